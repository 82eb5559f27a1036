"""Whole sampling runs through pipelines of diffusers: images per second of ours, full precision and DeepCache.

    python benchmarks/bench_sampling.py --network cifar10_small16 --images 8 --record
    python benchmarks/bench_sampling.py --network sd15 --images 1 8 --device cuda --budget 500 --record --skip-recorded

A run is one call of the pipeline (benchmarks/pipelines.py says which, and what is left out), from noise to pictures or
latents, the sampler's own work included. Every configuration begins from the same noise. Before anything is timed, a
configuration samples once or twice (which compiles, captures and chooses kernels) and then once more; that result is
compared with full precision, eager in channels_last, and one that is too far away is not timed and makes the exit code
1. PSNR is that of pictures. With random weights it says little about quality: such a network reacts to errors as no
trained one does.

On the CPU the configurations take turns, and ratios pair runs of one round. On a GPU they come one by one, the most
telling first, and ratios are those of medians; rows are appended after each, so what is cut off by --budget is what
stands last. The strongest forms count as rivals: full precision compiled with max-autotune and CUDA graphs, and
DeepCache as its package does it, and compiled, with CUDA graphs (benchmarks/deepcache.py).

full_calls is how many calls of the UNet compute all of it; in the others nothing runs (schedules), or its shallow
levels do (DeepCache, deep levels). On a GPU host_time is the time of a step that the host needs by itself, waiting left
out, and device_idle the share of a run in which the device has nothing to do: kernels' time by torch.profiler in the
time of a run without it. On a CPU outside_unet is the time of a step in the pipeline and the scheduler.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record, step_profile
from benchmarks.budget import Budget, attempt
from benchmarks.configurations import (
    DEEPCACHE,
    RUN_ORDER,
    Network,
    Networks,
    default_dtype,
    plan_file,
    run_rows,
)
from benchmarks.contest import Entrant, Scores, add_arguments, hold
from benchmarks.pipelines import GUIDED, SAMPLERS, Workload
from benchmarks.shapes import NETWORKS, build_unet
from modiff_kernels.evaluation import psnr, sqnr, text_table
from modiff_kernels.evaluation.configurations import Row
from modiff_kernels.evaluation.networks import choose_device, quiet_libraries
from modiff_kernels.integrations.graphs import WARM_UP_CALLS

OP = "sampling"
LEAST_SQNR_DB = {"float32": 80.0, "float16": 30.0, "bfloat16": 6.0}
"""Least SQNR of the result of full precision in another form, by dtype: errors of rounding grow along a run."""
LEAST_SQNR_APPROXIMATE_DB = 3.0
"""The same in low bits, and where calls are not, or not wholly, computed: a wrong picture has 0 dB or less. Guidance
makes errors ten times as large; benchmarks/bench_unet_step.py asks for more of a single call."""
FLOATS = ("float-contiguous", "float-channels_last", "float-compile", "float-compile-graphs")
BASELINES = {
    "speedup_vs_float": FLOATS,
    **{
        f"speedup_vs_deepcache{n}": tuple(key for key, interval in DEEPCACHE.items() if interval == n)
        for n in sorted(set(DEEPCACHE.values()))
    },
}
"""By metric the rows whose fastest one it compares with."""


class Bench:
    """The runs of one workload. known: entrants that have their rows. keep: takes rows as they come."""

    def __init__(
        self, workload: Workload, networks: Networks, known: list[Entrant], keep: Callable[[list], None], budget: Budget
    ) -> None:
        self.workload = workload
        self.networks = networks
        self.keep = keep
        self.budget = budget
        self.scores = Scores(BASELINES, known)
        self.device = networks.unet.device
        self.expected = self._result(self.make(Row("reference", "full precision", "float")))

    def make(self, row: Row) -> Network:
        """The network of `row` in a pipeline of its own."""
        pipes: list[Any] = []

        def pipe_of(unet: torch.nn.Module) -> Any:
            pipes.append(self.workload.pipe(unet))
            return pipes[0]

        network = self.networks.make(row, pipe_of)
        network.pipe = pipes[0] if pipes else pipe_of(network.unet)
        return network

    def verify(self, entrant: Entrant) -> float | str:
        """SQNR of the last run in dB, or why it is not timed."""
        network = entrant.network
        for _ in range(WARM_UP_CALLS if entrant.row.cuda_graphs else 1):  # of each kind, one that a run has once too
            self._result(network)
        result = self._result(network)
        found = sqnr(result, self.expected)
        least = least_sqnr_db(entrant.row, self.networks.unet.dtype)
        if not found >= least:
            return f"{found:.1f} dB to full precision, at least {least:g} expected"
        if self.workload.in_pixels:
            pictures = [x.permute(0, 2, 3, 1).clamp(0, 1).numpy() for x in (result, self.expected)]
            entrant.more["psnr"] = float(psnr(*pictures).mean())
        entrant.more |= self._costs(entrant)
        return found

    def _costs(self, entrant: Entrant) -> dict[str, Any]:
        network, steps = entrant.network, self.workload.steps
        costs: dict[str, Any] = {"full_calls": steps, "backend": network.backend}
        if network.cached:
            costs["full_calls"] = network.cached.calls_full
        if network.quantised:
            costs["full_calls"] = steps - network.quantised.handle.skipped_calls("mid_block")
            costs["state"] = network.quantised.handle.state.nbytes()
        return costs

    def timed(self, entrant: Entrant) -> list[float]:
        """Seconds of one run."""
        return [self._seconds(entrant.network)]

    def _seconds(self, network: Network) -> float:
        _synchronize(self.device)
        started = time.perf_counter()
        with self._run(network):
            self.workload.sample(network.pipe)
        _synchronize(self.device)
        return time.perf_counter() - started

    def _result(self, network: Network) -> torch.Tensor:
        with self._run(network):
            return self.workload.sample(network.pipe).float().cpu()

    def _run(self, network: Network) -> contextlib.AbstractContextManager[Any]:
        """The run, where the pipeline does not begin it by itself."""
        return contextlib.nullcontext() if network.quantised else network.run(network.pipe.scheduler)

    def look_into(self, entrant: Entrant) -> dict[str, tuple[str, float]]:
        """Where the time goes beside the UNet: by metric its unit and value."""
        network = entrant.network
        if self.device.type == "cuda":
            run = functools.partial(self._seconds, network)
            return step_profile.host_and_device(run, entrant.median, self.workload.steps)
        marks: list[float] = []
        hooks = [
            network.unet.register_forward_pre_hook(lambda *_: marks.append(-time.perf_counter()), prepend=True),
            network.unet.register_forward_hook(lambda *_: marks.append(time.perf_counter())),
        ]
        try:
            whole_s = self._seconds(network)
        finally:
            for hook in hooks:
                hook.remove()
        return {"outside_unet": ("ms", 1e3 * (whole_s - sum(marks)) / self.workload.steps)}

    def measured(self, new: list[Entrant]) -> None:
        """Rows of `new`, and ratios of the others to baselines that have come in with it."""
        rows = [row for entrant in new for row in self._rows(entrant)]
        rows += [self._row(entrant, metric, "x", faster) for entrant, metric, faster in self.scores.add(new)]
        self.keep(rows)
        for entrant in new:
            found = attempt(f"{entrant.row.name}, look inside", lambda e=entrant: self.look_into(e), self.budget) or {}
            self.keep([self._row(entrant, name, unit, [value]) for name, (unit, value) in found.items()])

    def _rows(self, entrant: Entrant) -> list[dict]:
        images = self.workload.images
        rows = [
            self._row(entrant, "run_time", "s", entrant.times),
            self._row(entrant, "images_per_s", "1/s", [images / s for s in entrant.times]),
            self._row(entrant, "full_calls", "calls", [entrant.more["full_calls"]]),
        ]
        units = {"psnr": "dB", "state": "bytes"}
        rows += [self._row(entrant, name, units[name], [entrant.more[name]]) for name in units if name in entrant.more]
        if entrant.peak_bytes:
            rows.append(self._row(entrant, "peak_memory", "bytes", [entrant.peak_bytes]))
        return rows

    def _row(self, entrant: Entrant, metric: str, unit: str, values: list[float]) -> dict:
        return {
            "op": OP,
            "problem": problem(self.workload, entrant.row.key),
            "backend": entrant.more["backend"],
            "metric": metric,
            "unit": unit,
            "cache": "warm",
            "timer": "perf_counter",
            "sqnr_db": entrant.sqnr_db,
            "verified": True,
            **record.percentiles(values),
        }


def problem(workload: Workload, key: str) -> str:
    """What rows have in their column `problem`."""
    return f"{workload.label}-{workload.sampler.key}-n{workload.images}-{key}"


def least_sqnr_db(row: Row, dtype: torch.dtype) -> float:
    """Below which the result of `row` is wrong."""
    exact = row.mode == "float" and row.act_bits == 32 and row.schedule is None and row.key not in DEEPCACHE
    return LEAST_SQNR_DB[str(dtype).removeprefix("torch.")] if exact else LEAST_SQNR_APPROXIMATE_DB


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(rows: list[dict]) -> str:
    """A line for every problem, with the last value of each metric."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        table.setdefault(row["problem"], {"sqnr_db": row["sqnr_db"]})[row["metric"]] = row["p50"]
    forms = {
        "run_time": "{:.3f}",
        "images_per_s": "{:.2f}",
        "full_calls": "{:.0f}",
        "sqnr_db": "{:.1f}",
        **dict.fromkeys(BASELINES, "{:.2f}x"),
        "psnr": "{:.1f}",
        "state": "{:.3g}",
        "peak_memory": "{:.3g}",
        "host_time": "{:.2f}",
        "outside_unet": "{:.2f}",
        "device_idle": "{:.0f}",
    }
    shown = [name for name in forms if any(name in found for found in table.values())]
    cells = [[key, *(forms[n].format(found[n]) if n in found else "-" for n in shown)] for key, found in table.items()]
    return text_table(("problem", *shown), cells)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", nargs="+", default=["cifar10_small16"], choices=NETWORKS, help="default: the shipped model")
    add("--images", type=int, nargs="+", default=[8], help="of a run, one or several numbers (%(default)s)")
    add("--sampler", nargs="+", default=list(SAMPLERS), choices=SAMPLERS, help="default: all")
    add("--steps", type=int, default=None, help="others than the sampler's own, to try things; not recorded")
    add("--rounds", type=int, default=4, help="timed runs of each row (%(default)s)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if min(*args.images, args.rounds, args.threads, args.steps or 12) < 1:
        parser.error("--images, --rounds, --threads, --steps must be at least 1")
    if args.steps and args.record:
        parser.error("--steps: rows are recorded for the samplers' own numbers of steps; leave --record out")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    budget = Budget(args.budget)
    torch.set_num_threads(args.threads)
    quiet_libraries()
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    complete = True
    with torch.no_grad():
        for network in args.network:
            if budget.is_over:
                print(f"the budget is used up; left out: {network}", file=sys.stderr)
                complete = False
                continue
            unet = build_unet(network, device).to(dtype)
            for images in args.images:
                for sampler in args.sampler:
                    workload = Workload(network, unet, SAMPLERS[sampler], images, args.steps)
                    complete &= run_workload(workload, Networks(unet, args.backend), args, budget)
            del unet
    return int(not complete)


def run_workload(workload: Workload, networks: Networks, args: argparse.Namespace, budget: Budget) -> bool:
    """Verify, time and print the rows of one workload; whether all of them were."""
    unet = networks.unet
    samples = workload.images * (2 if workload.network in GUIDED else 1)
    plan = plan_file(unet.device, workload.network, samples)
    complete, results = hold(
        args,
        budget,
        unet.device,
        run_rows(unet.device, unet.dtype, args.compile, plan if plan.exists() else None),
        RUN_ORDER,
        lambda row: problem(workload, row.key),
        (OP, "run_time", 1.0),
        lambda known, keep: Bench(workload, networks, known, keep, budget),
        args.rounds,
    )
    print(show(results), flush=True)
    return complete


if __name__ == "__main__":
    sys.exit(main())
