"""All ops in plain torch on any device: slow, and the definition of correct.

Integer sums are done in float64, which is exact: |code * weight code| <= 2^14, so 2^39 terms fit into its 53 bits.
Norms and state are computed in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import affine, packing
from ..quant.packing import KPACK_V1
from ..quant.spec import granule_count, row_count
from . import Kernel

NAME = "reference"


def unavailable() -> str | None:
    """None: torch is always there."""
    return None


def preferred_layout(problem: Any) -> str:
    """The portable layout is the only one read here."""
    return KPACK_V1


def prepare_weight(
    weight_packed: Tensor,
    weight_bits: int,
    n: int,
    k: int,
    layout_from: str,
    layout_to: str,
    kernel_size: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The identity on kpack_v1; ValueError for other layouts."""
    for layout in (layout_from, layout_to):
        packing.check_layout("prepare_weight (reference)", layout)
    return weight_packed


def _require_finite(op: str, *bounds: Tensor) -> None:
    if not all(bool(torch.isfinite(bound).all()) for bound in bounds):
        raise ValueError(
            f"{op}: x holds NaN or Inf; look for overflow in the layers before (float16 ends at 65504) or in the "
            "model's input"
        )


def _require_usable_scale(op: str, scale: Tensor) -> None:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(
            f"{op}: scale holds a value that is not positive and finite; calibrate it again or give None (dynamic)"
        )


def _require_fit(op: str, x: Tensor, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    if not bool((x.abs() <= largest).all()):
        raise ValueError(
            f"{op}: x does not fit into the state dtype {dtype} (largest {largest:g}); choose another state dtype"
        )


def _residual(
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
    _require_finite(op, absmax)
    if granularity == "per_channel":
        codes, used = _channel_codes(residual, x_hat.shape[1 if image else -1], act_bits, clip_ratio)
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


def _channel_codes(residual: Tensor, channels: int, act_bits: int, clip_ratio: float) -> tuple[Tensor, Tensor]:
    """Codes times multipliers, int8 like `residual` [N, rows * channels], and scales [N], for per_channel."""
    values = residual.unflatten(1, (-1, channels))
    scale, multiplier = affine.channel_multipliers(values.abs().amax(1), act_bits, clip_ratio)
    by_channel = values.movedim(2, 1).flatten(0, 1)
    codes = affine.quantize(by_channel, (scale.unsqueeze(1) * multiplier).flatten(), act_bits)
    codes = codes * multiplier.to(torch.int8).reshape(-1, 1)
    return codes.unflatten(0, (-1, channels)).movedim(1, 2).flatten(1), scale


def _activation(
    op: str, x: Tensor, like: Tensor, act_bits: int, granularity: str, affine_codes: bool, image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_activation` of x; the codes get the shape and memory format of `like`."""
    count = granule_count(like.shape, granularity, image)
    values = _granules_of(x, count, image)
    low, high = values.aminmax(dim=1)
    _require_finite(op, low, high)
    if affine_codes:
        scale, zero_point = affine.affine_range(low.clamp_max(0.0), high.clamp_min(0.0), act_bits)
    else:
        scale = affine.residual_scale(torch.maximum(-low, high).clamp_min(0.0), act_bits)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    x_q = torch.empty_like(like, dtype=torch.int8)
    affine.granules(x_q, count, image).copy_(affine.quantize(values, scale, act_bits, zero_point))
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
    x: Tensor, x_hat: Tensor, scale: Tensor | None, act_bits: int, granularity: str, clip_ratio: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    return _residual("quantize_residual", x, x_hat, scale, act_bits, granularity, clip_ratio, x.ndim == 4)


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
    return _residual(op, x, x_hat, scale, act_bits, granularity, clip_ratio, h.ndim == 4)


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
    return _residual("layer_norm_quantize_residual", x, x_hat, scale, act_bits, granularity, clip_ratio, False)


@torch.no_grad()
def geglu_quantize_residual(
    h: Tensor, x_hat: Tensor, scale: Tensor | None, act_bits: int, granularity: str, clip_ratio: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    return _residual("geglu_quantize_residual", _geglu(h), x_hat, scale, act_bits, granularity, clip_ratio, False)


@torch.no_grad()
def quantize_activation(
    x: Tensor, act_bits: int, granularity: str, affine: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    return _activation("quantize_activation", x, x, act_bits, granularity, affine, x.ndim == 4)


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
    return _activation("group_norm_silu_quantize_activation", x, h, act_bits, granularity, affine, h.ndim == 4)


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
    return _activation("layer_norm_quantize_activation", x, h, act_bits, granularity, affine, False)


@torch.no_grad()
def geglu_quantize_activation(
    h: Tensor, act_bits: int, granularity: str, affine: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    x = _geglu(h)
    return _activation("geglu_quantize_activation", x, x, act_bits, granularity, affine, False)


Conv = tuple[
    Sequence[int], Sequence[int], Sequence[int], Sequence[int], int
]  # kernel_size, stride, padding, dilation, groups


def _weight(
    weight_packed: Tensor, weight_scale: Tensor, weight_bits: int, group_size: int, k: int, conv: Conv | None
) -> tuple[Tensor, Tensor]:
    """The weight in float64 and the factor that is left for its output channels: codes and weight_scale, or, with
    groups along
    K, dequantised weights and ones."""
    rows = packing.unpack(weight_packed, weight_bits, k).to(torch.float64)
    factor = weight_scale
    if group_size != -1:
        rows = rows * affine.expand_weight_scale(weight_scale, k, group_size).to(torch.float64)
        factor = torch.ones_like(weight_scale[:, 0])
    if conv is None:
        return rows, factor
    r, s = conv[0]
    return affine.rows_to_weight(rows, (rows.shape[0], k // (r * s), r, s)), factor


def _k(x: Tensor, conv: Conv | None) -> int:
    if conv is None:
        return x.shape[-1]
    return conv[0][0] * conv[0][1] * (x.shape[1] // conv[4])


def _apply(x: Tensor, weight: Tensor, conv: Conv | None) -> Tensor:
    """Linear or Conv2d in float64; [..., N] or [N, c_out, P, Q]."""
    if conv is None:
        return F.linear(x, weight)
    _, stride, padding, dilation, groups = conv
    return F.conv2d(x, weight, None, tuple(stride), tuple(padding), tuple(dilation), groups)


def _per_channel(vector: Tensor, conv: Conv | None) -> Tensor:
    return vector if conv is None else vector.reshape(1, -1, 1, 1)


def _per_row(values: Tensor, shape: Sequence[int], conv: Conv | None) -> Tensor:
    """Values of consecutive rows (pixels in NHWC order), broadcastable to a tensor of `shape`."""
    image = conv is not None
    rows = values.repeat_interleave(row_count(shape, image) // values.shape[0])
    return rows.reshape(shape[0], 1, shape[2], shape[3]) if image else rows.reshape(*shape[:-1], 1)


def _product(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_bits: int,
    group_size: int,
    conv: Conv | None,
) -> Tensor:
    """scale * weight_scale * (exact integer product of codes - zero_point and weight codes), float32."""
    weight, factor = _weight(weight_packed, weight_scale, weight_bits, group_size, _k(codes, conv), conv)
    values = codes.to(torch.float64)
    if zero_point is not None:
        values = values - _per_row(zero_point, codes.shape, conv)
    if conv is not None and scale.shape[0] > codes.shape[0]:
        one_pixel = tuple(conv[0]) == (1, 1) and tuple(conv[1]) == (1, 1) and tuple(conv[2]) == (0, 0)
        if not one_pixel:  # a scale per pixel does not leave the sum over the kernel window
            values = values * _per_row(scale, codes.shape, conv).to(torch.float64)
            return _apply(values, weight, conv).to(torch.float32) * _per_channel(factor, conv)
    total = _apply(values, weight, conv).to(torch.float32)
    return total * (_per_row(scale, total.shape, conv) * _per_channel(factor, conv))


def _store(y_hat: Tensor, values: Tensor, skip: Tensor | None, out_dtype: torch.dtype, write_out: bool) -> Tensor:
    """Round float32 `values` to y_hat and make out from what was stored."""
    y_hat.copy_(values)
    return _out(y_hat, skip, out_dtype) if write_out else y_hat.new_empty((0,), dtype=out_dtype)


def _out(values: Tensor, skip: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    total = values.to(torch.float32)
    if skip is not None:
        total = total + skip.to(torch.float32)
    return torch.empty_like(values, dtype=out_dtype).copy_(total)


def _accumulate(
    residual_q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    y_hat: Tensor,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    conv: Conv | None,
    out_dtype: torch.dtype,
    write_out: bool,
) -> Tensor:
    delta = _product(residual_q, scale, None, weight_packed, weight_scale, weight_bits, group_size, conv)
    return _store(y_hat, y_hat.to(torch.float32) + delta, skip, out_dtype, write_out)


@torch.no_grad()
def accumulate_linear(
    residual_q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    y_hat: Tensor,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    layout: str,
    out_dtype: torch.dtype,
    write_out: bool = True,
) -> Tensor:
    return _accumulate(
        residual_q, scale, weight_packed, weight_scale, y_hat, skip, weight_bits, group_size, None, out_dtype, write_out
    )


@torch.no_grad()
def accumulate_conv2d(
    residual_q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    y_hat: Tensor,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    layout: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_dtype: torch.dtype,
    write_out: bool = True,
) -> Tensor:
    conv = (kernel_size, stride, padding, dilation, groups)
    return _accumulate(
        residual_q, scale, weight_packed, weight_scale, y_hat, skip, weight_bits, group_size, conv, out_dtype, write_out
    )


def _initialize(
    op: str,
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
    first_step_bits: int,
    write_out: bool,
) -> Tensor:
    _require_finite(op, x)
    _require_fit(op, x, x_hat.dtype)
    if first_step_bits == 0:
        x_hat.copy_(x)
        weight, factor = _weight(weight_packed, weight_scale, weight_bits, group_size, _k(x, conv), conv)
        values = _apply(x_hat.to(torch.float64), weight, conv).to(torch.float32) * _per_channel(factor, conv)
    else:
        count, image = x.shape[0], conv is not None
        x_q, scale, _ = _activation(op, x, x, first_step_bits, "per_sample", False, image)
        affine.granules(x_hat, count, image).copy_(affine.dequantize(affine.granules(x_q, count, image), scale))
        values = _product(x_q, scale, None, weight_packed, weight_scale, weight_bits, group_size, conv)
    if bias is not None:
        values = values + _per_channel(bias.to(torch.float32), conv)
    return _store(y_hat, values, skip, x.dtype, write_out)


@torch.no_grad()
def initialize_linear(
    x: Tensor,
    x_hat: Tensor,
    y_hat: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    layout: str,
    first_step_bits: int = 0,
    write_out: bool = True,
) -> Tensor:
    return _initialize(
        "initialize_linear", x, x_hat, y_hat, weight_packed, weight_scale, bias, skip, weight_bits, group_size, None,
        first_step_bits, write_out,
    )  # fmt: skip


@torch.no_grad()
def initialize_conv2d(
    x: Tensor,
    x_hat: Tensor,
    y_hat: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    layout: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    first_step_bits: int = 0,
    write_out: bool = True,
) -> Tensor:
    conv = (kernel_size, stride, padding, dilation, groups)
    return _initialize(
        "initialize_conv2d", x, x_hat, y_hat, weight_packed, weight_scale, bias, skip, weight_bits, group_size, conv,
        first_step_bits, write_out,
    )  # fmt: skip


@torch.no_grad()
def modulated_linear(
    x: Tensor,
    x_hat: Tensor,
    scale: Tensor | None,
    weight_packed: Tensor,
    weight_scale: Tensor,
    y_hat: Tensor,
    skip: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float,
    weight_bits: int,
    group_size: int,
    layout: str,
    write_out: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    residual_q, used, absmax = _residual(
        "modulated_linear", x, x_hat, scale, act_bits, granularity, clip_ratio, image=False
    )
    out = _accumulate(
        residual_q, used, weight_packed, weight_scale, y_hat, skip, weight_bits, group_size, None, x.dtype, write_out
    )
    return out, used, absmax


@torch.no_grad()
def modulated_conv2d(
    x: Tensor,
    x_hat: Tensor,
    scale: Tensor | None,
    weight_packed: Tensor,
    weight_scale: Tensor,
    y_hat: Tensor,
    skip: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float,
    weight_bits: int,
    group_size: int,
    layout: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    write_out: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    residual_q, used, absmax = _residual(
        "modulated_conv2d", x, x_hat, scale, act_bits, granularity, clip_ratio, image=True
    )
    conv = (kernel_size, stride, padding, dilation, groups)
    out = _accumulate(
        residual_q, used, weight_packed, weight_scale, y_hat, skip, weight_bits, group_size, conv, x.dtype, write_out
    )
    return out, used, absmax


def _quantized(
    x_q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    conv: Conv | None,
    out_dtype: torch.dtype,
) -> Tensor:
    values = _product(x_q, scale, zero_point, weight_packed, weight_scale, weight_bits, group_size, conv)
    if bias is not None:
        values = values + _per_channel(bias.to(torch.float32), conv)
    memory_format = torch.contiguous_format if conv is None else torch.channels_last
    out = torch.empty(values.shape, dtype=out_dtype, device=values.device, memory_format=memory_format)
    return out.copy_(_out(values, skip, out_dtype))


@torch.no_grad()
def quantized_linear(
    x_q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    layout: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return _quantized(
        x_q, scale, zero_point, weight_packed, weight_scale, bias, skip, weight_bits, group_size, None, out_dtype
    )


@torch.no_grad()
def quantized_conv2d(
    x_q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    layout: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    conv = (kernel_size, stride, padding, dilation, groups)
    return _quantized(
        x_q, scale, zero_point, weight_packed, weight_scale, bias, skip, weight_bits, group_size, conv, out_dtype
    )


@torch.no_grad()
def pack_weight(weight_q: Tensor, weight_bits: int, layout: str = KPACK_V1) -> Tensor:
    return packing.pack(weight_q, weight_bits)


@torch.no_grad()
def unpack_weight(weight_packed: Tensor, weight_bits: int, n: int, k: int, layout: str = KPACK_V1) -> Tensor:
    return packing.unpack(weight_packed, weight_bits, k)


def _why_not(problem: Any) -> str | None:
    if problem.layout in (None, KPACK_V1):
        return None
    return f"it reads weights in layout {KPACK_V1!r}, not {problem.layout!r}"


_OPS: tuple[Callable[..., Any], ...] = (
    quantize_residual,
    group_norm_silu_quantize_residual,
    layer_norm_quantize_residual,
    geglu_quantize_residual,
    quantize_activation,
    group_norm_silu_quantize_activation,
    layer_norm_quantize_activation,
    geglu_quantize_activation,
    accumulate_linear,
    accumulate_conv2d,
    initialize_linear,
    initialize_conv2d,
    modulated_linear,
    modulated_conv2d,
    quantized_linear,
    quantized_conv2d,
    pack_weight,
    unpack_weight,
)
KERNELS: dict[str, Kernel] = {fn.__name__: Kernel(fn, _why_not) for fn in _OPS}
