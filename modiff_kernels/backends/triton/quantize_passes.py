"""The passes of all quantising ops: `range_kernel` (dynamic scales that cover more than a row) and `quantize_kernel`.

Operands (N samples, R rows of C channels per sample; an NHWC image has R = H * W), all row major:

========== =================== ============ ========================================================================
h          [N, R, C]           float        input (GEGLU: [N, R, 2C]); x = prologue(h), see quantize_device.py
x_hat      [N, R, C]           float        state, read and written; None: the plain form, which quantises x itself
a, b       [N, C] or [C]       float        GROUP_NORM: folded norm, float32; LAYER_NORM: gamma and beta or None
given      [1] or [granules]   float32      scales of the caller
range      [granules]          int32        bit patterns of absmax; it is the result absmax
           (affine: twice)                  affine: of -min(x, 0), then of max(x, 0)
block      [N, ceil(R/16), C]  int32        PER_BLOCK: bit patterns of absmax per 16 rows of a channel; the last block
                                            of a sample takes the rows that are left, and so the last two entries
codes      [N, R, C]           int8         PACKED: uint8 [N, R, W], kpack_v1 of every row in its W bytes
scale      [granules]          float32      zero_point [granules] int32: plain form only
========== =================== ============ ========================================================================

Programs: one tile of BLOCK_R rows x BLOCK_C channels of one sample each, no loops; the equations are in ops/schema.py.
A tile holds whole rows where a row must be reduced (PER_TOKEN scales, LAYER_NORM), no more than the 16 rows of a block
with PER_BLOCK, and with PACKED channels in multiples of 8, which begin at a byte in both planes of kpack_v1.

Bytes per element (s = bytes of h, t = of x_hat), every tensor read at most once per pass:

- scale given, or PER_TOKEN: one pass, s + 2 t + 1 (GEGLU: 2 s + 2 t + 1). absmax comes from the same registers.
- other dynamic scales: the range pass reads s + t before it, from the last tile to the first, so that the second
  reading comes from the L2 cache (50 MB on H100) as far as it reaches. PER_BLOCK writes and reads 1/4 byte more.
- plain form: t = 0. PACKED: codes of 1/2 (4 bits) or 3/8 byte.

Limits: whole-row tiles reach MAX_ROW channels (`why_not`).
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant.packing import empty_packed
from ...quant.spec import BLOCK_ROWS, block_count
from .launching import launch
from .quantize_device import (
    GEGLU,
    GROUP_NORM,
    LAYER_NORM,
    PER_BLOCK,
    PER_SAMPLE,
    PER_TENSOR,
    PER_TOKEN,
    affine_scale,
    block_multiplier,
    block_scale,
    load_activation,
    magnitude,
    magnitude_above,
    magnitude_below,
    round_to_code,
    store_packed,
    symmetric_scale,
    tile_of_program,
    tile_offsets,
)

# SOURCE: where the scale comes from.
GIVEN = tl.constexpr(0)  # the caller
REDUCED = tl.constexpr(1)  # the range pass
IN_TILE = tl.constexpr(2)  # this tile: PER_TOKEN

_BLOCK_ROWS = tl.constexpr(BLOCK_ROWS)

MAX_ROW = 8192  # 16 float32 values per thread of 16 warps, of two inputs (GEGLU) and x_hat at the same time
_TILE_BYTES = 8192  # of h or x_hat, the wider: four 16-byte loads per thread of 4 warps in flight, below 150 registers
_PACKED_CHANNELS = 8  # whose codes fill whole bytes of every plane
_LEAST_TILE = 1024  # elements: 8 per thread, which is one 16-byte load of a 2-byte tensor
_ENOUGH_PROGRAMS = 264  # two per SM of an H100
_GRANULARITY = {
    "per_tensor": PER_TENSOR.value,
    "per_sample": PER_SAMPLE.value,
    "per_token": PER_TOKEN.value,
    "per_block": PER_BLOCK.value,
}


@triton.jit
def range_kernel(
    h_ptr,
    x_hat_ptr,
    a_ptr,
    b_ptr,
    range_ptr,
    block_ptr,
    rows,
    channels,
    granules,
    eps,
    PROLOGUE: tl.constexpr,
    SILU: tl.constexpr,
    GRANULARITY: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, first, row, col = tile_of_program(rows, channels, BLOCK_R, BLOCK_C, True)
    mask = (row < rows)[:, None] & (col < channels)[None, :]
    value = load_activation(h_ptr, a_ptr, b_ptr, sample, first, rows, channels, eps, row, col, mask, PROLOGUE, SILU)
    if x_hat_ptr is not None:
        offsets = tile_offsets(sample, first, rows, channels, row, col)
        value = value - tl.load(x_hat_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(mask, value, 0.0)
    granule = sample
    if GRANULARITY == PER_TENSOR:
        granule = 0
    if AFFINE:
        tl.atomic_max(range_ptr + granule, tl.max(magnitude_below(value)), sem="relaxed")
        tl.atomic_max(range_ptr + granules + granule, tl.max(magnitude_above(value)), sem="relaxed")
    elif GRANULARITY == PER_BLOCK:
        largest = tl.max(magnitude(value), axis=0)
        at = (sample.to(tl.int64) * tl.cdiv(rows, _BLOCK_ROWS) + first // _BLOCK_ROWS) * channels + col
        if BLOCK_R == _BLOCK_ROWS:
            tl.store(block_ptr + at, largest, mask=col < channels)
        else:  # several tiles of a block
            tl.atomic_max(block_ptr + at, largest, mask=col < channels, sem="relaxed")
        tl.atomic_max(range_ptr + granule, tl.max(largest), sem="relaxed")
    else:
        tl.atomic_max(range_ptr + granule, tl.max(magnitude(value)), sem="relaxed")


@triton.jit
def quantize_kernel(
    h_ptr,
    x_hat_ptr,
    a_ptr,
    b_ptr,
    given_ptr,
    range_ptr,
    block_ptr,
    codes_ptr,
    scale_ptr,
    zero_point_ptr,
    rows,
    channels,
    granules,
    given_stride,
    eps,
    clip_ratio,
    half,
    PROLOGUE: tl.constexpr,
    SILU: tl.constexpr,
    GRANULARITY: tl.constexpr,
    SOURCE: tl.constexpr,
    PACKED: tl.constexpr,  # bits of packed codes, 0: a byte for each
    AFFINE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, first, row, col = tile_of_program(rows, channels, BLOCK_R, BLOCK_C, False)
    mask = (row < rows)[:, None] & (col < channels)[None, :]
    offsets = tile_offsets(sample, first, rows, channels, row, col)
    value = load_activation(h_ptr, a_ptr, b_ptr, sample, first, rows, channels, eps, row, col, mask, PROLOGUE, SILU)
    if x_hat_ptr is not None:
        old = tl.load(x_hat_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        value = value - old
    value = tl.where(mask, value, 0.0)

    # Scale and zero point are scalars or, PER_TOKEN, one per row; `owner` says which this program writes down.
    if GRANULARITY == PER_TOKEN:
        granule = sample * rows + row
        owner = row < rows
    elif GRANULARITY == PER_TENSOR:
        granule = 0
        owner = tl.program_id(0) == 0
    else:
        granule = sample
        owner = (first == 0) & (tl.program_id(0) % tl.cdiv(channels, BLOCK_C) == 0)
    zero_point = half * 0.0

    if SOURCE == GIVEN:
        if GRANULARITY == PER_TOKEN:
            scale = tl.load(given_ptr + granule * given_stride, mask=owner, other=1.0)
            tl.store(range_ptr + granule, tl.max(magnitude(value), axis=1), mask=owner)
        else:
            scale = tl.load(given_ptr + granule * given_stride)
            tl.atomic_max(range_ptr + granule, tl.max(magnitude(value)), sem="relaxed")
    elif AFFINE:
        if SOURCE == IN_TILE:
            below = tl.max(magnitude_below(value), axis=1)
            above = tl.max(magnitude_above(value), axis=1)
        else:
            below = tl.load(range_ptr + granule)
            above = tl.load(range_ptr + granules + granule)
        scale, zero_point = affine_scale(below.to(tl.float32, bitcast=True), above.to(tl.float32, bitcast=True), half)
    else:
        if SOURCE == IN_TILE:
            largest = tl.max(magnitude(value), axis=1)
            if x_hat_ptr is not None:
                tl.store(range_ptr + granule, largest, mask=owner)
        else:
            largest = tl.load(range_ptr + granule)
        absmax = largest.to(tl.float32, bitcast=True)
        if GRANULARITY == PER_BLOCK:
            scale = block_scale(absmax, clip_ratio, half)
        else:
            scale = symmetric_scale(absmax, clip_ratio, half - 0.5)
    tl.store(scale_ptr + granule, scale, mask=owner)
    if zero_point_ptr is not None:
        tl.store(zero_point_ptr + granule, zero_point.to(tl.int32), mask=owner)

    if GRANULARITY == PER_BLOCK:
        last = rows // _BLOCK_ROWS - 1
        block = tl.minimum(first // _BLOCK_ROWS, last)
        at = (sample.to(tl.int64) * tl.cdiv(rows, _BLOCK_ROWS) + block) * channels + col
        largest = tl.load(block_ptr + at, mask=col < channels, other=0)
        # The rows that are left are the last block's, too; elsewhere the second load repeats the first.
        beyond = tl.where(block == last, tl.cdiv(rows, _BLOCK_ROWS) - rows // _BLOCK_ROWS, 0) * channels
        rest = tl.load(block_ptr + at + beyond, mask=col < channels, other=0)
        largest = tl.maximum(largest, rest)
        multiplier = block_multiplier(largest.to(tl.float32, bitcast=True), scale, clip_ratio, half)
        code = round_to_code(value * tl.div_rn(1.0, scale * multiplier)[None, :], -half, half - 1.0)
        code = code * multiplier[None, :]
    else:
        if GRANULARITY == PER_TOKEN:
            scale = scale[:, None]
            if AFFINE:
                zero_point = zero_point[:, None]
        code = round_to_code(value * tl.div_rn(1.0, scale), -half - zero_point, half - 1.0 - zero_point) + zero_point
    if PACKED > 0:
        first_col = (tl.program_id(0) % tl.cdiv(channels, BLOCK_C)) * BLOCK_C
        store_packed(codes_ptr, code.to(tl.int8), sample, first, rows, channels, row, first_col, PACKED)
    else:
        tl.store(codes_ptr + offsets, code.to(tl.int8), mask=mask)
    if x_hat_ptr is not None:
        updated = (old + scale * code).to(x_hat_ptr.dtype.element_ty)
        # x_hat is read again in the next step; the L2 cache is for the codes, which the product reads now.
        tl.store(x_hat_ptr + offsets, updated, mask=mask, eviction_policy="evict_first")


class Plan(NamedTuple):
    """How a tensor is cut into samples, rows and tiles, and what its granules are called inside the kernels."""

    samples: int
    rows: int
    channels: int
    granularity: int
    granules: int
    block_r: int
    block_c: int
    num_warps: int

    @property
    def grid(self) -> tuple[int]:
        """One program per tile."""
        return (self.samples * -(-self.rows // self.block_r) * -(-self.channels // self.block_c),)


def plan_of(h: Tensor, like: Tensor, granularity: str, act_bits: int, prologue: int, packed: bool = False) -> Plan:
    """`plan` for the input h and a result of the shape and (x_hat) dtype of `like`, [N, C, H, W], [N, L, K] or
    [M, K].
    """
    shape = like.shape
    image = len(shape) == 4
    rows = shape[2] * shape[3] if image else shape[1] if len(shape) == 3 else 1
    channels = shape[1] if image else shape[-1]
    bytes_read = max(h.element_size(), like.element_size()) * (2 if prologue == GEGLU.value else 1)
    return plan(shape[0], rows, channels, granularity, act_bits, prologue, bytes_read, packed)


@lru_cache(maxsize=4096)
def plan(
    samples: int,
    rows: int,
    channels: int,
    granularity: str,
    act_bits: int,
    prologue: int,
    bytes_read: int,
    packed: bool = False,
) -> Plan:
    """The cut of [samples, rows, channels]. Samples are dissolved where nothing depends on them: one sample with all
    rows makes better tiles, above all for the [M, K] input of a Linear, whose samples are single rows.
    """
    name = granularity
    if name == "per_block" and block_count(rows, act_bits) == 0:
        name = "per_sample"  # without multipliers
    if name == "per_sample" and rows == 1 and channels <= MAX_ROW:
        name = "per_token"
    granules = {"per_tensor": 1, "per_token": samples * rows}.get(name, samples)
    if name in ("per_tensor", "per_token") and prologue != GROUP_NORM.value:
        samples, rows = 1, samples * rows
    whole_rows = name == "per_token" or prologue == LAYER_NORM.value
    if name == "per_block":
        block_r, block_c, num_warps = block_tile(channels, whole_rows, bytes_read)
    else:
        columns = max(channels, _PACKED_CHANNELS) if packed else channels
        block_r, block_c, num_warps = tile(samples, rows, columns, whole_rows, bytes_read)
    return Plan(samples, rows, channels, _GRANULARITY[name], granules, block_r, block_c, num_warps)


@lru_cache(maxsize=4096)
def tile(samples: int, rows: int, channels: int, whole_rows: bool, bytes_read: int) -> tuple[int, int, int]:
    """BLOCK_R, BLOCK_C, num_warps: _TILE_BYTES at `bytes_read` per element, less where that leaves SMs idle.

    Channels are cut without a remainder where a power of two from 32 on divides them (as it does in all UNets here):
    no lane is masked, and a row segment is whole sectors of 32 bytes, also in the int8 codes.
    """
    most = _TILE_BYTES // bytes_read
    block_c = _channel_block(channels, whole_rows)
    block_r = max(1, min(most // block_c, triton.next_power_of_2(rows)))
    while (
        block_r > 1
        and block_r * block_c > _LEAST_TILE
        and samples * -(-rows // block_r) * -(-channels // block_c) < _ENOUGH_PROGRAMS
    ):
        block_r //= 2
    return block_r, block_c, min(16, max(4, 4 * block_r * block_c // most))


def block_tile(channels: int, whole_rows: bool, bytes_read: int) -> tuple[int, int, int]:
    """`tile` for PER_BLOCK: the rows of one block, and as many warps as leave 16 elements to a thread (two 16-byte
    loads of a 2-byte tensor); of whole rows, which fill more registers, a part of a block.
    """
    most = _TILE_BYTES // bytes_read
    block_c = _channel_block(channels, whole_rows)
    if whole_rows:
        block_r = max(1, min(BLOCK_ROWS, most // block_c))
        return block_r, block_c, min(16, max(4, 4 * block_r * block_c // most))
    block_c = min(block_c, most // BLOCK_ROWS)
    return BLOCK_ROWS, block_c, max(1, BLOCK_ROWS * block_c // 512)


def _channel_block(channels: int, whole_rows: bool) -> int:
    if whole_rows:
        return triton.next_power_of_2(channels)
    divisor = channels & -channels
    return min(divisor, 256) if divisor >= 32 else min(triton.next_power_of_2(channels), 128)


class Ranges(NamedTuple):
    """int32 scratch of the two passes: `largest` [granules] (affine: twice), `block` [N, ceil(R/16), C] or None."""

    largest: Tensor
    block: Tensor | None


def make_ranges(p: Plan, affine: bool, device: torch.device, zeroed: bool = True) -> Ranges:
    """Scratch for `quantize`; not `zeroed`: the caller's own kernel does that and saves a launch."""
    make = torch.zeros if zeroed and p.granularity != PER_TOKEN.value else torch.empty
    largest = make(p.granules * (2 if affine else 1), dtype=torch.int32, device=device)
    if p.granularity != PER_BLOCK.value:
        return Ranges(largest, None)
    blocks = (p.samples, -(-p.rows // BLOCK_ROWS), p.channels)
    make = torch.empty if p.block_r == BLOCK_ROWS else torch.zeros
    return Ranges(largest, make(blocks, dtype=torch.int32, device=device))


def quantize(
    h: Tensor,
    like: Tensor,
    p: Plan,
    prologue: int,
    x_hat: Tensor | None,
    scale: Tensor | None,
    act_bits: int,
    *,
    clip_ratio: float = 1.0,
    packed: bool = False,
    affine: bool = False,
    silu: bool = False,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float = 0.0,
    ranges: Ranges | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (shape and memory format of `like`, or `packed`) and scales of prologue(h) - x_hat, and absmax; in the
    plain form, x_hat None, of prologue(h), and zero points.
    """
    if ranges is None:
        ranges = make_ranges(p, affine, h.device)
    sizes = p.rows, p.channels, p.granules
    shape = {"GRANULARITY": p.granularity, "AFFINE": affine, "BLOCK_R": p.block_r, "BLOCK_C": p.block_c}
    source = GIVEN if scale is not None else IN_TILE if p.granularity == PER_TOKEN.value else REDUCED
    if source is REDUCED:
        launch(
            range_kernel, p.grid, h, x_hat, a, b, *ranges, *sizes, eps,
            PROLOGUE=prologue, SILU=silu, **shape, num_warps=p.num_warps,
        )  # fmt: skip
    codes = empty_packed(like, act_bits) if packed else torch.empty_like(like, dtype=torch.int8)
    used = torch.empty(p.granules, dtype=torch.float32, device=h.device)
    zero_point = torch.empty(p.granules, dtype=torch.int32, device=h.device) if x_hat is None else None
    given_stride = 0 if scale is None or scale.shape[0] == 1 else 1
    launch(
        quantize_kernel, p.grid, h, x_hat, a, b, scale, *ranges, codes, used, zero_point,
        *sizes, given_stride, eps, clip_ratio, float(1 << (act_bits - 1)),
        PROLOGUE=prologue, SILU=silu, SOURCE=source.value, PACKED=act_bits if packed else 0, **shape,
        num_warps=p.num_warps,
    )  # fmt: skip
    return codes, used, ranges.largest.view(torch.float32) if zero_point is None else zero_point


def why_not(problem: Any) -> str | None:
    """Why the quantising kernels cannot solve `problem`, None if they can."""
    whole_rows = problem.granularity == "per_token" or problem.op.startswith("layer_norm")
    if whole_rows and problem.k > MAX_ROW:
        return f"{problem.k} channels: rows are held in registers, of at most {MAX_ROW} channels"
    return None
