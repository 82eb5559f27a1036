"""The compiled library of the CUDA kernels and its ops, in the private namespace `modiff_cuda`."""

from functools import lru_cache
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


# The ops of the library, which `unavailable` or `why_not_loaded` has loaded; tests put an emulation in their place.


def quantize_op() -> Any:
    return torch.ops.modiff_cuda.quantize.default


def product_op() -> Any:
    return torch.ops.modiff_cuda.product.default


def tiles_op() -> Any:
    return torch.ops.modiff_cuda.tiles.default
