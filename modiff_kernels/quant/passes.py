"""What every product of codes shares, in torch: the quantising ops themselves, and the steps around an integer product.

The quantising ops are complete (`QUANTIZING_OPS`), computed in float32 on any device. For the rest a backend adds its
product: `residual_codes`, `per_row`, `per_channel`, `store` and `rounded_out` are what stands before and after it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import affine, packing
from .spec import granule_count, row_count

Conv = tuple[
    Sequence[int], Sequence[int], Sequence[int], Sequence[int], int
]  # kernel_size, stride, padding, dilation, groups


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor Inf; waits for the device.

    One pass where the sum is finite, because NaN and Inf stay in a sum; only one that overflows needs a second look.
    """
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())


def require_finite(op: str, *bounds: Tensor) -> None:
    """Raise ValueError unless all values of `bounds` are finite."""
    if not all(all_finite(bound) for bound in bounds):
        raise ValueError(
            f"{op}: x holds NaN or Inf; look for overflow in the layers before (float16 ends at 65504) or in the "
            "model's input"
        )


def _require_usable_scale(op: str, scale: Tensor) -> None:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(
            f"{op}: scale holds a value that is not positive and finite; calibrate it again or give None (dynamic)"
        )


def require_fit(op: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless x can be stored in `dtype`."""
    largest = torch.finfo(dtype).max
    if not bool((x.abs() <= largest).all()):
        raise ValueError(
            f"{op}: x does not fit into the state dtype {dtype} (largest {largest:g}); choose another state dtype"
        )


def residual_codes(
    op: str,
    x: Tensor,
    x_hat: Tensor,
    scale: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float,
    image: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_residual` of x, float of any dtype and any strides, in x_hat's shape."""
    count = granule_count(x_hat.shape, granularity, image)
    state = affine.granules(x_hat, count, image)
    residual = _granules_of(x, count, image) - state.to(torch.float32)
    absmax = residual.abs().amax(1)
    require_finite(op, absmax)
    if granularity == "per_block":
        codes, used = affine.quantize_blocks(residual, x_hat.shape[1 if image else -1], act_bits, clip_ratio)
    else:
        if scale is None:
            used = affine.residual_scale(absmax, act_bits, clip_ratio)
        else:
            _require_usable_scale(op, scale)
            used = scale.expand(count).clone()
        codes = affine.quantize(residual, used, act_bits)
    residual_q = torch.empty_like(x_hat, dtype=torch.int8)
    affine.granules(residual_q, count, image).copy_(codes)
    state.copy_(state.to(torch.float32) + affine.dequantize(codes, used))
    return residual_q, used, absmax


def activation_codes(
    op: str, x: Tensor, like: Tensor, act_bits: int, granularity: str, affine_codes: bool, image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_activation` of x; the codes get the shape and memory format of `like`."""
    count = granule_count(like.shape, granularity, image)
    values = _granules_of(x, count, image)
    low, high = values.aminmax(dim=1)
    require_finite(op, low, high)
    if affine_codes:
        scale, zero_point = affine.affine_range(low.clamp_max(0.0), high.clamp_min(0.0), act_bits)
    else:
        scale = affine.residual_scale(torch.maximum(-low, high).clamp_min(0.0), act_bits)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    x_q = torch.empty_like(like, dtype=torch.int8)
    affine.granules(x_q, count, image).copy_(affine.quantize(values, scale, act_bits, zero_point))
    return x_q, scale, zero_point


def static_activation_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, act_bits: int, image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x, channels_last (`image`) or contiguous, for a calibrated scale float32 [1] and zero point int32 [1].

    Returns them as `quantize_activation` does. Raises ValueError on NaN or Inf, on the CPU and outside compiled code.
    """
    values = _granules_of(x, 1, image)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # the test would wait for the device, and cut code
        require_finite("static_activation_codes", *values.aminmax())
    x_q = torch.empty_like(x, dtype=torch.int8)
    affine.granules(x_q, 1, image).copy_(affine.quantize(values, scale, act_bits, zero_point))
    return x_q, scale, zero_point


def _granules_of(x: Tensor, count: int, image: bool) -> Tensor:
    memory_format = torch.channels_last if image else torch.contiguous_format
    return affine.granules(x.to(torch.float32).contiguous(memory_format=memory_format), count, image)


def _float32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float32)


def _group_norm(
    h: Tensor, shift: Tensor | None, gamma: Tensor | None, beta: Tensor | None, num_groups: int, eps: float, silu: bool
) -> Tensor:
    x = h.to(torch.float32)
    tokens = h.ndim == 3
    if tokens:
        x = x.transpose(1, 2)
    if shift is not None:
        x = x + shift.to(torch.float32).reshape(*shift.shape, *[1] * (x.ndim - 2))
    x = torch.group_norm(x.contiguous(), num_groups, _float32(gamma), _float32(beta), eps)
    if silu:
        x = F.silu(x)
    return x.transpose(1, 2) if tokens else x


def _layer_norm(h: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(h.to(torch.float32), h.shape[-1:], _float32(gamma), _float32(beta), eps)


def _geglu(h: Tensor) -> Tensor:
    values, gates = h.to(torch.float32).chunk(2, dim=-1)
    return values * F.gelu(gates)


@torch.no_grad()
def quantize_residual(
    x: Tensor,
    x_hat: Tensor,
    scale: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float = 1.0,
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    codes, used, absmax = residual_codes(
        "quantize_residual", x, x_hat, scale, act_bits, granularity, clip_ratio, x.ndim == 4
    )
    return packing.pack_channels(codes, act_bits) if packed else codes, used, absmax


@torch.no_grad()
def group_norm_silu_quantize_residual(
    h: Tensor,
    shift: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    x_hat: Tensor,
    scale: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "group_norm_silu_quantize_residual"
    x = _group_norm(h, shift, gamma, beta, num_groups, eps, silu)
    return residual_codes(op, x, x_hat, scale, act_bits, granularity, clip_ratio, h.ndim == 4)


@torch.no_grad()
def layer_norm_quantize_residual(
    h: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    x_hat: Tensor,
    scale: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    x = _layer_norm(h, gamma, beta, eps)
    return residual_codes("layer_norm_quantize_residual", x, x_hat, scale, act_bits, granularity, clip_ratio, False)


@torch.no_grad()
def geglu_quantize_residual(
    h: Tensor, x_hat: Tensor, scale: Tensor | None, act_bits: int, granularity: str, clip_ratio: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    return residual_codes("geglu_quantize_residual", _geglu(h), x_hat, scale, act_bits, granularity, clip_ratio, False)


@torch.no_grad()
def quantize_activation(
    x: Tensor, act_bits: int, granularity: str, affine: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    return activation_codes("quantize_activation", x, x, act_bits, granularity, affine, x.ndim == 4)


@torch.no_grad()
def group_norm_silu_quantize_activation(
    h: Tensor,
    shift: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    act_bits: int,
    granularity: str,
    affine: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    x = _group_norm(h, shift, gamma, beta, num_groups, eps, silu)
    return activation_codes("group_norm_silu_quantize_activation", x, h, act_bits, granularity, affine, h.ndim == 4)


@torch.no_grad()
def layer_norm_quantize_activation(
    h: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    act_bits: int,
    granularity: str,
    affine: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    x = _layer_norm(h, gamma, beta, eps)
    return activation_codes("layer_norm_quantize_activation", x, h, act_bits, granularity, affine, False)


@torch.no_grad()
def geglu_quantize_activation(
    h: Tensor, act_bits: int, granularity: str, affine: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    x = _geglu(h)
    return activation_codes("geglu_quantize_activation", x, x, act_bits, granularity, affine, False)


def summed(x: Tensor, conv: Conv | None) -> int:
    """Products summed per output: K of a Linear, r * s * c_in / groups of a conv."""
    if conv is None:
        return x.shape[-1]
    return conv[0][0] * conv[0][1] * (x.shape[1] // conv[4])


def per_channel(vector: Tensor, conv: Conv | None) -> Tensor:
    """Values of output channels [N], broadcastable to the output."""
    return vector if conv is None else vector.reshape(1, -1, 1, 1)


def per_row(values: Tensor, shape: Sequence[int], conv: Conv | None) -> Tensor:
    """Values of consecutive rows (pixels in NHWC order), broadcastable to a tensor of `shape`."""
    image = conv is not None
    rows = values.repeat_interleave(row_count(shape, image) // values.shape[0])
    return rows.reshape(shape[0], 1, shape[2], shape[3]) if image else rows.reshape(*shape[:-1], 1)


def store(y_hat: Tensor, values: Tensor, skip: Tensor | None, out_dtype: torch.dtype, write_out: bool) -> Tensor:
    """Round float32 `values` to y_hat and make out from what was stored."""
    y_hat.copy_(values)
    return rounded_out(y_hat, skip, out_dtype) if write_out else y_hat.new_empty((0,), dtype=out_dtype)


def rounded_out(values: Tensor, skip: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """values + skip in float32, rounded to out_dtype; never aliases `values`."""
    total = values.to(torch.float32)
    if skip is not None:
        total = total + skip.to(torch.float32)
    return torch.empty_like(values, dtype=out_dtype).copy_(total)


def initialize_in_state_dtype(
    x: Tensor,
    x_hat: Tensor,
    y_hat: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    conv: Conv | None,
    write_out: bool,
) -> Tensor:
    """A first call with activations in high precision, by torch's own operator on the device of the tensors and in the
    dtype of the state: x_hat needs no conversion, and y_hat gets no coarser rounding than its own. Waits for nothing.
    """
    x_hat.copy_(x)
    k = summed(x, conv)
    codes = packing.unpack(weight_packed, weight_bits, k)
    shape = None if conv is None else (codes.shape[0], k // (conv[0][0] * conv[0][1]), *conv[0])
    weight = affine.dequantize_weight(codes, weight_scale, group_size, shape).to(x_hat.dtype)
    bias = None if bias is None else bias.to(x_hat.dtype)
    if conv is None:
        y_hat.copy_(F.linear(x_hat, weight, bias))
    else:
        _, stride, padding, dilation, groups = conv
        y_hat.copy_(F.conv2d(x_hat, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups))
    return rounded_out(y_hat, skip, x.dtype) if write_out else x.new_empty((0,))


QUANTIZING_OPS: tuple[Callable[..., Any], ...] = (
    quantize_residual,
    group_norm_silu_quantize_residual,
    layer_norm_quantize_residual,
    geglu_quantize_residual,
    quantize_activation,
    group_norm_silu_quantize_activation,
    layer_norm_quantize_activation,
    geglu_quantize_activation,
)
