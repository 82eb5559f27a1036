"""A group norm in front of `quantize`, folded: x = silu?(group_norm(h + shift)) = silu?(a * h + b).

Operands (N samples, R rows of C channels, G groups; an NHWC image has R = H * W), all row major:

- h [N, R, C] and shift [N, C] or None, float; the results a and b [N, C], float32,
- partial [N, P, 2, C] float32, scratch: mean and sum of squares around it, per channel and block of BLOCK_R rows,
- cleared [granules] (or twice) int32 or None: scratch of the quantising passes, set to 0 here.

Programs and equations:

- `statistics_kernel`: one tile of BLOCK_R rows x BLOCK_C channels each: m = mean of the rows, q = sum (h - m)^2.
- `coefficients_kernel`: one group of one sample each. Means and squares are merged as in Chan et al., so that a mean
  far from 0 does not cancel the variance::

      mean = sum_p,c n_p (m_pc + shift_c) / (R C/G)      var = sum_p,c (q_pc + n_p (m_pc + shift_c - mean)^2) / (R C/G)
      a_c  = gamma_c / sqrt(var + eps)                   b_c = beta_c + (shift_c - mean) a_c
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant.operands import Prologue
from .launch import launch
from .quantize_kernel import tile_of_program, tile_offsets
from .quantize_tiling import Tiling, next_power_of_2, tile

_MERGED = 2048  # elements of partial results that a program of the second kernel merges at a time


@triton.jit
def statistics_kernel(
    h_ptr, partial_ptr, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARDS: tl.constexpr
):
    sample, first, row, col = tile_of_program(rows, channels, BLOCK_R, BLOCK_C, BACKWARDS)
    mask = (row < rows)[:, None] & (col < channels)[None, :]
    h = tl.load(h_ptr + tile_offsets(sample, first, rows, channels, row, col), mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(rows - first, BLOCK_R).to(tl.float32)
    mean = tl.div_rn(tl.sum(h, axis=0), count)
    h = tl.where(mask, h - mean[None, :], 0.0)
    partial = partial_ptr + (sample.to(tl.int64) * tl.cdiv(rows, BLOCK_R) + first // BLOCK_R) * 2 * channels + col
    tl.store(partial, mean, mask=col < channels)
    tl.store(partial + channels, tl.sum(h * h, axis=0), mask=col < channels)


@triton.jit
def coefficients_kernel(
    partial_ptr, shift_ptr, gamma_ptr, beta_ptr, a_ptr, b_ptr, cleared_ptr,
    rows, channels, granules, num_groups, eps,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0) // num_groups
    group = tl.program_id(0) % num_groups
    width = channels // num_groups
    lane = tl.arange(0, BLOCK_G)
    inside = lane < width
    col = group * width + lane
    at = sample.to(tl.int64) * channels + col
    blocks = tl.cdiv(rows, BLOCK_R)
    partial_ptr += sample.to(tl.int64) * blocks * 2 * channels
    size = tl.cast(rows, tl.float32) * tl.cast(width, tl.float32)
    shift = tl.zeros([BLOCK_G], tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + at, mask=inside, other=0.0).to(tl.float32)

    total = tl.zeros([BLOCK_P, BLOCK_G], tl.float32)
    for start in range(0, blocks, BLOCK_P):
        block = start + tl.arange(0, BLOCK_P)
        mask = (block < blocks)[:, None] & inside[None, :]
        count = tl.minimum(rows - block * BLOCK_R, BLOCK_R).to(tl.float32)
        mean = tl.load(partial_ptr + block[:, None] * 2 * channels + col[None, :], mask=mask, other=0.0)
        total += tl.where(mask, count[:, None] * (mean + shift[None, :]), 0.0)
    group_mean = tl.div_rn(tl.sum(total), size)

    total = tl.zeros([BLOCK_P, BLOCK_G], tl.float32)
    for start in range(0, blocks, BLOCK_P):
        block = start + tl.arange(0, BLOCK_P)
        mask = (block < blocks)[:, None] & inside[None, :]
        count = tl.minimum(rows - block * BLOCK_R, BLOCK_R).to(tl.float32)
        offsets = block[:, None] * 2 * channels + col[None, :]
        mean = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        squares = tl.load(partial_ptr + offsets + channels, mask=mask, other=0.0)
        distance = mean + shift[None, :] - group_mean
        total += tl.where(mask, squares + count[:, None] * distance * distance, 0.0)
    variance = tl.div_rn(tl.sum(total), size)

    a = tl.zeros([BLOCK_G], tl.float32) + tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    if gamma_ptr is not None:
        a *= tl.load(gamma_ptr + col, mask=inside, other=0.0).to(tl.float32)
    b = (shift - group_mean) * a
    if beta_ptr is not None:
        b += tl.load(beta_ptr + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(a_ptr + at, a, mask=inside)
    tl.store(b_ptr + at, b, mask=inside)

    if cleared_ptr is not None:  # all programs of a granule write the same 0
        granule = sample % granules  # one granule: 0
        tl.store(cleared_ptr + granule, 0)
        if AFFINE:
            tl.store(cleared_ptr + granules + granule, 0)


@lru_cache(maxsize=1024)
def merge_tile(row_blocks: int, width: int) -> tuple[int, int, int]:
    """BLOCK_P, BLOCK_G, num_warps of `coefficients_kernel` for groups of `width` channels."""
    block_g = next_power_of_2(width)
    block_p = min(next_power_of_2(row_blocks), max(1, _MERGED // block_g))
    return block_p, block_g, min(16, max(4, block_g // 1024))


def fold_group_norm(
    h: Tensor, norm: Prologue, tiling: Tiling, cleared: Tensor | None, backwards: bool
) -> tuple[Tensor, Tensor]:
    """a and b [N, C]. backwards: the last tile first, for a pass that runs the other way afterwards."""
    samples, rows, channels = tiling.samples, tiling.rows, tiling.channels
    block_r, block_c, num_warps = tile(samples, rows, channels, False, h.element_size())
    row_blocks, channel_blocks = -(-rows // block_r), -(-channels // block_c)
    partial = torch.empty((samples, row_blocks, 2, channels), dtype=torch.float32, device=h.device)
    launch(
        statistics_kernel, (samples * row_blocks * channel_blocks,), h, partial, rows, channels,
        BLOCK_R=block_r, BLOCK_C=block_c, BACKWARDS=backwards, num_warps=num_warps,
    )  # fmt: skip
    a, b = torch.empty((2, samples, channels), dtype=torch.float32, device=h.device)
    block_p, block_g, num_warps = merge_tile(row_blocks, channels // norm.num_groups)
    affine = cleared is not None and cleared.shape[0] == 2 * tiling.granules
    launch(
        coefficients_kernel, (samples * norm.num_groups,), partial, norm.shift, norm.gamma, norm.beta, a, b, cleared,
        rows, channels, tiling.granules, norm.num_groups, norm.eps,
        BLOCK_R=block_r, BLOCK_P=block_p, BLOCK_G=block_g, AFFINE=affine, num_warps=num_warps,
    )  # fmt: skip
    return a, b
