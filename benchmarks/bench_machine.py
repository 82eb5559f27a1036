"""What this machine reaches in plain torch: a copy in memory, products and convolutions in every dtype, on random data.

    python benchmarks/bench_machine.py [--device cuda] [--record]

These are the ceilings that kernels are seen against beside the data sheet. Every product is checked on a corner of its
result.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record
from modiff_kernels.evaluation import sqnr, text_table
from modiff_kernels.evaluation.networks import choose_device

REPEATS = 10
CORNER = 64  # rows and columns of a product, or channels of a convolution, that are checked
LEAST_SQNR_DB = {torch.float32: 60.0, torch.float16: 50.0, torch.bfloat16: 40.0}
"""Of the checked part to float64 out of the same inputs: rounding of the result, and tf32 where torch allows it."""
SIZES = {"cuda": (8192, (16, 1280, 32), 1 << 32), "cpu": (1536, (4, 256, 32), 1 << 28)}
"""By device: rows and columns of a product; images, channels and side of a 3x3 convolution; bytes of a copy."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of every repeat of a call that does `amount`: operations, or bytes read and written."""

    problem: str
    amount: float
    unit: str
    seconds: list[float]
    sqnr_db: float

    def row(self, device_name: str, timer: str) -> dict:
        """A row for record.append, in TOPS or GB/s."""
        scale = 1e-12 if self.unit == "TOPS" else 1e-9
        rates = [self.amount * scale / s for s in self.seconds]
        return {
            "op": "machine",
            "problem": self.problem,
            "backend": "torch",
            "metric": "rate" if self.unit == "TOPS" else "bandwidth",
            "unit": self.unit,
            **record.percentiles(rates),
            "cache": "warm",
            "timer": timer,
            "sqnr_db": self.sqnr_db,
            "verified": True,
            "device": device_name,
        }


def time_s(call: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of REPEATS calls after two untimed ones."""
    for _ in range(2):
        call()
    if device.type == "cpu":
        marks = [time.perf_counter()]
        for _ in range(REPEATS):
            call()
            marks.append(time.perf_counter())
        return [end - begin for begin, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [1e-3 * begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]


def copied(device: torch.device, size: int) -> Measured:
    """A copy of `size` bytes, counted as read and written."""
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    seconds = time_s(lambda: target.copy_(source), device)
    if not torch.equal(source, target):
        raise RuntimeError("the copy differs from its source")
    return Measured(f"copy-{size}", 2 * size, "GB/s", seconds, float("inf"))


def multiplied(device: torch.device, size: int, dtype: torch.dtype) -> Measured:
    """A product of two square matrices of side `size`; int8 ones give int32."""
    name = f"matmul-{str(dtype).removeprefix('torch.')}-{size}"
    if dtype is torch.int8:
        a, b = (torch.randint(-128, 128, (size, size), dtype=dtype, device=device) for _ in range(2))
        b = b.t().contiguous().t()  # columns in memory order, as weights are
        call = lambda: torch._int_mm(a, b)  # noqa: E731
    else:
        a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        b = b.t().contiguous().t()
        call = lambda: a @ b  # noqa: E731
    expected = a[:CORNER].double() @ b[:, :CORNER].double()
    return Measured(name, 2 * size**3, "TOPS", time_s(call, device), checked(call()[:CORNER, :CORNER], expected, name))


def convolved(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> Measured:
    """A 3x3 convolution in channels_last with as many channels out as in."""
    images, channels, side = shape
    name = f"conv3x3-{str(dtype).removeprefix('torch.')}-{channels}@{side}x{side}-b{images}"
    x = torch.randn(images, channels, side, side, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    call = lambda: F.conv2d(x, weight, padding=1)  # noqa: E731
    expected = F.conv2d(x[:1].double(), weight[:CORNER].double(), padding=1)
    operations = 2 * 9 * channels**2 * images * side**2
    return Measured(name, operations, "TOPS", time_s(call, device), checked(call()[:1, :CORNER], expected, name))


def checked(found: torch.Tensor, expected: torch.Tensor, name: str) -> float:
    """SQNR in dB of `found` to `expected`, float64; RuntimeError if it is lower than its dtype explains."""
    if found.dtype is torch.int32:
        if not torch.equal(found.double(), expected):
            raise RuntimeError(f"{name}: integers differ from the product in float64")
        return float("inf")
    sqnr_db = sqnr(found.double(), expected)
    if not sqnr_db >= LEAST_SQNR_DB[found.dtype]:
        raise RuntimeError(f"{name}: {sqnr_db:.1f} dB to float64, at least {LEAST_SQNR_DB[found.dtype]:g} expected")
    return sqnr_db


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--record", action="store_true", help="append the rows to benchmarks/results")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    side, image, copy_bytes = SIZES[device.type]
    floats = (torch.float32, torch.float16, torch.bfloat16) if cuda else (torch.float32,)
    with torch.inference_mode():
        found = [copied(device, copy_bytes)]
        found += [multiplied(device, side, dtype) for dtype in (*floats, torch.int8)]
        found += [convolved(device, image, dtype) for dtype in floats]
    name = torch.cuda.get_device_name(device) if cuda else record.device_name()
    rows = [measured.row(name, "cuda_event" if cuda else "perf_counter") for measured in found]
    header = ("problem", "unit", "median", "p20", "p80")
    print(
        text_table(header, [(r["problem"], r["unit"], *(f"{r[p]:.4g}" for p in ("p50", "p20", "p80"))) for r in rows])
    )
    if args.record:
        print(f"recorded in {record.append(rows, record.results_file(device=name))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
