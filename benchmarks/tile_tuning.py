"""What tools/tune_triton.py and tools/tune_cuda.py share: candidates of a product are measured on this GPU, the fastest
one is kept per shape, and each has a row, the chosen one and its neighbours.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.bounds import PEAKS, peaks_of
from benchmarks.layers.products import Problem, problems_by_share
from benchmarks.runner import Budget
from benchmarks.shapes import NETWORKS, Layer
from benchmarks.timing import ColdTimer
from modiff_kernels.backends import reference
from modiff_kernels.quant.packing import KPACK_V1, pack
from modiff_kernels.tuned import Store

OP = "product_tile"
OVER_BEST = "estimate_over_best"
"""Metric: how much slower than the fastest candidate the one is that the estimate chooses."""
ROUNDS, SECONDS = 20, 0.02
Timer = Callable[[Callable[[], Any]], list[float]]


class Scratch:
    """Tensors of one layer on `device`. `check` compares the output of an update with what it should be."""

    def __init__(self, layer: Layer, batch: int, weight_bits: int, device: torch.device) -> None:
        draw = torch.Generator(device).manual_seed(0)
        image = layer.kind == "conv"
        memory_format = torch.channels_last if image else torch.contiguous_format
        shape = (batch, layer.c_in, layer.h, layer.w) if image else (batch, layer.h, layer.c_in)
        values = torch.empty(shape, dtype=torch.float16, device=device, memory_format=memory_format)
        # Rounded Gaussians, as residuals are: the power that a multiplication draws depends on its operands.
        self.codes = values.normal_(0.0, 28.0, generator=draw).round_().clamp_(-128, 127).to(torch.int8)
        low = 1 << (weight_bits - 1)
        k = layer.c_in * layer.kernel**2
        rows = torch.randint(-low, low, (layer.c_out, k), dtype=torch.int8, generator=draw, device=device)
        self.weight = (pack(rows, weight_bits), torch.ones(layer.c_out, device=device))
        self.weight_bits = weight_bits
        pair = ((layer.kernel,) * 2, (layer.stride,) * 2, (layer.padding,) * 2, (1, 1), 1)
        self.conv = pair if image else None
        self.scale = torch.full((1,), 2.0**-12, device=device)  # keeps float16 finite; a power of two rounds nothing
        out_shape = (batch, layer.c_out, layer.h_out, layer.w_out) if image else (batch, layer.h, layer.c_out)
        self.y_hat = torch.empty(out_shape, dtype=torch.float16, device=device, memory_format=memory_format).zero_()
        self._ends = sorted({0, batch - 1})
        self._expected = self._reference()
        self._first: Tensor | None = None
        self.disputed = False

    def _reference(self) -> Tensor:
        function = reference.accumulate_linear if self.conv is None else reference.accumulate_conv2d
        y_hat = self.y_hat[self._ends].clone()
        codes = self.codes[self._ends]
        function(
            codes, self.scale, *self.weight, y_hat, None, self.weight_bits, -1, KPACK_V1, *(self.conv or ()),
            torch.float16, False,
        )  # fmt: skip
        return y_hat

    def is_exact(self, update: Callable[[], None]) -> bool:
        """Whether `update` gives the reference's output for the first and the last sample, and for all samples what the
        first exact candidate gave; bit for bit, as all sums are integers times a power of two. Where candidates differ
        between the ends, `disputed` is set, as any of them may be wrong.
        """
        self.y_hat.zero_()
        update()
        if not torch.equal(self.y_hat[self._ends], self._expected):
            return False
        if self._first is None:
            self._first = self.y_hat.clone()
        same = torch.equal(self.y_hat, self._first)
        self.disputed |= not same
        return same


class Tunable(Protocol):
    """A backend's products, as the tuner sees them."""

    name: str
    store: Store[Any, Any]

    def shape(self, scratch: Scratch) -> Any:
        """The key of a problem."""

    def candidates(self, scratch: Scratch) -> Sequence[Any]:
        """All choices for a problem, the one that is estimated to be best first; empty if the backend has none."""

    def cut(self, candidate: Any) -> tuple[Any, int]:
        """The candidate's tile, and the number of its parts along K."""

    def update(self, scratch: Scratch, candidate: Any) -> Callable[[], None]:
        """One update of the scratch output by this candidate."""


def shortlist(candidates: Sequence[Any], cut_of: Callable[[Any], tuple[Any, int]]) -> list[Any]:
    """Of every tile the number of parts with the best estimate, half and twice as many, in the order of `candidates`:
    an estimate that is wrong about tiles is seldom wrong by more than that about parts.
    """
    best: dict[Any, int] = {}
    for candidate in candidates:
        tile, parts = cut_of(candidate)
        best.setdefault(tile, parts)

    def is_near(candidate: Any) -> bool:
        tile, parts = cut_of(candidate)
        return parts in (best[tile], best[tile] // 2, best[tile] * 2)

    return [candidate for candidate in candidates if is_near(candidate)]


def tuned_problems(rows: Iterable[dict[str, str]], backend: str, commit: str) -> set[str]:
    """Problems among `rows` that were tuned at `commit`: their last row is there."""
    return {
        row["problem"]
        for row in rows
        if row["op"] == OP and row["metric"] == OVER_BEST and row["git_commit"] == commit
        if row["backend"].split("-")[0] == backend
    }


@dataclass
class Tuner:
    """Measures the candidates of problems. choices: shape -> fastest candidate so far; save: called after each problem;
    sink: takes its rows; done: names of problems that are left out.
    """

    backend: Tunable
    choices: dict[Any, Any]
    device: torch.device
    device_name: str
    timer: Timer
    sink: Callable[[list[dict[str, Any]]], None]
    save: Callable[[dict[Any, Any]], None]
    done: set[str] = field(default_factory=set)
    wrong: int = 0

    def run(self, problems: Sequence[Problem], weight_bits: Sequence[int], budget: Budget) -> int:
        """Tunes `problems` in their order until `budget` is spent; returns how many are left."""
        todo = [(problem, bits) for problem in problems for bits in weight_bits if problem.name(bits) not in self.done]
        for index, (problem, bits) in enumerate(todo):
            if budget.is_over:
                return len(todo) - index
            try:
                self._tune(problem, bits)
            except torch.OutOfMemoryError:
                print(f"{problem.name(bits)}: out of memory, not tuned", file=sys.stderr)
                torch.cuda.empty_cache()
        return 0

    def _tune(self, problem: Problem, weight_bits: int) -> None:
        layer, name = problem.layer, problem.name(weight_bits)
        if weight_bits != 8 and layer.kernel > 1 and layer.c_in % 8 != 0:
            return  # a tap of a packed weight begins at a byte
        scratch = Scratch(layer, problem.batch, weight_bits, self.device)
        candidates = self.backend.candidates(scratch)
        times: dict[Any, list[float]] = {}
        for candidate in shortlist(candidates, self.backend.cut):
            update = self.backend.update(scratch, candidate)
            try:
                if scratch.is_exact(update):
                    times[candidate] = self.timer(update)
                    continue
                reason = "WRONG sums"
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers have errors of their own
                reason = f"FAILED: {error}"
                if self.device.type == "cuda":
                    torch.cuda.synchronize()  # raises where the device is lost
            self.wrong += 1
            print(f"{name}: {self.backend.name}-{candidate} is not timed, {reason}", file=sys.stderr, flush=True)
        if not times or scratch.disputed:
            reason = "its candidates differ" if times else "no candidate computes it"
            print(f"{name}: {self.backend.name} has no choice for it, {reason}", file=sys.stderr)
            return
        medians = {candidate: statistics.median(values) for candidate, values in times.items()}
        best = min(medians, key=medians.__getitem__)
        self.choices[self.backend.shape(scratch)] = best
        self.save(self.choices)
        self.sink(self._rows(name, times, best, candidates[0]))
        ranked = sorted(medians, key=medians.__getitem__)[:3]
        print(f"{name}  " + "  ".join(f"{candidate} {medians[candidate]:.1f} us" for candidate in ranked), flush=True)

    def _rows(self, problem: str, times: dict[Any, list[float]], best: Any, estimated: Any) -> list[dict[str, Any]]:
        common = {
            "op": OP, "problem": problem, "cache": "cold", "timer": "cuda_event", "sqnr_db": float("inf"),
            "verified": True, "device": self.device_name,
        }  # fmt: skip
        rows = [
            {**common, "backend": f"{self.backend.name}-{candidate}", "metric": "time", "unit": "us"}
            | record.percentiles(values)
            for candidate, values in times.items()
        ]
        slower = statistics.median(times.get(estimated, [float("nan")])) / statistics.median(times[best])
        chosen = {**common, "backend": f"{self.backend.name}-{best}", "metric": OVER_BEST, "unit": "x"}
        return [*rows, chosen | record.percentiles([slower])]


def main(
    argv: list[str] | None, description: str, reason: str | None, backend_of: Callable[[torch.device], Tunable],
    about: Callable[[], dict[str, str]],
) -> int:  # fmt: skip
    """The command line of both tools. reason: why there is nothing to tune, or None; about: versions, for the file.
    Exit code 1: some candidates were wrong or failed; 2: nothing to tune; 3: the budget was spent first.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    tool = Path(sys.argv[0]).stem
    add("--network", nargs="+", default=["ddpm_cifar10"], choices=NETWORKS, help="whose layers (%(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 2, 8], help="images (%(default)s)")
    add("--weight-bits", type=int, nargs="+", default=[8], choices=(3, 4, 8), help="default: %(default)s")
    add("--most", type=int, help="problems, those with the largest share of a step (default: all)")
    add("--budget", type=float, metavar="SECONDS", help="stop after this time, between two problems")
    add("--record", action="store_true", help="append a row per candidate to benchmarks/results")
    add("--skip-recorded", action="store_true", help="leave out problems that have rows of this commit and device")
    add("--dry-run", action="store_true", help="print the choices, write no file of choices")
    args = parser.parse_args(argv)
    budget = Budget(args.budget)
    if min(*args.batch, args.most or 1) < 1:
        parser.error("--batch and --most must be at least 1")
    if reason is not None:
        print(f"{tool}: nothing to tune here: {reason}", file=sys.stderr)
        return 2
    device, device_name = current_gpu()
    backend = backend_of(device)
    path = record.results_file(device=device_name)
    done: set[str] = set()
    if args.skip_recorded and path.exists():
        done = tuned_problems(record.read(path), backend.name, record.environment()["git_commit"])
    facts = {
        **about(),
        "torch": torch.__version__,
        "command": shlex.join(["python", f"tools/{tool}.py", *sys.argv[1:]]),
    }

    def save(choices: dict[Any, Any]) -> None:
        if not args.dry_run:
            backend.store.save(choices, device_name, facts)

    def sink(rows: list[dict[str, Any]]) -> None:
        if args.record:
            record.append(rows, path)

    tuner = Tuner(
        backend,
        dict(backend.store.load(device_name)),
        device,
        device_name,
        ColdTimer(ROUNDS, SECONDS),
        sink,
        save,
        done,
    )
    problems = problems_by_share(args.network, args.batch, peaks_of(device_name) or PEAKS["H200"])
    with torch.inference_mode():
        left = tuner.run(problems[: args.most], args.weight_bits, budget)
    written = "" if args.dry_run else f", written to {backend.store.path(device_name)}"
    print(f"{len(tuner.choices)} choices{written}; {tuner.wrong} wrong or failed, {left} problems left")
    return 1 if tuner.wrong else 3 if left else 0
