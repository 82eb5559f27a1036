"""A group norm in front of `quantize`, folded: x = silu?(group_norm(h + shift)) = silu?(a * h + b).

Operands (N samples, R rows of C channels, G groups; an NHWC image has R = H * W), all row major:

- h [N, R, C], shift [N, C] (any stride between its rows) or None, float; the results a and b [N, C], float32,
- partial [N, P + 1, S, C] float32, scratch: mean and sum of squares around it, per channel and block of BLOCK_R rows;
  at P of all rows. With `range` also the least and the greatest h (S = 4, else 2),
- range [N] or [2, N] int32, or None: the range of x, as `range_kernel` gives it,
- counter [N + N * ceil(C/BLOCK_C)] int32: see `arrive`.

Programs: one tile of BLOCK_R rows x BLOCK_C channels each: m = mean of the rows, q = sum (h - m)^2. The last one of a
column of tiles merges their rows, the last one of a sample the channels of its groups. Means and squares are merged as
in Chan et al., so that a mean far from 0 does not cancel the variance::

    m_c = sum_p n_p m_pc / R                                q_c = sum_p (q_pc + n_p (m_pc - m_c)^2)
    mean = sum_c (m_c + shift_c) / (C/G)                    var = sum_c (q_c + R (m_c + shift_c - mean)^2) / (R C/G)
    a_c  = gamma_c / sqrt(var + eps)                        b_c = beta_c + (shift_c - mean) a_c

The range of x needs no second pass over h: a * h + b is monotone in h, also rounded. silu falls as far as _SILU_AT and
rises from there, so over an interval it is greatest at an end, and least at an end or, if the interval holds _SILU_AT,
above _SILU_LEAST, which is then taken: the upper end of the range is exact, the lower one at most 0.2785 too low.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant.operands import Prologue
from .launch import counters, launch
from .quantize_kernel import arrive, magnitude_above, magnitude_below, silu, tile_of_program, tile_offsets
from .quantize_tiling import Tiling, next_power_of_2, tile

_MERGED = 2048  # elements of partial results that a program merges at a time
_SILU_AT = tl.constexpr(-1.2784645)
_SILU_LEAST = tl.constexpr(-0.27846455)


@triton.jit
def group_norm_kernel(
    h_ptr, shift_ptr, gamma_ptr, beta_ptr, partial_ptr, counter_ptr, a_ptr, b_ptr, range_ptr,
    samples, rows, channels, shift_stride, num_groups, eps, SILU: tl.constexpr, AFFINE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
    BACKWARDS: tl.constexpr,
):  # fmt: skip
    sample, first, row, col = tile_of_program(rows, channels, BLOCK_R, BLOCK_C, BACKWARDS)
    inside = col < channels
    mask = (row < rows)[:, None] & inside[None, :]
    h = tl.load(h_ptr + tile_offsets(sample, first, rows, channels, row, col), mask=mask, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(h, axis=0), tl.minimum(rows - first, BLOCK_R).to(tl.float32))
    distance = tl.where(mask, h - mean[None, :], 0.0)
    blocks = tl.cdiv(rows, BLOCK_R)
    planes = 2 if range_ptr is None else 4
    partial_ptr += sample.to(tl.int64) * (blocks + 1) * planes * channels
    at = partial_ptr + first // BLOCK_R * planes * channels + col
    tl.store(at, mean, mask=inside)
    tl.store(at + channels, tl.sum(distance * distance, axis=0), mask=inside)
    if range_ptr is not None:
        tl.store(at + 2 * channels, tl.min(tl.where(mask, h, float("inf")), axis=0), mask=inside)
        tl.store(at + 3 * channels, tl.max(tl.where(mask, h, -float("inf")), axis=0), mask=inside)

    columns = tl.cdiv(channels, BLOCK_C)
    place = tl.program_id(0) // (blocks * columns)
    if arrive(counter_ptr + samples + place * columns + tl.program_id(0) % columns, blocks):
        merged_ptr = partial_ptr + blocks * planes * channels
        _merge_rows(
            partial_ptr, merged_ptr, rows, channels, planes, col, range_ptr is not None, BLOCK_R, BLOCK_C, BLOCK_P
        )
        if arrive(counter_ptr + place, columns):
            if shift_ptr is not None:
                shift_ptr += sample.to(tl.int64) * shift_stride
            a_ptr += sample.to(tl.int64) * channels
            b_ptr += sample.to(tl.int64) * channels
            below, above = _merge_channels(
                merged_ptr, shift_ptr, gamma_ptr, beta_ptr, a_ptr, b_ptr,
                rows, channels, num_groups, eps, SILU, range_ptr is not None, BLOCK_G, BLOCK_W,
            )  # fmt: skip
            if range_ptr is not None:
                if AFFINE:
                    tl.store(range_ptr + sample, below)
                    tl.store(range_ptr + samples + sample, above)
                else:
                    tl.store(range_ptr + sample, tl.maximum(below, above))


@triton.jit
def _merge_rows(
    partial_ptr, merged_ptr, rows, channels, planes, col, RANGE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    inside = col < channels
    blocks = tl.cdiv(rows, BLOCK_R)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, blocks, BLOCK_P):
        block = start + tl.arange(0, BLOCK_P)
        mask = (block < blocks)[:, None] & inside[None, :]
        count = tl.minimum(rows - block * BLOCK_R, BLOCK_R).to(tl.float32)
        at = partial_ptr + block[:, None] * planes * channels + col[None, :]
        mean = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        total += tl.where(mask, count[:, None] * mean, 0.0)
    merged = tl.div_rn(tl.sum(total, axis=0), tl.cast(rows, tl.float32))
    tl.store(merged_ptr + col, merged, mask=inside)

    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    low = tl.full([BLOCK_C], float("inf"), tl.float32)
    high = -low
    for start in range(0, blocks, BLOCK_P):
        block = start + tl.arange(0, BLOCK_P)
        mask = (block < blocks)[:, None] & inside[None, :]
        count = tl.minimum(rows - block * BLOCK_R, BLOCK_R).to(tl.float32)
        at = partial_ptr + block[:, None] * planes * channels + col[None, :]
        distance = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg") - merged[None, :]
        squares = tl.load(at + channels, mask=mask, other=0.0, cache_modifier=".cg")
        total += tl.where(mask, squares + count[:, None] * distance * distance, 0.0)
        if RANGE:
            least = tl.load(at + 2 * channels, mask=mask, other=float("inf"), cache_modifier=".cg")
            most = tl.load(at + 3 * channels, mask=mask, other=-float("inf"), cache_modifier=".cg")
            low = tl.minimum(low, tl.min(least, axis=0))
            high = tl.maximum(high, tl.max(most, axis=0))
    tl.store(merged_ptr + channels + col, tl.sum(total, axis=0), mask=inside)
    if RANGE:
        tl.store(merged_ptr + 2 * channels + col, low, mask=inside)
        tl.store(merged_ptr + 3 * channels + col, high, mask=inside)


@triton.jit
def _merge_channels(
    merged_ptr, shift_ptr, gamma_ptr, beta_ptr, a_ptr, b_ptr, rows, channels, num_groups, eps,
    SILU: tl.constexpr, RANGE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """a and b of a sample; max(-min(x, 0)) and max(max(x, 0)) as ordered integers."""
    width = channels // num_groups
    lane = tl.arange(0, BLOCK_W)
    count = tl.cast(rows, tl.float32)
    size = tl.cast(width, tl.float32)
    below = tl.zeros([BLOCK_G, BLOCK_W], tl.int32)
    above = tl.zeros([BLOCK_G, BLOCK_W], tl.int32)
    for start in range(0, num_groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        mask = (group < num_groups)[:, None] & (lane < width)[None, :]
        col = group[:, None] * width + lane[None, :]
        shift = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + col, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(merged_ptr + col, mask=mask, other=0.0, cache_modifier=".cg") + shift
        squares = tl.load(merged_ptr + channels + col, mask=mask, other=0.0, cache_modifier=".cg")
        group_mean = tl.div_rn(tl.sum(mean, axis=1), size)[:, None]
        distance = tl.where(mask, mean - group_mean, 0.0)
        variance = tl.div_rn(tl.sum(squares + count * distance * distance, axis=1), count * size)
        a = tl.rsqrt(variance + eps)[:, None] + tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
        if gamma_ptr is not None:
            a *= tl.load(gamma_ptr + col, mask=mask, other=0.0).to(tl.float32)
        b = (shift - group_mean) * a
        if beta_ptr is not None:
            b += tl.load(beta_ptr + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(a_ptr + col, a, mask=mask)
        tl.store(b_ptr + col, b, mask=mask)
        if RANGE:
            low = tl.fma(tl.load(merged_ptr + 2 * channels + col, mask=mask, other=0.0, cache_modifier=".cg"), a, b)
            high = tl.fma(tl.load(merged_ptr + 3 * channels + col, mask=mask, other=0.0, cache_modifier=".cg"), a, b)
            least, most = tl.minimum(low, high), tl.maximum(low, high)
            if SILU:
                holds_least = (least <= _SILU_AT) & (most >= _SILU_AT)
                low, high = silu(least), silu(most)
                least = tl.where(holds_least, _SILU_LEAST, tl.minimum(low, high))
                most = tl.maximum(low, high)
            below = tl.maximum(below, tl.where(mask, magnitude_below(least), 0))
            above = tl.maximum(above, tl.where(mask, magnitude_above(most), 0))
    return tl.max(below), tl.max(above)


@lru_cache(maxsize=1024)
def merge_tiles(row_blocks: int, block_c: int, groups: int, width: int) -> dict[str, int]:
    """BLOCK_P, of rows that are merged at a time, and BLOCK_G x BLOCK_W, of groups and their channels."""
    block_w = next_power_of_2(width)
    block_p = min(next_power_of_2(row_blocks), max(1, _MERGED // block_c))
    return {"BLOCK_P": block_p, "BLOCK_G": min(next_power_of_2(groups), max(1, _MERGED // block_w)), "BLOCK_W": block_w}


def fold_group_norm(
    h: Tensor, norm: Prologue, tiling: Tiling, found: Tensor | None, affine: bool, backwards: bool
) -> tuple[Tensor, Tensor]:
    """a and b [N, C]; found: where the range of x per sample goes, or None. backwards: the last tile first, for a pass
    that runs the other way afterwards."""
    samples, rows, channels = tiling.samples, tiling.rows, tiling.channels
    block_r, block_c, num_warps = tile(samples, rows, channels, False, h.element_size())
    row_blocks, columns = -(-rows // block_r), -(-channels // block_c)
    planes = 2 if found is None else 4
    partial = torch.empty((samples, row_blocks + 1, planes, channels), dtype=torch.float32, device=h.device)
    a, b = torch.empty((2, samples, channels), dtype=torch.float32, device=h.device)
    shift = norm.shift
    launch(
        group_norm_kernel, (samples * row_blocks * columns,), h, shift, norm.gamma, norm.beta, partial,
        counters(h.device, samples * (1 + columns)), a, b, found,
        samples, rows, channels, 0 if shift is None else shift.stride(0), norm.num_groups, norm.eps,
        SILU=norm.silu, AFFINE=affine and found is not None, BLOCK_R=block_r, BLOCK_C=block_c, BACKWARDS=backwards,
        **merge_tiles(row_blocks, block_c, norm.num_groups, channels // norm.num_groups), num_warps=num_warps,
    )  # fmt: skip
    return a, b
