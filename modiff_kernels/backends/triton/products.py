"""The ops around the integer product: `accumulate_*` and `quantized_*`, and what they share with the other ops.

Arguments are those of ops/schema.py, already checked. Nothing here reads the device.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...quant.packing import packed_width
from .launching import launch
from .product_kernel import ACCUMULATE, OUTPUT, finish_kernel, product_kernel, weight_sums_kernel
from .tile_configs import Gpu, Shape, TileConfig, choose

Conv = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int]

_INTERPRETED_GPU = Gpu("interpreter", (9, 0), 4)
_FINISH_TILE = {"BLOCK_M": 32, "BLOCK_N": 64}  # 2048 sums in 4 warps: memory-bound, 16 bytes per thread and load
_SUMS_ROWS = 64


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that `device` names; a small made-up one for the interpreter, which runs on the CPU."""
    if device.type != "cuda":
        return _INTERPRETED_GPU
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


class Geometry(NamedTuple):
    """Sizes of one product. A Linear is an image of `m` pixels in one row with a 1x1 window."""

    m: int
    channels: int
    channels_in: int
    groups: int
    kernel: tuple[int, int]
    image: tuple[int, int, int, int]  # height, width, out_height, out_width
    window: tuple[int, ...]  # stride, padding, dilation, two each

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def windowed(self) -> bool:
        return self.taps > 1 or self.window[:4] != (1, 1, 0, 0)

    @property
    def padded(self) -> bool:
        return self.window[2:4] != (0, 0)


_LINEAR_WINDOW = (1, 1, 0, 0, 1, 1)


def geometry(codes: Tensor, out_shape: Sequence[int], conv: Conv | None) -> Geometry:
    """Sizes of the product of `codes` that gives `out_shape`."""
    if conv is None:
        k = codes.shape[-1]
        m = codes.numel() // k
        return Geometry(m, k, k, 1, (1, 1), (1, m, 1, m), _LINEAR_WINDOW)
    kernel_size, stride, padding, dilation, groups = conv
    samples, channels_in, height, width = codes.shape
    image = (height, width, out_shape[2], out_shape[3])
    m = samples * out_shape[2] * out_shape[3]
    kernel = (kernel_size[0], kernel_size[1])
    return Geometry(m, channels_in // groups, channels_in, groups, kernel, image, (*stride, *padding, *dilation))


def output_shape(codes: Tensor, n: int, conv: Conv | None) -> tuple[int, ...]:
    """Shape of the product of `codes` with a weight of `n` rows."""
    if conv is None:
        return (*codes.shape[:-1], n)
    kernel_size, stride, padding, dilation, _ = conv
    sizes = [
        (codes.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return (codes.shape[0], n, *sizes)


def weight_sums(
    weight_packed: Tensor, weight_scale: Tensor, weight_bits: int, group_size: int, geo: Geometry, block_k: int
) -> Tensor:
    """Sums of the weight's codes that a zero point is multiplied with: [N, taps] with padding, else [N, 1]."""
    n, k = weight_scale.shape[0], geo.taps * geo.channels
    taps = geo.taps if geo.padded else 1
    grouped = group_size != -1
    sums = torch.empty((n, taps), dtype=torch.float32 if grouped else torch.int32, device=weight_packed.device)
    launch(
        weight_sums_kernel, (triton.cdiv(n, _SUMS_ROWS), taps),
        weight_packed, weight_scale, sums, n, k // taps, k, packed_width(weight_bits, k),
        group_size if grouped else k, weight_scale.shape[1] if grouped else 1,
        WEIGHT_BITS=weight_bits, GROUPED=grouped, BLOCK_N=_SUMS_ROWS, BLOCK_K=block_k if grouped else 128, num_warps=4,
    )  # fmt: skip
    return sums


def integer_product(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: int,
    y_hat: Tensor | None,
    skip: Tensor | None,
    write_out: bool,
    out_dtype: torch.dtype,
    weight_bits: int,
    group_size: int,
    conv: Conv | None,
    config: TileConfig | None = None,
) -> Tensor:
    """The product with its epilogue (product_kernel.py), in the tile `config` or the one that is chosen for it."""
    n = weight_scale.shape[0]
    out_shape = output_shape(codes, n, conv) if y_hat is None else y_hat.shape
    geo = geometry(codes, out_shape, conv)
    grouped = group_size != -1
    shape = Shape(geo.m, n, geo.channels, geo.taps, geo.groups, weight_bits, group_size)
    if config is None:
        config = choose(shape, gpu_of(codes.device))
    memory_format = torch.contiguous_format if conv is None else torch.channels_last
    out = None
    if write_out:
        out = torch.empty(out_shape, dtype=out_dtype, device=codes.device, memory_format=memory_format)
    steps_per_tap = -(-geo.channels // config.block_k)
    steps = geo.taps * steps_per_tap
    steps_per_split = -(-steps // config.split_k)
    splits = -(-steps // steps_per_split)
    tiles = -(-geo.m // config.block_m) * geo.groups * -(-(n // geo.groups) // config.block_n)
    k = geo.taps * geo.channels
    rows_per_scale = geo.m // scale.shape[0]
    flags = {
        "KERNEL_H": geo.kernel[0], "KERNEL_W": geo.kernel[1], "PADDED": geo.padded, "GROUPED": grouped,
        "HAS_ZERO_POINT": zero_point is not None, "HAS_BIAS": bias is not None, "HAS_SKIP": skip is not None,
        "WRITE_OUT": write_out, "EPILOGUE": epilogue,
    }  # fmt: skip
    sums = partial = None
    if zero_point is not None:
        sums = weight_sums(weight_packed, weight_scale, weight_bits, group_size, geo, config.block_k)
    if splits > 1:
        partial_dtype = torch.float32 if grouped else torch.int32
        partial = torch.empty((splits, geo.m, n), dtype=partial_dtype, device=codes.device)
    launch(
        product_kernel, (tiles, splits),
        codes, weight_packed, scale, zero_point, sums, weight_scale, bias, y_hat, skip, out, partial,
        geo.m, n, geo.channels, geo.channels_in, packed_width(weight_bits, k), geo.groups,
        steps_per_tap, steps_per_split, rows_per_scale,
        group_size if grouped else k, weight_scale.shape[1] if grouped else 1, *geo.image, *geo.window,
        WINDOW=geo.windowed, WEIGHT_BITS=weight_bits, SPLIT=splits > 1, EVEN_K=geo.channels % config.block_k == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages, **flags,
    )  # fmt: skip
    if partial is not None:
        grid = (triton.cdiv(geo.m, _FINISH_TILE["BLOCK_M"]), triton.cdiv(n, _FINISH_TILE["BLOCK_N"]))
        launch(
            finish_kernel, grid,
            partial, splits, scale, zero_point, sums, weight_scale, bias, y_hat, skip, out,
            geo.m, n, rows_per_scale, *geo.image, *geo.window, **flags, **_FINISH_TILE, num_warps=4,
        )  # fmt: skip
    return codes.new_empty((0,), dtype=out_dtype) if out is None else out


def accumulate_linear(
    residual_q, scale, weight_packed, weight_scale, y_hat, skip, weight_bits, group_size, layout, out_dtype,
    write_out=True,
):  # fmt: skip
    return integer_product(
        residual_q, scale, None, weight_packed, weight_scale, None, ACCUMULATE, y_hat, skip, write_out, out_dtype,
        weight_bits, group_size, None,
    )  # fmt: skip


def accumulate_conv2d(
    residual_q, scale, weight_packed, weight_scale, y_hat, skip, weight_bits, group_size, layout,
    kernel_size, stride, padding, dilation, groups, out_dtype, write_out=True,
):  # fmt: skip
    conv = (kernel_size, stride, padding, dilation, groups)
    return integer_product(
        residual_q, scale, None, weight_packed, weight_scale, None, ACCUMULATE, y_hat, skip, write_out, out_dtype,
        weight_bits, group_size, conv,
    )  # fmt: skip


def quantized_linear(
    x_q, scale, zero_point, weight_packed, weight_scale, bias, skip, weight_bits, group_size, layout, out_dtype
):
    return integer_product(
        x_q, scale, zero_point, weight_packed, weight_scale, bias, OUTPUT, None, skip, True, out_dtype,
        weight_bits, group_size, None,
    )  # fmt: skip


def quantized_conv2d(
    x_q, scale, zero_point, weight_packed, weight_scale, bias, skip, weight_bits, group_size, layout,
    kernel_size, stride, padding, dilation, groups, out_dtype,
):  # fmt: skip
    conv = (kernel_size, stride, padding, dilation, groups)
    return integer_product(
        x_q, scale, zero_point, weight_packed, weight_scale, bias, OUTPUT, None, skip, True, out_dtype,
        weight_bits, group_size, conv,
    )  # fmt: skip
