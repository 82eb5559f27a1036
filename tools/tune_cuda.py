"""Measure the tiles of products of the backend cuda on this GPU; write the best per shape to backends/cuda/tiles/.

python tools/tune_cuda.py [--network sd15 ...] [--batch 1 2 8] [--weight-bits 8 4] [--budget 500] [--record]

A choice is a tile of the kernels of sm_90 or sm_80 and a number of parts along K. Needs a GPU, which nothing else
should use meanwhile. Works on scratch tensors of the layers' shapes, so no state is touched; a choice whose sums are
not exact is refused and never timed. Layers with the largest share of a network's step come first, and every choice is
written as soon as it is there. Choices for other shapes are kept.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import tile_tuning
from benchmarks.tile_tuning import Scratch
from modiff_kernels.backends import cuda
from modiff_kernels.backends.cuda import product_launch, tiles
from modiff_kernels.ops import Problem
from modiff_kernels.quant.packing import KPACK_V1

CODE_BITS = 8


class CudaProducts:
    """benchmarks/tile_tuning.py Tunable of the backend cuda, for a GPU of this capability and size."""

    name, store = "cuda", tiles.STORE

    def __init__(self, capability: tuple[int, int], multiprocessors: int) -> None:
        self.gpu = (capability, multiprocessors)

    def _geometry(self, scratch: Scratch) -> tuple[int, ...]:
        return product_launch.geometry_of(scratch.codes, scratch.weight.n, scratch.window)

    def shape(self, scratch: Scratch) -> tiles.Shape:
        return tiles.shape_of(self._geometry(scratch), scratch.weight.bits, CODE_BITS)

    def candidates(self, scratch: Scratch) -> list[tiles.Tile]:
        shape, bits = self.shape(scratch), scratch.weight.bits
        sizes = {"m": shape.m, "n": shape.n, "k": shape.channels * shape.taps, "weight_bits": bits}
        problem = Problem("product", "cuda", window=scratch.window, layout=KPACK_V1, **sizes)
        if product_launch.why_not(problem) is not None:
            return []
        return tiles.candidates(self._geometry(scratch), bits, CODE_BITS, *self.gpu)

    def tile(self, candidate: tiles.Tile) -> tuple[tiles.Tile, int]:
        return candidate._replace(splits=1), candidate.splits

    def update(self, scratch: Scratch, candidate: tiles.Tile) -> Callable[[], object]:
        return lambda: product_launch.product(*scratch.operands, candidate)


def products_on(device: torch.device) -> CudaProducts:
    properties = torch.cuda.get_device_properties(device)
    return CudaProducts((properties.major, properties.minor), properties.multi_processor_count)


def _about() -> dict[str, str]:
    info = cuda.build_info()
    return {"nvcc": info["nvcc"]} if isinstance(info, dict) else {}


if __name__ == "__main__":
    sys.exit(tile_tuning.main(__doc__ or "", cuda.unavailable(), products_on, _about))
