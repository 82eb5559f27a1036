"""Time of one UNet call in each configuration, on an input that changes as it does in sampling.

    python benchmarks/bench_unet_step.py --network ddpm_cifar10 --record

The input of call i is x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise at the i-th of 50 DDIM timesteps with one x_0 and one
noise: the trajectory of a perfect predictor. It is the same for all configurations, and needs no trained weights. The
configurations take turns at every call (A B C A B C ...); first calls (initialize) and later ones (update) are kept
apart. Before anything is timed, every configuration runs once and its last output is checked against float32; one that
fails is not timed and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record
from benchmarks.shapes import NETWORKS, build_unet
from modiff_kernels.cli.models import share_copy
from modiff_kernels.cli.quantised import Quantised
from modiff_kernels.cli.rows import Row, build_rows, select_rows
from modiff_kernels.evaluation import sqnr, text_table

LEAST_SQNR_DB = {"float": 80.0, "weight_only": 20.0, "quantized": 15.0, "modulated": 15.0}
"""Least SQNR of the last call of a run against float32 contiguous, at 8 bits."""


@dataclass
class Configuration:
    """A UNet to time, and the seconds its calls took."""

    row: Row
    unet: torch.nn.Module
    quantised: Quantised | None = None
    sqnr_db: float = 0.0
    first: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    @property
    def backend(self) -> str:
        return self.quantised.backend if self.quantised else "torch"

    def run(self):
        return self.quantised.sampling_run() if self.quantised else contextlib.nullcontext()


def trajectory(size: int, batch: int, calls: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x_t, t) of the first `calls` of 50 DDIM steps, x_t float32 [batch, 3, size, size] contiguous."""
    from diffusers import DDIMScheduler

    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, 3, 4, 4, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)
    noise = torch.randn(image.shape, generator=generator)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    return [(scheduler.add_noise(image, noise, t[None]), t) for t in scheduler.timesteps[:calls]]


def configurations(network: str, rows: list[Row], backend: str) -> list[Configuration]:
    """One UNet per row; the channels_last ones share their weights."""
    contiguous = build_unet(network)
    channels_last = copy.deepcopy(contiguous).to(memory_format=torch.channels_last)
    result = []
    for row in rows:
        unet = share_copy(channels_last) if row.channels_last else contiguous
        if row.compiled:
            unet.compile()
        result.append(Configuration(row, unet, None if row.mode == "float" else Quantised(unet, row, backend)))
    return result


def call(configuration: Configuration, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, float]:
    if configuration.row.channels_last:
        x = x.to(memory_format=torch.channels_last)
    started = time.perf_counter()
    out = configuration.unet(x, t, return_dict=False)[0]
    return out, time.perf_counter() - started


def verify(configs: list[Configuration], inputs: list, reference: torch.nn.Module, quiet: bool) -> list[Configuration]:
    """Run every configuration once, untimed, and keep those that agree with `reference` at the last call."""
    expected = reference(*inputs[-1], return_dict=False)[0]
    kept = []
    for configuration in tqdm(configs, desc="verify", unit="row", disable=quiet, leave=False):
        with configuration.run():
            for x, t in inputs:
                out, _ = call(configuration, x, t)
        configuration.sqnr_db = sqnr(out, expected)
        least = LEAST_SQNR_DB[configuration.row.mode]
        low_bits = min(configuration.row.act_bits, configuration.row.weight_bits) < 8
        if low_bits and configuration.row.mode == "quantized":
            least = 0.0
        elif low_bits:
            least = 10.0
        if configuration.sqnr_db >= least:
            kept.append(configuration)
        else:
            print(
                f"{configuration.row.name}: {configuration.sqnr_db:.1f} dB to float32, at least {least} expected; "
                "not timed",
                file=sys.stderr,
            )
    return kept


def measure(configs: list[Configuration], inputs: list, rounds: int, quiet: bool) -> None:
    """Time `rounds` sampling runs; at every call the configurations take turns, another one first each time."""
    with tqdm(total=rounds * len(inputs), desc="time", unit="call", disable=quiet, leave=False) as bar:
        for _ in range(rounds):
            with contextlib.ExitStack() as stack:
                for configuration in configs:
                    stack.enter_context(configuration.run())
                for index, (x, t) in enumerate(inputs):
                    shift = index % len(configs)
                    for configuration in configs[shift:] + configs[:shift]:
                        _, seconds = call(configuration, x, t)
                        (configuration.update if index else configuration.first).append(seconds)
                    bar.update()


def result_rows(network: str, batch: int, configs: list[Configuration]) -> list[dict]:
    """Rows for record.append: times, and ratios paired call by call."""
    by_key = {configuration.row.key: configuration for configuration in configs}
    eager = [by_key[key] for key in ("float-contiguous", "float-channels_last") if key in by_key]
    baselines = {}
    if eager:
        baselines["speedup_vs_best_eager"] = min(eager, key=lambda c: statistics.median(c.update))
    if "float-compile" in by_key:
        baselines["speedup_vs_compile"] = by_key["float-compile"]
    rows = []
    for c in configs:
        common = {
            "op": "unet_step",
            "problem": f"{network}-b{batch}-{c.row.key}",
            "backend": c.backend,
            "cache": "warm",
            "timer": "perf_counter",
            "sqnr_db": c.sqnr_db,
            "verified": True,
        }

        def add(metric: str, unit: str, values: list[float], common: dict = common) -> None:
            rows.append({**common, "metric": metric, "unit": unit, **record.percentiles(values)})

        add("update_time", "ms", [1e3 * s for s in c.update])
        if c.row.mode == "modulated":
            add("initialize_time", "ms", [1e3 * s for s in c.first])
        for metric, baseline in baselines.items():
            add(metric, "x", [b / s for b, s in zip(baseline.update, c.update, strict=True)])
        plain = by_key.get(f"plain-w{c.row.weight_bits}a8")
        if c.row.mode == "modulated" and plain is not None:
            add("overhead_vs_plain", "%", [100 * (s / p - 1) for s, p in zip(c.update, plain.update, strict=True)])
        if c.quantised:
            add("state", "bytes", [c.quantised.state_bytes])
    return rows


def show(rows: list[dict]) -> str:
    table: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        table[row["problem"]][row["metric"]] = row
    header = (
        "problem",
        "update ms",
        "p20",
        "p80",
        "first ms",
        "vs best eager",
        "vs compile",
        "over plain",
        "SQNR dB",
        "state MB",
        "backend",
    )
    cells = []
    for problem, metrics in table.items():
        update = metrics["update_time"]

        def shown(metric: str, form: str, scale: float = 1.0, metrics: dict = metrics) -> str:
            return form.format(metrics[metric]["p50"] * scale) if metric in metrics else "-"

        cells.append(
            (
                problem,
                f"{update['p50']:.2f}",
                f"{update['p20']:.2f}",
                f"{update['p80']:.2f}",
                shown("initialize_time", "{:.2f}"),
                shown("speedup_vs_best_eager", "{:.2f}x"),
                shown("speedup_vs_compile", "{:.2f}x"),
                shown("overhead_vs_plain", "{:+.1f} %"),
                f"{update['sqnr_db']:.1f}",
                shown("state", "{:.1f}", 1e-6),
                update["backend"],
            )
        )
    return text_table(header, cells)


def profile(configs: list[Configuration], inputs: list) -> None:
    """Print where the time of one update call goes, for each configuration."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    for configuration in configs:
        with configuration.run():
            for x, t in inputs[:3]:
                call(configuration, x, t)
            with torch_profile(activities=[ProfilerActivity.CPU]) as trace:
                call(configuration, *inputs[3])
        print(f"\n{configuration.row.name}")
        print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", action="append", choices=NETWORKS, help="may be given twice (default: all)")
    add("--batch", type=int, default=8)
    add("--calls", type=int, default=12, help="UNet calls of a run, at least 4 (%(default)s)")
    add("--rounds", type=int, default=3, help="runs (%(default)s)")
    add("--threads", type=int, default=2)
    add("--rows", default="", help="names or beginnings of rows as in `modiff compare`, by commas (default: all)")
    add("--backend", default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="with or without torch.compile")
    add("--record", action="store_true", help="append the rows to benchmarks/results")
    add("--profile", action="store_true", help="print the ops that take the time, instead of timing")
    add("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if min(args.batch, args.rounds, args.threads) < 1 or not 4 <= args.calls <= 50:
        parser.error("--batch, --rounds, --threads must be at least 1, --calls 4 to 50")
    torch.set_num_threads(args.threads)
    names = tuple(name for name in args.rows.split(",") if name)
    rows_wanted = select_rows(build_rows((8,), None, args.compile), names)
    failed = False
    with torch.inference_mode():
        for network in args.network or NETWORKS:
            reference = build_unet(network)
            inputs = trajectory(reference.config.sample_size, args.batch, args.calls)
            configs = configurations(network, rows_wanted, args.backend)
            if args.profile:
                profile(configs, inputs)
                continue
            kept = verify(configs, inputs, reference, args.quiet)
            failed |= len(kept) < len(configs)
            measure(kept, inputs, args.rounds, args.quiet)
            rows = result_rows(network, args.batch, kept)
            print(show(rows))
            if args.record:
                print(f"appended to {record.append(rows).relative_to(record.ROOT)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
