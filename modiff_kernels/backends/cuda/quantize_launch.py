"""`quantize`: csrc/cuda/common/quantize*.h in the shape of the op. Nothing here reads the device."""

from functools import lru_cache
from typing import Any

from torch import Tensor

from ...quant.operands import PROLOGUE_VALUE, sizes_of
from ...quant.spec import GRANULARITY_VALUE
from . import library

MAX_ROW = 8192  # channels of a row in registers of a block: csrc/cuda/common/quantize_tiling.h kMostRowChannels
MAX_ROWS = 1 << 31
VECTOR = 8  # channels that a thread reads at once, out of one tensor: csrc/cuda/common/vectors.h kVector
MAX_ELEMENTS = 1 << 36  # 2^31 blocks of at least 32 elements: one row of 4 vectors


@lru_cache(maxsize=4096)
def _form(shape, kind, num_groups, silu, affine, bits, granularity, packed, delayed, eps, clip_ratio) -> Tensor:
    sizes = PROLOGUE_VALUE[kind], *sizes_of(shape), num_groups
    return library.form(*sizes, silu, affine, bits, GRANULARITY_VALUE[granularity], packed, delayed, eps, clip_ratio)


def quantize(
    h, prologue, x_hat, scale, bits, granularity, clip_ratio, affine, last_absmax=None, packed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.quantize`, its arguments already checked; with `packed` the codes of every row are in kpack_v1."""
    if prologue.further is not None and h.shape[1] % VECTOR != 0:
        h, prologue = prologue.joined(h), prologue._replace(further=None)
    kind, gamma, beta, shift, num_groups, eps, silu, further = prologue
    affine, delayed = affine and x_hat is None, last_absmax is not None
    shape = prologue.shape(h)
    form = _form(shape, kind, num_groups, silu, affine, bits, granularity, packed, delayed, eps, clip_ratio)
    given = last_absmax if delayed else scale
    codes, used, third = library.quantize_op()(h, further, gamma, beta, shift, x_hat, given, form)
    if delayed:
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
