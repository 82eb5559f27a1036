"""The products of csrc/cuda/sm90 on the host: calls of the program emulator/hopper.cpp."""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.backends.cuda.emulation import DTYPES, Emulator

EPILOGUES = {"accumulate": 0, "initialize": 1, "output": 2}  # csrc/common/problem.h


@dataclass(frozen=True)
class Cut:
    """How a call is cut: the tile's index in csrc/cuda/sm90/plan.h, -1 for the plan's own; parts along K."""

    tile: int = -1
    splits: int = 1
    multiprocessors: int = 3
    seed: int = 0


class HopperEmulator(Emulator):
    """emulator/hopper.cpp."""

    def product(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, weight_packed: Tensor, weight_scale: Tensor,
        weight_bits: int, window: tuple[tuple[int, int], ...], epilogue: str, bias: Tensor | None,
        y_hat: Tensor | None, skip: Tensor | None, out: Tensor | None, cut: Cut,
    ) -> int:  # fmt: skip
        """codes int8 [n, c, h, w]; y_hat (changed), skip and out (filled) [n, c_out, p, q]; all channels_last.
        window: kernel size, stride, padding, dilation. Returns the bytes that were prefetched for the epilogue.
        """
        samples, columns, *sides = next(t for t in (y_hat, out) if t is not None).shape
        dtypes = [0 if t is None else DTYPES[t.dtype] for t in (bias, y_hat, skip, out)]
        n, c, h, w = codes.shape
        head = struct.pack(
            "25q", n, h, w, c, columns, *(side for pair in window for side in pair), 1, weight_bits,
            samples * sides[0] * sides[1] // scale.numel(), EPILOGUES[epilogue], *dtypes, cut.tile, cut.splits,
            cut.multiprocessors, cut.seed,
        )  # fmt: skip
        prefetched = torch.zeros(1, dtype=torch.int64)
        tensors = (codes, scale, zero_point, weight_packed, weight_scale, bias, y_hat, skip, out)
        self.ask(head, tensors, (out, y_hat, prefetched))
        return int(prefetched)
