"""The quantising ops of this backend, by name."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ...quant.spec import GRANULARITIES
from .geglu_quantize_residual import geglu_quantize_activation, geglu_quantize_residual
from .group_norm_silu_quantize_residual import group_norm_silu_quantize_activation, group_norm_silu_quantize_residual
from .launching import Variant, recorded
from .layer_norm_quantize_residual import layer_norm_quantize_activation, layer_norm_quantize_residual
from .quantize_passes import why_not
from .quantize_residual import quantize_activation, quantize_residual

__all__ = ["QUANTIZING_KERNELS", "aot_variants", "why_not"]

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

_DTYPES = ((torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32))
_MIXED = (torch.bfloat16, torch.float16)
_IMAGES = ((2, 320, 64, 64), (2, 1280, 16, 16), (2, 1280, 8, 8))
_TOKENS = ((2, 4096, 320), (2, 1024, 1280), (2, 77, 768))


def aot_variants() -> list[Variant]:
    """The forms of the kernels that layers of SD 1.5 launch, each once: every prologue, granularity, source of the
    scale and dtype, at image and token sizes from the first level to the last.
    """
    with recorded() as variants, torch.device("meta"):
        for dtype, state_dtype in _DTYPES:
            for shape in _IMAGES if dtype == torch.float16 else _IMAGES[:1]:
                _call_ops(shape, dtype, state_dtype, ("quantize", "group_norm_silu_quantize"))
            for shape in _TOKENS if dtype == torch.float16 else _TOKENS[:1]:
                _call_ops(shape, dtype, state_dtype, ("quantize", "layer_norm_quantize", "geglu_quantize"))
        _call_ops(_IMAGES[0], *_MIXED, ("quantize", "group_norm_silu_quantize"))
    return list({_key(variant): variant for variant in variants}.values())


def _key(variant: Variant) -> tuple[Any, ...]:
    kernel, signature, constexprs, *rest = variant
    return kernel, *signature.items(), *sorted(constexprs.items()), *rest


def _call_ops(shape: tuple[int, ...], dtype: torch.dtype, state_dtype: torch.dtype, stems: Iterable[str]) -> None:
    image = len(shape) == 4
    channels = shape[1] if image else shape[-1]
    memory_format = torch.channels_last if image else torch.contiguous_format
    x_hat = torch.empty(shape, dtype=state_dtype, memory_format=memory_format)
    vector, shift = torch.empty(channels, dtype=dtype), torch.empty((shape[0], channels), dtype=dtype)
    prologues: dict[str, tuple[Any, ...]] = {
        "quantize": (),
        "group_norm_silu_quantize": (shift, vector, vector, 32, 1e-5, True),
        "layer_norm_quantize": (vector, vector, 1e-5),
        "geglu_quantize": (),
    }
    for stem in stems:
        width = 2 * shape[-1] if stem == "geglu_quantize" else shape[-1]
        h = torch.empty((*shape[:-1], width), dtype=dtype, memory_format=memory_format)
        for granularity in GRANULARITIES:
            dynamic = (*prologues[stem], x_hat, None, 4, granularity)
            QUANTIZING_KERNELS[f"{stem}_residual"](h, *dynamic)
            if granularity != "per_channel":
                given = (*prologues[stem], x_hat, torch.empty(1), 4, granularity)
                QUANTIZING_KERNELS[f"{stem}_residual"](h, *given)
                for affine in (True, False):
                    QUANTIZING_KERNELS[f"{stem}_activation"](h, *prologues[stem], 8, granularity, affine)
