"""Time of one UNet call in each configuration, on an input that changes as it does in sampling.

    python benchmarks/bench_unet_step.py --network ddpm_cifar10 --batch 1 8 --record
    python benchmarks/bench_unet_step.py --network sd15 --device cuda --batch 1 2 8 16 64 --budget 500 --record

The input of call i is x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise at the i-th of 50 DDIM timesteps with one x_0 and one
noise: the trajectory of a perfect predictor. It is the same for all configurations, and needs no trained weights. First
calls (initialize) and later ones (update) are kept apart. Before anything is timed, a configuration runs once and its
last output is checked against plain eager; one that fails is not timed and makes the exit code 1.

On the CPU the configurations take turns run by run, another one first each time, and ratios pair calls of one place in
neighbouring runs. Turns at every call would time each network with caches full of the others, which no sampler does;
small networks take up to twice as long then. On a GPU they come one by one, the most telling first, ratios are those of
medians, and rows are appended after each, so that --budget cuts off what stands last; a configuration that does not fit
into memory is left out, which is told.

Baselines: eager in both memory formats, torch.compile (on CUDA with max-autotune, without and with CUDA graphs; on the
CPU max-autotune and freezing took the same time within 3 % and are left out), and torchao's dynamic int8 where it can
be imported. The row "planned" takes the plan that benchmarks/make_plans.py has measured on this device, if it did. The
bound beside each row is that of benchmarks/bounds.py; peak memory is known on CUDA only, and counts the weights.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import bounds, record, step_profile
from benchmarks.budget import Budget
from benchmarks.configurations import (
    STEP_ORDER,
    Network,
    Networks,
    default_dtype,
    label,
    plan_file,
    step_rows,
)
from benchmarks.contest import Entrant, Scores, add_arguments, hold
from benchmarks.shapes import NETWORKS, SMALL_NETWORKS, build_unet, conditions
from modiff_kernels.evaluation import sqnr, text_table
from modiff_kernels.evaluation.configurations import Row
from modiff_kernels.evaluation.networks import choose_device
from modiff_kernels.planning.roofline import Machine

LEAST_SQNR_DB = {"float": 80.0, "weight_only": 20.0, "quantized": 15.0, "modulated": 15.0}
"""Least SQNR of the last call of a run against eager contiguous, at 8 bits."""
LEAST_SQNR_16_BIT_DB = {"float16": 45.0, "bfloat16": 25.0}
"""The same for rows "float" of 16-bit networks, where two orders of summation differ."""
OVERHEAD = "overhead_vs_plain"
BASELINES = {
    "speedup_vs_best_eager": ("float-contiguous", "float-channels_last"),
    "speedup_vs_compile": ("float-compile", "float-compile-graphs"),
    OVERHEAD: ("plain-w8a8",),
}
"""By metric the rows whose fastest one it compares with."""


def trajectory(size: int, batch: int, calls: int, channels: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x_t, t) of the first `calls` of 50 DDIM steps, x_t float32 [batch, channels, size, size] contiguous."""
    from diffusers import DDIMScheduler

    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, channels, 4, 4, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)
    noise = torch.randn(image.shape, generator=generator)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    return [(scheduler.add_noise(image, noise, t[None]), t) for t in scheduler.timesteps[:calls]]


class Bench:
    """The calls of one network at one batch. keep: takes rows as they come. known: entrants that have their rows."""

    def __init__(
        self,
        network: str,
        batch: int,
        networks: Networks,
        calls: int,
        machine: Machine,
        keep: Callable[[list[dict]], None],
        profile: bool,
        known: list[Entrant],
    ) -> None:
        unet = networks.unet
        config = unet.config
        self.network = network
        self.batch = batch
        self.networks = networks
        self.machine = machine
        self.keep = keep
        self.profile = profile
        self.scores = Scores(BASELINES, known)
        self.inputs = [
            (x.to(unet.device, unet.dtype), t.to(unet.device))
            for x, t in trajectory(config.sample_size, batch, calls, config.in_channels)
        ]
        networks.shown = self.inputs
        self.keywords = conditions(unet, batch)
        self.expected = unet(*self.inputs[-1], **self.keywords, return_dict=False)[0]

    def make(self, row: Row) -> Network:
        """The network of `row`."""
        return self.networks.make(row)

    def verify(self, entrant: Entrant) -> float | str:
        """SQNR of the last call of a run in dB, or why it is not timed."""
        with entrant.network.run():
            for x, t in self.inputs:
                out, _ = self._call(entrant.network, x, t)
        found, least = sqnr(out.float(), self.expected.float()), least_sqnr_db(entrant.row, out.dtype)
        entrant.more["state"] = entrant.network.quantised.state_bytes if entrant.network.quantised else None
        entrant.more["backend"] = entrant.network.backend
        return found if found >= least else f"{found:.1f} dB to full precision, at least {least} expected"

    def timed(self, entrant: Entrant) -> list[float]:
        """Seconds of the later calls of one run; or of none for a profile, whose rows are made here."""
        if self.profile:
            calls = [functools.partial(self._seconds, entrant.network, x, t) for x, t in self.inputs]
            found = step_profile.profiled(entrant.network.run, calls, self.expected.device)
            entrant.more["profile"] = found
            return [found.whole_ms / 1e3]
        with entrant.network.run():
            seconds = [self._seconds(entrant.network, x, t) for x, t in self.inputs]
        entrant.more.setdefault("first", []).append(seconds[0])
        return seconds[1:]

    def _seconds(self, network: Network, x: torch.Tensor, t: torch.Tensor) -> float:
        return self._call(network, x, t)[1]

    def _call(self, network: Network, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, float]:
        if network.row.channels_last:
            x = x.to(memory_format=torch.channels_last)
        _synchronize(x.device)
        started = time.perf_counter()
        out = network.unet(x, t, **self.keywords, return_dict=False)[0]
        _synchronize(x.device)
        return out, time.perf_counter() - started

    def measured(self, new: list[Entrant]) -> None:
        """Rows of `new`, and ratios of the others to baselines that have come in with it."""
        if self.profile:
            self.keep([row for entrant in new for row in self._profile_rows(entrant)])
            return
        rows = [row for entrant in new for row in self._rows(entrant)]
        for entrant, metric, faster in self.scores.add(new):
            if metric != OVERHEAD:
                rows.append(self._row(entrant, metric, "x", faster))
            elif entrant.row.mode == "modulated":
                rows.append(self._row(entrant, metric, "%", [100 * (1 / ratio - 1) for ratio in faster]))
        self.keep(rows)

    def _rows(self, entrant: Entrant) -> list[dict]:
        row = entrant.row
        rows = [self._row(entrant, "update_time", "ms", [1e3 * s for s in entrant.times])]
        if row.mode == "modulated":
            rows.append(self._row(entrant, "initialize_time", "ms", [1e3 * s for s in entrant.more["first"]]))
        if entrant.more["state"] is not None:
            rows.append(self._row(entrant, "state", "bytes", [entrant.more["state"]]))
        if entrant.peak_bytes:
            rows.append(self._row(entrant, "peak_memory", "bytes", [entrant.peak_bytes]))
        state_bytes = 2 if self.expected.is_cuda else 4
        if row.weight_bits == 16:  # the machine's rates are those of the other rows
            return rows
        mode = "quantized" if row.weight_bits == 8 and row.mode == "float" else row.mode
        sizes = (self.expected.element_size(), state_bytes)
        rows.append(
            self._row(entrant, "bound", "ms", [bounds.bound_ms(self.network, self.batch, mode, self.machine, *sizes)])
        )
        return rows

    def _profile_rows(self, entrant: Entrant) -> list[dict]:
        found = entrant.more["profile"]
        timer = {"timer": "torch.profiler"}
        parts = {"op": "unet_step_profile", **timer}
        others = {"op": "unet_step_others", **timer}
        rows = [{**self._row(entrant, kind, "ms", [ms]), **parts} for kind, ms in found.parts().items()]
        rows.append({**self._row(entrant, "whole", "ms", [found.whole_ms]), **others})
        return rows + [{**self._row(entrant, name, "ms", [ms]), **others} for name, ms in found.others().items()]

    def _row(self, entrant: Entrant, metric: str, unit: str, values: list[float]) -> dict:
        return {
            "op": "unet_step",
            "problem": problem(self.network, self.networks.unet, self.batch, entrant.row),
            "backend": entrant.more["backend"],
            "metric": metric,
            "unit": unit,
            "cache": "warm",
            "timer": "perf_counter",
            "sqnr_db": entrant.sqnr_db,
            "verified": True,
            **record.percentiles(values),
        }


def problem(network: str, unet: torch.nn.Module, batch: int, row: Row) -> str:
    """What rows have in their column `problem`."""
    return f"{label(network, unet)}-b{batch}-{row.key}"


def least_sqnr_db(row: Row, dtype: torch.dtype) -> float:
    """Below which the result of `row` is wrong."""
    low_bits = min(row.act_bits, row.weight_bits) < 8
    if low_bits:
        return 0.0 if row.mode == "quantized" else 10.0
    if row.mode == "float" and row.weight_bits == 8:
        return LEAST_SQNR_DB["quantized"]
    if row.mode == "float":
        name = "bfloat16" if row.weight_bits == 16 else str(dtype).removeprefix("torch.")
        return LEAST_SQNR_16_BIT_DB.get(name, LEAST_SQNR_DB["float"])
    return LEAST_SQNR_DB[row.mode]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(rows: list[dict]) -> str:
    table: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        table[row["problem"]][row["metric"]] = row
    header = (
        "problem",
        "update ms",
        "bound ms",
        "p20",
        "p80",
        "first ms",
        "vs best eager",
        "vs compile",
        "over plain",
        "SQNR dB",
        "state MB",
        "peak MB",
        "backend",
    )
    cells = []
    for problem, metrics in table.items():
        if "update_time" not in metrics:  # measured before, only its ratio to a new baseline is new
            continue
        update = metrics["update_time"]

        def shown(metric: str, form: str, scale: float = 1.0, metrics: dict = metrics) -> str:
            return form.format(metrics[metric]["p50"] * scale) if metric in metrics else "-"

        cells.append(
            (
                problem,
                f"{update['p50']:.2f}",
                shown("bound", "{:.2f}"),
                f"{update['p20']:.2f}",
                f"{update['p80']:.2f}",
                shown("initialize_time", "{:.2f}"),
                shown("speedup_vs_best_eager", "{:.2f}x"),
                shown("speedup_vs_compile", "{:.2f}x"),
                shown("overhead_vs_plain", "{:+.1f} %"),
                f"{update['sqnr_db']:.1f}",
                shown("state", "{:.1f}", 1e-6),
                shown("peak_memory", "{:.0f}", 1e-6),
                update["backend"],
            )
        )
    return text_table(header, cells)


def show_profile(rows: list[dict]) -> str:
    """Configurations as columns, kinds of work and what takes 2 % of a call as rows."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    found = {(row["problem"], row["metric"]): row["p50"] for row in rows}
    metrics = [*step_profile.PARTS, *dict.fromkeys(metric for _, metric in found if metric not in step_profile.PARTS)]
    cells = [
        (metric[:60], *(f"{found[key, metric]:.2f}" if (key, metric) in found else "-" for key in problems))
        for metric in metrics
    ]
    return text_table(("ms of a call", *problems), cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", action="append", choices=NETWORKS, help=f"may be given twice (default: {SMALL_NETWORKS})")
    add("--batch", type=int, nargs="+", default=[8], help="one or several (%(default)s)")
    add("--calls", type=int, default=12, help="UNet calls of a run, at least 4 (%(default)s)")
    add("--rounds", type=int, default=3, help="runs (%(default)s)")
    add("--profile", action="store_true", help="instead of timing, tell what takes the time, by kind and by name")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if min(*args.batch, args.rounds, args.threads) < 1 or not 4 <= args.calls <= 50:
        parser.error("--batch, --rounds, --threads must be at least 1, --calls 4 to 50")
    budget = Budget(args.budget)
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    machine, source = bounds.machine(device)
    print(f"bounds by rates {source}: {machine}")
    complete = True
    with torch.no_grad():
        for network in args.network or SMALL_NETWORKS:
            if budget.is_over:
                print(f"the budget is used up; left out: {network}", file=sys.stderr)
                complete = False
                continue
            unet = build_unet(network, device).to(dtype)
            for batch in args.batch:
                complete &= run_network(network, batch, Networks(unet, args.backend), machine, args, budget)
            del unet
    return int(not complete)


def run_network(
    network: str, batch: int, networks: Networks, machine: Machine, args: argparse.Namespace, budget: Budget
) -> bool:
    """Verify, time and print one network at one batch; whether all rows were."""
    unet = networks.unet
    plan = plan_file(unet.device, network, batch)
    rows = step_rows(unet.device, unet.dtype, args.compile, plan if plan.exists() else None)
    complete, results = hold(
        args,
        budget,
        unet.device,
        rows,
        STEP_ORDER,
        lambda row: problem(network, unet, batch, row),
        ("unet_step_others", "whole", 1e-3) if args.profile else ("unet_step", "update_time", 1e-3),
        lambda known, keep: Bench(network, batch, networks, args.calls, machine, keep, args.profile, known),
        1 if args.profile else args.rounds,
    )
    print(show_profile(results) if args.profile else show(results), flush=True)
    return complete


if __name__ == "__main__":
    sys.exit(main())
