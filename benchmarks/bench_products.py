"""Time of single layers on a GPU: the ops of the backends cuda and triton, side by side, against torch in bf16 and fp16
(cuDNN, cuBLAS), torch._int_mm, CUTLASS's int8 kernels and the roofline.

python benchmarks/bench_products.py [--network sd15 sdxl] [--batch 1 2 8] [--backend cuda] [--record] [--budget 500]

Every problem is timed once, however many networks have it, those with the largest share of a network's step first; with
--record its rows are written as soon as they are there. So a run may be stopped at any time, by --budget or otherwise,
and goes on where it was with --skip-recorded. Every form is verified first (both ends of the batch), then timed with a
cold L2 cache by CUDA events (benchmarks/gpu_timing.py). Needs a GPU that nothing else uses. Exit code 1: some forms
failed; 2: nothing can be timed here; 3: the budget was spent first.

Rivals: convolutions in channels_last with cudnn.benchmark, matrices by cuBLAS; torch._int_mm with both operands along
K; the fastest of the kernels of CUTLASS that benchmarks/cutlass_int8/build.py has built, if it was run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import record
from benchmarks.bounds import PEAKS, peaks_of
from benchmarks.budget import Budget
from benchmarks.cutlass_int8.build import FOLDER as CUTLASS_FOLDER
from benchmarks.cutlass_int8.rival import Rival
from benchmarks.gpu_timing import LEAST_ROUNDS, ColdTimer, current_gpu
from benchmarks.product_cases import (
    FORMS,
    RIVAL_FORM,
    TORCH_FORMS,
    Case,
    Check,
    Problem,
    bound_us,
    bytes_moved,
    forms_of,
    operations,
    problems_by_share,
)
from benchmarks.shapes import NETWORKS, Layer
from modiff_kernels import ops

BACKENDS = ("cuda", "triton")
RIVAL_BACKEND = "cutlass"
Key = tuple[str, str, str]
Timer = Callable[[Callable[[], Any]], list[float]]


def rows_of(
    form: str, backend: str, layer: Layer, batch: int, weight_bits: int, times: list[float], sqnr_db: float, device: str
) -> list[dict[str, Any]]:
    """Rows of one measurement: time, rates, and the share of the roofline's bound if the device's peaks are known."""
    common = {
        "op": form,
        "problem": Problem(layer, batch, 0.0).name(weight_bits_of(form, weight_bits)),
        "backend": backend,
        "cache": "cold",
        "timer": "cuda_event",
        "sqnr_db": sqnr_db,
        "verified": True,
        "device": device,
    }
    rates = {"bandwidth": ("GB/s", bytes_moved(form, layer, batch, weight_bits) / 1e3)}
    if form != "quantize_residual":
        rates["rate"] = ("TOPS", operations(layer, batch) / 1e6)
    peaks = peaks_of(device)
    if peaks is not None:
        rates["of_bound"] = ("%", 100 * bound_us(form, layer, batch, weight_bits, peaks))
    rows = [{**common, "metric": "time", "unit": "us", **record.percentiles(times)}]
    for metric, (unit, amount) in rates.items():
        rows.append({**common, "metric": metric, "unit": unit, **record.percentiles([amount / t for t in times])})
    return rows


def weight_bits_of(form: str, weight_bits: int) -> int:
    """Bits of the weight that `form` multiplies."""
    return 16 if form in ("bf16", "fp16") else weight_bits


def backends_of(form: str, backends: Sequence[str], has_rival: bool) -> list[str]:
    """Whom to time `form` with."""
    if form == RIVAL_FORM:
        return [RIVAL_BACKEND] if has_rival else []
    return ["torch"] if form in TORCH_FORMS else list(backends)


def recorded(rows: Iterable[dict[str, str]], commit: str) -> set[Key]:
    """(form, problem, backend) of the times among `rows` that were measured at `commit`."""
    return {
        (row["op"], row["problem"], row["backend"].split("-")[0])
        for row in rows
        if row["metric"] == "time" and row["git_commit"] == commit
    }


@dataclass
class Bench:
    """What to time, on what and with what; `sink` takes the rows of every measurement as soon as it is done.

    timer: a call to microseconds of several calls (ColdTimer); quick: the same of fewer calls, to choose among the
    kernels of `rival`. done: keys that are not timed, and those that were.
    """

    forms: Sequence[str]
    backends: Sequence[str]
    weight_bits: int
    device: torch.device
    device_name: str
    timer: Timer
    sink: Callable[[list[dict[str, Any]]], None]
    done: set[Key]
    rival: Rival | None = None
    quick: Timer | None = None

    def __post_init__(self) -> None:
        self.timed = self.failed = 0

    def todo(self, problem: Problem) -> list[tuple[str, str, Key]]:
        """(form, backend, key) that are not done yet."""
        found = []
        for form in forms_of(problem.layer, problem.batch, self.weight_bits, self.forms):
            for backend in backends_of(form, self.backends, bool(self.rival)):
                key = (form, problem.name(weight_bits_of(form, self.weight_bits)), backend)
                if key not in self.done:
                    found.append((form, backend, key))
        return found

    def run(self, problems: Sequence[Problem], budget: Budget) -> int:
        """Times `problems` in their order until `budget` is spent; returns how many measurements are left.

        A wrong form, one that is out of memory and one that its backend does not solve are reported on stderr and left
        out; an error of the device ends the run, as nothing runs on it any more.
        """
        for index, problem in enumerate(problems):
            case = None
            for form, backend, key in self.todo(problem):
                if budget.is_over:
                    return sum(len(self.todo(rest)) for rest in problems[index:])
                self.done.add(key)
                try:
                    case = case or Case(problem.layer, problem.batch, self.weight_bits, self.device)
                    self._time(form, backend, problem, case)
                except ops.BackendUnavailable as error:
                    print(f"bench_products: {error}", file=sys.stderr)
                except torch.OutOfMemoryError:
                    print(f"bench_products: {form}, {backend}, {key[1]}: out of memory", file=sys.stderr)
                    case = None
                    torch.cuda.empty_cache()
                except Exception as error:  # compilers have errors of their own
                    self.failed += 1
                    print(f"bench_products: FAILED {form}, {backend}, {key[1]}: {error}", file=sys.stderr, flush=True)
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()  # raises where the device is lost
        return 0

    def _time(self, form: str, backend: str, problem: Problem, case: Case) -> None:
        name = backend
        if form == RIVAL_FORM:
            assert self.rival is not None
            found = self.rival.best(case, self.timer, self.quick or self.timer)
            if isinstance(found, str):
                print(f"bench_products: {problem.name(self.weight_bits)}: {found}", file=sys.stderr)
                return
            kernel, times, sqnr_db = found
            name = f"{backend}-{kernel}"
        else:

            def call() -> torch.Tensor:
                return case.run(form, backend)

            sqnr_db = Check(form, case).sqnr_db(call)
            times = self.timer(call)
        layer, batch = problem.layer, problem.batch
        rows = rows_of(form, name, layer, batch, self.weight_bits, times, sqnr_db, self.device_name)
        self.sink(rows)
        self.timed += 1
        values = "  ".join(f"{row['p50']:.1f} {row['unit']}" for row in rows)
        print(f"{rows[0]['problem']}  {form}  {name}  {values}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", nargs="+", default=["sd15"], choices=NETWORKS, help="whose layers (default: sd15)")
    add("--batch", type=int, nargs="+", default=[1, 2, 8], help="images (%(default)s)")
    add("--weight-bits", type=int, default=8, choices=(3, 4, 8), help="default: %(default)s")
    add("--backend", nargs="+", default=list(BACKENDS), choices=BACKENDS, help="default: all that run")
    add("--form", nargs="+", default=list(FORMS), choices=FORMS, help="default: all")
    add("--most", type=int, help="problems, those with the largest share of a step (default: all)")
    add("--rounds", type=int, default=50, help="timed calls of each form (%(default)s)")
    add("--budget", type=float, metavar="SECONDS", help="stop after this time, between two measurements")
    add("--cutlass", type=Path, default=CUTLASS_FOLDER, help="folder of CUTLASS's built kernels (%(default)s)")
    add("--record", action="store_true", help="append the results to benchmarks/results")
    add("--skip-recorded", action="store_true", help="leave out what has rows of this commit and device")
    args = parser.parse_args(argv)
    budget = Budget(args.budget)
    if min(*args.batch, args.rounds, args.most or 1) < 1:
        parser.error("--batch, --rounds and --most must be at least 1")
    reasons = {name: ops.dispatch.why_unavailable(name) for name in args.backend}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"bench_products: {name} is not timed here: {reason}", file=sys.stderr)
    backends = [name for name, reason in reasons.items() if reason is None]
    if not backends:
        return 2
    rival = None
    if RIVAL_FORM in args.form:
        rival = Rival(args.cutlass)
        if not rival:
            print(f"bench_products: no kernel of CUTLASS in {args.cutlass}; see cutlass_int8/build.py", file=sys.stderr)
    device, device_name = current_gpu()
    path = record.results_file(device=device_name)
    done: set[Key] = set()
    if args.skip_recorded and path.exists():
        done = recorded(record.read(path), record.environment()["git_commit"])
    torch.backends.cudnn.benchmark = True

    def sink(rows: list[dict[str, Any]]) -> None:
        if args.record:
            record.append(rows, path)

    bench = Bench(
        args.form, backends, args.weight_bits, device, device_name, ColdTimer(args.rounds), sink, done, rival,
        ColdTimer(LEAST_ROUNDS),
    )  # fmt: skip
    problems = problems_by_share(args.network, args.batch, peaks_of(device_name) or PEAKS["H200"])
    with torch.inference_mode():
        left = bench.run(problems[: args.most], budget)
    where = f", recorded in {path}" if args.record else ""
    print(f"{bench.timed} measurements{where}; {bench.failed} failed, {left} left")
    return 1 if bench.failed else 3 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
