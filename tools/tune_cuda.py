"""Measure the tiles of products of the backend cuda on this GPU; write the best per shape to backends/cuda/tiles/.

python tools/tune_cuda.py [--network sd15 ...] [--batch 1 2 8] [--weight-bits 8 4] [--budget 500] [--record]

A choice is a tile of the kernels of sm_90 or sm_80 and a number of parts along K. Needs a GPU, which nothing else
should use meanwhile. Works on scratch tensors of the layers' shapes, so no state is touched; a choice whose sums are
not exact is refused and never timed. Layers with the largest share of a network's step come first, and every choice is
written as soon as it is there. Choices for other shapes are kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from modiff_kernels.backends.cuda.cuts import Cut

from benchmarks import tile_tuning
from benchmarks.tile_tuning import Scratch
from modiff_kernels.backends import cuda
from modiff_kernels.backends.cuda import cuts, products
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.packing import KPACK_V1

CODE_BITS = 8


class CudaProducts:
    """benchmarks/tile_tuning.py Tunable of the backend cuda, for a GPU of this capability and size."""

    name, store = "cuda", cuts.STORE

    def __init__(self, capability: tuple[int, int], multiprocessors: int) -> None:
        self.gpu = (capability, multiprocessors)

    def _geometry(self, scratch: Scratch) -> list[int]:
        return products.geometry_of(scratch.codes, scratch.weight.n, scratch.window)

    def shape(self, scratch: Scratch) -> cuts.Shape:
        return cuts.shape_of(self._geometry(scratch), scratch.weight_bits, CODE_BITS)

    def candidates(self, scratch: Scratch) -> list[Cut]:
        shape, conv = self.shape(scratch), scratch.window
        window = {} if conv is None else dict(zip(("kernel_size", "stride", "padding", "dilation"), conv))
        problem = Problem(
            "accumulate_linear" if conv is None else "accumulate_conv2d", device_type="cuda", m=shape.m, n=shape.n,
            k=shape.channels * shape.taps, weight_bits=shape.weight_bits, layout=KPACK_V1, **window,
        )  # fmt: skip
        if products.why_not(problem) is not None:
            return []
        return cuts.candidates(self._geometry(scratch), scratch.weight_bits, CODE_BITS, *self.gpu)

    def tile(self, candidate: Cut) -> tuple[Cut, int]:
        return candidate._replace(splits=1), candidate.splits

    def update(self, scratch: Scratch, candidate: Cut) -> Callable[[], None]:
        def call() -> None:
            products.integer_product(
                scratch.codes, scratch.scale, None, *scratch.weight[:2], None, products.ACCUMULATE, scratch.y_hat, None,
                False, torch.float16, scratch.weight_bits, scratch.window, candidate,
            )  # fmt: skip

        return call


def products_on(device: torch.device) -> CudaProducts:
    """The products of this GPU."""
    properties = torch.cuda.get_device_properties(device)
    return CudaProducts((properties.major, properties.minor), properties.multi_processor_count)


def _about() -> dict[str, str]:
    info = cuda.build_info()
    return {"nvcc": info["nvcc"]} if isinstance(info, dict) else {}


def main() -> int:
    return tile_tuning.main(__doc__ or "", cuda.unavailable(), products_on, _about)


if __name__ == "__main__":
    sys.exit(main())
