"""`quantize`: which kernels an activation takes (quantize_kernel.py), and their scratch.

Launches: one with scales given, delayed or per token, otherwise two. A group norm has one more, except for the plain
form with scales per sample, of which it finds the range (quantize_group_norm.py), and given or delayed scales where
groups fit into the registers of a few programs."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...quant.operands import norm_stride
from .launch import launch, scratch
from .quantize_group_norm import fold_form, group_norm_kernel
from .quantize_kernel import quantize_kernel, range_kernel
from .quantize_tiling import tiling, tiling_by_groups


class _Form(NamedTuple):
    """What calls with the same formats have in common. integers: elements of range, partial and block, 0 if not used;
    floats: of partial, a and b of a norm; counters: of all kernels, at most. groups: of a tile, and channels of one."""

    grid: tuple[int]
    sizes: tuple[int, int, int, int]
    source: str
    integers: tuple[int, int, int]
    floats: tuple[int, int, int]
    counters: int
    form: dict[str, Any]
    groups: dict[str, int]
    norm_grid: tuple[int]
    norm_form: dict[str, Any]


@lru_cache(maxsize=4096)
def _form(
    shape: Sequence[int], dtype: torch.dtype, state_dtype: torch.dtype | None, granularity: str, bits: int,
    affine: bool, source: str, kind: str, num_groups: int, silu: bool,
) -> _Form:  # fmt: skip
    """source: "given", "delayed", or "" where the scale is to be found. shape: of x."""
    image, pair = len(shape) == 4, 2 if kind == "geglu" else 1
    rows = shape[2] * shape[3] if image else shape[1] if len(shape) == 3 else 1
    read = max(dtype.itemsize, 0 if state_dtype is None else state_dtype.itemsize)
    channels = shape[1] if image else shape[-1]
    tiles = tiling(shape[0], rows, channels, granularity, bits, kind, read * pair)
    if kind == "group_norm" and source and tiles.granularity != "per_token":
        tiles = tiling_by_groups(tiles, num_groups, dtype.itemsize)
        kind = "groups" if tiles.width else kind
    samples, rows, channels, granularity, granules, block_r, block_c, num_warps, width, groups = tiles
    plain, per_token = state_dtype is None, granularity == "per_token"
    if not source:
        source = "tile" if per_token else "reduced"
        if kind == "group_norm" and plain and granularity == "per_sample":
            source = "folded"
    norm: Any = (0,), {}
    ends, floats, counted = 2 if affine else 1, (0, 0, 0), 0
    merged = 0 if per_token or source == "folded" else ends * tiles.grid[0]
    blocks = samples * -(-rows // block_r) * channels if granularity == "per_block" else 0
    if kind == "group_norm":
        folded = source == "folded"
        parts, counted, *norm = fold_form(tiles, dtype.itemsize, num_groups, silu, folded, affine, source != "reduced")
        floats = parts, samples * channels, samples * channels
    integers, counted = (ends * granules if plain else 0, merged, blocks), max(granules if merged else 0, counted)
    form = {"PROLOGUE": kind, "SILU": silu, "GRANULARITY": granularity, "AFFINE": affine}
    form |= {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": num_warps}
    sizes, whole = (samples, rows, channels, granules), {"WIDTH": width, "GROUPS": groups}
    return _Form(tiles.grid, sizes, source, integers, floats, counted, form, whole, *norm)


def quantize(
    h, prologue, x_hat, scale, bits, granularity, clip_ratio, affine, last_absmax=None
) -> tuple[Tensor, Tensor, Tensor]:
    kind, gamma, beta, shift, num_groups, eps, silu, further = prologue
    device, plain = h.device, x_hat is None
    given, source = (scale, "given") if last_absmax is None else (last_absmax, "delayed")
    grid, sizes, source, integers, floats, counted, form, groups, norm_grid, norm_form = _form(
        prologue.shape(h), h.dtype, None if plain else x_hat.dtype, granularity, bits, affine and plain,
        "" if given is None else source, kind, num_groups, silu,
    )  # fmt: skip
    largest, partial, block, norm_partial, norm_a, norm_b, counters = scratch(device, integers, floats, counted)
    granules = sizes[3]
    third = torch.empty(granules, dtype=torch.int32, device=device)
    largest = largest if plain else third
    own = 0 if further is None else h.shape[1]
    strides = 0 if shift is None else shift.stride(0), norm_stride(gamma)
    if form["PROLOGUE"] == "group_norm":
        launch(
            group_norm_kernel, norm_grid, h, further, shift, gamma, beta, norm_partial, counters, norm_a, norm_b,
            largest if source == "folded" else None, own, *sizes[:3], *strides, num_groups, eps, **norm_form,
        )  # fmt: skip
        gamma, beta, shift, strides = norm_a, norm_b, None, (0, 0)
    merged = partial, None if partial is None else counters
    if source == "reduced":
        launch(
            range_kernel, grid, h, further, x_hat, gamma, beta, largest, *merged, block, own, *sizes[1:], eps, **form
        )
        merged = None, None
    codes = prologue.empty_codes(h) if plain else torch.empty_like(x_hat, dtype=torch.int8)
    used = torch.empty(granules, dtype=torch.float32, device=device)
    launch(
        quantize_kernel, grid, h, further, x_hat, gamma, beta, shift, given, largest, *merged, block, codes, used,
        third if plain else None, own, *sizes[1:], *strides, 0 if given is None or given.shape[0] == 1 else 1, eps,
        clip_ratio, float(1 << (bits - 1)), SOURCE=source, **groups, **form,
    )  # fmt: skip
    return codes, used, third if plain else third.view(torch.float32)
