"""The affine quantiser in torch: the one place where its formulas stand.

Rounding contract, the same on every backend::

    qmin, qmax = -2^(bits-1), 2^(bits-1) - 1
    inv_scale  = 1 / scale                                        fp32, computed once per scale
    code       = clamp(rne(x * inv_scale) + zero_point, qmin, qmax)
    x         ~= scale * (code - zero_point)

`rne` rounds half to even; `zero_point` is 0 for residuals and weights. All functions here take *granules*: a float32
tensor [granules, elements] whose rows share a scale (`granules` makes that view), with scales float32 [granules]."""

import torch
from torch import Tensor

from .spec import BLOCK_ROWS, block_count, check_bits, check_group_size, group_count, quant_max, quant_min

MIN_SCALE = 2.0**-100
WEIGHT_METHODS = ("absmax", "mse")


def granules(x: Tensor, count: int, image: bool) -> Tensor:
    """View `x` as [count, elements], one row per granule. image: channels_last [N, C, H, W] (elements in NHWC order),
    else contiguous [..., K]; RuntimeError if `x` has another memory format."""
    return (x.permute(0, 2, 3, 1) if image else x).view(count, -1)


def residual_scale(absmax: Tensor, bits: int, clip_ratio: float = 1.0) -> Tensor:
    """Dynamic scale of a symmetric quantiser: max(clip_ratio * absmax / (2^(bits-1) - 0.5), 2^-100). absmax lies half a
    step above the largest code, so at clip_ratio 1 no error is larger than half a step, and the step is smaller than
    with 2^(bits-1) - 1. The lowest code is met at ties and with given scales only. absmax: float32, any shape; returns
    float32 of the same shape. Delayed scales come from an earlier update's absmax."""
    levels = torch.full_like(absmax, 2 ** (bits - 1) - 0.5)
    return torch.clamp_min(absmax * clip_ratio / levels, MIN_SCALE)


def block_multipliers(absmax: Tensor, bits: int, clip_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale [N] and integer multipliers [N, B, C] of granularity per_block, from the absmax [N, B, C] of every block.

    scale * multiplier is the scale of a block; code * multiplier, with codes of `bits` bits, fits int8::

        most       = 2^(8-bits)
        reach      = 2^(bits-1) - 13/16
        scale      = max(clip_ratio * max_bc absmax_bc / (reach * most), 2^-100)
        multiplier = clamp(ceil(clip_ratio * absmax_bc / (reach * scale)), 1, most)

    All float32. This is the per-channel scale of MoDiff's paper ("LCQ") on small blocks, in a form that an integer
    product can take. Why 13/16, and not the half step of `residual_scale`: docs/cpu_kernels.md."""
    reach, most = 2 ** (bits - 1) - 13 / 16, 2 ** (8 - bits)
    levels = torch.full_like(absmax[:, 0, 0], reach * most)
    scale = torch.clamp_min(absmax.amax((1, 2)) * clip_ratio / levels, MIN_SCALE)
    multiplier = torch.ceil(absmax * clip_ratio / (scale * reach)[:, None, None]).clamp_(1, most)
    return scale, multiplier


def affine_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero_point (int32) of an affine quantiser over [low, high], float32, low <= 0 <= high. scale
    = max((high - low) / (2^bits - 1), 2^-100); zero_point = clamp(rne(-low / scale) + qmin, qmin, qmax)."""
    steps = torch.full_like(low, 2**bits - 1)
    scale = torch.clamp_min((high - low) / steps, MIN_SCALE)
    zero_point = torch.round(-low * inverse(scale)) + quant_min(bits)
    return scale, zero_point.clamp_(quant_min(bits), quant_max(bits)).to(torch.int32)


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor Inf: both stay in a sum; one that overflows needs a second look. Waits."""
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())


def static_codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes of x, an image (channels_last) or rows (contiguous), for one calibrated scale float32 [1] and zero point.
    ValueError on NaN or Inf, on the CPU and outside compiled code."""
    image = x.ndim == 4
    memory_format = torch.channels_last if image else torch.contiguous_format
    values = granules(x.to(torch.float32).contiguous(memory_format=memory_format), 1, image)
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not all_finite(values):
        raise ValueError("x holds NaN or Inf; look for overflow in the layers before or in the model's input")
    codes = torch.empty_like(x, dtype=torch.int8)
    granules(codes, 1, image).copy_(quantize(values, scale, bits, zero_point))
    return codes


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, correctly rounded in float32."""
    return torch.ones_like(scale) / scale


def quantize(x: Tensor, scale: Tensor, bits: int, zero_point: Tensor | None = None) -> Tensor:
    """Codes int8 [granules, elements] of x float32 [granules, elements]; scale and zero_point [granules]."""
    codes = (x * inverse(scale).unsqueeze(-1)).round_()
    if zero_point is not None:
        codes += zero_point.unsqueeze(-1)
    return codes.clamp_(quant_min(bits), quant_max(bits)).to(torch.int8)


def quantize_blocks(x: Tensor, channels: int, bits: int, clip_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Granularity per_block: codes times multipliers, int8 like `x` float32 [N, rows * channels], and scales [N]."""
    values = x.unflatten(1, (-1, channels))
    rows = values.shape[1]
    blocks = block_count(rows, bits)
    if blocks == 0:
        scale = residual_scale(x.abs().amax(1), bits, clip_ratio)
        return quantize(x, scale, bits), scale
    ends = [*range(BLOCK_ROWS, blocks * BLOCK_ROWS, BLOCK_ROWS), rows]
    parts = values.tensor_split(ends[:-1], dim=1)
    scale, multiplier = block_multipliers(torch.stack([p.abs().amax(1) for p in parts], 1), bits, clip_ratio)
    sizes = torch.tensor([p.shape[1] for p in parts], device=x.device)
    by_row = multiplier.repeat_interleave(sizes, dim=1)  # [N, rows, C]
    codes = quantize(values.unsqueeze(-1).flatten(0, 2), (scale[:, None, None] * by_row).flatten(), bits)
    return (codes.view_as(values) * by_row.to(torch.int8)).flatten(1), scale


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """scale * (code - zero_point), float32 [granules, elements]."""
    values = codes.to(torch.float32)
    if zero_point is not None:
        values -= zero_point.unsqueeze(-1)
    return values * scale.unsqueeze(-1)


def weight_rows(weight: Tensor) -> Tensor:
    """[N, K] from a Linear weight [N, K] or a conv weight [N, C, R, S]; K runs in (r, s, c) order for a conv."""
    if weight.ndim not in (2, 4):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [N, K] or [N, C, R, S]")
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def quantize_weight(weight: Tensor, bits: int, group_size: int = -1, method: str = "absmax") -> tuple[Tensor, Tensor]:
    """Symmetric round-to-nearest weight codes, one scale per output channel or per group along K.

    weight: float [N, K] or [N, C, R, S], any memory format. Returns weight_q int8 [N, K] with K in (r, s, c) order and
    codes in -2^(bits-1) .. 2^(bits-1)-1, and weight_scale float32 [N] (group_size -1) or [N, ceil(K / group_size)].

    method "absmax": scale = absmax / (2^(bits-1) - 1), no weight is clipped. "mse": the scale out of 81 between 0.2 and
    1.0 times that with the smallest squared error of its granule; it never has a larger error than "absmax". Raises
    ValueError on bits, group_size, method or shape that are not allowed and on NaN or Inf."""
    where = "quantize_weight"
    check_bits(where, "bits", bits)
    check_group_size(where, group_size)
    if method not in WEIGHT_METHODS:
        raise ValueError(f"{where}: method={method!r} is not known; choose one of {str(WEIGHT_METHODS)[1:-1]}")
    rows = weight_rows(weight.detach()).to(torch.float32)
    if not all_finite(rows):
        raise ValueError(f"{where}: weight holds NaN or Inf; repair the checkpoint before quantising it")
    n, k = rows.shape
    groups = group_count(k, group_size)
    width = k if group_size == -1 else group_size
    missing = groups * width - k
    blocks = (torch.nn.functional.pad(rows, (0, missing)) if missing else rows).reshape(n * groups, width)
    full = torch.clamp_min(torch.linalg.vector_norm(blocks, torch.inf, 1) / quant_max(bits), MIN_SCALE)
    scale = full if method == "absmax" else _smallest_error_scale(blocks, full, bits)
    weight_q = quantize(blocks, scale, bits).reshape(n, groups * width)[:, :k].contiguous()
    return weight_q, scale if group_size == -1 else scale.reshape(n, groups)


def _smallest_error_scale(blocks: Tensor, full: Tensor, bits: int) -> Tensor:
    best_scale, best_error = full, torch.full_like(full, torch.inf)
    for ratio in torch.linspace(1.0, 0.2, 81).tolist():
        scale = torch.clamp_min(full * ratio, MIN_SCALE)
        error = (dequantize(quantize(blocks, scale, bits), scale) - blocks).square().sum(1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def expand_weight_scale(weight_scale: Tensor, k: int, group_size: int) -> Tensor:
    """Scale of every weight: [N, 1] (group_size -1) or [N, k] from weight_scale [N] or [N, ceil(k / group_size)]."""
    return weight_scale[:, None] if group_size == -1 else weight_scale.repeat_interleave(group_size, dim=1)[:, :k]


def dequantize_weight(
    weight_q: Tensor, weight_scale: Tensor, group_size: int = -1, shape: tuple[int, ...] | torch.Size | None = None
) -> Tensor:
    """weight_scale * weight_q, float32 [N, K], or in `shape`, that of the weight."""
    rows = weight_q.to(torch.float32) * expand_weight_scale(weight_scale, weight_q.shape[1], group_size)
    return rows if shape is None else rows_to_weight(rows, shape)


def rows_to_weight(rows: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """[N, K] back to a Linear weight [N, K] or a conv weight [N, C, R, S]: the inverse of `weight_rows`."""
    return rows.unflatten(1, (*shape[2:], shape[1])).permute(0, 3, 1, 2) if len(shape) == 4 else rows
