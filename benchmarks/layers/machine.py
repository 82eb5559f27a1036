"""What this machine reaches in plain torch: a copy in memory, products and convolutions in every dtype, on random data.

These are the ceilings that kernels are seen against beside the data sheet. A corner of every result is checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks import record
from benchmarks.runner import Entrant, Row
from modiff_kernels.evaluation import sqnr

REPEATS = 10
CORNER = 64  # rows and columns of a product, or channels of a convolution, that are checked
LEAST_SQNR_DB = {torch.float32: 60.0, torch.float16: 50.0, torch.bfloat16: 40.0}
"""Of the checked part to float64 out of the same inputs: rounding of the result, and tf32 where torch allows it."""
SIZES = {"cuda": (8192, (16, 1280, 32), 1 << 32), "cpu": (1536, (4, 256, 32), 1 << 28)}
"""By device: rows and columns of a product; images, channels and side of a 3x3 convolution; bytes of a copy."""


@dataclass(frozen=True)
class Rate:
    """One measurement; key: as rows name it."""

    kind: str
    dtype: torch.dtype
    key: str
    compiled: bool = False

    @property
    def name(self) -> str:
        """The same."""
        return self.key


def rates(device: str) -> list[Rate]:
    """All measurements on a kind of device."""
    side, (images, channels, size), copied = SIZES[device]
    floats = (torch.float32, torch.float16, torch.bfloat16) if device == "cuda" else (torch.float32,)
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in (*floats, torch.int8)}
    found = [Rate("copy", torch.int8, f"copy-{copied}")]
    found += [Rate("matmul", dtype, f"matmul-{name}-{side}") for dtype, name in names.items()]
    shape = f"{channels}@{size}x{size}-b{images}"
    return found + [Rate("conv", dtype, f"conv3x3-{names[dtype]}-{shape}") for dtype in floats]


@dataclass
class Work:
    """A call that does `amount`: operations, or bytes read and written, and what a corner of its result should be."""

    call: Callable[[], torch.Tensor]
    amount: float
    corner: Callable[[torch.Tensor], torch.Tensor]
    expected: torch.Tensor


def work_of(rate: Rate, device: torch.device) -> Work:
    """Its tensors and its call."""
    side, (images, channels, size), copied = SIZES[device.type]

    def random(*shape: int) -> torch.Tensor:
        if rate.dtype is torch.int8:
            return torch.randint(-128, 128, shape, dtype=rate.dtype, device=device)
        return torch.randn(*shape, dtype=rate.dtype, device=device)

    if rate.kind == "copy":
        source = random(copied)
        target = torch.zeros_like(source)
        return Work(lambda: target.copy_(source), 2 * copied, lambda out: out.int(), source.int())
    if rate.kind == "matmul":
        a, b = random(side, side), random(side, side).t()  # columns in memory order, as weights are
        call = (lambda: torch._int_mm(a, b)) if rate.dtype is torch.int8 else (lambda: a @ b)
        expected = a[:CORNER].double() @ b[:, :CORNER].double()
        return Work(call, 2 * side**3, lambda out: out[:CORNER, :CORNER], expected)
    x, weight = (
        random(*shape).to(memory_format=torch.channels_last)
        for shape in ((images, channels, size, size), (channels, channels, 3, 3))
    )
    expected = F.conv2d(x[:1].double(), weight[:CORNER].double(), padding=1)
    amount = 2 * 9 * channels**2 * images * size**2
    return Work(lambda: F.conv2d(x, weight, padding=1), amount, lambda out: out[:1, :CORNER], expected)


class MachineCase:
    """All rates, for benchmarks/runner.py."""

    baselines: dict[str, Sequence[str]] = {}  # noqa: RUF012 (a constant)

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.backends.cudnn.benchmark = True

    def make(self, rate: Rate) -> Work:
        return work_of(rate, self.device)

    def verify(self, entrant: Entrant) -> float | str:
        work = entrant.subject
        found = work.corner(work.call())
        if not found.is_floating_point():
            return float("inf") if torch.equal(found.double(), work.expected.double()) else "integers differ"
        sqnr_db, least = sqnr(found.double(), work.expected), LEAST_SQNR_DB[found.dtype]
        return sqnr_db if sqnr_db >= least else f"{sqnr_db:.1f} dB to float64, at least {least:g} expected"

    def timed(self, entrant: Entrant) -> list[float]:
        """Of REPEATS calls in a row."""
        call = entrant.subject.call
        if self.device.type == "cpu":
            from benchmarks.timing import CallTimer

            return [second for _ in range(REPEATS) for second in CallTimer()(call)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [1e-3 * begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]

    def rows(self, entrant: Entrant) -> list[Row]:
        is_copy = entrant.config.kind == "copy"
        metric, unit, scale = ("bandwidth", "GB/s", 1e-9) if is_copy else ("rate", "TOPS", 1e-12)
        timer = "perf_counter" if self.device.type == "cpu" else "cuda_event"
        row = {"op": "machine", "problem": entrant.config.key, "backend": "torch", "metric": metric, "unit": unit}
        row |= {"cache": "warm", "timer": timer, "sqnr_db": entrant.sqnr_db}
        return [row | record.percentiles([entrant.subject.amount * scale / s for s in entrant.times])]

    def ratio_rows(self, entrant: Entrant, metric: str, faster: list[float]) -> list[Row]:
        return []
