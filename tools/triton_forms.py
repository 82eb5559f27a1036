"""The compiled forms of the Triton kernels that ship: what the ops launch, recorded on device "meta"."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from modiff_kernels.backends.triton import launch
from modiff_kernels.backends.triton.product_launch import product
from modiff_kernels.backends.triton.quantize_launch import quantize
from modiff_kernels.backends.triton.quantize_tiling import MAX_ROW
from modiff_kernels.backends.triton.tiles import Shape, TileConfig, candidates, fits
from modiff_kernels.quant.operands import PackedWeight, Prologue, Window
from modiff_kernels.quant.packing import packed_dtype, packed_width
from modiff_kernels.quant.spec import GRANULARITIES, group_count

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_TYPES |= {torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32"}
_ALIGNMENT = 16  # bytes of a pointer, and divisor of an integer, that Triton compiles for

_CHANNELS = 1280  # divisible by every k-block and by 16, as in all layers that low bits pay for
_ODD_CHANNELS = 1008  # no multiple of a k-block, but of 16
_COLUMNS = 640
_WINDOW = Window((3, 3), padding=(1, 1))

_IMAGES, _TOKENS = ("identity", "group_norm"), ("identity", "layer_norm", "geglu")  # prologues
_FIRST_IMAGE, _FIRST_TOKENS = (2, 320, 64, 64), (2, 4096, 320)
_OTHER_SHAPES = ((2, 640, 32, 32), (2, 1280, 8, 8), (2, 1024, 640), (2, 64, 1280), (2, 77, 768))
_WITH_GROUPS = ((2, 320, 32, 32), (2, 2560, 16, 16))  # which programs hold, the first with most registers
_OTHER_DTYPES = ((torch.bfloat16, torch.float16), (torch.float32, torch.float32))


class Variant(NamedTuple):
    """One compiled form of a kernel: what Triton's launcher derives from the arguments of a launch."""

    kernel: Any
    signature: dict[str, str]  # every argument: "*fp16", "i32", "fp32" or "constexpr"
    constexprs: dict[str, Any]  # meta-parameters, None pointers, integers that are 1
    divisible: tuple[str, ...]  # arguments with the attribute tt.divisibility 16
    options: dict[str, Any]  # num_warps, and num_stages where it is not Triton's default


@contextmanager
def recorded() -> Iterator[list[Variant]]:
    """Launch nothing; collect the variants instead. Tensors made inside are on device "meta"."""
    variants: list[Variant] = []
    launch.record = lambda *launched: variants.append(_variant(*launched))
    try:
        with torch.device("meta"):
            yield variants
    finally:
        launch.record = None


def _variant(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Variant:
    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
    signature, constexprs, divisible = {}, keywords, []
    for parameter, value in zip(kernel.params, args):
        name = parameter.name
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or (value == 1 and not parameter.do_not_specialize):
            constexprs[name] = value
        else:
            signature[name] = "i32"
            if value % _ALIGNMENT == 0 and not parameter.do_not_specialize:
                divisible.append(name)
    signature.update(dict.fromkeys(constexprs, "constexpr"))
    ordered = {name: signature[name] for name in kernel.arg_names}
    return Variant(kernel, ordered, constexprs, tuple(divisible), options)


class Form(NamedTuple):
    """One use of the product kernel, independent of its tile."""

    name: str
    conv: bool = True
    weight_bits: int = 8
    group_size: int = -1
    channels: int = _CHANNELS
    state_dtype: torch.dtype | None = torch.float16  # None: without y_hat, but with a zero point and a bias
    dtype: torch.dtype = torch.float16
    skip: bool = False
    split_k: int = 1
    geglu: bool = False


# What most time is spent in: for a fast check.
MAIN_FORMS = (Form("conv-w8"), Form("conv-w4", weight_bits=4), Form("linear-w8", conv=False))
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
    Form("conv-w8-plain", state_dtype=None, skip=True),
    Form("linear-w8-plain", conv=False, state_dtype=None),
    Form("linear-w8-geglu", conv=False, state_dtype=None, geglu=True),
    Form("linear-w4-group128-plain", conv=False, weight_bits=4, group_size=128, state_dtype=None),
)


def _weight(n: int, k: int, bits: int, group_size: int) -> PackedWeight:
    scale = torch.empty((n,) if group_size == -1 else (n, group_count(k, group_size)))
    return PackedWeight(torch.empty((n, packed_width(bits, k)), dtype=packed_dtype(bits)), scale, bits, group_size)


def _call_product(form: Form, tile: TileConfig) -> None:
    def empty(channels: int, dtype: torch.dtype) -> torch.Tensor:
        rows = torch.empty((512, channels), dtype=dtype)
        return rows.view(2, 16, 16, channels).permute(0, 3, 1, 2) if form.conv else rows

    weight = _weight(_COLUMNS, (9 if form.conv else 1) * form.channels, form.weight_bits, form.group_size)
    weight, plain = weight._replace(geglu=form.geglu), form.state_dtype is None
    product(
        empty(form.channels, torch.int8), torch.empty(2), torch.empty(2, dtype=torch.int32) if plain else None, weight,
        None if plain else empty(_COLUMNS, form.state_dtype),
        torch.empty(_COLUMNS, dtype=form.dtype) if plain else None,
        empty(_COLUMNS, form.dtype) if form.skip else None,
        _WINDOW if form.conv else None, form.dtype, True, tile._replace(split_k=form.split_k),
    )  # fmt: skip


def product_variants(capability: tuple[int, int], few: bool = False) -> list[tuple[str, Variant]]:
    """(name, variant) of every tile that a device of `capability` may get, in every form that it fits; each once.

    few: forms that little time is spent in have one tile: on sm_90 the last that fits, elsewhere the first."""
    named: dict[str, tuple[str, Variant]] = {}
    for form in MAIN_FORMS + OTHER_FORMS:
        shape = Shape(512, _COLUMNS, form.channels, 9 if form.conv else 1, 1, form.weight_bits, form.group_size)
        fitting = [tile for tile in candidates(capability) if fits(tile, shape)]
        if few and form not in MAIN_FORMS:
            fitting = fitting[-1:] if capability >= (9, 0) else fitting[:1]
        for tile in fitting:
            with recorded() as variants:
                _call_product(form, tile)
            for variant in variants:
                of_kernel = variant.kernel.__name__.removesuffix("_kernel")
                named.setdefault(repr(variant), (f"{of_kernel} {form.name} {tile}", variant))
    return list(named.values())


def quantize_variants() -> list[Variant]:
    """Forms of the quantising kernels that layers of SD 1.5 launch, each once: everything with float16 at the first
    level; per_block, which needs most registers, at other levels and with other dtypes; the longest rows."""
    half = (torch.float16, torch.float16)
    with recorded() as variants:
        for granularity in GRANULARITIES:
            _call_quantize(_FIRST_IMAGE, half, _IMAGES, granularity)
            _call_quantize(_FIRST_TOKENS, half, _TOKENS[1:], granularity)
        for shape in _WITH_GROUPS:
            _call_quantize(shape, half, ("group_norm",), "per_sample")
        for dtypes in _OTHER_DTYPES:
            _call_quantize(_FIRST_IMAGE, dtypes, _IMAGES, "per_block")
            _call_quantize(_FIRST_TOKENS, dtypes, _TOKENS, "per_block")
            _call_quantize((2, 64, MAX_ROW), dtypes, _TOKENS, "per_token")
        for shape in _OTHER_SHAPES:
            _call_quantize(shape, half, _IMAGES if len(shape) == 4 else _TOKENS, "per_block")
    return list({repr(variant): variant for variant in variants}.values())


def _call_quantize(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], prologues: Iterable[str], granularity: str
) -> None:
    dtype, state_dtype = dtypes
    image = len(shape) == 4
    channels = shape[1] if image else shape[-1]
    memory_format = torch.channels_last if image else torch.contiguous_format
    x_hat = torch.empty(shape, dtype=state_dtype, memory_format=memory_format)
    vector, shift = torch.empty(channels, dtype=dtype), torch.empty((shape[0], channels), dtype=dtype)
    norms = {"group_norm": (vector, vector, shift, 32, 1e-5, True), "layer_norm": (vector, vector, None, 0, 1e-5)}
    for kind in prologues:
        width = 2 * shape[-1] if kind == "geglu" else shape[-1]
        h = torch.empty((*shape[:-1], width), dtype=dtype, memory_format=memory_format)
        prologue = Prologue(kind, *norms.get(kind, ()))
        quantize(h, prologue, x_hat, None, 4, granularity, 1.0, False)
        if granularity in ("per_sample", "per_token"):
            quantize(h, prologue, x_hat, torch.empty(1), 4, granularity, 1.0, False)
            granules = torch.empty(shape[0] if granularity == "per_sample" else x_hat.numel() // channels)
            quantize(h, prologue, x_hat, None, 4, granularity, 1.0, False, granules)
            quantize(h, prologue, None, None, 8, granularity, 1.0, True)
