"""The quantising ops of this backend, by name."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ...quant.spec import GRANULARITIES
from .geglu_quantize_residual import geglu_quantize_activation, geglu_quantize_residual
from .group_norm_silu_quantize_residual import group_norm_silu_quantize_activation, group_norm_silu_quantize_residual
from .launching import Variant, recorded
from .layer_norm_quantize_residual import layer_norm_quantize_activation, layer_norm_quantize_residual
from .quantize_passes import MAX_ROW, why_not
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

_IMAGE_OPS = ("quantize", "group_norm_silu_quantize")
_TOKEN_OPS = ("quantize", "layer_norm_quantize", "geglu_quantize")
_FIRST_IMAGE, _FIRST_TOKENS = (2, 320, 64, 64), (2, 4096, 320)
_OTHER_SHAPES = ((2, 640, 32, 32), (2, 1280, 8, 8), (2, 1024, 640), (2, 64, 1280), (2, 77, 768))
_OTHER_DTYPES = ((torch.bfloat16, torch.float16), (torch.float32, torch.float32))


def aot_variants() -> list[Variant]:
    """Forms of the kernels that layers of SD 1.5 launch, each once: with float16 every prologue, granularity and source
    of the scale at the first level; per_block, which needs most registers, at other levels and with other dtypes; the
    longest rows; packed codes.
    """
    half = (torch.float16, torch.float16)
    with recorded() as variants, torch.device("meta"):
        for granularity in GRANULARITIES:
            _call_ops(_FIRST_IMAGE, half, _IMAGE_OPS, granularity)
            _call_ops(_FIRST_TOKENS, half, _TOKEN_OPS[1:], granularity)
        for dtypes in _OTHER_DTYPES:
            _call_ops(_FIRST_IMAGE, dtypes, _IMAGE_OPS, "per_block")
            _call_ops(_FIRST_TOKENS, dtypes, _TOKEN_OPS, "per_block")
            _call_ops((2, 64, MAX_ROW), dtypes, _TOKEN_OPS, "per_token")
        for shape in _OTHER_SHAPES:
            _call_ops(shape, half, _IMAGE_OPS if len(shape) == 4 else _TOKEN_OPS, "per_block")
        image = torch.empty(_FIRST_IMAGE, dtype=torch.float16, memory_format=torch.channels_last)
        for bits in (3, 4):
            for scale in (None, torch.empty(1)):
                for granularity in ("per_tensor", "per_sample", "per_token"):
                    quantize_residual(image, image, scale, bits, granularity, packed=True)
            longest = torch.empty((2, 64, MAX_ROW), dtype=torch.float16)
            quantize_residual(longest, longest, None, bits, "per_token", packed=True)
    return list({repr(variant): variant for variant in variants}.values())


def _call_ops(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], stems: Iterable[str], granularity: str
) -> None:
    dtype, state_dtype = dtypes
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
        residual, activation = (QUANTIZING_KERNELS[f"{stem}_{form}"] for form in ("residual", "activation"))
        residual(h, *prologues[stem], x_hat, None, 4, granularity)
        if granularity in ("per_sample", "per_token"):
            residual(h, *prologues[stem], x_hat, torch.empty(1), 4, granularity)
            activation(h, *prologues[stem], 8, granularity)
