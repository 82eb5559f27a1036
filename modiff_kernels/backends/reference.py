"""All ops in plain torch on any device: slow, and the definition of correct.

Norms and state are computed in float32, codes by `quant.affine`. Integer sums are done in float64, which is exact:
|code * weight code| <= 2^14, so 2^39 terms fit into its 53 bits."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import affine, packing
from ..quant.operands import Prologue, Window, summed
from ..quant.packing import KPACK_V1
from ..quant.spec import granule_count, row_count


def why_not(problem: Any) -> str | None:
    """Everything is solved, from weights in the portable layout."""
    known = problem.layout in (None, KPACK_V1)
    return None if known else f"it reads weights in layout {KPACK_V1!r}, not {problem.layout!r}"


@torch.no_grad()
def quantize(
    h, prologue, x_hat, scale, bits, granularity, clip_ratio, zero_points, last_absmax=None
) -> tuple[Tensor, Tensor, Tensor]:
    image = h.ndim == 4
    x = apply_prologue(h, prologue)
    if x_hat is None:
        return activation_codes(x, bits, granularity, zero_points, image)
    if last_absmax is not None:
        scale = affine.residual_scale(last_absmax, bits, clip_ratio)
    codes, used, absmax = residual_codes(x, x_hat, scale, bits, granularity, clip_ratio, image)
    if last_absmax is not None:
        last_absmax.copy_(absmax)
    return codes, used, absmax


def apply_prologue(h: Tensor, prologue: Prologue) -> Tensor:
    """x in float32, in the memory format of the ops."""
    kind, gamma, beta, shift, num_groups, eps, silu, _ = prologue
    gamma, beta = (None if t is None else t.to(torch.float32) for t in (gamma, beta))
    x = prologue.joined(h).to(torch.float32)
    if kind == "group_norm":
        if h.ndim == 3:
            x = x.transpose(1, 2)
        if shift is not None:
            x = x + shift.to(torch.float32).reshape(*shift.shape, *[1] * (x.ndim - 2))
        if gamma is None or beta is None or gamma.ndim == 1:
            x = torch.group_norm(x.contiguous(), num_groups, gamma, beta, eps)
        else:
            factor, term = (t.reshape(*t.shape, *[1] * (x.ndim - 2)) for t in (gamma, beta))
            x = torch.group_norm(x.contiguous(), num_groups, None, None, eps) * factor + term
        x = F.silu(x) if silu else x
        x = x.transpose(1, 2) if h.ndim == 3 else x
    elif kind == "layer_norm":
        x = F.layer_norm(x, x.shape[-1:], gamma, beta, eps)
    elif kind == "geglu":
        value, gate = x.chunk(2, dim=-1)
        x = value * F.gelu(gate)
    return x.contiguous(memory_format=torch.channels_last if h.ndim == 4 else torch.contiguous_format)


def residual_codes(
    x: Tensor, x_hat: Tensor, scale: Tensor | None, bits: int, granularity: str, clip_ratio: float, image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and absmax of x - x_hat; x_hat follows."""
    count = granule_count(x_hat.shape, granularity, image)
    state = affine.granules(x_hat, count, image)
    residual = affine.granules(x, count, image) - state.to(torch.float32)
    absmax = residual.abs().amax(1)
    _require_finite(absmax)
    if granularity == "per_block":
        codes, used = affine.quantize_blocks(residual, x_hat.shape[1 if image else -1], bits, clip_ratio)
    else:
        if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
            advice = "calibrate it again or give None (dynamic)"
            raise ValueError(f"quantize: scale holds a value that is not positive and finite; {advice}")
        used = affine.residual_scale(absmax, bits, clip_ratio) if scale is None else scale.expand(count).clone()
        codes = affine.quantize(residual, used, bits)
    residual_q = torch.empty_like(x_hat, dtype=torch.int8)
    affine.granules(residual_q, count, image).copy_(codes)
    state.copy_(state.to(torch.float32) + affine.dequantize(codes, used))
    return residual_q, used, absmax


def activation_codes(
    x: Tensor, bits: int, granularity: str, zero_points: bool, image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of x itself."""
    count = granule_count(x.shape, granularity, image)
    values = affine.granules(x, count, image)
    low, high = values.aminmax(dim=1)
    _require_finite(low, high)
    if zero_points:
        scale, zero_point = affine.affine_range(low.clamp_max(0.0), high.clamp_min(0.0), bits)
    else:
        scale = affine.residual_scale(torch.maximum(-low, high).clamp_min(0.0), bits)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    codes = torch.empty_like(x, dtype=torch.int8)
    affine.granules(codes, count, image).copy_(affine.quantize(values, scale, bits, zero_point))
    return codes, scale, zero_point


def _require_finite(*bounds: Tensor) -> None:
    if not all(affine.all_finite(bound) for bound in bounds):
        advice = "look for overflow in the layers before (float16 ends at 65504) or in the model's input"
        raise ValueError(f"quantize: x holds NaN or Inf; {advice}")


@torch.no_grad()
def product(codes, scale, zero_point, weight, y_hat, bias, skip, window, out_dtype, write_out) -> Tensor:
    values = codes.to(torch.float64)
    if zero_point is not None:
        values = values - per_row(zero_point, codes.shape, window)
    # With groups along K nothing is left of the weight's scales for the output channels.
    left = weight.scale if weight.group_size == -1 else torch.ones_like(weight.scale[:, 0])
    factor, late = per_channel(left, window), scale
    if window is not None and scale.shape[0] > codes.shape[0] and not window.is_pointwise:
        values = values * per_row(scale, codes.shape, window).to(torch.float64)  # such scales do not leave the sum
        late = scale.new_ones(1)
    k = summed(codes.shape[-1 if window is None else 1], window)
    rows = packing.unpack(weight.packed, weight.bits, k).to(torch.float64)
    if weight.group_size != -1:
        rows = rows * affine.expand_weight_scale(weight.scale, k, weight.group_size).to(torch.float64)
    dense = in_shape_of(window, rows)
    if window is None:
        sums = F.linear(values, dense)
    else:
        sums = F.conv2d(values, dense, None, window.stride, window.padding, window.dilation, window.groups)
    if late is scale and weight.group_size == -1:
        sums = sums.round()  # they are integers, but the algorithm of a GPU's convolution need not be exact
    sums = sums.to(torch.float32)
    values = sums * (per_row(late, sums.shape, window) * factor)
    if weight.geglu:
        values = values if bias is None else values + bias.to(torch.float32)
        return (values[..., ::2] * F.gelu(values[..., 1::2])).to(out_dtype)
    return finish(values, y_hat, bias, skip, window, out_dtype, write_out)


def in_shape_of(window: Window | None, rows: Tensor) -> Tensor:
    """Weight rows [N, K] as torch's operators take them: [N, K], or [N, C, R, S] for a convolution."""
    if window is None:
        return rows
    r, s = window.kernel_size
    return affine.rows_to_weight(rows, (rows.shape[0], rows.shape[1] // (r * s), r, s))


def per_channel(vector: Tensor, window: Window | None) -> Tensor:
    """Values of output channels [N], broadcastable to the output."""
    return vector if window is None else vector.reshape(1, -1, 1, 1)


def per_row(values: Tensor, shape: Sequence[int], window: Window | None) -> Tensor:
    """Values of consecutive rows (pixels in NHWC order), broadcastable to a tensor of `shape`."""
    image = window is not None
    rows = values.repeat_interleave(row_count(shape, image) // values.shape[0])
    return rows.reshape(shape[0], 1, shape[2], shape[3]) if image else rows.reshape(*shape[:-1], 1)


def finish(values: Tensor, y_hat, bias, skip, window, out_dtype, write_out) -> Tensor:
    """What follows the sums, `values` in float32: y_hat, bias, skip and the rounding to out_dtype."""
    if y_hat is not None:
        y_hat.copy_(y_hat.to(torch.float32) + values)
        values = y_hat.to(torch.float32)
    if not write_out:
        return values.new_empty((0,), dtype=out_dtype)
    if bias is not None:
        values = values + per_channel(bias.to(torch.float32), window)
    if skip is not None:
        values = values + skip.to(torch.float32)
    memory_format = torch.contiguous_format if window is None else torch.channels_last
    return torch.empty(values.shape, dtype=out_dtype, device=values.device, memory_format=memory_format).copy_(values)


@torch.no_grad()
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, score_scale: float) -> Tensor:
    samples, tokens, channels = q.shape
    q, k, v = [t.view(samples, -1, heads, channels // heads).transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(q, k, v, scale=score_scale).transpose(1, 2).reshape(samples, tokens, channels)
