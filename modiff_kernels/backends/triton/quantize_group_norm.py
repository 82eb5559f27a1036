"""A group norm in front of `quantize`, folded: x = silu?(group_norm(h + shift)) = silu?(a * h + b).

Operands (N samples, R rows of C channels, G groups; an NHWC image has R = H * W), all row major:

- h [N, R, C] (or [N, R, own] and further, as in quantize_kernel.py); shift [N, C], gamma and beta [C] or [N, C] (any
  stride between rows), or None, float; the results a and b [N, C], float32,
- partial [N, P + 1, S, C] float32, scratch: mean and sum of squares around it, per channel and block of BLOCK_R rows;
  at P of all rows. With `range` also the least and the greatest h (S = 4, else 2),
- range [N] or [2, N] int32, or None: the range of x, as `range_kernel` gives it,
- counter [N + N * ceil(C/BLOCK_C)] int32: see `arrive`.

Programs: one tile of BLOCK_R rows x BLOCK_C channels each: m = mean of the rows, q = sum (h - m)^2. The last one of a
column of tiles merges their rows, about the mean m_0c of the first tile, the last one of a sample the channels of its
groups. Means and squares are merged as in Chan et al., so that a mean far from 0 does not cancel the variance::

    d_pc = m_pc - m_0c        m_c = m_0c + sum_p n_p d_pc / R        q_c = sum_p (q_pc + n_p d_pc^2) - R (m_c - m_0c)^2
    mean = sum_c (m_c + shift_c) / (C/G)                    var = sum_c (q_c + R (m_c + shift_c - mean)^2) / (R C/G)
    a_c  = gamma_c / sqrt(var + eps)                        b_c = beta_c + (shift_c - mean) a_c

The range of x needs no second pass over h: a * h + b is monotone in h, also rounded. silu falls as far as _SILU_AT and
rises from there, so over an interval it is greatest at an end, and least at an end or, if the interval holds _SILU_AT,
above _SILU_LEAST, which is then taken: the upper end of the range is exact, the lower one at most 0.2785 too low (with
the shipped model 1e-6, docs/triton_kernels.md)."""

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from .quantize_kernel import arrive, load_channels, magnitude_above, magnitude_below, silu, tile_of_program
from .quantize_tiling import Tiling, next_power_of_2, tile

_SILU_AT = tl.constexpr(-1.2784645)
_SILU_LEAST = tl.constexpr(-0.27846455)


@triton.jit
def _read(partial_ptr, mask):
    """What other programs stored: past the L1 cache."""
    return tl.load(partial_ptr, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def group_norm_kernel(
    h_ptr, further_ptr, shift_ptr, gamma_ptr, beta_ptr, partial_ptr, counter_ptr, a_ptr, b_ptr, range_ptr,
    own, samples, rows, channels, shift_stride, norm_stride, num_groups, eps, SILU: tl.constexpr, AFFINE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
    BACKWARDS: tl.constexpr,
):  # fmt: skip
    sample, first, row, col = tile_of_program(rows, channels, BLOCK_R, BLOCK_C, BLOCK_C, BACKWARDS)
    inside = col < channels
    mask = (row < rows)[:, None] & inside[None, :]
    h = load_channels(h_ptr, further_ptr, own, sample, first, rows, channels, row, col, mask)
    mean = tl.div_rn(tl.sum(h, axis=0), tl.minimum(rows - first, BLOCK_R).to(tl.float32))
    distance = tl.where(mask, h - mean[None, :], 0.0)
    blocks, columns = tl.cdiv(rows, BLOCK_R), tl.cdiv(channels, BLOCK_C)
    stride = channels * (2 if range_ptr is None else 4)
    partial_ptr += sample.to(tl.int64) * (blocks + 1) * stride
    merged_ptr = partial_ptr + blocks * stride
    at = partial_ptr + first // BLOCK_R * stride + col
    tl.store(at, mean, mask=inside)
    tl.store(at + channels, tl.sum(distance * distance, axis=0), mask=inside)
    if range_ptr is not None:
        tl.store(at + 2 * channels, tl.min(tl.where(mask, h, float("inf")), axis=0), mask=inside)
        tl.store(at + 3 * channels, tl.max(tl.where(mask, h, -float("inf")), axis=0), mask=inside)
    place = tl.program_id(0) // (blocks * columns)
    if not arrive(counter_ptr + samples + place * columns + tl.program_id(0) % columns, blocks):
        return

    pivot = _read(partial_ptr + col, inside)
    moved = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    low = tl.full([BLOCK_C], float("inf"), tl.float32)
    high = -low
    for start in range(0, blocks, BLOCK_P):
        block = start + tl.arange(0, BLOCK_P)
        valid = (block < blocks)[:, None] & inside[None, :]
        count = tl.where(valid, tl.minimum(rows - block * BLOCK_R, BLOCK_R).to(tl.float32)[:, None], 0.0)
        tile = partial_ptr + block[:, None] * stride + col[None, :]
        moved_by = _read(tile, valid) - pivot[None, :]
        moved += count * moved_by
        squares += _read(tile + channels, valid) + count * moved_by * moved_by
        if range_ptr is not None:
            low = tl.minimum(low, tl.min(tl.where(valid, _read(tile + 2 * channels, valid), float("inf")), axis=0))
            high = tl.maximum(high, tl.max(tl.where(valid, _read(tile + 3 * channels, valid), -float("inf")), axis=0))
    all_rows = tl.cast(rows, tl.float32)
    distance = tl.div_rn(tl.sum(moved, axis=0), all_rows)
    tl.store(merged_ptr + col, pivot + distance, mask=inside)
    square = tl.maximum(tl.sum(squares, axis=0) - all_rows * distance * distance, 0.0)
    tl.store(merged_ptr + channels + col, square, mask=inside)
    if range_ptr is not None:
        tl.store(merged_ptr + 2 * channels + col, low, mask=inside)
        tl.store(merged_ptr + 3 * channels + col, high, mask=inside)
    if not arrive(counter_ptr + place, columns):
        return

    width = channels // num_groups
    lane = tl.arange(0, BLOCK_W)
    size = tl.cast(width, tl.float32)
    start_of_sample = sample.to(tl.int64) * channels
    below, above = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    for start in range(0, num_groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        there = (group < num_groups)[:, None] & (lane < width)[None, :]
        channel = group[:, None] * width + lane[None, :]
        shift = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
        if shift_ptr is not None:
            row_ptr = shift_ptr + sample.to(tl.int64) * shift_stride
            shift = tl.load(row_ptr + channel, mask=there, other=0.0).to(tl.float32)
        center = _read(merged_ptr + channel, there) + shift
        square_sum = _read(merged_ptr + channels + channel, there)
        group_mean = tl.div_rn(tl.sum(center, axis=1), size)[:, None]
        apart = tl.where(there, center - group_mean, 0.0)
        variance = tl.div_rn(tl.sum(square_sum + all_rows * apart * apart, axis=1), all_rows * size)
        a = tl.rsqrt(variance + eps)[:, None] + tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
        if gamma_ptr is not None:
            a *= tl.load(gamma_ptr + sample.to(tl.int64) * norm_stride + channel, mask=there, other=0.0).to(tl.float32)
        b = (shift - group_mean) * a
        if beta_ptr is not None:
            b += tl.load(beta_ptr + sample.to(tl.int64) * norm_stride + channel, mask=there, other=0.0).to(tl.float32)
        tl.store(a_ptr + start_of_sample + channel, a, mask=there)
        tl.store(b_ptr + start_of_sample + channel, b, mask=there)
        if range_ptr is not None:
            x_0 = tl.fma(_read(merged_ptr + 2 * channels + channel, there), a, b)
            x_1 = tl.fma(_read(merged_ptr + 3 * channels + channel, there), a, b)
            least = tl.minimum(x_0, x_1)
            if SILU:
                holds_least = (least <= _SILU_AT) & (tl.maximum(x_0, x_1) >= _SILU_AT)
                x_0, x_1 = silu(x_0), silu(x_1)
                least = tl.where(holds_least, _SILU_LEAST, tl.minimum(x_0, x_1))
            below = tl.maximum(below, tl.max(tl.where(there, magnitude_below(least), 0)))
            above = tl.maximum(above, tl.max(tl.where(there, magnitude_above(tl.maximum(x_0, x_1)), 0)))
    if range_ptr is not None:
        if AFFINE:
            tl.store(range_ptr + sample, below)
            tl.store(range_ptr + samples + sample, above)
        else:
            tl.store(range_ptr + sample, tl.maximum(below, above))


@lru_cache(maxsize=1024)
def merge_tiles(row_blocks: int, block_c: int, planes: int, groups: int, width: int) -> dict[str, int]:
    """BLOCK_P, of rows that are merged at a time, and BLOCK_G x BLOCK_W, of groups and their channels: as many values
    as the registers of 4 warps hold."""
    block_w = next_power_of_2(width)
    block_p = min(next_power_of_2(row_blocks), max(1, 4096 // planes // block_c))
    return {"BLOCK_P": block_p, "BLOCK_G": min(next_power_of_2(groups), max(1, 1024 // block_w)), "BLOCK_W": block_w}


def fold_form(
    tiling: Tiling, bytes_read: int, num_groups: int, silu: bool, ranged: bool, affine: bool, backwards: bool
) -> tuple[int, int, tuple[int], dict[str, Any]]:
    """Elements of `partial` and counters, grid and form of a launch. ranged: the range of x per sample is wanted.
    backwards: the last tile first, for a pass that runs the other way afterwards."""
    samples, rows, channels = tiling.samples, tiling.rows, tiling.channels
    block_r, block_c, num_warps = tile(samples, rows, channels, False, bytes_read)
    row_blocks, columns = -(-rows // block_r), -(-channels // block_c)
    planes = 4 if ranged else 2
    form = {"SILU": silu, "AFFINE": affine and ranged, "BLOCK_R": block_r, "BLOCK_C": block_c, "BACKWARDS": backwards}
    form |= merge_tiles(row_blocks, block_c, planes, num_groups, channels // num_groups) | {"num_warps": num_warps}
    partial = samples * (row_blocks + 1) * planes * channels
    return partial, samples * (1 + columns), (samples * row_blocks * columns,), form
