"""The CUDA kernels on the host: builds the programs of emulator/ with sanitizers, and calls them in the place of the
ops `modiff_cuda::quantize` and `modiff_cuda::product`; builds its modules, functions of csrc on arrays.
"""

import importlib.util
import struct
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from modiff_kernels.backends.cuda import quantizing
from modiff_kernels.quant.packing import empty_packed
from modiff_kernels.quant.spec import granule_count

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = Path(__file__).parent / "emulator"
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/common/problem.h


def compile_source(compiler: str, source: Path, out: Path, *flags: str) -> None:
    """-O0: more time goes into compiling than into running."""
    common = ["-std=c++17", "-O0", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, *common, *flags, f"-I{ROOT / 'csrc'}", f"-I{source.parent}", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_module(compiler: str, name: str, folder: Path, pybind11_include: str) -> ModuleType:
    """The pybind11 module emulator/<name>.cpp; what is undefined in it ends the process with a message."""
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-shared", "-fPIC", "-fvisibility=hidden", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    for include in (pybind11_include, sysconfig.get_path("include")):
        flags += ["-isystem", include]
    compile_source(compiler, EMULATOR / f"{name}.cpp", library, *flags)
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Emulator:
    """A running program that answers calls."""

    def __init__(self, program: Path):
        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.falling = False

    def close(self) -> None:
        self.process.stdin.close()
        errors = self.process.stderr.read().decode()
        assert self.process.wait(timeout=60) == 0, errors

    def ask(self, head: bytes, tensors: Sequence[torch.Tensor | None], results: Sequence[torch.Tensor | None]) -> None:
        """Sends a call and fills `results`, as far as there are any, with the answer."""
        try:
            self.process.stdin.write(head + b"".join(map(_buffer, tensors)))
            self.process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(self.process.stderr.read().decode()) from None
        for result in results:
            if result is not None:
                _in_memory_order(result).copy_(self._read(result))

    def _read(self, like: torch.Tensor) -> torch.Tensor:
        size = like.numel() * like.element_size()
        data = self.process.stdout.read(size)
        assert len(data) == size, self.process.stderr.read().decode()
        return torch.frombuffer(bytearray(data), dtype=like.dtype).view(_in_memory_order(like).shape)


class QuantizingEmulator(Emulator):
    """emulator/quantizing.cpp; `quantize` has the arguments and results of the op."""

    def quantize(
        self, x, prologue, gamma, beta, shift, num_groups, eps, silu, x_hat, affine, act_bits, granularity, clip_ratio,
        scale, packed, samples, rows, channels,
    ):  # fmt: skip
        head = struct.pack(
            "16q2d", prologue, samples, rows, channels, DTYPES[x.dtype], num_groups, silu, _dtype(x_hat), affine,
            act_bits, granularity, packed, _dtype(gamma), _dtype(beta), _dtype(shift), self.falling, eps, clip_ratio,
        )  # fmt: skip
        like = x if x.ndim == 4 else x[..., :channels].contiguous()
        codes = empty_packed(like, act_bits) if packed else torch.empty_like(like, dtype=torch.int8)
        name = next(key for key, value in quantizing.GRANULARITY.items() if value == granularity)
        used = torch.empty(granule_count(like.shape, name, x.ndim == 4))
        third = torch.empty_like(used, dtype=torch.int32 if x_hat is None else torch.float32)
        self.ask(head, (x, x_hat, gamma, beta, shift, scale), (codes, used, third, x_hat))
        return codes, used, third


class ProductEmulator(Emulator):
    """emulator/products.cpp; `product` has the arguments and results of the op. `tile` and `splits` are what the
    kernels choose for a GPU (csrc/cuda/sm80/tile_config.h); CHOOSE leaves it to them, for a GPU with as many
    multiprocessors as `splits`.
    """

    CHOOSE = -1

    def __init__(self, program: Path):
        super().__init__(program)
        self.tile, self.splits = self.CHOOSE, 4

    def product(
        self, codes, scale, zero_point, weight, weight_bits, weight_scale, bias, epilogue, y_hat, skip, write_out,
        out_dtype, geometry, cut,
    ):  # fmt: skip
        samples, h, w, _, n, r, s, *window, _ = geometry
        sizes = [
            (size + 2 * window[2 + i] - window[4 + i] * (kernel - 1) - 1) // window[i] + 1
            for i, (size, kernel) in enumerate(((h, r), (w, s)))
        ]
        bits, rows_per_scale = 4 if codes.dtype == torch.uint8 else 8, samples * sizes[0] * sizes[1] // len(scale)
        head = struct.pack(
            "30q", *geometry, weight_bits, bits, rows_per_scale, epilogue, _dtype(bias), _dtype(y_hat),
            _dtype(skip), DTYPES[out_dtype], write_out, self.tile, self.splits, self.falling,
            *(cut or (0, 0, 0, 0)),
        )  # fmt: skip
        if codes.ndim == 4:
            out = torch.empty((samples, n, *sizes), dtype=out_dtype, memory_format=torch.channels_last)
        else:
            out = torch.empty((*codes.shape[:-1], n), dtype=out_dtype)
        tensors = (codes, scale, zero_point, weight, weight_scale, bias, y_hat, skip)
        self.ask(head, tensors, (out if write_out else None, y_hat))
        return out if write_out else torch.empty(0, dtype=out_dtype)


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
