"""The method in forty executable lines, as the papers write it, in float64: what every backend is tested against.

MoDiff (Gao et al., ICML 2025), eqs. 8-17. A linear operator `apply` (a Linear or a convolution without bias) is called
on x_0, x_1, ... along one run; `scale` is per sample."""

from collections.abc import Callable

import torch
from torch import Tensor

FIRST_UPDATES, FIRST_BITS = 2, 8


def absmax_scale(residual: Tensor, bits: int) -> Tensor:
    """A scale per sample that clips nothing: the largest residual lies half a step above the largest code."""
    absmax = residual.abs().flatten(1).amax(1).reshape(-1, *[1] * (residual.ndim - 1))
    return (absmax / (2 ** (bits - 1) - 0.5)).clamp_min(2.0**-100)


def quantize(x: Tensor, x_hat: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of the residual; x_hat follows what they stand for, so that the error stays in the next residual."""
    residual = x - x_hat
    codes = torch.clamp(torch.round(residual / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    x_hat += scale * codes
    return codes


def product(codes: Tensor, scale: Tensor, y_hat: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """The operator is linear: its output changes by what the codes stand for. The bias is in y_hat already."""
    y_hat += scale * apply(codes)
    return y_hat.clone()


def run(inputs: list[Tensor], apply: Callable[[Tensor], Tensor], bias: Tensor | float, bits: int) -> list[Tensor]:
    """Outputs of one run. At all times y_hat == apply(x_hat) + bias."""
    x_hat = torch.zeros_like(inputs[0])
    y_hat = torch.zeros_like(apply(x_hat)) + bias
    outputs = []
    for call, x in enumerate(inputs):
        updates = [FIRST_BITS] * FIRST_UPDATES if call == 0 else [bits]
        for update_bits in updates:
            scale = absmax_scale(x - x_hat, update_bits)
            codes = quantize(x, x_hat, scale, update_bits)
            out = product(codes, scale, y_hat, apply)
        outputs.append(out)
    return outputs
