"""The compiled library of the CUDA kernels and its ops, in the private namespace `modiff_cuda`."""

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from .. import library_build_info

LIBRARY = Path(__file__).resolve().parents[2] / "_lib" / "libmodiff_cuda.so"
LEAST_CAPABILITY = (8, 0)


@lru_cache(maxsize=1)
def why_not_loaded() -> str | None:
    """Why the library is not there, or None. It is loaded at the first call."""
    if not LIBRARY.exists():
        return (
            f"{LIBRARY.name} was not built: no nvcc was found at installation, or MODIFF_CUDA=OFF or "
            "MODIFF_SKIP_BUILD=1 was set"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    return None


def build_info() -> dict[str, str] | str:
    """What the library was built with, or why that is not known. It needs no GPU."""
    return why_not_loaded() or library_build_info("modiff_cuda")


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why these kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return why_not_loaded() or "torch sees no CUDA device"
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if max(capabilities) < LEAST_CAPABILITY:
        found = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
        return f"compute capability {found}: the kernels need 8.0 (A100) or newer"
    return why_not_loaded()


def too_old(problem: Any) -> str | None:
    """Why the device of `problem` cannot run these kernels, or None."""
    if problem.capability is not None and problem.capability < LEAST_CAPABILITY:
        return f"compute capability {problem.capability[0]}.{problem.capability[1]}: the kernels need 8.0 or newer"
    return None


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, None for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def quantize_op() -> Any:
    """The op of the library, which `unavailable` has loaded; tests put an emulation in its place."""
    return torch.ops.modiff_cuda.quantize.default


def cuts_op() -> Any:
    """The op of the library, which `unavailable` or `why_not_loaded` has loaded."""
    return torch.ops.modiff_cuda.cuts.default


def product_op() -> Any:
    """The op of the library, which `unavailable` has loaded; tests put an emulation in its place."""
    return torch.ops.modiff_cuda.product.default
