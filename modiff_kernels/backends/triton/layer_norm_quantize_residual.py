"""`layer_norm_quantize_residual` and `layer_norm_quantize_activation`: x = layer_norm(h) over the last dimension.

    x = (h - mean) / sqrt(var + eps) * gamma + beta        mean and (biased) var of a row, in float32

Operands, programs and bytes: quantize_passes.py; the statistics are taken from the registers that hold the row, so the
norm costs no further bytes. Launches: as in quantize_residual.py. Limits: rows of at most MAX_ROW channels.
"""

from torch import Tensor

from . import quantize_passes as passes
from .quantize_device import LAYER_NORM


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
    plan = passes.plan_of(h, x_hat, granularity, act_bits, LAYER_NORM.value)
    return passes.quantize(
        h, x_hat, plan, LAYER_NORM.value, x_hat, scale, act_bits, clip_ratio=clip_ratio, a=gamma, b=beta, eps=eps
    )


def layer_norm_quantize_activation(
    h: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    act_bits: int,
    granularity: str,
    affine: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = passes.plan_of(h, h, granularity, act_bits, LAYER_NORM.value)
    return passes.quantize(h, h, plan, LAYER_NORM.value, None, None, act_bits, affine=affine, a=gamma, b=beta, eps=eps)
