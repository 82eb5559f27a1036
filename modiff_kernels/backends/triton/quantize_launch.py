"""`quantize`: which kernels an activation takes (quantize_kernel.py), and their scratch.

Launches: one with scales given, delayed or per token, otherwise two. A group norm has one more, except for the plain
form with scales per sample, of which it finds the range (quantize_group_norm.py)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Parts, counters, launch, scratch
from .quantize_group_norm import NormForm, fold_group_norm, norm_form
from .quantize_kernel import quantize_kernel, range_kernel
from .quantize_tiling import tiling

_NONE = (0, torch.int32)


class _Form(NamedTuple):
    """What calls with the same formats have in common; scratch: range, partial, block, and partial, a and b of a norm;
    those of no elements are not used."""

    grid: tuple[int]
    sizes: tuple[int, int, int]
    source: str
    scratch: Parts
    norm: NormForm | None
    keywords: dict[str, Any]


@lru_cache(maxsize=4096)
def _form(
    shape: Sequence[int], dtype: torch.dtype, state_dtype: torch.dtype | None, granularity: str, bits: int,
    affine: bool, source: str, kind: str, num_groups: int, silu: bool,
) -> _Form:  # fmt: skip
    """source: "given", "delayed", or "" where the scale is to be found. shape: of h."""
    image, pair = len(shape) == 4, 2 if kind == "geglu" else 1
    rows = shape[2] * shape[3] if image else shape[1] if len(shape) == 3 else 1
    read = max(dtype.itemsize, 0 if state_dtype is None else state_dtype.itemsize)
    channels = shape[1] if image else shape[-1] // pair
    tiles = tiling(shape[0], rows, channels, granularity, bits, kind, read * pair)
    samples, rows, channels, granularity, granules, block_r, block_c, num_warps = tiles
    plain, per_token = state_dtype is None, granularity == "per_token"
    if not source:
        source = "tile" if per_token else "reduced"
        if kind == "group_norm" and plain and granularity == "per_sample":
            source = "folded"
    norm, programs, ends = None, tiles.grid[0], 2 if affine else 1
    parts = [(ends * granules if plain else 0, torch.int32), _NONE, _NONE]
    if not (per_token or source == "folded"):
        parts[1] = ends * programs, torch.int32
    if granularity == "per_block":
        parts[2] = samples * -(-rows // block_r) * channels, torch.int32
    if kind == "group_norm":
        norm = norm_form(tiles, dtype.itemsize, num_groups, silu, source == "folded", affine, source != "reduced")
        parts += [(count, torch.float32) for count in (norm.partial, samples * channels, samples * channels)]
    keywords = {"PROLOGUE": kind, "SILU": silu, "GRANULARITY": granularity, "AFFINE": affine}
    keywords |= {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": num_warps}
    return _Form(tiles.grid, (rows, channels, granules), source, tuple(parts), norm, keywords)


def quantize(
    h, prologue, x_hat, scale, bits, granularity, clip_ratio, affine, last_absmax=None
) -> tuple[Tensor, Tensor, Tensor]:
    kind, a, b, _, num_groups, eps, silu = prologue
    device, plain = h.device, x_hat is None
    given, source = (scale, "given") if last_absmax is None else (last_absmax, "delayed")
    form = _form(
        h.shape, h.dtype, None if plain else x_hat.dtype, granularity, bits, affine and plain,
        "" if given is None else source, kind, num_groups, silu,
    )  # fmt: skip
    grid, sizes, source, parts, norm, keywords = form
    granules = sizes[2]
    largest, partial, block, *of_norm = scratch(device, parts)
    third = torch.empty(granules, dtype=torch.int32, device=device)
    largest = largest if plain else third
    if norm is not None:
        fold_group_norm(h, prologue, norm, *of_norm, largest if source == "folded" else None)
        _, a, b = of_norm
    merged = (partial, counters(device, granules)) if parts[1][0] else (None, None)
    block = block if parts[2][0] else None
    if source == "reduced":
        launch(range_kernel, grid, h, x_hat, a, b, largest, *merged, block, *sizes, eps, **keywords)
        merged = None, None
    if plain and kind == "geglu":
        codes = h.new_empty((*h.shape[:-1], h.shape[-1] // 2), dtype=torch.int8)
    else:
        codes = torch.empty_like(h if plain else x_hat, dtype=torch.int8)
    used = torch.empty(granules, dtype=torch.float32, device=device)
    launch(
        quantize_kernel, grid, h, x_hat, a, b, given, largest, *merged, block, codes, used,
        third if plain else None, *sizes, 0 if given is None or given.shape[0] == 1 else 1, eps, clip_ratio,
        float(1 << (bits - 1)), SOURCE=source, **keywords,
    )  # fmt: skip
    return codes, used, third if plain else third.view(torch.float32)
