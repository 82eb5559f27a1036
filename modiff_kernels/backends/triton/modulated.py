"""Ops that quantise and multiply: `modulated_*` (one launch or the pair of ops) and `initialize_*`.

Arguments are those of ops/schema.py, already checked. Nothing here reads the device.
"""

from torch import Tensor

from ...quant import passes
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
    return passes.initialize_in_state_dtype(
        x, x_hat, y_hat, weight_packed, weight_scale, bias, skip, weight_bits, group_size, conv, write_out
    )


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
