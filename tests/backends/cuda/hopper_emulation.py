"""The products of csrc/cuda/sm90 on the host: builds the program emulator/hopper.cpp with sanitizers, and calls it."""

import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.backends.cuda.emulation import DTYPES

SOURCE = Path(__file__).parent / "emulator" / "hopper.cpp"
EPILOGUES = {"accumulate": 0, "initialize": 1, "output": 2}  # csrc/common/problem.h


@dataclass(frozen=True)
class Cut:
    """How a call is cut: the tile's index in csrc/cuda/sm90/plan.h, -1 for the plan's own; parts along K."""

    tile: int = -1
    splits: int = 1
    multiprocessors: int = 3
    falling: bool = False
    seed: int = 0


class HopperEmulator:
    """A running program."""

    def __init__(self, program: Path):
        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def close(self) -> None:
        self.process.stdin.close()
        errors = self.process.stderr.read().decode()
        assert self.process.wait(timeout=60) == 0, errors

    def product(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, weight_packed: Tensor, weight_scale: Tensor,
        weight_bits: int, window: tuple[tuple[int, int], ...], epilogue: str, bias: Tensor | None,
        y_hat: Tensor | None, skip: Tensor | None, out: Tensor | None, cut: Cut,
    ) -> int:  # fmt: skip
        """codes int8 [n, h, w, c]; y_hat (changed), skip and out (filled) [n, p, q, c_out], all contiguous.
        window: kernel size, stride, padding, dilation. Returns the bytes of y_hat that were prefetched.
        """
        shape = next(t for t in (y_hat, out) if t is not None).shape
        dtypes = [0 if t is None else DTYPES[t.dtype] for t in (y_hat, skip, out, bias)]
        n, h, w, c = codes.shape
        head = struct.pack(
            "27q", n, h, w, c, shape[-1], *(side for pair in window for side in pair), shape[1], shape[2], weight_bits,
            n * shape[1] * shape[2] // scale.numel(), EPILOGUES[epilogue], *dtypes, cut.tile, cut.splits,
            cut.multiprocessors, cut.falling, cut.seed,
        )  # fmt: skip
        buffers = (codes, scale, zero_point, weight_packed, weight_scale, bias, y_hat, skip, out)
        try:
            self.process.stdin.write(head + b"".join(map(_buffer, buffers)))
            self.process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(self.process.stderr.read().decode()) from None
        for result in (y_hat, out):
            if result is not None:
                data = self._read(result.numel() * result.element_size())
                result.copy_(torch.frombuffer(bytearray(data), dtype=result.dtype).view(result.shape))
        return struct.unpack("q", self._read(8))[0]

    def _read(self, size: int) -> bytes:
        data = self.process.stdout.read(size)
        assert len(data) == size, self.process.stderr.read().decode()
        return data


def _buffer(t: Tensor | None) -> bytes:
    """Size and bytes of a tensor, -1 for None."""
    if t is None:
        return struct.pack("q", -1)
    data = t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return struct.pack("q", len(data)) + data
