"""`modulate` of 4-bit codes and weights on the 4-bit tensor cores of sm_80 to sm_89.

Codes leave `quantize` packed and are multiplied as they are: at twice the rate of bytes, with half of their traffic.
"""

from typing import Any

from torch import Tensor

from .. import LEAST_CAPABILITY
from .product_launch import PACKED_MULTIPLE, product
from .quantize_launch import quantize

BELOW = (9, 0)  # newer GPUs emulate 4-bit tensor cores, slower than bytes


def why_not(problem: Any) -> str | None:
    if not (problem.act_bits == problem.weight_bits == 4):
        return "codes and weights must have 4 bits: 3-bit ones are packed in planes, no nibbles"
    if problem.granularity == "per_block":
        return "codes times the multipliers of per_block have 8 bits"
    if problem.channels % PACKED_MULTIPLE != 0:
        return f"{problem.channels} input channels: nibbles are read {PACKED_MULTIPLE} at a time"
    if problem.capability is None or not LEAST_CAPABILITY <= problem.capability < BELOW:
        return "only GPUs from sm_80 to sm_89 have 4-bit tensor cores"
    return None


def modulate(
    h, prologue, x_hat, scale, weight, y_hat, skip, window, out_dtype, bits, granularity, clip_ratio, write_out,
    last_absmax=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    form = (bits, granularity, clip_ratio, False)
    codes, used, absmax = quantize(h, prologue, x_hat, scale, *form, last_absmax, packed=True)
    out = product(codes, used, None, weight, y_hat, None, skip, window, out_dtype, write_out)
    return out, used, absmax
