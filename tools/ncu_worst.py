"""Counters of the kernels that are furthest from their bound, by NVIDIA's profiler ncu.

python tools/ncu_worst.py [--most 5] [--budget 300] [--out benchmarks/results/ncu]

Takes the worst of the rows of `python -m benchmarks layers` on this GPU, runs each once under ncu, after a warm-up and
with the clocks as they are, and writes what it says of the call's kernels to <out>/<form>-<backend>-<problem>.txt.
Needs ncu on PATH and permission to read counters. Exit code 1: some could not be profiled; 2: nothing to profile; 3:
the budget was spent first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import record
from benchmarks.bounds import PEAKS, peaks_of
from benchmarks.layers import Problem, Tensors, problems_by_share, worst
from benchmarks.runner import Budget
from benchmarks.shapes import NETWORKS, Layer

OUT = record.RESULTS / "ncu"
SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats"),
    *("LaunchStats", "Occupancy"),
)
BATCHES = (1, 2, 8, 16, 64)
WARM_UP = 3
LONGEST_S = 120.0
WEIGHT_BITS = 8


def command(problem: Problem, form: str, backend: str) -> list[str]:
    """ncu around a process that makes this call; it sees the kernels between start and stop alone."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    call = json.dumps([dataclasses.asdict(problem.layer), problem.batch, form, backend])
    program = [sys.executable, str(Path(__file__).resolve()), "--call", call]
    return ["ncu", "--clock-control", "none", "--profile-from-start", "off", *sections, *program]


def make(call: str) -> None:
    """The call, seen by the profiler after a warm-up."""
    layer, batch, form, backend = json.loads(call)
    with torch.inference_mode():
        run = Tensors(Layer(**layer), batch, WEIGHT_BITS, torch.device("cuda")).call(form, backend)
        for _ in range(WARM_UP):
            run()
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            run()
            torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--most", type=int, default=5, help="calls to profile (%(default)s)")
    add("--budget", type=float, metavar="SECONDS", help="end within this time")
    add("--out", type=Path, default=OUT, help="folder of the texts (%(default)s)")
    add("--call", help=argparse.SUPPRESS)  # what runs under ncu
    args = parser.parse_args()
    if args.call is not None:
        make(args.call)
        return 0
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        print(
            "ncu_worst: needs a CUDA device and ncu on PATH (of the CUDA toolkit, or Nsight Compute)", file=sys.stderr
        )
        return 2
    budget, name = Budget(args.budget), torch.cuda.get_device_name()
    path = record.results_file(device=name)
    problems = problems_by_share(NETWORKS, BATCHES, peaks_of(name) or PEAKS["H200"])
    found = worst(record.read(path) if path.exists() else [], problems, args.most)
    if not found:
        print(f"ncu_worst: no rows in {path}; run `python -m benchmarks layers --record` first", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for problem, form, backend in found:
        file = args.out / f"{form}-{backend}-{problem.name(WEIGHT_BITS)}.txt"
        if file.exists():
            continue
        if budget.is_over:
            return 1 if failed else 3
        try:
            seconds = min(LONGEST_S, budget.left)
            words = command(problem, form, backend)
            done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
            wrong = done.returncode != 0 or "==ERROR==" in done.stdout + done.stderr
            reason = (done.stderr or done.stdout).strip()[-400:] if wrong else ""
        except subprocess.TimeoutExpired:
            reason = "stopped, it took too long"
        if reason:
            failed += 1
            print(f"ncu_worst: {file.stem}: {reason}", file=sys.stderr)
            continue
        lines = [line.rstrip() for line in done.stdout.splitlines() if not line.startswith("==PROF==")]
        file.write_text("\n".join(lines) + "\n")
        print(file, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
