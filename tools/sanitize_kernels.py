"""Every family of kernels once, at small odd sizes, against the backend reference: the first thing to run on a new GPU,
and what compute-sanitizer is run on.

python tools/sanitize_kernels.py [--backend cuda triton] [--match TEXT] [--jobs 14]

export PYTORCH_NO_CUDA_MEMORY_CACHING=1          every tensor is an allocation of its own, whose ends are watched
compute-sanitizer --tool memcheck python tools/sanitize_kernels.py --backend cuda
compute-sanitizer --tool racecheck --kernel-name kns=modiff python tools/sanitize_kernels.py --backend cuda

Prints a line per family: ok, what differs, or why the backend leaves it out. Exit code 1 if something differs. Inputs
are made on the CPU, so that hardly a kernel of torch runs beside those that are looked at. Backend cpu runs everywhere.
--jobs deals the families out to so many processes, as Triton compiles some for each. A process that has lost its CUDA
context ends; give each backend a run of its own, so that it does not take the other one with it."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.layers import prepared  # noqa: E402
from benchmarks.runner import device_is_lost  # noqa: E402
from modiff_kernels import ops  # noqa: E402
from modiff_kernels.ops import dispatch  # noqa: E402
from modiff_kernels.quant.affine import quantize_weight  # noqa: E402

GPU_BACKENDS = ("cuda", "triton")
EMPTY = 2  # exit code where no family has the name that is asked for
MOST_TIES = 0.01
"""Share of codes that may be off behind a norm or an activation, whose float32 sums have no fixed order."""
MULTIPLIER = 16  # the largest of per_block at 4 bits: what a code at a tie is multiplied with


@dataclass(frozen=True)
class Product:
    """One product, and which kernels it reaches on an H100 (csrc/cuda/sm90/tiling.h, csrc/cuda/sm80/tile_config.h)."""

    samples: int
    height: int
    width: int
    c_in: int
    c_out: int
    kernel: int = 1
    stride: int = 1
    bits: int = 8
    group_size: int = -1
    groups: int = 1

    @property
    def window(self) -> ops.Window | None:
        """Of a convolution; a Linear is what has neither a window nor a width."""
        if self.kernel == 1 and self.stride == 1 and self.width == 1:
            return None
        return ops.Window((self.kernel,) * 2, (self.stride,) * 2, (self.kernel // 2,) * 2, (1, 1), self.groups)

    def __str__(self) -> str:
        kind = f"conv{self.kernel}x{self.kernel}-s{self.stride}-g{self.groups}" if self.window else "linear"
        size = f"{self.samples}x{self.height}x{self.width}x{self.c_in}-{self.c_out}"
        return f"{kind}-w{self.bits}-group{self.group_size}-{size}"


PRODUCTS = (
    # sm90: 128 x 64, one step; boxes of 64 codes and im2col; stride 2; parts along K
    Product(3, 5, 1, 128, 64),
    Product(2, 9, 7, 64, 72, 3),
    Product(2, 9, 8, 80, 72, 3, 2),
    Product(1, 8, 8, 1280, 72, 3),
    # 256 x 160, 128 x 256, 128 x 128
    Product(8, 1089, 1, 128, 320),
    Product(8, 1089, 1, 128, 256),
    Product(4, 1089, 1, 128, 256),
    # packed weights: 128 x 64, then 256 x 160
    *(Product(3, 5, 1, 128, 64, bits=bits) for bits in (4, 3)),
    *(Product(2, 9, 7, 128, 72, 3, bits=bits) for bits in (4, 3)),
    *(Product(8, 1089, 1, 128, 320, bits=bits) for bits in (4, 3)),
    # sm80, for what TMA cannot walk: bytes, unpacked, parts along K, the large tile
    *(Product(1, 19, 19, 32, 24, 1, 9, bits) for bits in (8, 4)),
    Product(1, 19, 19, 2048, 24, 1, 9),
    Product(2, 5, 1, 96, 40, bits=3),
    Product(8, 1089, 1, 96, 320, bits=3),
    # what triton alone has: groups of scales and of channels, channels that are no multiple of 16
    Product(3, 7, 1, 64, 40, bits=4, group_size=32),
    Product(2, 5, 6, 32, 24, 3, groups=2),
    Product(2, 5, 6, 20, 24, 3),
)


class Call(NamedTuple):
    """A family: `run(backend, device)` gives its results; `tie`: by how much codes at a rounding tie may be off."""

    name: str
    run: Callable[[str, str], list[Tensor]]
    tie: int = 0


def _laid_out(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values


def _random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return _laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


class Layer:
    """The operands of a product on `device`."""

    def __init__(self, case: Product, backend: str, device: str) -> None:
        self.window, k = case.window, case.c_in // case.groups
        side = () if self.window is None else (case.kernel, case.kernel)
        weight = _random(case.c_out, k, *side, seed=2)
        codes, scale = quantize_weight(weight.float() / k**0.5, case.bits, case.group_size)
        packed = ops.pack_weight(codes, case.bits).to(device)
        portable = ops.PackedWeight(packed, scale.to(device), case.bits, case.group_size)
        self.weight = prepared(portable, codes.shape[1], self.window, backend)
        self.x_shape, y_shape = (case.samples, case.height, case.c_in), (case.samples, case.height, case.c_out)
        if self.window is not None:
            self.x_shape = (case.samples, case.c_in, case.height, case.width)
            y_shape = self.window.output_shape(self.x_shape, case.c_out)
        self.x, self.x_hat = (_random(*self.x_shape, seed=seed).to(device) for seed in (3, 4))
        self.y_hat, self.skip = (_random(*y_shape, seed=seed).to(device) for seed in (5, 6))
        self.bias = _random(case.c_out, seed=7).to(device)


def _product(case: Product, with_state: bool, backend: str, device: str) -> list[Tensor]:
    layer = Layer(case, backend, device)
    scale = (torch.arange(case.samples) * 1e-4 + 1e-3).to(device)
    codes = torch.randint(-128, 128, layer.x_shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    codes, rest = _laid_out(codes).to(device), (layer.skip, layer.window, torch.float16)
    if with_state:
        return [ops.product(codes, scale, None, layer.weight, layer.y_hat, None, *rest, backend=backend), layer.y_hat]
    zero_point = (torch.arange(case.samples, dtype=torch.int32) * 5 - 7).to(device)
    return [ops.product(codes, scale, zero_point, layer.weight, None, layer.bias, *rest, backend=backend)]


def _modulate(case: Product, granularity: str, backend: str, device: str) -> list[Tensor]:
    layer = Layer(case, backend, device)
    state = (layer.x_hat, None, layer.weight, layer.y_hat, layer.skip, layer.window, torch.float16)
    results = ops.modulate(layer.x, ops.IDENTITY, *state, 4, granularity, backend=backend)
    return [*results, layer.x_hat, layer.y_hat]


GRANULARITIES = ("per_sample", "per_token")
IMAGES, TOKENS = ((2, 40, 7, 5), (1, 21, 5, 3)), ((2, 33, 72), (3, 5, 21), (65, 320))
PROLOGUES = {"identity": IMAGES + TOKENS, "group_norm": IMAGES, "layer_norm": TOKENS, "geglu": TOKENS}


def _prologue(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ops.Prologue]:
    """What is quantised, and how x is made of it."""
    channels = shape[1] if len(shape) == 4 else shape[-1]
    h = _random(*((*shape[:-1], 2 * channels) if kind == "geglu" else shape), dtype=dtype).to(device)
    if kind in ("identity", "geglu"):
        return h, ops.Prologue(kind)
    gamma, beta = (_random(channels, dtype=dtype, seed=seed).to(device) for seed in (8, 9))
    if kind == "layer_norm":
        return h, ops.Prologue(kind, gamma, beta, eps=1e-5)
    shift = _random(shape[0], channels, dtype=dtype, seed=10).to(device)
    return h, ops.Prologue(kind, gamma, beta, shift, 4 if channels % 4 == 0 else 3, 1e-5, True)


def _quantize(kind: str, shape: tuple[int, ...], granularity: str, source: str, bits: int) -> Callable:
    """Of the residual with a scale by `source`, or of the activation: "affine", "symmetric"."""

    def run(backend: str, device: str) -> list[Tensor]:
        h = _prologue(kind, shape, torch.float32 if source == "float32" else torch.float16, device)
        if source in ("affine", "symmetric"):
            return list(ops.quantize(*h, None, None, bits, granularity, affine=source == "affine", backend=backend))
        x_hat = _random(*shape, seed=11).to(device)
        scale = torch.full((1,), 0.3).to(device) if source == "given" else None
        return [*ops.quantize(*h, x_hat, scale, bits, granularity, backend=backend), x_hat]

    return run


def calls() -> Iterator[Call]:
    """All families: everything at the first shape of a prologue, the rest of the shapes with two granularities."""
    for kind, shapes in PROLOGUES.items():
        for place, shape in enumerate(shapes):
            forms = [(granularity, "dynamic", 4) for granularity in GRANULARITIES]
            forms += [(granularity, "affine", 8) for granularity in GRANULARITIES]
            if place == 0:
                sources = ("dynamic", "given", "float32")
                forms += [(granularity, s, 4) for granularity in GRANULARITIES for s in sources[1:]]
                forms += [("per_tensor", s, 4) for s in sources] + [("per_block", s, 4) for s in sources[::2]]
                forms += [(granularity, "symmetric", 8) for granularity in GRANULARITIES]
            if kind == "identity":
                forms += [(granularity, s, 3) for granularity, s, bits in forms if (s, bits) == ("dynamic", 4)]
            for granularity, source, bits in forms:
                tie = 0 if kind == "identity" else MULTIPLIER if granularity == "per_block" else 1
                name = f"quantize {kind} {shape} {granularity} {source} {bits}"
                yield Call(name, _quantize(kind, shape, granularity, source, bits), tie)
    for case in PRODUCTS:
        yield Call(f"product state {case}", lambda *at, case=case: _product(case, True, *at))
        yield Call(f"product plain {case}", lambda *at, case=case: _product(case, False, *at))
    for case in (PRODUCTS[0], PRODUCTS[1], *(case for case in PRODUCTS if case.groups == 9)):
        for granularity in ("per_sample", "per_block" if case.window else "per_token"):
            yield Call(f"modulate {granularity} {case}", lambda *at, c=case, g=granularity: _modulate(c, g, *at))


def difference(got: list[Tensor], wanted: list[Tensor], tie: int) -> str | None:
    """What is wrong with results, in words. Codes are equal, or some of them off by up to `tie`; the rest is equal up
    to roundings, but for the state where codes are off."""
    off = None
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
            forms = [f"{t.dtype} {tuple(t.shape)} {t.stride()}" for t in (a, b)]
            return f"result {index} is {forms[0]}, not {forms[1]}"
        if not a.dtype.is_floating_point:
            distance = (a.int() - b.int()).abs()
            wrong, most = int((distance > 0).sum()), int(distance.max())
            if most > tie or wrong > MOST_TIES * a.numel():
                return f"{wrong} of {a.numel()} codes of result {index} differ, by up to {most}"
            off = distance > 0 if index == 0 else off
            continue
        eps = max(torch.finfo(a.dtype).eps, torch.finfo(torch.float16).eps)
        close = torch.isclose(a.float(), b.float(), rtol=4 * eps, atol=4 * eps)
        if off is not None and off.shape == close.shape:
            close |= off
        if not close.all():
            worst = (a.float() - b.float()).abs().nan_to_num(torch.inf).max()
            return f"{int((~close).sum())} of {a.numel()} values of result {index} differ, by up to {worst:.3g}"
    return None


def check_all(chosen: Sequence[Call], backends: Sequence[str]) -> int | None:
    """How many calls went wrong; None: the CUDA context is lost, and nothing works any more in this process."""
    failed = 0
    for call in chosen:
        wanted = call.run("reference", "cpu")
        for backend in backends:
            wrong, words = None, "ok"
            try:
                got = [result.cpu() for result in call.run(backend, "cuda" if backend in GPU_BACKENDS else "cpu")]
                wrong = difference(got, wanted, call.tie)
            except ops.BackendUnavailable as error:
                words = f"left out: {error}"
            except Exception as error:  # compilers have errors of their own
                wrong = f"{type(error).__name__}: {error}"
            failed += wrong is not None
            print(f"{backend:9s} {call.name}: {f'FAILED: {wrong}' if wrong else words}", flush=True)
            if wrong and backend in GPU_BACKENDS and device_is_lost():
                print("stopped: the CUDA context is lost", flush=True)
                return None
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=GPU_BACKENDS, choices=dispatch.BACKENDS)
    parser.add_argument("--match", default="", help="only families whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    for backend in args.backend:
        if (reason := dispatch.why_unavailable(backend)) is not None:
            parser.error(f"backend {backend}: {reason}")
    begin = time.perf_counter()
    chosen = [call for call in calls() if args.match in call.name]
    if args.jobs > 1:
        own = [sys.executable, str(Path(__file__)), "--backend", *args.backend, "--match", args.match, "--share"]
        processes = [subprocess.Popen([*own, str(index), str(args.jobs)]) for index in range(args.jobs)]
        failed: int | None = sum(process.wait() not in (0, EMPTY) for process in processes)
    else:
        chosen = chosen[args.share[0] :: args.share[1]]
        failed = check_all(chosen, args.backend)
    seconds = time.perf_counter() - begin
    print(f"{len(chosen) * len(args.backend)} calls, {'all' if failed is None else failed} failed, {seconds:.0f} s")
    return EMPTY if not chosen else int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
