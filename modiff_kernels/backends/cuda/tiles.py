"""How a product is tiled: which tiles of which kernels, and how many splits along K.

A call gets the measured choice of `tiles/<gpu>.json` for its shape or the nearest known one, which tools/tune_cuda.py
makes; else the kernels choose by an estimate (csrc/cuda/sm90/tiling.h, sm80/tile_config.h).
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ...tuned import Store
from . import library


class Tile(NamedTuple):
    """csrc/cuda/product.h Tiling: tiles of rows x columns outputs by the kernels of sm_90 or sm_80; splits of K."""

    architecture: int
    rows: int
    columns: int
    splits: int

    def __str__(self) -> str:
        return f"sm{self.architecture}-{self.rows}x{self.columns}-k{self.splits}"


class Shape(NamedTuple):
    """What the choice depends on. m: output pixels; taps: kernel_h * kernel_w; code_bits: 4 where codes are packed."""

    m: int
    n: int
    channels: int
    taps: int
    weight_bits: int
    code_bits: int


STORE = Store(Path(__file__).resolve().parent / "tiles", Shape, Tile)


def shape_of(geometry: Sequence[int], weight_bits: int, code_bits: int) -> Shape:
    """The shape of a product; geometry: csrc/cuda/product.h."""
    samples, h, w, c_in, c_out, r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, _ = geometry
    out_h = (h + 2 * pad_h - dilation_h * (r - 1) - 1) // stride_h + 1
    out_w = (w + 2 * pad_w - dilation_w * (s - 1) - 1) // stride_w + 1
    return Shape(samples * out_h * out_w, c_out, c_in, r * s, weight_bits, code_bits)


@cache
def _tuned_gpu(device: torch.device) -> str | None:
    """Name of the GPU, None if there are no choices for it, or for another kind of device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return name if STORE.load(name) else None


def choose(geometry: Sequence[int], weight_bits: int, code_bits: int, device: torch.device) -> Tile | None:
    """The measured tile of a product on `device`; None: the kernels choose."""
    gpu_name = _tuned_gpu(device)
    return None if gpu_name is None else STORE.nearest(shape_of(geometry, weight_bits, code_bits), gpu_name)


def candidates(
    geometry: Sequence[int], weight_bits: int, code_bits: int, capability: tuple[int, int], multiprocessors: int
) -> list[Tile]:
    """Every tiling on such a GPU, sm_90 before sm_80, the best estimate first: the first is what the kernels choose.
    Needs the library, no GPU."""
    values = library.tiles_op()(geometry, weight_bits, code_bits, 10 * capability[0] + capability[1], multiprocessors)
    return [Tile(*values[i : i + 4]) for i in range(0, len(values), 4)]
