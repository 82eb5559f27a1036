"""Measure the tiles of the Triton product on this GPU and write the best per shape into backends/triton/tiles/.

python tools/tune_triton.py [--network sd15 ...] [--batch 1 2 8] [--weight-bits 8 4] [--budget 500] [--record]

Needs a GPU, which nothing else should use meanwhile. Works on scratch tensors of the layers' shapes, so no state is
touched; a tile whose sums are not exact is refused and never timed. Layers with the largest share of a network's step
come first, and every choice is written as soon as it is there. Choices for other shapes are kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import tile_tuning
from benchmarks.tile_tuning import Scratch
from modiff_kernels.backends import triton


class TritonProducts:
    """benchmarks/tile_tuning.py Tunable of the backend triton."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        from modiff_kernels.backends.triton.products import gpu_of
        from modiff_kernels.backends.triton.tile_configs import STORE

        self.gpu, self.store = gpu_of(device), STORE

    def shape(self, scratch: Scratch) -> Any:
        from modiff_kernels.backends.triton import products, tile_configs

        geo = products.geometry(scratch.codes, scratch.y_hat.shape, scratch.window)
        n = scratch.y_hat.shape[1 if scratch.window else -1]
        return tile_configs.Shape(geo.m, n, geo.channels, geo.taps, 1, scratch.weight_bits, -1)

    def candidates(self, scratch: Scratch) -> list[Any]:
        from modiff_kernels.backends.triton import tile_configs

        return tile_configs.ranked(self.shape(scratch), self.gpu)

    def tile(self, candidate: Any) -> tuple[Any, int]:
        return replace(candidate, split_k=1), candidate.split_k

    def update(self, scratch: Scratch, candidate: Any) -> Callable[[], None]:
        from modiff_kernels.backends.triton import products
        from modiff_kernels.backends.triton.product_kernel import ACCUMULATE

        def call() -> None:
            products.integer_product(
                scratch.codes, scratch.scale, None, *scratch.weight[:2], None, ACCUMULATE, scratch.y_hat, None, False,
                torch.float16, scratch.weight_bits, -1, scratch.window, candidate,
            )  # fmt: skip

        return call


def _about() -> dict[str, str]:
    import triton as triton_package

    return {"triton": triton_package.__version__}


def main() -> int:
    return tile_tuning.main(__doc__ or "", triton.unavailable(), TritonProducts, _about)


if __name__ == "__main__":
    sys.exit(main())
