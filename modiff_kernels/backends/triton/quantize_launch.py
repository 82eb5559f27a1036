"""`quantize`: which kernels an activation takes (quantize_kernel.py), and their scratch.

Launches: one with scales given, delayed or per token, otherwise two. A group norm has one more, except for the plain
form with scales per sample, of which it finds the range (quantize_group_norm.py), and given or delayed scales where
groups fit into the registers of a few programs."""

from typing import Any

import torch
from torch import Tensor

from .launch import counters, launch
from .quantize_group_norm import fold_group_norm
from .quantize_kernel import quantize_kernel, range_kernel
from .quantize_tiling import tiling_by_groups, tiling_of


def quantize(
    h, prologue, x_hat, scale, bits, granularity, clip_ratio, affine, last_absmax=None
) -> tuple[Tensor, Tensor, Tensor]:
    kind, a, b, shift, _, eps, silu, further = prologue
    codes = prologue.empty_codes(h)
    like = codes if x_hat is None else x_hat
    affine = affine and x_hat is None
    tiling = tiling_of(h, like, granularity, bits, kind)
    granules, per_token = tiling.granules, tiling.granularity == "per_token"
    given, source = scale, "given" if scale is not None else "tile" if per_token else "reduced"
    if last_absmax is not None:
        given, source = last_absmax, "delayed"

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=h.device)

    ends = 2 if affine else 1
    largest = scratch(ends * granules)
    whole = None
    if kind == "group_norm" and source in ("given", "delayed") and not per_token:
        whole = tiling_by_groups(tiling, prologue.num_groups, h.element_size())
    if whole is not None:
        tiling, kind = whole, "groups"
    elif kind == "group_norm":
        if x_hat is None and tiling.granularity == "per_sample":
            source = "folded"
        found = largest if source == "folded" else None
        a, b = fold_group_norm(h, prologue, tiling, found, affine, backwards=source != "reduced")
    parts: tuple[Tensor | None, Tensor | None] = None, None
    block = None
    if not (per_token or source == "folded"):
        parts = scratch(ends * tiling.grid[0]), counters(h.device, granules)
    if tiling.granularity == "per_block":
        block = scratch(tiling.samples, -(-tiling.rows // tiling.block_r), tiling.channels)
    sizes = h.shape[1 if h.ndim == 4 else -1], tiling.rows, tiling.channels, granules
    form: dict[str, Any] = {
        "PROLOGUE": kind, "SILU": silu, "GRANULARITY": tiling.granularity, "AFFINE": affine,
        "BLOCK_R": tiling.block_r, "BLOCK_C": tiling.block_c, "num_warps": tiling.num_warps,
    }  # fmt: skip
    if source == "reduced":
        launch(range_kernel, tiling.grid, h, further, x_hat, a, b, largest, *parts, block, *sizes, eps, **form)
        parts = None, None
    used = torch.empty(granules, dtype=torch.float32, device=h.device)
    zero_point = scratch(granules) if x_hat is None else None
    launch(
        quantize_kernel, tiling.grid, h, further, x_hat, a, b, shift, given, largest, *parts, block, codes, used,
        zero_point, *sizes, 0 if shift is None else shift.stride(0), 0 if given is None or given.shape[0] == 1 else 1,
        eps, clip_ratio, float(1 << (bits - 1)),
        SOURCE=source, WIDTH=tiling.width, GROUPS=tiling.groups, **form,
    )  # fmt: skip
    return codes, used, largest.view(torch.float32) if zero_point is None else zero_point
