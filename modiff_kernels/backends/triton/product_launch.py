"""`product`: the sizes of a product, its tile, and the kernels that it takes (product_kernel.py)."""

import torch
from torch import Tensor

from ...quant.operands import Window, weight_sums
from ...quant.packing import packed_width
from .launch import launch
from .product_kernel import finish_kernel, product_kernel
from .tiles import Shape, TileConfig, choose, gpu_of

_FINISH_TILE = {"BLOCK_M": 32, "BLOCK_N": 64}  # 2048 sums in 4 warps: memory-bound, 16 bytes per thread and load
_NO_WINDOW = Window((1, 1))


def product(
    codes, scale, zero_point, weight, y_hat, bias, skip, window, out_dtype, write_out, tile: TileConfig | None = None
) -> Tensor:
    """`ops.product`, its arguments already checked, in `tile` or the one that is chosen for its shape."""
    n, grouped = weight.n, weight.group_size != -1
    kernel, stride, padding, dilation, groups = window or _NO_WINDOW
    if window is None:  # an image of m pixels in one row with a 1x1 window
        channels_in, out_shape = codes.shape[-1], (*codes.shape[:-1], weight.outputs)
        m = codes.numel() // channels_in
        image = 1, m, 1, m
    else:
        samples, channels_in, height, width = codes.shape
        _, _, p, q = out_shape = window.output_shape(codes.shape, n)
        m, image = samples * p * q, (height, width, p, q)
    channels, taps = channels_in // groups, kernel[0] * kernel[1]
    k = taps * channels
    tile = tile or choose(Shape(m, n, channels, taps, groups, weight.bits, weight.group_size), gpu_of(codes.device))
    out = None
    if write_out:
        memory_format = torch.contiguous_format if window is None else torch.channels_last
        out = torch.empty(out_shape, dtype=out_dtype, device=codes.device, memory_format=memory_format)
    steps_per_tap = -(-channels // tile.block_k)
    steps = taps * steps_per_tap
    steps_per_split = -(-steps // tile.split_k)
    splits = -(-steps // steps_per_split)
    tiles = -(-m // tile.block_m) * groups * -(-(n // groups) // tile.block_n)
    sums = None if zero_point is None else weight_sums(weight, k, taps if padding != (0, 0) else 1)
    partial = None
    if splits > 1:
        partial = codes.new_empty((splits, m, n), dtype=torch.float32 if grouped else torch.int32)
    rows_per_scale = m // scale.shape[0]
    window_sizes = (*image, *stride, *padding, *dilation)
    form = {"KERNEL_H": kernel[0], "KERNEL_W": kernel[1], "PADDED": padding != (0, 0)}
    form |= {"GROUPED": grouped, "GEGLU": weight.geglu}
    launch(
        product_kernel, (tiles, splits),
        codes, weight.packed, scale, zero_point, sums, weight.scale, bias, y_hat, skip, out, partial,
        m, n, channels, channels_in, packed_width(weight.bits, k), groups, steps_per_tap, steps_per_split,
        rows_per_scale, weight.group_size if grouped else k, weight.scale.shape[1] if grouped else 1, *window_sizes,
        WINDOW=not (window or _NO_WINDOW).is_pointwise, WEIGHT_BITS=weight.bits, EVEN_K=channels % tile.block_k == 0,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **form,
    )  # fmt: skip
    if partial is not None:
        launch(
            finish_kernel, (-(-m // _FINISH_TILE["BLOCK_M"]), -(-n // _FINISH_TILE["BLOCK_N"])),
            partial, splits, scale, zero_point, sums, weight.scale, bias, y_hat, skip, out,
            m, n, rows_per_scale, *window_sizes, **form, **_FINISH_TILE, num_warps=4,
        )  # fmt: skip
    return codes.new_empty((0,), dtype=out_dtype) if out is None else out
