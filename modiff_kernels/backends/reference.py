"""All ops in plain torch on any device: slow, and the definition of correct.

Integer sums are done in float64, which is exact: |code * weight code| <= 2^14, so 2^39 terms fit into its 53 bits.
Norms and state are computed in float32; the quantising ops stand in quant/passes.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import affine, packing, passes
from ..quant.packing import KPACK_V1
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


def _weight(
    weight_packed: Tensor, weight_scale: Tensor, weight_bits: int, group_size: int, k: int, conv: passes.Conv | None
) -> tuple[Tensor, Tensor]:
    """The weight in float64 and the factor that is left for its output channels: codes and weight_scale, or, with
    groups along K, dequantised weights and ones.
    """
    rows = packing.unpack(weight_packed, weight_bits, k).to(torch.float64)
    factor = weight_scale
    if group_size != -1:
        rows = rows * affine.expand_weight_scale(weight_scale, k, group_size).to(torch.float64)
        factor = torch.ones_like(weight_scale[:, 0])
    if conv is None:
        return rows, factor
    r, s = conv[0]
    return affine.rows_to_weight(rows, (rows.shape[0], k // (r * s), r, s)), factor


def _apply(x: Tensor, weight: Tensor, conv: passes.Conv | None) -> Tensor:
    """Linear or Conv2d in float64; [..., N] or [N, c_out, P, Q]."""
    if conv is None:
        return F.linear(x, weight)
    _, stride, padding, dilation, groups = conv
    return F.conv2d(x, weight, None, tuple(stride), tuple(padding), tuple(dilation), groups)


def _product(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_bits: int,
    group_size: int,
    conv: passes.Conv | None,
) -> Tensor:
    """scale * weight_scale * (exact integer product of codes - zero_point and weight codes), float32."""
    weight, factor = _weight(weight_packed, weight_scale, weight_bits, group_size, passes.summed(codes, conv), conv)
    values = codes.to(torch.float64)
    if zero_point is not None:
        values = values - passes.per_row(zero_point, codes.shape, conv)
    if conv is not None and scale.shape[0] > codes.shape[0]:
        one_pixel = tuple(conv[0]) == (1, 1) and tuple(conv[1]) == (1, 1) and tuple(conv[2]) == (0, 0)
        if not one_pixel:  # a scale per pixel does not leave the sum over the kernel window
            values = values * passes.per_row(scale, codes.shape, conv).to(torch.float64)
            return _apply(values, weight, conv).to(torch.float32) * passes.per_channel(factor, conv)
    total = _apply(values, weight, conv).to(torch.float32)
    return total * (passes.per_row(scale, total.shape, conv) * passes.per_channel(factor, conv))


def _accumulate(
    residual_q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    y_hat: Tensor,
    skip: Tensor | None,
    weight_bits: int,
    group_size: int,
    conv: passes.Conv | None,
    out_dtype: torch.dtype,
    write_out: bool,
) -> Tensor:
    delta = _product(residual_q, scale, None, weight_packed, weight_scale, weight_bits, group_size, conv)
    return passes.store(y_hat, y_hat.to(torch.float32) + delta, skip, out_dtype, write_out)


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
    conv: passes.Conv | None,
    first_step_bits: int,
    write_out: bool,
) -> Tensor:
    passes.require_finite(op, x)
    passes.require_fit(op, x, x_hat.dtype)
    if first_step_bits == 0:
        x_hat.copy_(x)
        weight, factor = _weight(weight_packed, weight_scale, weight_bits, group_size, passes.summed(x, conv), conv)
        values = _apply(x_hat.to(torch.float64), weight, conv).to(torch.float32) * passes.per_channel(factor, conv)
    else:
        count, image = x.shape[0], conv is not None
        x_q, scale, _ = passes.activation_codes(op, x, x, first_step_bits, "per_sample", False, image)
        affine.granules(x_hat, count, image).copy_(affine.dequantize(affine.granules(x_q, count, image), scale))
        values = _product(x_q, scale, None, weight_packed, weight_scale, weight_bits, group_size, conv)
    if bias is not None:
        values = values + passes.per_channel(bias.to(torch.float32), conv)
    return passes.store(y_hat, values, skip, x.dtype, write_out)


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
    residual_q, used, absmax = passes.residual_codes(
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
    residual_q, used, absmax = passes.residual_codes(
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
    conv: passes.Conv | None,
    out_dtype: torch.dtype,
) -> Tensor:
    values = _product(x_q, scale, zero_point, weight_packed, weight_scale, weight_bits, group_size, conv)
    if bias is not None:
        values = values + passes.per_channel(bias.to(torch.float32), conv)
    memory_format = torch.contiguous_format if conv is None else torch.channels_last
    out = torch.empty(values.shape, dtype=out_dtype, device=values.device, memory_format=memory_format)
    return out.copy_(passes.rounded_out(values, skip, out_dtype))


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
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, score_scale: float) -> Tensor:
    by_head = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*by_head, scale=score_scale).transpose(1, 2).flatten(2).contiguous()


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
    *passes.QUANTIZING_OPS,
    accumulate_linear,
    accumulate_conv2d,
    initialize_linear,
    initialize_conv2d,
    modulated_linear,
    modulated_conv2d,
    quantized_linear,
    quantized_conv2d,
    attention,
    pack_weight,
    unpack_weight,
)
KERNELS: dict[str, Kernel] = {fn.__name__: Kernel(fn, _why_not) for fn in _OPS}
