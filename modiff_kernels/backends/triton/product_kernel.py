"""The integer product of all ops: an implicit GEMM over NHWC images, of which a Linear is the case without a window.

Operands (all contiguous, K fast):

============ ========================================== ========================
codes        [samples, height, width, groups * C]       int8; a Linear: [M, C]
weight       [N, taps * C], packed (weight_tiles.py)    int8 or uint8
scale        [ceil(M / rows_per_scale)]                 float32
zero_point   like scale, or none                        int32
weight_sums  [N, taps] with zero_point, [N] unpadded    int32 (grouped: float32)
weight_scale [N], or [N, K / group_size] (grouped)      float32
bias         [N] or none                                float
y_hat        [M, N] or none                             float, updated in place
skip, out    [M, N] or none                             float
partial      [splits, M, N] with splits > 1             int32 (grouped: float32)
============ ========================================== ========================

    acc[m, n] = sum over taps t and channels c of codes[pixel(m, t), c] * weight[n, t, c]       0 outside of the image
    v         = scale[m] * weight_scale[n] * (acc[m, n] - zero_point[m] * sum of weight_sums[n, t] over taps inside)
    with y_hat     y_hat += v              out = y_hat + skip
    without                                out = v + bias + skip
    with GEGLU, u = v + bias               out[m, j] = u[m, 2j] * gelu(u[m, 2j + 1]), with erf; out is [M, N / 2]

m counts output pixels (sample, p, q). Integers are exact; the rest is float32. With WINDOW off, what a window needs is
not compiled.

Mapping: program 0 of the grid is an output tile [BLOCK_M, BLOCK_N], in columns of GROUP_M tiles so that programs which
run together share weights in the L2 cache; program 1 is a split of K. The K loop runs over (tap, block of channels) in
one sequence, so the pipeline of loads never drains between taps; a step is inside one tap and one group of weight
scales. Rows and columns past the end read the last one instead of a mask and are not stored. With splits > 1 (fewer
tiles than multiprocessors) every split writes its sums to `partial`, and `finish_kernel` adds them in order.

Limits: k <= 65536, so that no sum of 8-bit products leaves int32; groups of weight scales are multiples of BLOCK_K."""

import triton
import triton.language as tl

from .weight_tiles import load_codes, load_weight_tile

_SQRT_HALF = tl.constexpr(0.70710678118654752)
# Extents on which no address alignment depends: their values must not lead to further compilations.
_WINDOW = ["height", "width", "out_height", "out_width", "stride_h", "stride_w", "pad_h", "pad_w"]
_WINDOW += ["dilation_h", "dilation_w"]
_STEPS = ["steps_per_tap", "steps_per_split", "group_size", "scale_groups"]


@triton.jit
def _tile_position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of tile number `tile`: GROUP_M rows at a time, column after column."""
    per_band = GROUP_M * tiles_n
    first = tile // per_band * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    inside = tile % per_band
    return first + inside % size, inside // size


@triton.jit
def _pixel(rows, out_height, out_width, stride_h, stride_w, pad_h, pad_w):
    """Sample, and the row and column of the input that the first tap meets, of output pixels `rows`."""
    q = rows % out_width
    line = rows // out_width
    return line // out_height, line % out_height * stride_h - pad_h, q * stride_w - pad_w


@triton.jit
def _places(tile, first_column, m, n, column_end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the elements of a tile of BLOCK_M rows lie in [m, n]: at start (64 bits) + at (32 bits, inside of the tile,
    which saves a register per address), and which of them are there."""
    row, col = tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    start = (tile * BLOCK_M).to(tl.int64) * n
    return start, row[:, None] * n + col[None, :], (row < m - tile * BLOCK_M)[:, None] & (col < column_end)[None, :]


@triton.jit
def _finish(
    acc, rows, cols, start, at, mask,
    scale, zero_point, weight_sums, weight_scale, bias, y_hat, skip, out,
    rows_per_scale, height, width, out_height, out_width, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, PADDED: tl.constexpr, GROUPED: tl.constexpr,
    GEGLU: tl.constexpr,
):  # fmt: skip
    """The epilogue of sums `acc` [rows, cols]; rows and cols may be read; start, at, mask: `_places`, of out."""
    scale_at = rows // rows_per_scale
    row_scale = tl.load(scale + scale_at)
    if zero_point is not None:
        zero = tl.load(zero_point + scale_at)
        if PADDED:
            _, top, left = _pixel(rows, out_height, out_width, stride_h, stride_w, pad_h, pad_w)
            for tap in range(KERNEL_H * KERNEL_W):
                h = top + tap // KERNEL_W * dilation_h
                w = left + tap % KERNEL_W * dilation_w
                inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
                sums = tl.load(weight_sums + cols * (KERNEL_H * KERNEL_W) + tap)
                acc -= tl.where(inside, zero, 0)[:, None] * sums[None, :]
        else:
            acc -= zero[:, None] * tl.load(weight_sums + cols)[None, :]
    if GROUPED:
        v = acc * row_scale[:, None]
    else:
        v = acc.to(tl.float32) * (row_scale[:, None] * tl.load(weight_scale + cols)[None, :])
    if bias is not None:
        v += tl.load(bias + cols).to(tl.float32)[None, :]
    if GEGLU:  # a thread holds both of a pair, so that nothing moves between threads
        pairs: tl.constexpr = (v.shape[0], v.shape[1] // 2, 2)
        value, gate = tl.split(tl.reshape(v, pairs))
        v = value * (0.5 * gate * (1.0 + tl.erf(gate * _SQRT_HALF)))
    if y_hat is not None:
        v += tl.load(y_hat + start + at, mask=mask, other=0.0).to(tl.float32)
        stored = v.to(y_hat.dtype.element_ty)
        tl.store(y_hat + start + at, stored, mask=mask)
        v = stored.to(tl.float32)
    if out is not None:
        if skip is not None:
            v += tl.load(skip + start + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + start + at, v.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m", "rows_per_scale", *_STEPS, *_WINDOW])
def product_kernel(
    codes, weight, scale, zero_point, weight_sums, weight_scale, bias, y_hat, skip, out, partial,
    m, n, channels, channels_in, row_bytes, groups, steps_per_tap, steps_per_split, rows_per_scale,
    group_size, scale_groups,
    height, width, out_height, out_width, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    WINDOW: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, PADDED: tl.constexpr,
    WEIGHT_BITS: tl.constexpr, GROUPED: tl.constexpr, GEGLU: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of the output, or of one split's sums; operands and mapping at the top of this file."""
    group_columns = n // groups
    tiles_in_group = tl.cdiv(group_columns, BLOCK_N)
    tile_m, tile_n = _tile_position(tl.program_id(0), tl.cdiv(m, BLOCK_M), groups * tiles_in_group, GROUP_M)
    group = tile_n // tiles_in_group
    column_end = (group + 1) * group_columns
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = group * group_columns + tile_n % tiles_in_group * BLOCK_N
    col = first_column + tl.arange(0, BLOCK_N)
    rows, cols = tl.minimum(row, m - 1), tl.minimum(col, column_end - 1)

    if WINDOW:
        sample, top, left = _pixel(rows, out_height, out_width, stride_h, stride_w, pad_h, pad_w)
        pixel = (sample.to(tl.int64) * height + top) * width + left
    else:
        pixel = rows.to(tl.int64)
    first_code = codes + pixel * channels_in + group * channels
    k = tl.arange(0, BLOCK_K)
    row_codes = KERNEL_H * KERNEL_W * channels
    first_step = tl.program_id(1) * steps_per_split
    last_step = tl.minimum(first_step + steps_per_split, KERNEL_H * KERNEL_W * steps_per_tap)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if GROUPED else tl.int32)
    for step in range(first_step, last_step):
        if WINDOW:
            tap = step // steps_per_tap
            channel = step % steps_per_tap * BLOCK_K
            down, right = tap // KERNEL_W * dilation_h, tap % KERNEL_W * dilation_w
            at = first_code[:, None] + ((down * width + right).to(tl.int64) * channels_in + channel + k)[None, :]
        else:
            tap = 0
            channel = step * BLOCK_K
            at = first_code[:, None] + (channel + k)[None, :]
        left_k = channels - channel
        if PADDED:
            h, w = top + down, left + right
            inside = ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
            if not EVEN_K:
                inside = inside & (k < left_k)[None, :]
            a = tl.load(at, mask=inside, other=0)
        else:
            a = load_codes(at, k, left_k, EVEN_K)
        b = load_weight_tile(
            weight, cols, row_codes, row_bytes, tap * channels + channel, left_k, WEIGHT_BITS, BLOCK_K, EVEN_K
        )
        if GROUPED:
            group_scale = tl.load(weight_scale + cols * scale_groups + (tap * channels + channel) // group_size)
            acc += tl.dot(a, tl.trans(b), out_dtype=tl.int32).to(tl.float32) * group_scale[None, :]
        else:
            acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)

    start, at, mask = _places(tile_m, first_column, m, n, column_end, BLOCK_M, BLOCK_N)
    if partial is not None:
        tl.store(partial + tl.program_id(1).to(tl.int64) * m * n + start + at, acc, mask=mask)
    else:
        if GEGLU:
            start, at, mask = _places(tile_m, first_column // 2, m, n // 2, n // 2, BLOCK_M, BLOCK_N // 2)
        _finish(
            acc, rows, cols, start, at, mask,
            scale, zero_point, weight_sums, weight_scale, bias, y_hat, skip, out,
            rows_per_scale, height, width, out_height, out_width,
            stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
            KERNEL_H, KERNEL_W, PADDED, GROUPED, GEGLU,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "m", "rows_per_scale", *_WINDOW])
def finish_kernel(
    partial, splits, scale, zero_point, weight_sums, weight_scale, bias, y_hat, skip, out,
    m, n, rows_per_scale, height, width, out_height, out_width,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, PADDED: tl.constexpr, GROUPED: tl.constexpr,
    GEGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the sums of all splits, in order, and do the epilogue of one tile [BLOCK_M, BLOCK_N]."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = tl.minimum(row, m - 1), tl.minimum(col, n - 1)
    tile_m, first_column = tl.program_id(0), tl.program_id(1) * BLOCK_N
    start, at, mask = _places(tile_m, first_column, m, n, n, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if GROUPED else tl.int32)
    sums = partial + start + at
    for _ in range(splits):
        acc += tl.load(sums, mask=mask, other=0)
        sums += tl.cast(m, tl.int64) * n
    if GEGLU:
        start, at, mask = _places(tile_m, first_column // 2, m, n // 2, n // 2, BLOCK_M, BLOCK_N // 2)
    _finish(
        acc, rows, cols, start, at, mask,
        scale, zero_point, weight_sums, weight_scale, bias, y_hat, skip, out,
        rows_per_scale, height, width, out_height, out_width,
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
        KERNEL_H, KERNEL_W, PADDED, GROUPED, GEGLU,
    )  # fmt: skip
