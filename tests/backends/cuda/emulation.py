"""The CUDA kernels on the host: builds the programs of emulator/ with sanitizers, and calls them in the place of the
ops `modiff_cuda::quantize` and `modiff_cuda::product` (`stand_ins`); builds its modules, functions of csrc on arrays.
"""

import importlib.util
import os
import shutil
import struct
import subprocess
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from modiff_kernels.backends.cuda import library
from modiff_kernels.quant.operands import Window
from modiff_kernels.quant.packing import pack, packed_dtype, packed_width
from modiff_kernels.quant.spec import GRANULARITIES, granule_count

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = Path(__file__).parent / "emulator"
# Null pointers and those past the end stop the address sanitizer, too; looking for them twice makes compiling slower.
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize=null,pointer-overflow", "-fno-sanitize-recover=all")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/common/problem.h


def empty_packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Storage for `codes` ([..., K], or an image [N, C, H, W], channels_last) with every row, or pixel, in kpack_v1."""
    if codes.ndim == 4:
        n, c, h, w = codes.shape
        shape, memory_format = (n, packed_width(bits, c), h, w), torch.channels_last
    else:
        shape, memory_format = (*codes.shape[:-1], packed_width(bits, codes.shape[-1])), torch.contiguous_format
    return torch.empty(shape, dtype=packed_dtype(bits), device=codes.device, memory_format=memory_format)


def pack_channels(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`empty_packed`, filled."""
    packed = empty_packed(codes, bits)
    rows, bytes_of_rows = (t.movedim(1, -1) if t.ndim == 4 else t for t in (codes, packed))
    bytes_of_rows.copy_(pack(rows.flatten(0, -2), bits).view(bytes_of_rows.shape))
    return packed


def compile_source(compiler: str, source: Path, out: Path, *flags: str) -> None:
    """-O0: more time goes into compiling than into running."""
    common = ["-std=c++17", "-O0", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, *common, *flags, f"-I{ROOT / 'csrc'}", f"-I{source.parent}", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def cuda_includes() -> list[str]:
    """Flags for the headers of CUDA; without them the test is skipped."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
    if not (folder / "cuda_runtime_api.h").is_file():
        pytest.skip(f"the headers of CUDA were not found in {folder}; set CUDA_HOME")
    return [f"-isystem{folder}", f"-isystem{folder / 'cccl'}"]


def compile_launches(compiler: str, library: Path) -> None:
    """emulator/stubs.cpp with the launchers and kernels of emulator/launch_*.cu, which have their PTX with them."""
    nvcc = shutil.which("nvcc") or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    if not Path(nvcc).is_file():
        pytest.skip(f"the compiler of CUDA, {nvcc}, was not found; set CUDA_HOME")
    objects = []
    for arch, name in (("80", "sm80"), ("90a", "sm90")):
        objects.append(library.with_name(f"{name}.o"))
        command = [
            nvcc,
            "-std=c++17",
            f"-ccbin={compiler}",
            f"-I{ROOT / 'csrc'}",
            "--no-compress",
            "-Xcompiler=-fPIC,-w",
        ]
        command += [f"-gencode=arch=compute_{arch},code=compute_{arch}", "-c", EMULATOR / f"launch_{name}.cu"]
        done = subprocess.run([*command, "-o", objects[-1]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    folder, new = Path(torch.__file__).parent, library.with_suffix(".new")
    flags = ["-shared", "-fPIC", "-fvisibility=hidden", "-w", f"-isystem{folder / 'include'}", *cuda_includes()]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DMODIFF_SM90=1", '-DMODIFF_SOURCES=""']
    flags += ['-DMODIFF_COMPILER=""', *map(str, objects), "-Wl,--no-as-needed", f"-L{folder / 'lib'}", "-ltorch_cpu"]
    compile_source(compiler, EMULATOR / "stubs.cpp", new, *flags)
    new.rename(library)


def compile_module(compiler: str, folder: Path, pybind11_include: str) -> ModuleType:
    """The pybind11 module emulator/maps.cpp; what is undefined in it ends the process with a message."""
    library = folder / f"maps{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-shared", "-fPIC", "-fvisibility=hidden", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    for include in (pybind11_include, sysconfig.get_path("include")):
        flags += ["-isystem", include]
    compile_source(compiler, EMULATOR / "maps.cpp", library, *flags)
    spec = importlib.util.spec_from_file_location("maps", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Emulator:
    """A running program that answers calls."""

    def __init__(self, program: Path):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen([program], **pipes)
        self.seed = None  # of the order of threads and copies; None: drawn by the form of a call, always the same

    def order(self, form: torch.Tensor) -> int:
        return zlib.crc32(form.numpy().tobytes()) if self.seed is None else self.seed

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


def _rows(t):
    """What is to be sent of a parameter [C] or [N, C], and the stride between rows there."""
    if t is None or t.ndim == 1:
        return t, 0
    return (t[:1], 0) if t.stride(0) == 0 else (t, t.shape[1])


class QuantizeEmulator(Emulator):
    """emulator/quantize.cpp; `quantize` has the arguments and results of the op."""

    def quantize(self, x, further, gamma, beta, shift, x_hat, scale, form):
        channels, _, _, _, act_bits, granularity, packed = map(int, form.tolist()[3:10])
        shift, row = _rows(shift)
        (gamma, norm_row), beta = _rows(gamma), _rows(beta)[0]
        like = x[..., :channels].contiguous()
        if x.ndim == 4:
            like = torch.empty((len(x), channels, *x.shape[2:])).contiguous(memory_format=torch.channels_last)
        codes = empty_packed(like, act_bits) if packed else torch.empty_like(like, dtype=torch.int8)
        used = torch.empty(granule_count(like.shape, GRANULARITIES[granularity], x.ndim == 4))
        third = torch.empty_like(used, dtype=torch.int32 if x_hat is None else torch.float32)
        own = channels - (0 if further is None else further.shape[1])
        head = form.numpy().tobytes() + struct.pack("4q", row, norm_row, self.order(form), own)
        self.ask(head, (x, further, x_hat, gamma, beta, shift, scale), (codes, used, third, x_hat))
        return codes, used, third


class ProductEmulator(Emulator):
    """emulator/product.cpp, the kernels of csrc/cuda/sm80; `product` has the arguments and results of the op.

    `tile` and `splits` are what the kernels choose for a GPU (csrc/cuda/sm80/tile_config.h); CHOOSE leaves it to them,
    for a GPU with as many multiprocessors as `splits`."""

    CHOOSE = -1

    def __init__(self, program: Path):
        super().__init__(program)
        self.tile, self.splits = self.CHOOSE, 4

    def product(self, *call):
        *tensors, form = call
        code_bits = 4 if tensors[0].dtype == torch.uint8 else 8
        head = form.numpy().tobytes() + struct.pack("4q", self.tile, self.splits, code_bits, self.order(form))
        return self.answer(head, tensors, form)

    def answer(self, head, tensors, form):
        codes, y_hat = tensors[0], tensors[7]
        *geometry, _, geglu, write_out, out_dtype = map(int, form.tolist()[:18])
        out = None
        if write_out:
            out = _output(codes, geometry, list(DTYPES)[out_dtype], geglu)
        self.ask(head, tensors, (out, y_hat))
        return torch.empty(0, dtype=list(DTYPES)[out_dtype]) if out is None else out


class HopperEmulator(ProductEmulator):
    """emulator/hopper.cpp, the kernels of csrc/cuda/sm90 on a model of TMA, barriers and wgmma; `product` as above.

    `tile`: index in csrc/cuda/sm90/tiling.h, -1 for the tiling's own.
    `other`: takes what these kernels do not."""

    def __init__(self, program: Path, other: ProductEmulator | None = None):
        super().__init__(program)
        self.splits, self.multiprocessors = 1, 3
        self.other = other

    def product(self, *call):
        *tensors, form = call
        weight_bits = int(form[14])
        if self.other is not None and weight_bits == 3 and int(form[3] * form[5] * form[6]) % 128 != 0:
            return self.other.product(*call)
        launch = self.tile, self.splits, 8, self.multiprocessors, self.order(form)
        return self.answer(form.numpy().tobytes() + struct.pack("5q", *launch), tensors, form)


PROGRAMS = {"quantize": QuantizeEmulator, "product": ProductEmulator, "hopper": HopperEmulator}


def stand_ins(quantize: QuantizeEmulator, product: Emulator) -> dict[tuple[ModuleType, str], Callable[[], Callable]]:
    """(module, attribute) and value that put the emulation behind the backend cuda, for tensors of the CPU."""
    return {(library, "quantize_op"): lambda: quantize.quantize, (library, "product_op"): lambda: product.product}


def _output(codes: torch.Tensor, geometry: Sequence[int], dtype: torch.dtype, geglu: bool) -> torch.Tensor:
    if codes.ndim == 4:
        n, h, w, c_in, c_out, *window = geometry
        shape = Window.from_ints(window).output_shape((n, c_in, h, w), c_out)
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    return torch.empty((*codes.shape[:-1], geometry[4] // (2 if geglu else 1)), dtype=dtype)


def _in_memory_order(t: torch.Tensor) -> torch.Tensor:
    return t.permute(0, 2, 3, 1) if t.ndim == 4 else t


def _buffer(t: torch.Tensor | None) -> bytes:
    """Size (-1 for None), dtype (of floats) and bytes of a tensor."""
    if t is None:
        return struct.pack("2q", -1, 0)
    data = _in_memory_order(t).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return struct.pack("2q", len(data), DTYPES.get(t.dtype, 0)) + data
