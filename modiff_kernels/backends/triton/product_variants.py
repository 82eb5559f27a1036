"""The compiled forms of the product kernels that ship, for ahead-of-time compilation (tools/aot_triton.py)."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ...quant.packing import packed_dtype, packed_width
from .launching import Variant, recorded
from .modulated_linear import modulated_linear_one_launch
from .product_kernel import ACCUMULATE, INITIALIZE, OUTPUT
from .products import integer_product
from .tile_configs import ONE_LAUNCH, Shape, TileConfig, candidates, fits

_CHANNELS = 1280  # divisible by every K step and by 16, as in all layers that low bits pay for
_ODD_CHANNELS = 1008  # no multiple of a K step, but of 16
_COLUMNS = 640
_WINDOW = ((3, 3), (1, 1), (1, 1), (1, 1), 1)


class Form(NamedTuple):
    """One use of the product kernel, independent of its tile."""

    name: str
    conv: bool = True
    weight_bits: int = 8
    group_size: int = -1
    channels: int = _CHANNELS
    epilogue: int = ACCUMULATE
    state_dtype: torch.dtype = torch.float16
    dtype: torch.dtype = torch.float16
    skip: bool = False
    split_k: int = 1


MAIN_FORMS = (Form("conv-w8"), Form("conv-w4", weight_bits=4), Form("linear-w8", conv=False))
"""What most time is spent in: for a fast check."""

OTHER_FORMS = (
    Form("conv-w3", weight_bits=3),
    Form("linear-w4", conv=False, weight_bits=4),
    Form("linear-w3", conv=False, weight_bits=3),
    Form("conv-w8-odd", channels=_ODD_CHANNELS),
    Form("linear-w4-odd", conv=False, weight_bits=4, channels=_ODD_CHANNELS),
    Form("linear-w4-group128", conv=False, weight_bits=4, group_size=128),
    Form("conv-w4-group64", weight_bits=4, group_size=64),
    Form("conv-w8-split", split_k=4),
    Form("linear-w4-group128-split", conv=False, weight_bits=4, group_size=128, split_k=2),
    Form("conv-w8-skip-bf16", dtype=torch.bfloat16, skip=True),
    Form("conv-w8-float32", state_dtype=torch.float32, dtype=torch.float32),
    Form("conv-w8-initialize", epilogue=INITIALIZE),
    Form("conv-w8-output", epilogue=OUTPUT, skip=True),
    Form("linear-w8-output", conv=False, epilogue=OUTPUT),
    Form("linear-w4-group128-output", conv=False, weight_bits=4, group_size=128, epilogue=OUTPUT),
)


def _weight(n: int, k: int, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale_shape = (n,) if group_size == -1 else (n, -(-k // group_size))
    return torch.empty((n, packed_width(bits, k)), dtype=packed_dtype(bits)), torch.empty(scale_shape)


def _call_product(form: Form, config: TileConfig) -> None:
    conv = _WINDOW if form.conv else None
    shape = (2, form.channels, 16, 16) if conv else (512, form.channels)
    out_shape = (2, _COLUMNS, 16, 16) if conv else (512, _COLUMNS)
    memory_format = torch.channels_last if conv else torch.contiguous_format
    codes = torch.empty(shape, dtype=torch.int8).to(memory_format=memory_format)
    weight = _weight(_COLUMNS, (9 if conv else 1) * form.channels, form.weight_bits, form.group_size)
    output = form.epilogue == OUTPUT
    zero_point = torch.empty(2, dtype=torch.int32) if output else None
    bias = None if form.epilogue == ACCUMULATE else torch.empty(_COLUMNS, dtype=form.dtype)
    y_hat = None if output else torch.empty(out_shape, dtype=form.state_dtype).to(memory_format=memory_format)
    skip = torch.empty(out_shape, dtype=form.dtype).to(memory_format=memory_format) if form.skip else None
    integer_product(
        codes, torch.empty(2), zero_point, *weight, bias, form.epilogue, y_hat, skip, True, form.dtype,
        form.weight_bits, form.group_size, conv, replace(config, split_k=form.split_k),
    )  # fmt: skip


def _call_one_launch(weight_bits: int, group_size: int, given: bool, dtype: torch.dtype, channels: int) -> None:
    x, x_hat, y_hat = (
        torch.empty((512, width), dtype=kind)
        for width, kind in ((channels, dtype), (channels, torch.float16), (128, torch.float16))
    )
    scale, granularity = (torch.empty(1), "per_tensor") if given else (None, "per_token")
    weight = _weight(128, channels, weight_bits, group_size)
    modulated_linear_one_launch(
        x, x_hat, scale, *weight, y_hat, None, 4, granularity, 1.0, weight_bits, group_size, True, ONE_LAUNCH.block_k
    )


def aot_variants(capability: tuple[int, int], main_only: bool = False) -> list[tuple[str, Variant]]:
    """(name, variant) of every tile that a device of `capability` may get, in every form that it fits; each once."""
    named: dict[Any, tuple[str, Variant]] = {}

    def keep(name: str, variants: list[Variant]) -> None:
        for variant in variants:
            key = (variant.kernel, *variant.signature.items(), *variant.constexprs.items(), variant[3:])
            named.setdefault(key, (f"{variant.kernel.__name__.removesuffix('_kernel')} {name}", variant))

    with torch.device("meta"):
        for config in candidates(capability):
            for form in MAIN_FORMS if main_only else MAIN_FORMS + OTHER_FORMS:
                taps = 9 if form.conv else 1
                if fits(config, Shape(512, _COLUMNS, form.channels, taps, 1, form.weight_bits, form.group_size)):
                    with recorded() as variants:
                        _call_product(form, config)
                    keep(f"{form.name} {config}", variants)
        for weight_bits, group_size in ((8, -1),) if main_only else ((8, -1), (4, -1), (3, -1), (4, 128)):
            for given in (False, True):
                for dtype, channels in ((torch.float16, 320), (torch.bfloat16, _ODD_CHANNELS)):
                    with recorded() as variants:
                        _call_one_launch(weight_bits, group_size, given, dtype, channels)
                    given_name = "given" if given else "dynamic"
                    keep(f"w{weight_bits} group {group_size} {given_name} {dtype} k{channels} {ONE_LAUNCH}", variants)
    return list(named.values())
