"""`quantize`: which kernels an activation takes (quantize_kernel.py), and their scratch.

Launches: one with scales given (and one that clears absmax, unless they are per token) or per token; otherwise two, and
one that clears the scratch. A group norm has two more (quantize_group_norm.py), which clear the scratch themselves.
"""

from typing import Any

import torch
from torch import Tensor

from ...quant.spec import BLOCK_ROWS
from .launch import launch
from .quantize_group_norm import fold_group_norm
from .quantize_kernel import quantize_kernel, range_kernel
from .quantize_tiling import Tiling, tiling_of


def _make_ranges(tiling: Tiling, affine: bool, device: torch.device, zeroed: bool) -> tuple[Tensor, Tensor | None]:
    """int32 scratch of the passes: `largest` [granules] (affine: twice) and `block` [N, ceil(R/16), C] or None. Not
    `zeroed`: another kernel does that and saves a launch."""
    make = torch.zeros if zeroed and tiling.granularity != "per_token" else torch.empty
    largest = make(tiling.granules * (2 if affine else 1), dtype=torch.int32, device=device)
    if tiling.granularity != "per_block":
        return largest, None
    blocks = (tiling.samples, -(-tiling.rows // BLOCK_ROWS), tiling.channels)
    make = torch.empty if tiling.block_r == BLOCK_ROWS else torch.zeros
    return largest, make(blocks, dtype=torch.int32, device=device)


def quantize(h, prologue, x_hat, scale, bits, granularity, clip_ratio, affine) -> tuple[Tensor, Tensor, Tensor]:
    kind, a, b, _, _, eps, silu = prologue
    like = x_hat if x_hat is not None else h
    if kind == "geglu" and x_hat is None:
        like = h.new_empty((*h.shape[:-1], h.shape[-1] // 2), dtype=torch.int8)
    affine = affine and x_hat is None
    tiling = tiling_of(h, like, granularity, bits, kind)
    source = "given" if scale is not None else "tile" if tiling.granularity == "per_token" else "reduced"
    largest, block = _make_ranges(tiling, affine, h.device, zeroed=kind != "group_norm")
    if kind == "group_norm":
        clear = None if tiling.granularity == "per_token" else largest
        a, b = fold_group_norm(h, prologue, tiling, clear, backwards=source != "reduced")
    sizes = tiling.rows, tiling.channels, tiling.granules
    form: dict[str, Any] = {
        "PROLOGUE": kind, "SILU": silu, "GRANULARITY": tiling.granularity, "AFFINE": affine,
        "BLOCK_R": tiling.block_r, "BLOCK_C": tiling.block_c,
    }  # fmt: skip
    if source == "reduced":
        launch(
            range_kernel, tiling.grid, h, x_hat, a, b, largest, block, *sizes, eps, **form, num_warps=tiling.num_warps
        )
    codes = torch.empty_like(like, dtype=torch.int8)
    used = torch.empty(tiling.granules, dtype=torch.float32, device=h.device)
    zero_point = torch.empty(tiling.granules, dtype=torch.int32, device=h.device) if x_hat is None else None
    launch(
        quantize_kernel, tiling.grid, h, x_hat, a, b, scale, largest, block, codes, used, zero_point,
        *sizes, 0 if scale is None or scale.shape[0] == 1 else 1, eps, clip_ratio, float(1 << (bits - 1)),
        SOURCE=source, **form, num_warps=tiling.num_warps,
    )  # fmt: skip
    return codes, used, largest.view(torch.float32) if zero_point is None else zero_point
