"""Every family of kernels once, at small odd sizes, against the backend reference: the first thing to run on a new GPU,
and what compute-sanitizer is run on.

python tools/sanitize_kernels.py [--backend cuda triton] [--match TEXT]

export PYTORCH_NO_CUDA_MEMORY_CACHING=1          every tensor is an allocation of its own, whose ends are watched
compute-sanitizer --tool memcheck python tools/sanitize_kernels.py
compute-sanitizer --tool racecheck --kernel-name kns=modiff python tools/sanitize_kernels.py --backend cuda
compute-sanitizer --tool initcheck python tools/sanitize_kernels.py --backend cuda --match quantize
compute-sanitizer --tool synccheck --kernel-name kns=modiff python tools/sanitize_kernels.py --backend cuda

Prints a line per family: ok, what differs, or why the backend leaves it out. Exit code 1 if something differs. Inputs
are made on the CPU, so that hardly a kernel of torch runs beside those that are looked at. Backend cpu runs everywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modiff_kernels import ops  # noqa: E402
from modiff_kernels.ops import dispatch  # noqa: E402
from modiff_kernels.quant.affine import quantize_weight  # noqa: E402

GPU_BACKENDS = ("cuda", "triton")
MOST_TIES = 0.01
"""Share of codes that may be off behind a norm or an activation, whose float32 sums have no fixed order."""
MULTIPLIER = 16  # the largest of per_block at 4 bits: what a code at a tie is multiplied with


@dataclass(frozen=True)
class Product:
    """One product, and which kernels it reaches on an H100 (csrc/cuda/sm90/plan.h, csrc/cuda/sm80/tile_config.h)."""

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
    def conv(self) -> tuple:
        """Arguments of a convolution; a Linear is what has neither a window nor a width."""
        if self.kernel == 1 and self.stride == 1 and self.width == 1:
            return ()
        return (self.kernel,) * 2, (self.stride,) * 2, (self.kernel // 2,) * 2, (1, 1), self.groups

    def __str__(self) -> str:
        kind = f"conv{self.kernel}x{self.kernel}-s{self.stride}-g{self.groups}" if self.conv else "linear"
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


def _random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def _codes(*shape: int) -> Tensor:
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    return codes.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else codes


class Layer:
    """The operands of a product on `device`."""

    def __init__(self, case: Product, stem: str, backend: str, device: str) -> None:
        self.conv, self.op_name = case.conv, f"{stem}_{'conv2d' if case.conv else 'linear'}"
        k = case.c_in // case.groups
        weight = _random(*((case.c_out, k, case.kernel, case.kernel) if self.conv else (case.c_out, k)), seed=2)
        codes, scale = quantize_weight(weight.float() / k**0.5, case.bits, case.group_size)
        sizes = {"n": case.c_out, "k": codes.shape[1], "weight_bits": case.bits, "group_size": case.group_size}
        names = ("kernel_size", "stride", "padding", "dilation", "groups")
        window = dict(zip(names, self.conv))
        layout = ops.preferred_layout(self.op_name, device, **sizes, **window, backend=backend)
        kept = {name: window[name] for name in ("kernel_size", "groups") if window}
        packed = ops.pack_weight(codes, case.bits).to(device)
        arguments = (packed, case.bits, case.c_out, codes.shape[1])
        self.packed = ops.prepare_weight(*arguments, layout_to=layout, **kept, backend=backend)
        self.scale = scale.to(device)
        self.format = (case.bits, case.group_size, layout, *self.conv)
        self.x_shape, self.y_shape = (case.samples, case.height, case.c_in), (case.samples, case.height, case.c_out)
        if self.conv:
            sizes = [(side - 1) // case.stride + 1 for side in (case.height, case.width)]  # odd kernels, half padding
            self.x_shape = (case.samples, case.c_in, case.height, case.width)
            self.y_shape = (case.samples, case.c_out, *sizes)
        self.x, self.x_hat = (_random(*self.x_shape, seed=seed).to(device) for seed in (3, 4))
        self.y_hat, self.skip = (_random(*self.y_shape, seed=seed).to(device) for seed in (5, 6))
        self.bias = _random(case.c_out, seed=7).to(device)
        self.op: Callable = getattr(ops, self.op_name)


def _accumulate(case: Product, backend: str, device: str) -> list[Tensor]:
    layer = Layer(case, "accumulate", backend, device)
    scale = (torch.arange(case.samples) * 1e-4 + 1e-3).to(device)
    weight = (layer.packed, layer.scale, layer.y_hat, layer.skip)
    codes = _codes(*layer.x_shape).to(device)
    return [layer.op(codes, scale, *weight, *layer.format, torch.float16, backend=backend), layer.y_hat]


def _quantized(case: Product, backend: str, device: str) -> list[Tensor]:
    layer = Layer(case, "quantized", backend, device)
    scale = (torch.arange(case.samples) * 1e-4 + 1e-3).to(device)
    zero_point = (torch.arange(case.samples, dtype=torch.int32) * 5 - 7).to(device)
    weight = (layer.packed, layer.scale, layer.bias, layer.skip)
    codes = _codes(*layer.x_shape).to(device)
    return [layer.op(codes, scale, zero_point, *weight, *layer.format, torch.float16, backend=backend)]


def _initialize(case: Product, first_step_bits: int, backend: str, device: str) -> list[Tensor]:
    layer = Layer(case, "initialize", backend, device)
    x_hat, y_hat = (torch.full_like(t, torch.nan) for t in (layer.x_hat, layer.y_hat))
    weight = (layer.packed, layer.scale, layer.bias, layer.skip)
    return [layer.op(layer.x, x_hat, y_hat, *weight, *layer.format, first_step_bits, backend=backend), x_hat, y_hat]


def _modulated(case: Product, granularity: str, backend: str, device: str) -> list[Tensor]:
    layer = Layer(case, "modulated", backend, device)
    weight = (layer.packed, layer.scale, layer.y_hat, layer.skip)
    arguments = (layer.x, layer.x_hat, None, *weight, 4, granularity, 1.0, *layer.format)
    return [*layer.op(*arguments, backend=backend), layer.x_hat, layer.y_hat]


GRANULARITIES = ("per_sample", "per_token")
IMAGES, TOKENS = ((2, 40, 7, 5), (1, 21, 5, 3)), ((2, 33, 72), (3, 5, 21), (65, 320))
PROLOGUES = {"": IMAGES + TOKENS, "group_norm_silu_": IMAGES, "layer_norm_": TOKENS, "geglu_": TOKENS}


def _prologue(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple:
    """The arguments of a quantising op before x_hat."""
    channels = shape[1] if len(shape) == 4 else shape[-1]
    vectors = [_random(channels, dtype=dtype, seed=seed).to(device) for seed in (8, 9)]
    if name == "group_norm_silu_":
        shift = _random(shape[0], channels, dtype=dtype, seed=10).to(device)
        return _random(*shape, dtype=dtype).to(device), shift, *vectors, 4 if channels % 4 == 0 else 3, 1e-5, True
    if name == "layer_norm_":
        return _random(*shape, dtype=dtype).to(device), *vectors, 1e-5
    wide = (*shape[:-1], 2 * channels) if name == "geglu_" else shape
    return (_random(*wide, dtype=dtype).to(device),)


def _residual(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, granularity: str, given: bool, packed: bool, bits: int
) -> Callable[[str, str], list[Tensor]]:
    def run(backend: str, device: str) -> list[Tensor]:
        x_hat = _random(*shape, seed=11).to(device)
        scale = torch.full((1,), 0.3).to(device) if given else None
        arguments = (*_prologue(name, shape, dtype, device), x_hat, scale, bits, granularity, 1.0)
        function = getattr(ops, f"{name}quantize_residual")
        results = function(*arguments, *((packed,) if name == "" else ()), backend=backend)
        return [*results, x_hat]

    return run


def _activation(name: str, shape: tuple[int, ...], granularity: str, affine: bool) -> Callable:
    def run(backend: str, device: str) -> list[Tensor]:
        function = getattr(ops, f"{name}quantize_activation")
        return list(function(*_prologue(name, shape, torch.float16, device), 8, granularity, affine, backend=backend))

    return run


def calls() -> Iterator[Call]:
    """All families: everything at the first shape of an op, the rest of the shapes with the two cuts into blocks."""
    for name, shapes in PROLOGUES.items():
        for place, shape in enumerate(shapes):
            for granularity in ("per_sample", "per_token", "per_tensor", "per_block") if place == 0 else GRANULARITIES:
                for source in ("dynamic", "given", "float32") if place == 0 else ("dynamic",):
                    if granularity == "per_block" and source == "given":
                        continue
                    dtype = torch.float32 if source == "float32" else torch.float16
                    tie = 0 if name == "" else MULTIPLIER if granularity == "per_block" else 1
                    run = _residual(name, shape, dtype, granularity, source == "given", False, 4)
                    yield Call(f"{name}quantize_residual {shape} {granularity} {source}", run, tie)
            for granularity in GRANULARITIES:
                for affine in (True, False) if place == 0 else (True,):
                    kind = "affine" if affine else "symmetric"
                    run = _activation(name, shape, granularity, affine)
                    yield Call(f"{name}quantize_activation {shape} {granularity} {kind}", run, int(name != ""))
                for bits in (3, 4) if name == "" else ():
                    run = _residual(name, shape, torch.float16, granularity, False, True, bits)
                    yield Call(f"quantize_residual {shape} {granularity} packed {bits}", run)
    for case in PRODUCTS:
        yield Call(f"accumulate {case}", lambda *at, case=case: _accumulate(case, *at))
        yield Call(f"quantized {case}", lambda *at, case=case: _quantized(case, *at))
    for case in (PRODUCTS[0], PRODUCTS[1]):
        for bits in (0, 8):
            yield Call(f"initialize {bits} {case}", lambda *at, case=case, bits=bits: _initialize(case, bits, *at))
        for granularity in ("per_sample", "per_block") if case.conv else ("per_sample", "per_token"):
            yield Call(f"modulated {granularity} {case}", lambda *at, c=case, g=granularity: _modulated(c, g, *at))


def difference(got: list[Tensor], wanted: list[Tensor], tie: int) -> str | None:
    """What is wrong with results, in words. Codes are equal, or some of them off by up to `tie`; the rest is equal up
    to roundings, but for the state where codes are off.
    """
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


def check(call: Call, backend: str, wanted: list[Tensor]) -> tuple[bool, str]:
    """Whether `backend` gives what is `wanted` of `call`, and a word about it."""
    try:
        got = [result.cpu() for result in call.run(backend, "cuda" if backend in GPU_BACKENDS else "cpu")]
    except ops.BackendUnavailable as error:
        return True, f"left out: {error}"
    found = difference(got, wanted, call.tie)
    return found is None, found or "ok"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=GPU_BACKENDS, choices=dispatch.BACKENDS)
    parser.add_argument("--match", default="", help="only families whose name contains this")
    args = parser.parse_args(arguments)
    for backend in args.backend:
        if (reason := dispatch.why_unavailable(backend)) is not None:
            parser.error(f"backend {backend}: {reason}")
    chosen = [call for call in calls() if args.match in call.name]
    failed = 0
    begin = time.perf_counter()
    for call in chosen:
        wanted = call.run("reference", "cpu")
        for backend in args.backend:
            try:
                well, words = check(call, backend, wanted)
            except (RuntimeError, ValueError) as error:
                well, words = False, str(error)
            failed += not well
            print(f"{backend:9s} {call.name}: {'' if well else 'FAILED: '}{words}", flush=True)
            if not well and "CUDA error" in words:
                print("stopped: after an error of CUDA nothing works any more in this process")
                return 1
    seconds = time.perf_counter() - begin
    print(f"{len(chosen) * len(args.backend)} calls, {failed} failed, {seconds:.0f} s")
    return int(failed > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main())
