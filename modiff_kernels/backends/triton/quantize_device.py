"""Device functions of the quantising kernels: what an activation is, how large it is, its scale and its codes.

The formulas are those of `quant/affine.py`, in its order of float32 roundings, so that scales and codes come out bit
for bit: divisions are `tl.div_rn` (a plain `/` is approximate on a GPU), rounding is `common.rne`.

Ranges are kept as the bit patterns of non-negative float32 in int32: their maximum does not depend on the order, so
that `atomic_max` is deterministic, and it orders finite < inf < NaN, so that a NaN reaches absmax and scale.
"""

import triton
import triton.language as tl

from .common import rne

# PROLOGUE: what makes the activation x from the input h.
IDENTITY = tl.constexpr(0)  # x = h
GROUP_NORM = tl.constexpr(1)  # x = silu?(a[n, c] * h + b[n, c])
LAYER_NORM = tl.constexpr(2)  # x = (h - mean(row)) / sqrt(var(row) + eps) * a[c] + b[c]
GEGLU = tl.constexpr(3)  # x = h[:C] * gelu(h[C:])

# GRANULARITY: what shares a scale.
PER_TENSOR = tl.constexpr(0)
PER_SAMPLE = tl.constexpr(1)
PER_TOKEN = tl.constexpr(2)
PER_BLOCK = tl.constexpr(3)

_MIN_SCALE = tl.constexpr(2.0**-100)
_SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def tile_of_program(rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARDS: tl.constexpr):
    """sample, first row, row numbers [BLOCK_R] and channels [BLOCK_C] of this program's tile; a tile lies in one
    sample. Blocks of channels follow each other, so that programs that run together read whole rows.

    BACKWARDS: the last tile first. A pass runs against the pass before it, and so begins with what that one read last,
    which is in the L2 cache even where the tensors do not fit.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    row_blocks = tl.cdiv(rows, BLOCK_R)
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    col = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    block = program // channel_blocks
    first = (block % row_blocks) * BLOCK_R
    return block // row_blocks, first, first + tl.arange(0, BLOCK_R), col


@triton.jit
def tile_offsets(sample, first, rows, width, row, col):
    """Where a tile lies in a tensor of `width` elements per row. 64 bits hold the start only: the rest stays within
    the tile.
    """
    start = (sample.to(tl.int64) * rows + first) * width
    return start + ((row - first)[:, None] * width + col[None, :])


@triton.jit
def load_activation(
    h_ptr, a_ptr, b_ptr, sample, first, rows, channels, eps, row, col, mask, PROLOGUE: tl.constexpr, SILU: tl.constexpr
):
    """x in float32 [BLOCK_R, BLOCK_C]; a LAYER_NORM tile holds whole rows. Undefined outside `mask`."""
    if PROLOGUE == GEGLU:
        offsets = tile_offsets(sample, first, rows, 2 * channels, row, col)
        x = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(h_ptr + offsets + channels, mask=mask, other=0.0).to(tl.float32)
        x = x * (0.5 * gate * (1.0 + tl.erf(gate * _SQRT_HALF)))
    else:
        offsets = tile_offsets(sample, first, rows, channels, row, col)
        x = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if PROLOGUE == GROUP_NORM:
        at = sample.to(tl.int64) * channels + col
        a = tl.load(a_ptr + at, mask=col < channels, other=0.0)
        b = tl.load(b_ptr + at, mask=col < channels, other=0.0)
        x = x * a[None, :] + b[None, :]
        if SILU:
            x = x * tl.sigmoid(x)
    if PROLOGUE == LAYER_NORM:
        inside = (col < channels)[None, :]
        mean = tl.div_rn(tl.sum(x, axis=1), tl.cast(channels, tl.float32))
        x = tl.where(inside, x - mean[:, None], 0.0)
        variance = tl.div_rn(tl.sum(x * x, axis=1), tl.cast(channels, tl.float32))
        x = x * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]
        if a_ptr is not None:
            x = x * tl.load(a_ptr + col, mask=col < channels, other=0.0).to(tl.float32)[None, :]
        if b_ptr is not None:
            x = x + tl.load(b_ptr + col, mask=col < channels, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def magnitude(x):
    """|x| as an ordered integer."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def magnitude_below(x):
    """max(-x, 0) as an ordered integer; NaN counts above."""
    return tl.where(x < 0.0, magnitude(x), 0)


@triton.jit
def magnitude_above(x):
    """max(x, 0) as an ordered integer, NaN included."""
    return tl.where(x < 0.0, 0, magnitude(x))


@triton.jit
def symmetric_scale(absmax, clip_ratio, levels):
    """`affine.residual_scale`; a NaN stays one."""
    scale = tl.div_rn(absmax * clip_ratio, levels)
    return tl.where(scale < _MIN_SCALE, _MIN_SCALE, scale)


@triton.jit
def affine_scale(below, above, half):
    """Scale and zero point (a float) of `affine.affine_range` over [-below, above]; `half` = 2^(bits-1)."""
    scale = tl.div_rn(above + below, 2.0 * half - 1.0)
    scale = tl.where(scale < _MIN_SCALE, _MIN_SCALE, scale)
    # At most 2^bits - 1, because the range holds `below`: nothing is left to clamp.
    steps = below * tl.div_rn(1.0, scale)
    return scale, rne(steps) - half


@triton.jit
def block_scale(absmax, clip_ratio, half):
    """The scale of a sample in `affine.block_multipliers`."""
    return symmetric_scale(absmax, clip_ratio, (half - 0.8125) * tl.div_rn(128.0, half))


@triton.jit
def block_multiplier(absmax, scale, clip_ratio, half):
    """The integer multipliers (floats) of blocks in `affine.block_multipliers`."""
    multiplier = tl.ceil(tl.div_rn(absmax * clip_ratio, scale * (half - 0.8125)))
    return tl.minimum(tl.maximum(multiplier, 1.0), tl.div_rn(128.0, half))


@triton.jit
def round_to_code(scaled, low, high):
    """rne(clamp(scaled, low, high)) for integers low and high: the code, a float. NaN stays NaN, and so reaches
    x_hat.
    """
    scaled = tl.maximum(scaled, low, propagate_nan=tl.PropagateNan.ALL)
    return rne(tl.minimum(scaled, high, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def store_packed(codes_ptr, code, sample, first, rows, channels, row, first_col, BITS: tl.constexpr):
    """Store the int8 codes of a tile, [rows, channels from first_col on], in kpack_v1 of `quant/packing.py`. The tile
    has channels in multiples of 8; past the last one its codes are those of residual 0, as kpack_v1 wants them.
    """
    if BITS == 4:
        width = _byte_count(channels, 2)
        _store_plane(codes_ptr, code & 15, sample, first, rows, width, 0, channels, row, first_col, 4)
    else:
        biased = code + 4
        second = _byte_count(channels, 4)
        width = second + _byte_count(channels, 8)
        _store_plane(codes_ptr, biased & 3, sample, first, rows, width, 0, channels, row, first_col, 2)
        _store_plane(codes_ptr, (biased >> 2) & 1, sample, first, rows, width, second, channels, row, first_col, 1)


@triton.jit
def _byte_count(channels, PER_BYTE: tl.constexpr):
    """ceil(channels / PER_BYTE), written so that the compiler sees what divides it where it knows what divides
    `channels`: as many bytes are stored at once.
    """
    return channels - channels * (PER_BYTE - 1) // PER_BYTE


@triton.jit
def _store_plane(codes_ptr, values, sample, first, rows, width, begin, channels, row, first_col, BITS: tl.constexpr):
    """`values` of BITS bits, 8 / BITS neighbours to a byte, the first in the lowest bits; the plane begins at byte
    `begin` of the `width` bytes of a row.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = values.shape[1] // PER_BYTE
    shifts = tl.arange(0, PER_BYTE) * BITS
    parts = tl.reshape(values.to(tl.int32), (values.shape[0], BYTES, PER_BYTE)) << shifts[None, None, :]
    column = first_col // PER_BYTE + tl.arange(0, BYTES)
    mask = (row < rows)[:, None] & (column < _byte_count(channels, PER_BYTE))[None, :]
    offsets = tile_offsets(sample, first, rows, width, row, begin + column)
    tl.store(codes_ptr + offsets, tl.sum(parts, axis=2).to(tl.uint8), mask=mask)
