"""Compiled CUDA kernels (csrc/cuda) for NVIDIA GPUs from sm_80 (A100) on: the quantising ops and the integer products.

The library holds raw kernels in the private namespace `modiff_cuda`; this package gives them the shape of the ops. It
is built where nvcc is found and loads with any torch, also one without CUDA.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from ...quant.packing import KPACK_V1, check_layout
from .. import Kernel
from . import products, quantizing
from .library import build_info, too_old, unavailable

__all__ = ["KERNELS", "NAME", "build_info", "preferred_layout", "prepare_weight", "unavailable"]

NAME = "cuda"


def preferred_layout(problem: Any) -> str:
    """The portable layout, which every backend on CUDA reads."""
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
        check_layout("prepare_weight (cuda)", layout)
    return weight_packed


def _quantize_why_not(problem: Any) -> str | None:
    return too_old(problem) or quantizing.why_not(problem)


def _product_why_not(problem: Any) -> str | None:
    return too_old(problem) or products.why_not(problem)


def _both_why_not(problem: Any) -> str | None:
    """Of ops that quantise and multiply; `problem` is that of the product."""
    if problem.op.startswith("initialize") and problem.act_bits == 0:
        return None if problem.layout in (None, KPACK_V1) else products.why_not(problem)
    channels = products.channels_of(problem)
    return _product_why_not(problem) or quantizing.why_not(replace(problem, op="quantize_residual", k=channels))


_PRODUCTS = (
    products.accumulate_linear,
    products.accumulate_conv2d,
    products.quantized_linear,
    products.quantized_conv2d,
)
_BOTH = (
    products.initialize_linear,
    products.initialize_conv2d,
    products.modulated_linear,
    products.modulated_conv2d,
)

KERNELS: dict[str, Kernel] = {
    **{name: Kernel(fn, _quantize_why_not) for name, fn in quantizing.QUANTIZING_KERNELS.items()},
    **{fn.__name__: Kernel(fn, _product_why_not) for fn in _PRODUCTS},
    **{fn.__name__: Kernel(fn, _both_why_not) for fn in _BOTH},
}
