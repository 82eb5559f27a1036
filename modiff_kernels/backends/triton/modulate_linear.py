"""`modulate` of a Linear in one launch, for layers so small that launches cost more than what is computed twice.

Operands, contiguous, K fast (M rows, K = channels, N columns): x and x_hat [M, K], y_hat, skip and out [M, N] in any
float type, weight as in weight_tiles.py, weight_scale [N] or [N, K / group_size], given_scale [1] or one per granule
(None: dynamic, one per row), and written one per granule: scale_used, and absmax as bit patterns (zero before unless
per row).

    code  = clamp(rne((x - x_hat) * (1 / scale)), -half, half - 1)      half = 2^(act_bits - 1)
    y_hat += scale * weight_scale * sum_k code * weight
    x_hat += scale * code

Mapping: a program owns BLOCK_M rows and all of their columns, so that nobody else touches these rows of x_hat and
y_hat. It walks through the columns tile by tile and quantises its rows again for each (`tiles.one_launch_pays` weighs
that); x_hat is written in the walk over the last tile, by the step that loads an element for the last time. Dynamic
scales need the absmax of whole rows first, one walk more: granularity per_token only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant.packing import packed_width
from ...quant.spec import granule_count
from .launch import launch
from .quantize_kernel import magnitude, round_to_code, symmetric_scale
from .tiles import ONE_LAUNCH
from .weight_tiles import load_codes, load_weight_tile


@triton.jit
def _load_residual(x, x_hat, start, k, channels, EVEN_K: tl.constexpr):
    """x - x_hat and x_hat in float32; 0 outside."""
    at = start[:, None] + k[None, :]
    old = load_codes(x_hat + at, k, channels, EVEN_K).to(tl.float32)
    return load_codes(x + at, k, channels, EVEN_K).to(tl.float32) - old, old


@triton.jit(do_not_specialize=["m", "rows_per_granule", "rows_per_given", "group_size", "scale_groups"])
def modulate_linear_kernel(
    x, x_hat, given_scale, weight, weight_scale, y_hat, skip, out, scale_used, absmax,
    m, n, channels, row_bytes, rows_per_granule, rows_per_given, group_size, scale_groups, clip_ratio, half,
    WEIGHT_BITS: tl.constexpr, GROUPED: tl.constexpr, PER_ROW: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of rows; operands and mapping at the top of this file."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(row, m - 1)
    start = rows.to(tl.int64) * channels
    k = tl.arange(0, BLOCK_K)

    largest = tl.zeros((BLOCK_M,), tl.int32)
    if given_scale is None:
        for first in range(0, channels, BLOCK_K):
            residual, old = _load_residual(x, x_hat, start, first + k, channels, EVEN_K)
            largest = tl.maximum(largest, tl.max(magnitude(residual), axis=1))
        scale = symmetric_scale(largest.to(tl.float32, bitcast=True), clip_ratio, half - 0.5)
    else:
        scale = tl.load(given_scale + rows // rows_per_given)
    inverse = tl.div_rn(1.0, scale)
    granule = rows // rows_per_granule
    tl.store(scale_used + granule, scale, mask=(row < m) & (rows % rows_per_granule == 0))

    tiles = tl.cdiv(n, BLOCK_N)
    for tile in range(tiles):
        col = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        cols = tl.minimum(col, n - 1)
        may_write = (row < tl.where(tile == tiles - 1, m, 0))[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if GROUPED else tl.int32)
        for first in range(0, channels, BLOCK_K):
            residual, old = _load_residual(x, x_hat, start, first + k, channels, EVEN_K)
            largest = tl.maximum(largest, tl.max(magnitude(residual), axis=1))
            code = round_to_code(residual * inverse[:, None], -half, half - 1.0)
            new = (old + scale[:, None] * code).to(x_hat.dtype.element_ty)
            tl.store(
                x_hat + start[:, None] + (first + k)[None, :], new, mask=may_write & (first + k < channels)[None, :]
            )
            b = load_weight_tile(
                weight, cols, channels, row_bytes, first, channels - first, WEIGHT_BITS, BLOCK_K, EVEN_K
            )
            if GROUPED:
                group_scale = tl.load(weight_scale + cols * scale_groups + first // group_size)
                sums = tl.dot(code.to(tl.int8), tl.trans(b), out_dtype=tl.int32)
                acc += sums.to(tl.float32) * group_scale[None, :]
            else:
                acc = tl.dot(code.to(tl.int8), tl.trans(b), acc, out_dtype=tl.int32)
        if GROUPED:
            v = acc * scale[:, None]
        else:
            v = acc.to(tl.float32) * (scale[:, None] * tl.load(weight_scale + cols)[None, :])
        at = row.to(tl.int64)[:, None] * n + col[None, :]
        mask = (row < m)[:, None] & (col < n)[None, :]
        v += tl.load(y_hat + at, mask=mask, other=0.0).to(tl.float32)
        stored = v.to(y_hat.dtype.element_ty)
        tl.store(y_hat + at, stored, mask=mask)
        if out is not None:
            v = stored.to(tl.float32)
            if skip is not None:
                v += tl.load(skip + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + at, v.to(out.dtype.element_ty), mask=mask)

    if PER_ROW:
        tl.store(absmax + rows, largest, mask=row < m)
    else:
        tl.atomic_max(absmax + granule, largest, mask=row < m)


def modulate(
    h, prologue, x_hat, scale, weight, y_hat, skip, window, out_dtype, bits, granularity, clip_ratio, write_out
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.modulate` of what `why_not` accepts: no window, no prologue, a scale that is given or per token."""
    n, channels = weight.n, h.shape[-1]
    m = h.numel() // channels
    count = granule_count(h.shape, granularity, False)
    grouped, per_row = weight.group_size != -1, count == m
    out = torch.empty(y_hat.shape if write_out else (0,), dtype=out_dtype, device=h.device)
    used = torch.empty(count, dtype=torch.float32, device=h.device)
    absmax = (torch.empty if per_row else torch.zeros)(count, dtype=torch.int32, device=h.device)
    launch(
        modulate_linear_kernel, (-(-m // ONE_LAUNCH.block_m),),
        h, x_hat, scale, weight.packed, weight.scale, y_hat, skip, out if write_out else None, used, absmax,
        m, n, channels, packed_width(weight.bits, channels), m // count, m if scale is None else m // scale.shape[0],
        weight.group_size if grouped else channels, weight.scale.shape[1] if grouped else 1,
        float(clip_ratio), float(1 << (bits - 1)),
        WEIGHT_BITS=weight.bits, GROUPED=grouped, PER_ROW=per_row, EVEN_K=channels % ONE_LAUNCH.block_k == 0,
        BLOCK_M=ONE_LAUNCH.block_m, BLOCK_N=ONE_LAUNCH.block_n, BLOCK_K=ONE_LAUNCH.block_k,
        num_warps=ONE_LAUNCH.num_warps, num_stages=ONE_LAUNCH.num_stages,
    )  # fmt: skip
    return out, used, absmax.view(torch.float32)
