"""Measure the tiles of the Triton product on this GPU and write the best per shape into backends/triton/tiles/.

python tools/tune_triton.py [--network sd15 ...] [--batch 1 2 8] [--weight-bits 8 4] [--budget 500] [--record]

Needs a GPU, which nothing else should use meanwhile. Works on scratch tensors of the layers' shapes, so no state is
touched; a tile whose sums are not exact is refused and never timed. Layers with the largest share of a network's step
come first, and every choice is written as soon as it is there. Choices for other shapes are kept.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import tile_tuning
from benchmarks.tile_tuning import Scratch
from modiff_kernels.backends import triton
from modiff_kernels.backends.triton import tiles


class TritonProducts:
    """benchmarks/tile_tuning.py Tunable of the backend triton."""

    name, store = "triton", tiles.STORE

    def __init__(self, device: torch.device) -> None:
        from modiff_kernels.backends.triton import product_launch  # needs triton, which the command line asks for first

        self.gpu, self.launch = tiles.gpu_of(device), product_launch

    def shape(self, scratch: Scratch) -> tiles.Shape:
        return self.launch.geometry_of(scratch.codes, scratch.weight.n, scratch.window).shape(scratch.weight)

    def candidates(self, scratch: Scratch) -> list[tiles.TileConfig]:
        return tiles.ranked(self.shape(scratch), self.gpu)

    def tile(self, candidate: tiles.TileConfig) -> tuple[tiles.TileConfig, int]:
        return candidate._replace(split_k=1), candidate.split_k

    def update(self, scratch: Scratch, candidate: tiles.TileConfig) -> Callable[[], object]:
        return lambda: self.launch.product(*scratch.operands, candidate)


def _about() -> dict[str, str]:
    import triton as triton_package

    return {"triton": triton_package.__version__}


if __name__ == "__main__":
    sys.exit(tile_tuning.main(__doc__ or "", triton.unavailable(), TritonProducts, _about))
