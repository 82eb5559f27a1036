"""The ops around the integer product (csrc/cuda/product.h): `accumulate_*`, `quantized_*`, and with a quantising pass
before it `modulated_*` and `initialize_*`.

Arguments are those of ops/schema.py, already checked. Nothing here reads the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...quant import passes
from ...quant.packing import KPACK_V1
from ...quant.passes import Conv
from . import library
from .cuts import choose
from .quantizing import quantize_residual

ACCUMULATE, INITIALIZE, OUTPUT = range(3)  # csrc/common/problem.h
_ALIGNMENT = 16

CHANNEL_MULTIPLE = 16
"""Codes are copied in pieces of 16 bytes, each inside one tap."""

PACKED_MULTIPLE = 32
"""4- and 3-bit weights are copied in pieces of 32 codes, which begin at multiples of 16 and of 4 bytes."""

MAX_K = 1 << 16
"""255 * 128 * MAX_K < 2^31: no sum of codes minus a zero point leaves int32."""

MAX_ROWS = (
    1 << 30
)  # of the output, times the stride: 31 bits hold them, an image's border and a tile's rows past the end
MAX_OUTPUTS = 1 << 39  # 2^31 blocks of 64 x 64 outputs, with K in 16 splits


_S4_BELOW = (9, 0)
"""Capabilities from 8.0 up to this have 4-bit tensor cores; newer ones emulate them, slower than bytes."""


def _multiplies_nibbles(x: Tensor, act_bits: int, granularity: str, weight_bits: int) -> bool:
    """Whether codes of `x` are packed and multiplied as 4-bit integers, at twice the rate of bytes and in half of their
    memory. per_block codes have 8 bits; 3-bit ones are packed in planes (kpack_v1), no nibbles.
    """
    capability = library.capability(x.device)
    channels = x.shape[1] if x.ndim == 4 else x.shape[-1]
    return (
        act_bits == weight_bits == 4
        and granularity != "per_block"
        and channels % PACKED_MULTIPLE == 0
        and capability is not None
        and library.LEAST_CAPABILITY <= capability < _S4_BELOW
    )


def _aligned(t: Tensor) -> Tensor:
    """`t`, or a copy where its first element is not at a multiple of 16 bytes (a view into another tensor)."""
    return t if t.data_ptr() % _ALIGNMENT == 0 else t.clone()


def geometry_of(codes: Tensor, c_out: int, conv: Conv | None) -> list[int]:
    """Sizes of a product as the library has them (csrc/cuda/product.h); `conv` None is a Linear, a 1x1 convolution over
    an image of width 1.
    """
    per_element = 2 if codes.dtype == torch.uint8 else 1
    if conv is None:
        return [1, codes.shape[:-1].numel(), 1, codes.shape[-1] * per_element, c_out, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    samples, c_in, h, w = codes.shape
    kernel_size, stride, padding, dilation, groups = conv
    return [samples, h, w, c_in * per_element, c_out, *kernel_size, *stride, *padding, *dilation, groups]


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
    conv: Conv | None,
    cut: Sequence[int] | None = None,
) -> Tensor:
    """The integer product with its epilogue. Codes are int8, or uint8: 4-bit ones, packed. `cut` is a `cuts.Cut`, empty
    for what the kernels choose; None: the measured one of this GPU, if there is one.
    """
    geometry = geometry_of(codes, weight_scale.shape[0], conv)
    if cut is None:
        cut = choose(geometry, weight_bits, 4 if codes.dtype == torch.uint8 else 8, codes.device)
    out: Tensor = library.product_op()(
        _aligned(codes), scale, zero_point, _aligned(weight_packed), weight_bits, weight_scale, bias, epilogue, y_hat,
        skip, write_out, out_dtype, geometry, cut,
    )  # fmt: skip
    return out


def accumulate_linear(
    residual_q, scale, weight_packed, weight_scale, y_hat, skip, weight_bits, group_size, layout, out_dtype,
    write_out=True,
):  # fmt: skip
    return integer_product(
        residual_q, scale, None, weight_packed, weight_scale, None, ACCUMULATE, y_hat, skip, write_out, out_dtype,
        weight_bits, None,
    )  # fmt: skip


def accumulate_conv2d(
    residual_q, scale, weight_packed, weight_scale, y_hat, skip, weight_bits, group_size, layout,
    kernel_size, stride, padding, dilation, groups, out_dtype, write_out=True,
):  # fmt: skip
    conv = (kernel_size, stride, padding, dilation, groups)
    return integer_product(
        residual_q, scale, None, weight_packed, weight_scale, None, ACCUMULATE, y_hat, skip, write_out, out_dtype,
        weight_bits, conv,
    )  # fmt: skip


def quantized_linear(
    x_q, scale, zero_point, weight_packed, weight_scale, bias, skip, weight_bits, group_size, layout, out_dtype
):
    return integer_product(
        x_q, scale, zero_point, weight_packed, weight_scale, bias, OUTPUT, None, skip, True, out_dtype, weight_bits,
        None,
    )  # fmt: skip


def quantized_conv2d(
    x_q, scale, zero_point, weight_packed, weight_scale, bias, skip, weight_bits, group_size, layout,
    kernel_size, stride, padding, dilation, groups, out_dtype,
):  # fmt: skip
    conv = (kernel_size, stride, padding, dilation, groups)
    return integer_product(
        x_q, scale, zero_point, weight_packed, weight_scale, bias, OUTPUT, None, skip, True, out_dtype, weight_bits,
        conv,
    )  # fmt: skip


def modulated_linear(
    x, x_hat, scale, weight_packed, weight_scale, y_hat, skip, act_bits, granularity, clip_ratio, weight_bits,
    group_size, layout, write_out=True,
):  # fmt: skip
    packed = _multiplies_nibbles(x, act_bits, granularity, weight_bits)
    codes, used, absmax = quantize_residual(x, x_hat, scale, act_bits, granularity, clip_ratio, packed)
    out = integer_product(
        codes, used, None, weight_packed, weight_scale, None, ACCUMULATE, y_hat, skip, write_out, x.dtype, weight_bits,
        None,
    )  # fmt: skip
    return out, used, absmax


def modulated_conv2d(
    x, x_hat, scale, weight_packed, weight_scale, y_hat, skip, act_bits, granularity, clip_ratio, weight_bits,
    group_size, layout, kernel_size, stride, padding, dilation, groups, write_out=True,
):  # fmt: skip
    packed = _multiplies_nibbles(x, act_bits, granularity, weight_bits)
    codes, used, absmax = quantize_residual(x, x_hat, scale, act_bits, granularity, clip_ratio, packed)
    conv = (kernel_size, stride, padding, dilation, groups)
    out = integer_product(
        codes, used, None, weight_packed, weight_scale, None, ACCUMULATE, y_hat, skip, write_out, x.dtype, weight_bits,
        conv,
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
    if first_step_bits == 0:
        return passes.initialize_in_state_dtype(
            x, x_hat, y_hat, weight_packed, weight_scale, bias, skip, weight_bits, group_size, conv, write_out
        )
    x_hat.zero_()
    codes, used, _ = quantize_residual(x, x_hat, None, first_step_bits, "per_sample")
    return integer_product(
        codes, used, None, weight_packed, weight_scale, bias, INITIALIZE, y_hat, skip, write_out, x.dtype, weight_bits,
        conv,
    )  # fmt: skip


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


def channels_of(problem: Any) -> int:
    """Input channels of the problem of a product."""
    taps = 1 if problem.kernel_size is None else problem.kernel_size[0] * problem.kernel_size[1]
    channels: int = problem.k // taps * problem.groups
    return channels


def _why_not_the_sizes(problem: Any) -> str | None:
    channels = channels_of(problem)
    if channels % CHANNEL_MULTIPLE != 0:
        return (
            f"{channels} input channels: codes are read {CHANNEL_MULTIPLE} at a time, so their number must be "
            f"divisible by {CHANNEL_MULTIPLE}"
        )
    if problem.weight_bits != 8 and problem.k % PACKED_MULTIPLE != 0:
        return (
            f"{problem.weight_bits}-bit weights with k={problem.k}: they are read {PACKED_MULTIPLE} at a time, so k "
            f"must be divisible by {PACKED_MULTIPLE}; use weight_bits=8"
        )
    if problem.k > MAX_K:
        return f"k={problem.k} products can overflow int32; at most {MAX_K} are summed"
    if problem.m * problem.stride[0] * problem.stride[1] >= MAX_ROWS:
        return f"m={problem.m} rows at stride {problem.stride}; less than 2^30 pixels are counted"
    if problem.m * problem.n >= MAX_OUTPUTS:
        return f"{problem.m} x {problem.n} outputs may take more blocks than a launch has; less than 2^39 always fit"
    return None


def why_not(problem: Any) -> str | None:
    """Why the integer product cannot solve `problem`, None if it can."""
    if problem.layout not in (None, KPACK_V1):
        return f"it reads weights in layout {KPACK_V1!r}, not {problem.layout!r}"
    if problem.group_size != -1:
        return f"group_size={problem.group_size}: only one weight scale per output channel; use group_size=-1"
    if problem.groups != 1:
        return f"groups={problem.groups}: only convolutions over all channels"
    pointwise = problem.kernel_size in (None, (1, 1)) and problem.stride == (1, 1) and problem.padding == (0, 0)
    if problem.granularity == "per_token" and not pointwise:
        return "per_token scales do not factor out of a convolution larger than 1x1, stride 1"
    return _why_not_the_sizes(problem)
