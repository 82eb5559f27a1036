"""Counters of the kernels that are furthest from their bound, by NVIDIA's profiler ncu.

python tools/ncu_worst.py [--most 5] [--budget 300] [--out benchmarks/results/ncu]

Takes the worst of the rows that benchmarks/bench_products.py recorded on this GPU (benchmarks/products_report.py), runs
each once under ncu, after a warm-up and with the clocks as they are, and writes what it says of every kernel of the
call to <out>/<op>-<backend>-<problem>.txt. Needs ncu on PATH and permission to read counters. Exit code 1: some could
not be profiled; 2: nothing to profile; 3: the budget was spent first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from benchmarks.budget import Budget
from benchmarks.gpu_timing import current_gpu
from benchmarks.product_cases import Case, Problem

from benchmarks import products_report, record
from benchmarks.shapes import Layer

OUT = record.RESULTS / "ncu"
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
WARM_UP = 3
LONGEST_S = 120.0
WEIGHT_BITS = 8


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a form."""

    form: str
    backend: str
    layer: Layer
    batch: int

    def text(self) -> str:
        """For the command line."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def parsed(text: str) -> Call:
        """The inverse of `text`."""
        fields = json.loads(text)
        return Call(**{**fields, "layer": Layer(**fields["layer"])})

    def name(self) -> str:
        """Of its file."""
        return f"{self.form}-{self.backend}-{Problem(self.layer, self.batch, 0.0).name(WEIGHT_BITS)}"


def command(call: Call, ncu: str = "ncu") -> list[str]:
    """ncu around a process that makes this call; it sees the kernels between start and stop alone."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    program = [sys.executable, str(Path(__file__).resolve()), "--call", call.text()]
    return [ncu, "--clock-control", "none", "--profile-from-start", "off", *sections, *program]


def make(call: Call) -> None:
    """The call, seen by the profiler after a warm-up."""
    with torch.inference_mode():
        case = Case(call.layer, call.batch, WEIGHT_BITS, current_gpu()[0])
        for _ in range(WARM_UP):
            case.run(call.form, call.backend)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        case.run(call.form, call.backend)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def profile(calls: Sequence[Call], out: Path, budget: Budget) -> tuple[int, int]:
    """A file for each of `calls` that has none, until `budget` is spent. Returns how many failed, how many are left."""
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    todo = [call for call in calls if not (out / f"{call.name()}.txt").exists()]
    for index, call in enumerate(todo):
        if budget.is_over:
            return failed, len(todo) - index
        try:
            done = subprocess.run(
                command(call), capture_output=True, text=True, timeout=min(LONGEST_S, budget.left), check=False
            )
        except subprocess.TimeoutExpired:
            print(f"ncu_worst: {call.name()}: stopped, it took too long", file=sys.stderr)
            failed += 1
            continue
        if done.returncode != 0 or "==ERROR==" in done.stdout + done.stderr:
            print(f"ncu_worst: {call.name()}: {(done.stderr or done.stdout).strip()[-400:]}", file=sys.stderr)
            failed += 1
            continue
        lines = [line.rstrip() for line in done.stdout.splitlines() if not line.startswith("==PROF==")]
        (out / f"{call.name()}.txt").write_text("\n".join(lines) + "\n")
        print(f"{call.name()}: {out / f'{call.name()}.txt'}", flush=True)
    return failed, 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--most", type=int, default=5, help="calls to profile (%(default)s)")
    add("--budget", type=float, metavar="SECONDS", default=math.inf, help="end within this time")
    add("--out", type=Path, default=OUT, help="folder of the texts (%(default)s)")
    add("--call", help=argparse.SUPPRESS)  # what runs under ncu
    args = parser.parse_args(argv)
    if args.call is not None:
        make(Call.parsed(args.call))
        return 0
    budget = Budget(None if math.isinf(args.budget) else args.budget)
    for reason in _missing():
        print(f"ncu_worst: {reason}", file=sys.stderr)
        return 2
    path = record.results_file(device=current_gpu()[1])
    rows = record.read(path) if path.exists() else []
    found = products_report.worst(rows, args.most)
    if not found:
        print(f"ncu_worst: no rows in {path}; run benchmarks/bench_products.py --record first", file=sys.stderr)
        return 2
    calls = [
        Call(metrics["time"]["op"], metrics["time"]["backend"], problem.layer, problem.batch)
        for problem, metrics in found
    ]
    failed, left = profile(calls, args.out, budget)
    return 1 if failed else 3 if left else 0


def _missing() -> list[str]:
    reasons = [] if torch.cuda.is_available() else [f"torch {torch.__version__} sees no CUDA device"]
    if shutil.which("ncu") is None:
        reasons.append("ncu was not found on PATH; it comes with the CUDA toolkit and with Nsight Compute")
    return reasons


if __name__ == "__main__":
    raise SystemExit(main())
