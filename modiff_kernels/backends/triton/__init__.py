"""Triton kernels for NVIDIA GPUs from sm_80 (A100) on; no compiler is needed on the user's machine.

Quantising passes, and integer products on the int8 tensor cores. Importing this package imports neither triton nor a
kernel: KERNELS is made at its first use, after `unavailable()` has said that they can run.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...quant.packing import KPACK_V1, check_layout

NAME = "triton"

_LEAST_CAPABILITY = (8, 0)


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why these kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if max(capabilities) < _LEAST_CAPABILITY:
        found = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
        return f"compute capability {found}: the kernels need 8.0 (A100) or newer"
    try:
        import triton  # noqa: F401 (whether it loads is the question)
    except ImportError as error:
        return f"triton does not load ({error}); install it with: pip install 'modiff-kernels[triton]'"
    return None


def preferred_layout(problem: Any) -> str:
    """The portable layout: tiles of it unpack without moving data between threads (weight_tiles.py)."""
    return KPACK_V1


def prepare_weight(
    weight_packed: Tensor,
    weight_bits: int,
    n: int,
    k: int,
    layout_from: str,
    layout_to: str,
    kernel_size: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The identity on kpack_v1; ValueError for other layouts."""
    for layout in (layout_from, layout_to):
        check_layout("prepare_weight (triton)", layout)
    return weight_packed


def __getattr__(name: str) -> Any:
    if name != "KERNELS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .table import kernels

    globals()[name] = made = kernels()
    return made
