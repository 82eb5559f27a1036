"""`product`: csrc/cuda/product.h in the shape of the op. Nothing here reads the device."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...quant.operands import Window, weight_sums
from ...quant.packing import KPACK_V1
from .. import why_no_sums
from . import library

_ALIGNMENT = 16
_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/common/problem.h
_POINT = Window((1, 1)).to_ints()
CHANNEL_MULTIPLE = 16  # codes are copied in chunks of 16 bytes, each inside one tap
PACKED_MULTIPLE = 32  # 4- and 3-bit weights in chunks of 32 codes, which begin at multiples of 16 and of 4 bytes
MAX_ROWS = 1 << 30  # of the output, times the stride: 31 bits hold them, a border and a tile's rows past the end
MAX_OUTPUTS = 1 << 39  # 2^31 blocks of 64 x 64 outputs, with K in 16 splits


class Tile(NamedTuple):
    """csrc/cuda/product.h Tiling: tiles of rows x columns outputs by the kernels of sm_90 or sm_80; splits of K."""

    architecture: int
    rows: int
    columns: int
    splits: int


def _aligned(t: Tensor) -> Tensor:
    """`t`, or a copy where its first element is not at a multiple of 16 bytes (a view into another tensor)."""
    return t if t.data_ptr() % _ALIGNMENT == 0 else t.clone()


def geometry_of(shape: torch.Size, is_packed: bool, n: int, window: Window | None) -> tuple[int, ...]:
    """Sizes as in csrc/cuda/product.h for codes of this shape, two to a byte where packed; a Linear is a 1x1
    convolution of width 1."""
    samples, height, width, channels, sizes = 1, shape[:-1].numel(), 1, shape[-1], _POINT
    if window is not None:
        samples, channels, height, width = shape
        sizes = window.to_ints()
    return (samples, height, width, channels * (2 if is_packed else 1), n, *sizes)


@lru_cache(maxsize=4096)
def _form(shape, is_packed, n, window, bits, geglu, write_out, out_dtype, tile, settled) -> tuple[Tensor, int, int]:
    """`library.form` of a call; K, and the taps that weights' sums are kept for."""
    geometry = geometry_of(shape, is_packed, n, window)
    form = library.form(*geometry, bits, geglu, write_out, _DTYPE[out_dtype], *(tile or (0, 0, 0, 0)), settled)
    taps = geometry[5] * geometry[6]
    return form, geometry[3] * taps, taps if geometry[9:11] != (0, 0) else 1


def product(
    codes, scale, zero_point, weight, y_hat, bias, skip, window, out_dtype, write_out, tile: Tile | None = None
) -> Tensor:
    """`ops.product`, its arguments already checked; codes in uint8 are packed. tile None: the kernels choose by an
    estimate (csrc/cuda/sm90/tiling.h, sm80/tile_config.h); `library.tiles_op` lists what may be asked for."""
    packed, weight_scale, bits, _, _, geglu = weight
    is_packed, n, stored = codes.dtype is torch.uint8, weight_scale.shape[0], _aligned(packed)
    settled = stored is packed  # a copy is still being written
    form, k, taps = _form(codes.shape, is_packed, n, window, bits, geglu, write_out, out_dtype, tile, settled)
    sums = None if zero_point is None else weight_sums(weight, k, taps)
    return library.product_op()(_aligned(codes), scale, zero_point, sums, stored, weight_scale, bias, y_hat, skip, form)


def why_not(problem: Any) -> str | None:
    stride = (1, 1) if problem.window is None else problem.window.stride
    if problem.layout != KPACK_V1:
        return f"it reads weights in layout {KPACK_V1!r}, not {problem.layout!r}"
    if problem.window is not None and problem.window.groups != 1:
        return f"groups={problem.window.groups}: only convolutions over all channels"
    if problem.channels % CHANNEL_MULTIPLE != 0:
        wanted = f"at a time, so their number must be divisible by {CHANNEL_MULTIPLE}"
        return f"{problem.channels} input channels: codes are read {CHANNEL_MULTIPLE} {wanted}"
    if problem.weight_bits != 8 and problem.k % PACKED_MULTIPLE != 0:
        wanted = f"k must be divisible by {PACKED_MULTIPLE}, as they are read; use weight_bits=8"
        return f"{problem.weight_bits}-bit weights with k={problem.k}: {wanted}"
    if problem.m * stride[0] * stride[1] >= MAX_ROWS:
        return f"m={problem.m} rows at stride {stride}; less than 2^30 pixels are counted"
    if problem.m * problem.n >= MAX_OUTPUTS:
        return f"{problem.m} x {problem.n} outputs may take more blocks than a launch has; less than 2^39 always fit"
    return why_no_sums(problem)
