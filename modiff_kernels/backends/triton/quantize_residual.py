"""`quantize_residual` and `quantize_activation`: the activation as it is, x = h.

Operands, programs and bytes: quantize_passes.py. Launches: one with scales given (and one that clears absmax, unless
they are per token) or per token; otherwise two, and one that clears the scratch. Limits: rows of at most MAX_ROW
channels for per_token scales.
"""

from torch import Tensor

from . import quantize_passes as passes
from .quantize_device import IDENTITY


def quantize_residual(
    x: Tensor,
    x_hat: Tensor,
    scale: Tensor | None,
    act_bits: int,
    granularity: str,
    clip_ratio: float = 1.0,
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = passes.plan_of(x, x_hat, granularity, act_bits, IDENTITY.value, packed)
    return passes.quantize(x, x_hat, plan, IDENTITY.value, x_hat, scale, act_bits, clip_ratio=clip_ratio, packed=packed)


def quantize_activation(
    x: Tensor, act_bits: int, granularity: str, affine: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    plan = passes.plan_of(x, x, granularity, act_bits, IDENTITY.value)
    return passes.quantize(x, x, plan, IDENTITY.value, None, None, act_bits, affine=affine)
