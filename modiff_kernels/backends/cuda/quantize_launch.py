"""`quantize`: csrc/cuda/common/quantize*.h in the shape of the op. Nothing here reads the device."""

from typing import Any

from torch import Tensor

from ...quant.affine import residual_scale
from ...quant.operands import PROLOGUE_VALUE, sizes_of
from ...quant.spec import GRANULARITY_VALUE
from . import library

MAX_ROW = 8192  # channels of a row in registers of a block: csrc/cuda/common/quantize_tiling.h kMostRowChannels
MAX_ROWS = 1 << 31
VECTOR = 8  # channels that a thread reads at once, out of one tensor: csrc/cuda/common/vectors.h kVector
MAX_ELEMENTS = 1 << 36  # 2^31 blocks of at least 32 elements: one row of 4 vectors


def quantize(
    h, prologue, x_hat, scale, bits, granularity, clip_ratio, affine, last_absmax=None, packed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.quantize`, its arguments already checked; with `packed` the codes of every row are in kpack_v1."""
    if prologue.further is not None and h.shape[1] % VECTOR != 0:
        h, prologue = prologue.joined(h), prologue._replace(further=None)
    kind, *norm, further = prologue
    if last_absmax is not None:
        scale = residual_scale(last_absmax, bits, clip_ratio)
    form = (affine and x_hat is None, bits, GRANULARITY_VALUE[granularity], clip_ratio)
    args = (h, further, PROLOGUE_VALUE[kind], *norm, x_hat, *form, scale, packed, *sizes_of(prologue.shape(h)))
    codes, used, third = library.quantize_op()(*args)
    if last_absmax is not None:
        last_absmax.copy_(third)
    return codes, used, third


def why_not(problem: Any) -> str | None:
    if problem.m >= MAX_ROWS:
        return f"m={problem.m} rows; they are counted in 31 bits"
    if problem.m * problem.k >= MAX_ELEMENTS:
        return f"{problem.m} x {problem.k} elements may take more blocks than a launch has; less than 2^36 always fit"
    if problem.k > MAX_ROW and (problem.granularity == "per_token" or problem.prologue == "layer_norm"):
        return f"{problem.k} channels: rows are held in registers, of at most {MAX_ROW} channels"
    return None
