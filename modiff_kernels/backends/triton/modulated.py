"""Ops that quantise and multiply: `modulated_*` (one launch or the pair of ops) and `initialize_*`.

Arguments are those of ops/schema.py, already checked. Nothing here reads the device.
"""

import torch.nn.functional as F
from torch import Tensor

from ...quant import affine, packing
from .modulated_linear import modulated_linear_one_launch
from .product_kernel import ACCUMULATE, INITIALIZE
from .products import Conv, gpu_of, integer_product
from .quantize_residual import quantize_residual
from .tile_configs import ONE_LAUNCH, Shape, one_launch_pays


def modulated_linear(
    x, x_hat, scale, weight_packed, weight_scale, y_hat, skip, act_bits, granularity, clip_ratio, weight_bits,
    group_size, layout, write_out=True,
):  # fmt: skip
    channels = x.shape[-1]
    shape = Shape(x.numel() // channels, weight_scale.shape[0], channels, 1, 1, weight_bits, group_size)
    rows_alone = scale is not None or granularity == "per_token"
    if rows_alone and one_launch_pays(shape, gpu_of(x.device)):
        return modulated_linear_one_launch(
            x, x_hat, scale, weight_packed, weight_scale, y_hat, skip, act_bits, granularity, clip_ratio,
            weight_bits, group_size, write_out, ONE_LAUNCH.block_k,
        )  # fmt: skip
    codes, used, absmax = quantize_residual(x, x_hat, scale, act_bits, granularity, clip_ratio)
    out = integer_product(
        codes, used, None, weight_packed, weight_scale, None, ACCUMULATE, y_hat, skip, write_out, x.dtype,
        weight_bits, group_size, None,
    )  # fmt: skip
    return out, used, absmax


def modulated_conv2d(
    x, x_hat, scale, weight_packed, weight_scale, y_hat, skip, act_bits, granularity, clip_ratio, weight_bits,
    group_size, layout, kernel_size, stride, padding, dilation, groups, write_out=True,
):  # fmt: skip
    codes, used, absmax = quantize_residual(x, x_hat, scale, act_bits, granularity, clip_ratio)
    conv = (kernel_size, stride, padding, dilation, groups)
    out = integer_product(
        codes, used, None, weight_packed, weight_scale, None, ACCUMULATE, y_hat, skip, write_out, x.dtype,
        weight_bits, group_size, conv,
    )  # fmt: skip
    return out, used, absmax


def _dense_weight(
    weight_packed: Tensor, weight_scale: Tensor, weight_bits: int, group_size: int, k: int, conv: Conv | None
) -> Tensor:
    """The dequantised weight, float32 [N, K] or [N, C, R, S] channels_last."""
    codes = packing.unpack(weight_packed, weight_bits, k)
    if conv is None:
        return affine.dequantize_weight(codes, weight_scale, group_size)
    r, s = conv[0]
    return affine.dequantize_weight(codes, weight_scale, group_size, (codes.shape[0], k // (r * s), r, s))


def _initialize(
    x: Tensor,
    x_hat: Tensor,
    y_hat: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    first_step_bits: int,
    write_out: bool,
    conv: Conv | None,
) -> Tensor:
    if first_step_bits:
        x_hat.zero_()
        codes, used, _ = quantize_residual(x, x_hat, None, first_step_bits, "per_sample")
        return integer_product(
            codes, used, None, weight_packed, weight_scale, bias, INITIALIZE, y_hat, skip, write_out, x.dtype,
            weight_bits, group_size, conv,
        )  # fmt: skip
    # In the state's dtype: x_hat needs no conversion, and y_hat gets no coarser rounding than its own.
    x_hat.copy_(x)
    taps = 1 if conv is None else conv[0][0] * conv[0][1]
    k = x.shape[-1] if conv is None else taps * (x.shape[1] // conv[4])
    weight = _dense_weight(weight_packed, weight_scale, weight_bits, group_size, k, conv).to(x_hat.dtype)
    bias = None if bias is None else bias.to(x_hat.dtype)
    if conv is None:
        y_hat.copy_(F.linear(x_hat, weight, bias))
    else:
        _, stride, padding, dilation, groups = conv
        y_hat.copy_(F.conv2d(x_hat, weight, bias, stride, padding, dilation, groups))
    if not write_out:
        return x.new_empty((0,))
    return y_hat.to(x.dtype, copy=True) if skip is None else (y_hat.float() + skip.float()).to(x.dtype)


def initialize_linear(
    x, x_hat, y_hat, weight_packed, weight_scale, bias, skip, weight_bits, group_size, layout, first_step_bits=0,
    write_out=True,
):  # fmt: skip
    return _initialize(
        x, x_hat, y_hat, weight_packed, weight_scale, bias, skip, weight_bits, group_size, first_step_bits, write_out,
        None,
    )  # fmt: skip


def initialize_conv2d(
    x, x_hat, y_hat, weight_packed, weight_scale, bias, skip, weight_bits, group_size, layout,
    kernel_size, stride, padding, dilation, groups, first_step_bits=0, write_out=True,
):  # fmt: skip
    conv = (kernel_size, stride, padding, dilation, groups)
    return _initialize(
        x, x_hat, y_hat, weight_packed, weight_scale, bias, skip, weight_bits, group_size, first_step_bits, write_out,
        conv,
    )  # fmt: skip
