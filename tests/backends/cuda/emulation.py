"""The CUDA kernels on the host: builds the program of emulator/ with sanitizers, and calls it in the place of the op
`modiff_cuda::quantize`.
"""

import struct
import subprocess
from pathlib import Path

import torch

from modiff_kernels.backends import cuda
from modiff_kernels.quant.packing import empty_packed
from modiff_kernels.quant.spec import granule_count

ROOT = Path(__file__).resolve().parents[3]
SOURCE = Path(__file__).parent / "emulator" / "main.cpp"
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/common/problem.h


def compile_source(compiler: str, source: Path, out: Path, *flags: str) -> None:
    """-O0: more time goes into compiling than into running."""
    common = ["-std=c++17", "-O0", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, *common, *flags, f"-I{ROOT / 'csrc'}", f"-I{source.parent}", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Emulator:
    """A running program; `quantize` has the arguments and results of the op."""

    def __init__(self, program: Path):
        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.falling = False

    def close(self) -> None:
        self.process.stdin.close()
        errors = self.process.stderr.read().decode()
        assert self.process.wait(timeout=60) == 0, errors

    def quantize(
        self, x, prologue, gamma, beta, shift, num_groups, eps, silu, x_hat, affine, act_bits, granularity, clip_ratio,
        scale, packed, samples, rows, channels,
    ):  # fmt: skip
        head = struct.pack(
            "16q2d", prologue, samples, rows, channels, DTYPES[x.dtype], num_groups, silu, _dtype(x_hat), affine,
            act_bits, granularity, packed, _dtype(gamma), _dtype(beta), _dtype(shift), self.falling, eps, clip_ratio,
        )  # fmt: skip
        try:
            self.process.stdin.write(head + b"".join(map(_buffer, (x, x_hat, gamma, beta, shift, scale))))
            self.process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(self.process.stderr.read().decode()) from None
        like = x if x.ndim == 4 else x[..., :channels].contiguous()
        codes = empty_packed(like, act_bits) if packed else torch.empty_like(like, dtype=torch.int8)
        name = next(key for key, value in cuda._GRANULARITY.items() if value == granularity)
        used = torch.empty(granule_count(like.shape, name, x.ndim == 4))
        third = torch.empty_like(used, dtype=torch.int32 if x_hat is None else torch.float32)
        for result in (codes, used, third, x_hat):
            if result is not None:
                _in_memory_order(result).copy_(self._read(result))
        return codes, used, third

    def _read(self, like: torch.Tensor) -> torch.Tensor:
        size = like.numel() * like.element_size()
        data = self.process.stdout.read(size)
        assert len(data) == size, self.process.stderr.read().decode()
        return torch.frombuffer(bytearray(data), dtype=like.dtype).view(_in_memory_order(like).shape)


def _dtype(t: torch.Tensor | None) -> int:
    return 0 if t is None else DTYPES[t.dtype]


def _in_memory_order(t: torch.Tensor) -> torch.Tensor:
    return t.permute(0, 2, 3, 1) if t.ndim == 4 else t


def _buffer(t: torch.Tensor | None) -> bytes:
    """Size and bytes of a tensor, -1 for None."""
    if t is None:
        return struct.pack("q", -1)
    data = _in_memory_order(t).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return struct.pack("q", len(data)) + data
