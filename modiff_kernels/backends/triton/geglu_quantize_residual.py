"""`geglu_quantize_residual` and `geglu_quantize_activation`: x = h[..., :K] * gelu(h[..., K:]).

    gelu(g) = g / 2 * (1 + erf(g / sqrt(2)))        in float32

Operands, programs and bytes: quantize_passes.py, with 2 K values of h per row. Launches and limits: as in
quantize_residual.py.
"""

import torch
from torch import Tensor

from . import quantize_passes as passes
from .quantize_device import GEGLU


def geglu_quantize_residual(
    h: Tensor, x_hat: Tensor, scale: Tensor | None, act_bits: int, granularity: str, clip_ratio: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    plan = passes.plan_of(h, x_hat, granularity, act_bits, GEGLU.value)
    return passes.quantize(h, x_hat, plan, GEGLU.value, x_hat, scale, act_bits, clip_ratio=clip_ratio)


def geglu_quantize_activation(
    h: Tensor, act_bits: int, granularity: str, affine: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    like = h.new_empty((*h.shape[:-1], h.shape[-1] // 2), dtype=torch.int8)
    plan = passes.plan_of(h, like, granularity, act_bits, GEGLU.value)
    return passes.quantize(h, like, plan, GEGLU.value, None, None, act_bits, affine=affine)
