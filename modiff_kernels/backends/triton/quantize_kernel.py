"""The kernels of all quantisation: `range_kernel` (dynamic scales that cover more than a row) and `quantize_kernel`.

Operands (N samples, R rows of C channels per sample; an NHWC image has R = H * W), all row major:

========== =================== ============ ========================================================================
h          [N, R, C]           float        input ("geglu": [N, R, 2C]); x = prologue(h)
further    [N, R, C - own]     float        or None; then h is [N, R, own], and these are the channels from `own` on
x_hat      [N, R, C]           float        state, read and written; None: the plain form, which quantises x itself
a, b       [N, C] or [C]       float        "group_norm": folded norm, float32; "layer_norm" and "groups": gamma and
                                            beta, or None
given      [1] or [granules]   float32      scales of the caller; "delayed": absmax of the last update, read and written
range      [granules]          int32        bit patterns of absmax; it is the result absmax
           (affine: twice)                  affine: of -min(x, 0), then of max(x, 0)
partial    [programs]          int32        scratch: what each program adds to the range
           (affine: twice)
counter    [granules]          int32        programs that have stored theirs: 0 before and after, see `arrive`
block      [N, tiles, C]       int32        "per_block": bit patterns of absmax of a channel in the rows of a tile
codes      [N, R, C]           int8
scale      [granules]          float32      zero_point [granules] int32: plain form only
========== =================== ============ ========================================================================

PROLOGUE: "identity" (x = h), "group_norm" (x = silu?(a * h + b), quantize_group_norm.py), "layer_norm" (x = (h - mean)
/ sqrt(var + eps) * a + b, statistics of the row in registers), "groups" (x = silu?((h + shift - mean) / sqrt(var + eps)
* a + b), statistics of a group in registers) or "geglu" (x = h[:C] * gelu(h[C:]), gelu with erf).
SOURCE of the scale: "given" by the caller, "delayed" (made here of the last absmax), "reduced" by the range pass (or in
quantize_group_norm.py), or of this "tile" (granularity "per_token").

Programs: one tile of BLOCK_R rows x BLOCK_C channels of one sample each, no loops. A tile holds whole rows (of at most
`quantize_tiling.MAX_ROW` channels) where a row must be reduced ("per_token" scales, "layer_norm"), and no more than the
16 rows of a block with "per_block", of which the last one of a sample takes the rows that are left. With "groups" it
holds GROUPS groups of WIDTH channels, each in the next power of two of lanes; where programs share the rows of a group,
each reads all of them. Otherwise every tensor is
read at most once per pass; the range pass runs from the last tile to the first, so that the second reading comes from
the L2 cache as far as it reaches.

A range over many programs: each stores its part, and the last one to arrive merges them. Parts are the bit patterns of
non-negative float32 in int32, whose maximum orders finite < inf < NaN, so that a NaN reaches absmax and scale.

The formulas (ops/schema.py, `quant/affine.py`) keep their order of float32 roundings, so that scales and codes come out
bit for bit: divisions are `tl.div_rn` (a plain `/` is approximate on a GPU), rounding is `rne`."""

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents
from triton.language.target_info import cuda_capability_geq

from ...quant.spec import BLOCK_ROWS
from .launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_BLOCK_ROWS = tl.constexpr(BLOCK_ROWS)
_MERGED = tl.constexpr(1024)  # parts of a range that a program reads at a time
_MIN_SCALE = tl.constexpr(2.0**-100)
_SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def rne(x):
    """Round half to even, for |x| <= 2^22: clamp first (to integers, which changes no code)."""
    if _INTERPRETED:  # it has no libdevice; compiled, the addition could fuse with a product before it
        return (x + 12582912.0) - 12582912.0
    else:
        return libdevice.rint(x)


@triton.jit
def tile_of_program(
    rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr, BACKWARDS: tl.constexpr
):
    """sample, first row, row numbers [BLOCK_R] and channels [BLOCK_C] of this program's tile, STEP after those of the
    one before. Blocks of channels follow each other, so that programs that run together read whole rows.

    BACKWARDS: the last tile first, to begin with what the pass before read last, which is in the L2 cache."""
    channel_blocks = tl.cdiv(channels, STEP)
    row_blocks = tl.cdiv(rows, BLOCK_R)
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    col = (program % channel_blocks) * STEP + tl.arange(0, BLOCK_C)
    block = program // channel_blocks
    first = (block % row_blocks) * BLOCK_R
    return block // row_blocks, first, first + tl.arange(0, BLOCK_R), col


@triton.jit
def tile_offsets(sample, first, rows, width, row, col):
    """Where a tile lies in a tensor of `width` elements per row; only the start is in 64 bits."""
    start = (sample.to(tl.int64) * rows + first) * width
    return start + ((row - first)[:, None] * width + col[None, :])


@triton.jit
def load_channels(h_ptr, further_ptr, own, sample, first, rows, channels, row, col, mask):
    """A tile of h in float32, the channels from `own` on out of `further`. A warp that has none of a tensor reads none:
    both loads are masked, and `own` may lie inside of a tile."""
    if further_ptr is None:
        offsets = tile_offsets(sample, first, rows, channels, row, col)
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0)
    else:
        is_own = (col < own)[None, :]
        offsets = tile_offsets(sample, first, rows, own, row, col)
        h = tl.load(h_ptr + offsets, mask=mask & is_own, other=0.0)
        offsets = tile_offsets(sample, first, rows, channels - own, row, col - own)
        h = tl.where(is_own, h, tl.load(further_ptr + offsets, mask=mask & (col >= own)[None, :], other=0.0))
    return h.to(tl.float32)


@triton.jit
def arrive(counter_ptr, programs):
    """Whether this program is the last of `programs` to come here. It then sees what the others stored before, where it
    reads past the L1 cache (".cg"), and has set the counter back to 0 for the next launch."""
    tl.debug_barrier()  # one thread counts for all, so the stores of all come first
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def load_activation(
    h_ptr, further_ptr, own, a_ptr, b_ptr, sample, first, rows, channels, eps, row, col, mask, PROLOGUE: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """x in float32 [BLOCK_R, BLOCK_C]; a "layer_norm" tile holds whole rows. Undefined outside `mask`."""
    if PROLOGUE == "geglu":
        offsets = tile_offsets(sample, first, rows, 2 * channels, row, col)
        x = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(h_ptr + offsets + channels, mask=mask, other=0.0).to(tl.float32)
        x = x * (0.5 * gate * (1.0 + tl.erf(gate * _SQRT_HALF)))
    else:
        x = load_channels(h_ptr, further_ptr, own, sample, first, rows, channels, row, col, mask)
    if PROLOGUE == "group_norm":
        at = sample.to(tl.int64) * channels + col
        a = tl.load(a_ptr + at, mask=col < channels, other=0.0)
        b = tl.load(b_ptr + at, mask=col < channels, other=0.0)
        x = tl.fma(x, a[None, :], b[None, :])  # as the range in quantize_group_norm.py
        if SILU:
            x = silu(x)
    if PROLOGUE == "layer_norm":
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
def over_groups(x, WIDTH: tl.constexpr):
    """Sums of a tile over its rows and the lanes of each group, in every lane of the group."""
    LANES: tl.constexpr = triton.next_power_of_2(WIDTH)
    sums = tl.reshape(tl.sum(x, axis=0), (x.shape[1] // LANES, LANES))
    return tl.reshape(tl.broadcast_to(tl.sum(sums, axis=1)[:, None], sums.shape), (x.shape[1],))


@triton.jit
def load_groups(
    h_ptr, further_ptr, own, shift_ptr, shift_stride, sample, first, rows, channels, row, col, inside,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h + shift in float32; and of whole groups, by lanes, how many values a tile has of one, mean, and the sum of the
    squares around it."""
    mask = (row < rows)[:, None] & inside[None, :]
    h = load_channels(h_ptr, further_ptr, own, sample, first, rows, channels, row, col, mask)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + sample.to(tl.int64) * shift_stride + col, mask=inside, other=0.0)
        h += shift.to(tl.float32)[None, :]
    count = (tl.minimum(rows - first, BLOCK_R) * WIDTH).to(tl.float32)
    mean = tl.div_rn(over_groups(tl.where(mask, h, 0.0), WIDTH), count)
    distance = tl.where(mask, h - mean[None, :], 0.0)
    return h, count, mean, over_groups(distance * distance, WIDTH)


@triton.jit
def load_normalised(
    h_ptr, further_ptr, own, a_ptr, b_ptr, shift_ptr, shift_stride, norm_stride, sample, first, rows, channels, eps,
    row, col, inside, SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x of the prologue "groups". Where others share the rows of its groups with this program it reads theirs, too."""
    h, count, mean, squares = load_groups(
        h_ptr, further_ptr, own, shift_ptr, shift_stride, sample, first, rows, channels, row, col, inside, WIDTH,
        BLOCK_R,
    )  # fmt: skip
    for i in range(1, tl.cdiv(rows, BLOCK_R)):
        start = (first + i * BLOCK_R) % (tl.cdiv(rows, BLOCK_R) * BLOCK_R)
        _, more, other, apart = load_groups(
            h_ptr, further_ptr, own, shift_ptr, shift_stride, sample, start, rows, channels, start + row - first, col,
            inside, WIDTH, BLOCK_R,
        )  # fmt: skip
        distance = other - mean
        squares += apart + distance * distance * tl.div_rn(count * more, count + more)
        count += more
        mean += distance * tl.div_rn(more, count)
    x = (h - mean[None, :]) * tl.rsqrt(tl.div_rn(squares, count) + eps)[None, :]
    at = sample.to(tl.int64) * norm_stride + col
    if a_ptr is not None:
        x *= tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    if b_ptr is not None:
        x += tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SILU:
        x = silu(x)
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
    """rne(clamp(scaled, low, high)) for integers low and high: the code, a float. NaN stays NaN."""
    scaled = tl.maximum(scaled, low, propagate_nan=tl.PropagateNan.ALL)
    return rne(tl.minimum(scaled, high, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def largest_of(partial_ptr, count):
    """The maximum of `count` parts that other programs stored."""
    largest = tl.zeros([_MERGED], tl.int32)
    for start in range(0, count, _MERGED):
        at = start + tl.arange(0, _MERGED)
        largest = tl.maximum(largest, tl.load(partial_ptr + at, mask=at < count, other=0, cache_modifier=".cg"))
    return tl.max(largest)


@triton.jit
def merge_range(largest, above, partial_ptr, counter_ptr, range_ptr, copy_ptr, granule, granules, AFFINE: tl.constexpr):
    """range[granule] (affine: range[granules + granule], too): the largest of all programs of this granule. They follow
    each other, so that their numbers say which parts are theirs."""
    programs = tl.num_programs(0) // granules
    place = tl.program_id(0) // programs
    partial_ptr += place * programs
    tl.store(partial_ptr + tl.program_id(0) % programs, largest)
    if AFFINE:
        above_ptr = partial_ptr + tl.num_programs(0)
        tl.store(above_ptr + tl.program_id(0) % programs, above)
    if arrive(counter_ptr + place, programs):
        largest = largest_of(partial_ptr, programs)
        tl.store(range_ptr + granule, largest)
        if AFFINE:
            tl.store(range_ptr + granules + granule, largest_of(above_ptr, programs))
        if copy_ptr is not None:
            tl.store(copy_ptr + granule, largest.to(tl.float32, bitcast=True))


@triton.jit
def range_kernel(
    h_ptr, further_ptr, x_hat_ptr, a_ptr, b_ptr, range_ptr, partial_ptr, counter_ptr, block_ptr,
    own, rows, channels, granules, eps,
    PROLOGUE: tl.constexpr, SILU: tl.constexpr, GRANULARITY: tl.constexpr, AFFINE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample, first, row, col = tile_of_program(rows, channels, BLOCK_R, BLOCK_C, BLOCK_C, True)
    mask = (row < rows)[:, None] & (col < channels)[None, :]
    value = load_activation(
        h_ptr, further_ptr, own, a_ptr, b_ptr, sample, first, rows, channels, eps, row, col, mask, PROLOGUE, SILU
    )
    if x_hat_ptr is not None:
        offsets = tile_offsets(sample, first, rows, channels, row, col)
        value = value - tl.load(x_hat_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(mask, value, 0.0)
    above = 0
    if AFFINE:
        largest, above = tl.max(magnitude_below(value)), tl.max(magnitude_above(value))
    elif GRANULARITY == "per_block":
        largest = tl.max(magnitude(value), axis=0)
        at = (sample.to(tl.int64) * tl.cdiv(rows, BLOCK_R) + first // BLOCK_R) * channels + col
        tl.store(block_ptr + at, largest, mask=col < channels)
        largest = tl.max(largest)
    else:
        largest = tl.max(magnitude(value))
    granule = sample
    if GRANULARITY == "per_tensor":
        granule = 0
    merge_range(largest, above, partial_ptr, counter_ptr, range_ptr, None, granule, granules, AFFINE)


@triton.jit
def quantize_kernel(
    h_ptr, further_ptr, x_hat_ptr, a_ptr, b_ptr, shift_ptr, given_ptr, range_ptr, partial_ptr, counter_ptr, block_ptr,
    codes_ptr, scale_ptr, zero_point_ptr,
    own, rows, channels, granules, shift_stride, norm_stride, given_stride, eps, clip_ratio, half,
    PROLOGUE: tl.constexpr, SILU: tl.constexpr, GRANULARITY: tl.constexpr, SOURCE: tl.constexpr, AFFINE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    if not _INTERPRETED and cuda_capability_geq(9):
        gdc_launch_dependents()  # the product of `cuda` may begin, up to its wait for the end of this kernel
    STEP: tl.constexpr = WIDTH * GROUPS if PROLOGUE == "groups" else BLOCK_C
    sample, first, row, col = tile_of_program(rows, channels, BLOCK_R, BLOCK_C, STEP, False)
    inside = col < channels
    if PROLOGUE == "groups":
        LANES: tl.constexpr = BLOCK_C // GROUPS
        lane = tl.arange(0, BLOCK_C)
        col += lane // LANES * (WIDTH - LANES)
        inside = lane % LANES < WIDTH
    mask = (row < rows)[:, None] & inside[None, :]
    offsets = tile_offsets(sample, first, rows, channels, row, col)
    if PROLOGUE == "groups":
        value = load_normalised(
            h_ptr, further_ptr, own, a_ptr, b_ptr, shift_ptr, shift_stride, norm_stride, sample, first, rows,
            channels, eps, row, col, inside, SILU, WIDTH, BLOCK_R,
        )  # fmt: skip
    else:
        value = load_activation(
            h_ptr, further_ptr, own, a_ptr, b_ptr, sample, first, rows, channels, eps, row, col, mask, PROLOGUE, SILU
        )
    if x_hat_ptr is not None:
        old = tl.load(x_hat_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        value = value - old
    value = tl.where(mask, value, 0.0)

    # Scale and zero point are scalars or, per_token, one per row; `owner` says which this program writes down.
    if GRANULARITY == "per_token":
        granule = sample * rows + row
        owner = row < rows
    elif GRANULARITY == "per_tensor":
        granule = 0
        owner = tl.program_id(0) == 0
    else:
        granule = sample
        owner = (first == 0) & (tl.program_id(0) % tl.cdiv(channels, STEP) == 0)
    zero_point = half * 0.0

    if SOURCE == "given" or SOURCE == "delayed":
        if GRANULARITY == "per_token":
            scale = tl.load(given_ptr + granule * given_stride, mask=owner, other=1.0)
            largest = tl.max(magnitude(value), axis=1)
            tl.store(range_ptr + granule, largest, mask=owner)
            if SOURCE == "delayed":
                tl.debug_barrier()  # several threads may have read a row's
                tl.store(given_ptr + granule, largest.to(tl.float32, bitcast=True), mask=owner)
        else:
            scale = tl.load(given_ptr + granule * given_stride)
        if SOURCE == "delayed":
            scale = symmetric_scale(scale, clip_ratio, half - 0.5)
    elif AFFINE:
        if SOURCE == "tile":
            below = tl.max(magnitude_below(value), axis=1)
            above = tl.max(magnitude_above(value), axis=1)
        else:
            below = tl.load(range_ptr + granule)
            above = tl.load(range_ptr + granules + granule)
        scale, zero_point = affine_scale(below.to(tl.float32, bitcast=True), above.to(tl.float32, bitcast=True), half)
    else:
        if SOURCE == "tile":
            largest = tl.max(magnitude(value), axis=1)
            if x_hat_ptr is not None:
                tl.store(range_ptr + granule, largest, mask=owner)
        else:
            largest = tl.load(range_ptr + granule)
        absmax = largest.to(tl.float32, bitcast=True)
        if GRANULARITY == "per_block":
            scale = block_scale(absmax, clip_ratio, half)
        else:
            scale = symmetric_scale(absmax, clip_ratio, half - 0.5)
    tl.store(scale_ptr + granule, scale, mask=owner)
    if zero_point_ptr is not None:
        tl.store(zero_point_ptr + granule, zero_point.to(tl.int32), mask=owner)

    if GRANULARITY == "per_block":
        last = rows // _BLOCK_ROWS - 1
        block = tl.minimum(first // _BLOCK_ROWS, last)
        tiles = tl.cdiv(rows, BLOCK_R)
        start = block * (_BLOCK_ROWS // BLOCK_R)
        end = tl.where(block == last, tiles, start + _BLOCK_ROWS // BLOCK_R)
        at = block_ptr + (sample.to(tl.int64) * tiles + start) * channels + col
        largest = tl.zeros([BLOCK_C], tl.int32)
        for i in tl.static_range(2 * _BLOCK_ROWS // BLOCK_R):  # the last block has up to 31 rows
            most = tl.where(start + i < end, channels, 0)
            largest = tl.maximum(largest, tl.load(at + i * channels, mask=col < most, other=0))
        multiplier = block_multiplier(largest.to(tl.float32, bitcast=True), scale, clip_ratio, half)
        code = round_to_code(value * tl.div_rn(1.0, scale * multiplier)[None, :], -half, half - 1.0)
        code = code * multiplier[None, :]
    else:
        if GRANULARITY == "per_token":
            scale = scale[:, None]
            if AFFINE:
                zero_point = zero_point[:, None]
        code = round_to_code(value * tl.div_rn(1.0, scale), -half - zero_point, half - 1.0 - zero_point) + zero_point
    tl.store(codes_ptr + offsets, code.to(tl.int8), mask=mask)
    if x_hat_ptr is not None:
        updated = (old + scale * code).to(x_hat_ptr.dtype.element_ty)
        # x_hat is read again in the next step; the L2 cache is for the codes, which the product reads now.
        tl.store(x_hat_ptr + offsets, updated, mask=mask, eviction_policy="evict_first")
    if partial_ptr is not None:
        largest = tl.max(magnitude(value))
        if SOURCE == "delayed":  # all programs of the granule have read `given`
            merge_range(largest, 0, partial_ptr, counter_ptr, range_ptr, given_ptr, granule, granules, False)
        else:
            merge_range(largest, 0, partial_ptr, counter_ptr, range_ptr, None, granule, granules, False)
