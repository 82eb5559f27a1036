"""Compiled CUDA kernels (csrc/cuda) for NVIDIA GPUs from sm_80 (A100) on: quantisation and integer products.

The library holds raw kernels in the private namespace `modiff_cuda`; this package gives them the shape of the ops. It
is built where nvcc is found and loads with any torch, also one without CUDA."""

from typing import Any

from torch import Tensor

from .. import LEAST_CAPABILITY, why_too_old
from . import product_launch, quantize_launch
from .library import build_info, unavailable
from .product_launch import PACKED_MULTIPLE, product
from .quantize_launch import quantize

__all__ = ["build_info", "goes_first", "modulate", "product", "quantize", "unavailable", "why_not"]

BELOW = (9, 0)  # newer GPUs emulate 4-bit tensor cores, slower than bytes


def modulate(
    h, prologue, x_hat, scale, weight, y_hat, skip, window, out_dtype, bits, granularity, clip_ratio, write_out,
    last_absmax=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """4-bit codes and weights on 4-bit tensor cores: codes leave `quantize` packed and are multiplied as they are, at
    twice the rate of bytes, with half of their traffic."""
    form = (bits, granularity, clip_ratio, False)
    codes, used, absmax = quantize(h, prologue, x_hat, scale, *form, last_absmax, packed=True)
    out = product(codes, used, None, weight, y_hat, None, skip, window, out_dtype, write_out)
    return out, used, absmax


def _why_no_nibbles(problem: Any) -> str | None:
    if not (problem.act_bits == problem.weight_bits == 4):
        return "codes and weights must have 4 bits: 3-bit ones are packed in planes, no nibbles"
    if problem.granularity == "per_block":
        return "codes times the multipliers of per_block have 8 bits"
    if problem.channels % PACKED_MULTIPLE != 0:
        return f"{problem.channels} input channels: nibbles are read {PACKED_MULTIPLE} at a time"
    if problem.capability is None or not LEAST_CAPABILITY <= problem.capability < BELOW:
        return "only GPUs from sm_80 to sm_89 have 4-bit tensor cores"
    return None


_REASONS = {"quantize": quantize_launch.why_not, "product": product_launch.why_not, "modulate": _why_no_nibbles}


def goes_first(problem: Any) -> bool:
    """On sm_90 for products: Triton compiles an int8 dot to a wgmma that it waits for before the next step is issued
    (`warp_group_dot_wait {pendings = 0}`; dots with float sums alone are asynchronous), while these kernels keep one
    under way. On sm_80 to sm_89 for updates that the 4-bit tensor cores compute."""
    if problem.op in ("product", "modulate") and problem.capability == (9, 0):
        return True
    return problem.op == "modulate" and _why_no_nibbles(problem) is None


def why_not(problem: Any) -> str | None:
    return why_too_old(problem.capability) or _REASONS[problem.op](problem)
