"""The quantising ops of this backend, by name."""

from collections.abc import Callable
from typing import Any

from .geglu_quantize_residual import geglu_quantize_activation, geglu_quantize_residual
from .group_norm_silu_quantize_residual import group_norm_silu_quantize_activation, group_norm_silu_quantize_residual
from .layer_norm_quantize_residual import layer_norm_quantize_activation, layer_norm_quantize_residual
from .quantize_passes import why_not
from .quantize_residual import quantize_activation, quantize_residual

__all__ = ["QUANTIZING_KERNELS", "why_not"]

QUANTIZING_KERNELS: dict[str, Callable[..., Any]] = {
    fn.__name__: fn
    for fn in (
        quantize_residual,
        group_norm_silu_quantize_residual,
        layer_norm_quantize_residual,
        geglu_quantize_residual,
        quantize_activation,
        group_norm_silu_quantize_activation,
        layer_norm_quantize_activation,
        geglu_quantize_activation,
    )
}
