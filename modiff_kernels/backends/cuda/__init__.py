"""Compiled CUDA kernels (csrc/cuda) for NVIDIA GPUs from sm_80 (A100) on: quantisation and integer products.

The library holds raw kernels in the private namespace `modiff_cuda`; this package gives them the shape of the ops. It
is built where nvcc is found and loads with any torch, also one without CUDA.
"""

from typing import Any

from .. import why_too_old
from . import modulate_nibbles, product_launch, quantize_launch
from .library import build_info, unavailable
from .modulate_nibbles import modulate
from .product_launch import product
from .quantize_launch import quantize

__all__ = ["build_info", "goes_first", "modulate", "product", "quantize", "unavailable", "why_not"]

_REASONS = {
    "quantize": quantize_launch.why_not,
    "product": product_launch.why_not,
    "modulate": modulate_nibbles.why_not,
}


def goes_first(problem: Any) -> bool:
    """On sm_90 for products: Triton compiles an int8 dot to a wgmma that it waits for before the next step is issued
    (`warp_group_dot_wait {pendings = 0}`; dots with float sums alone are asynchronous), while these kernels keep one
    under way. On sm_80 to sm_89 for updates that the 4-bit tensor cores compute."""
    if problem.op in ("product", "modulate") and problem.capability == (9, 0):
        return True
    return problem.op == "modulate" and modulate_nibbles.why_not(problem) is None


def why_not(problem: Any) -> str | None:
    return why_too_old(problem.capability) or _REASONS[problem.op](problem)
