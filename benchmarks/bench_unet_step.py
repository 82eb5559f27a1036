"""Time of one UNet call in each configuration, on an input that changes as it does in sampling.

    python benchmarks/bench_unet_step.py --network ddpm_cifar10 --batch 1 8 --record
    python benchmarks/bench_unet_step.py --network sd15 --device cuda --batch 1 2 8 16 64

The input of call i is x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise at the i-th of 50 DDIM timesteps with one x_0 and one
noise: the trajectory of a perfect predictor. It is the same for all configurations, and needs no trained weights. The
configurations take turns run by run, another one first each time, and ratios pair calls of one place in neighbouring
runs. Turns at every call would time each network with caches full of the others, which no sampler does; small networks
take up to twice as long then. First calls (initialize) and later ones (update) are kept apart. Before anything is
timed, every configuration runs once and its last output is checked against plain eager; one that fails is not timed and
makes the exit code 1.

Baselines: eager in both memory formats, torch.compile (on CUDA with max-autotune, without and with CUDA graphs; on the
CPU max-autotune and freezing took the same time within 3 % and are left out), and torchao's dynamic int8 where it can
be imported. The bound beside each row is that of benchmarks/bounds.py; peak memory
is known on CUDA only, and counts the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import bounds, record, step_profile
from benchmarks.shapes import NETWORKS, SMALL_NETWORKS, build_unet, conditions
from modiff_kernels.cli.models import choose_device, share_copy
from modiff_kernels.cli.quantised import Quantised
from modiff_kernels.cli.rows import Row, build_rows, select_rows
from modiff_kernels.evaluation import sqnr, text_table
from modiff_kernels.planning.roofline import Machine

LEAST_SQNR_DB = {"float": 80.0, "weight_only": 20.0, "quantized": 15.0, "modulated": 15.0}
"""Least SQNR of the last call of a run against eager contiguous, at 8 bits."""
LEAST_SQNR_16_BIT_DB = {"float16": 45.0, "bfloat16": 25.0}
"""The same for rows "float" of 16-bit networks, where two orders of summation differ."""
TORCHAO = "torchao-int8"


@dataclass
class Configuration:
    """A UNet to time, and the seconds its calls took."""

    row: Row
    unet: torch.nn.Module
    quantised: Quantised | None = None
    sqnr_db: float = 0.0
    peak_bytes: int = 0
    first: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    @property
    def backend(self) -> str:
        return self.quantised.backend if self.quantised else "torch"

    def run(self):
        return self.quantised.sampling_run() if self.quantised else contextlib.nullcontext()


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


def all_rows(device: torch.device, dtype: torch.dtype, compiled: bool) -> list[Row]:
    """The rows of `modiff compare` with weights in 8 bits, and those that only whole steps have."""
    rows = build_rows((8,), None, compiled)
    modulated = next(row for row in rows if row.key == "modulated-w8a8")
    if compiled:
        rows.append(
            dataclasses.replace(
                modulated, key=f"{modulated.key}-compile", name="modulated W8A8, compiled", compiled=True
            )
        )
    if device.type == "cuda":
        rows.append(
            dataclasses.replace(
                modulated, key=f"{modulated.key}-graphs", name="modulated W8A8, CUDA graphs", cuda_graphs=True
            )
        )
        if compiled:
            plain = next(row for row in rows if row.key == "float-compile")
            rows.append(dataclasses.replace(plain, key=f"{plain.key}-graphs", cuda_graphs=True))
    if compiled and importlib.util.find_spec("torchao") is not None:
        rows.append(Row(TORCHAO, "torchao int8 dynamic, torch.compile", "float", 8, 8, compiled=True))
    name = str(dtype).removeprefix("torch.")
    return [dataclasses.replace(row, name=(row.name or row.key).replace("float32", name)) for row in rows]


def configurations(unet: torch.nn.Module, rows: list[Row], backend: str) -> list[Configuration]:
    """One UNet per row; all share the weights of `unet`, but for its memory format."""
    channels_last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    result = []
    for row in rows:
        own = share_copy(channels_last) if row.channels_last else unet
        quantised = None if row.mode == "float" else Quantised(own, row, backend)
        if row.key == TORCHAO:
            _quantise_with_torchao(own)
        if row.compiled and quantised is not None:
            quantised.handle.compile()
        elif row.compiled:
            mode = "max-autotune" if row.cuda_graphs else "max-autotune-no-cudagraphs"
            own.compile(**({"mode": mode} if unet.device.type == "cuda" else {}))
        result.append(Configuration(row, own, quantised))
    return result


def _quantise_with_torchao(unet: torch.nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(unet, Int8DynamicActivationInt8WeightConfig())


def call(
    configuration: Configuration, x: torch.Tensor, t: torch.Tensor, keywords: dict[str, Any]
) -> tuple[torch.Tensor, float]:
    if configuration.row.channels_last:
        x = x.to(memory_format=torch.channels_last)
    _synchronize(x.device)
    started = time.perf_counter()
    out = configuration.unet(x, t, **keywords, return_dict=False)[0]
    _synchronize(x.device)
    return out, time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def verify(
    configs: list[Configuration], inputs: list, keywords: dict[str, Any], expected: torch.Tensor, quiet: bool
) -> list[Configuration]:
    """Run every configuration once, untimed, and keep those that agree with `expected` at the last call."""
    kept = []
    cuda = expected.device.type == "cuda"
    for configuration in tqdm(configs, desc="verify", unit="row", disable=quiet, leave=False):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with configuration.run():
            for x, t in inputs:
                out, _ = call(configuration, x, t, keywords)
        if cuda:
            configuration.peak_bytes = torch.cuda.max_memory_allocated()
        row = configuration.row
        configuration.sqnr_db = sqnr(out.float(), expected.float())
        least = LEAST_SQNR_DB[row.mode]
        if row.mode == "float":
            least = LEAST_SQNR_16_BIT_DB.get(str(out.dtype).removeprefix("torch."), least)
        low_bits = min(row.act_bits, row.weight_bits) < 8
        if low_bits and row.mode == "quantized":
            least = 0.0
        elif low_bits:
            least = 10.0
        elif row.key == TORCHAO:
            least = LEAST_SQNR_DB["quantized"]
        if configuration.sqnr_db >= least:
            kept.append(configuration)
        else:
            print(
                f"{row.name}: {configuration.sqnr_db:.1f} dB to {str(out.dtype).removeprefix('torch.')}, at least "
                f"{least} expected; not timed",
                file=sys.stderr,
            )
    return kept


def measure(configs: list[Configuration], inputs: list, keywords: dict[str, Any], rounds: int, quiet: bool) -> None:
    """Time `rounds` sampling runs of each configuration, in turns, another one first each time."""
    with tqdm(total=rounds * len(configs), desc="time", unit="run", disable=quiet, leave=False) as bar:
        for turn in range(rounds):
            shift = turn % len(configs)
            for configuration in configs[shift:] + configs[:shift]:
                with configuration.run():
                    for index, (x, t) in enumerate(inputs):
                        _, seconds = call(configuration, x, t, keywords)
                        (configuration.update if index else configuration.first).append(seconds)
                bar.update()


def result_rows(
    network: str, batch: int, configs: list[Configuration], machine: Machine, float_bytes: int
) -> list[dict]:
    """Rows for record.append: times, ratios paired call by call, memory, and the bound on `machine`."""
    by_key = {configuration.row.key: configuration for configuration in configs}
    eager = [by_key[key] for key in ("float-contiguous", "float-channels_last") if key in by_key]
    baselines = {}
    if eager:
        baselines["speedup_vs_best_eager"] = min(eager, key=lambda c: statistics.median(c.update))
    compiled = [by_key[key] for key in ("float-compile", "float-compile-graphs") if key in by_key]
    if compiled:
        baselines["speedup_vs_compile"] = min(compiled, key=lambda c: statistics.median(c.update))
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
        if c.peak_bytes:
            add("peak_memory", "bytes", [c.peak_bytes])
        state_bytes = 2 if c.unet.device.type == "cuda" else 4
        mode = "quantized" if c.row.key == TORCHAO else c.row.mode
        add("bound", "ms", [bounds.bound_ms(network, batch, mode, machine, float_bytes, state_bytes)])
    return rows


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


def profile_rows(
    network: str, batch: int, configs: list[Configuration], inputs: list, keywords: dict[str, Any]
) -> list[dict]:
    """Rows for record.append: milliseconds of an update call by kind of work (`step_profile.parts`)."""
    rows = []
    for c in configs:
        calls = [functools.partial(lambda c, x, t: call(c, x, t, keywords)[1], c, x, t) for x, t in inputs]
        for kind, ms in step_profile.parts(c.run, calls, c.unet.device).items():
            rows.append(
                {
                    "op": "unet_step_profile",
                    "problem": f"{network}-b{batch}-{c.row.key}",
                    "backend": c.backend,
                    "metric": kind,
                    "unit": "ms",
                    "cache": "warm",
                    "timer": "torch.profiler",
                    "sqnr_db": c.sqnr_db,
                    "verified": True,
                    **record.percentiles([ms]),
                }
            )
    return rows


def show_profile(rows: list[dict]) -> str:
    """Configurations as columns."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    cells = [(kind, *[f"{row['p50']:.2f}" for row in rows if row["metric"] == kind]) for kind in step_profile.PARTS]
    return text_table(("ms of a call", *problems), cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", action="append", choices=NETWORKS, help=f"may be given twice (default: {SMALL_NETWORKS})")
    add("--batch", type=int, nargs="+", default=[8], help="one or several (%(default)s)")
    add("--calls", type=int, default=12, help="UNet calls of a run, at least 4 (%(default)s)")
    add("--rounds", type=int, default=3, help="runs (%(default)s)")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", choices=("cpu", "cuda", "auto"))
    add("--dtype", default=None, choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on cuda")
    add("--rows", default="", help="names or beginnings of rows as in `modiff compare`, by commas (default: all)")
    add("--backend", default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="with or without torch.compile")
    add("--record", action="store_true", help="append the rows to benchmarks/results")
    add("--profile", action="store_true", help="instead of timing, tell what kinds of work take the time")
    add("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if min(*args.batch, args.rounds, args.threads) < 1 or not 4 <= args.calls <= 50:
        parser.error("--batch, --rounds, --threads must be at least 1, --calls 4 to 50")
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    names = tuple(name for name in args.rows.split(",") if name)
    rows_wanted = select_rows(all_rows(device, dtype, args.compile), names)
    machine, source = bounds.machine(device)
    print(f"bounds by rates {source}: {machine}")
    failed = False
    with torch.no_grad():
        for network in args.network or SMALL_NETWORKS:
            unet = build_unet(network, device).to(dtype)
            for batch in args.batch:
                failed |= not run_network(network, unet, rows_wanted, batch, machine, args)
    return int(failed)


def run_network(
    network: str,
    unet: torch.nn.Module,
    rows: list[Row],
    batch: int,
    machine: Machine,
    args: argparse.Namespace,
) -> bool:
    """Verify, time and print one network at one batch; whether all rows were verified."""
    config = unet.config
    inputs = [
        (x.to(unet.device, unet.dtype), t.to(unet.device))
        for x, t in trajectory(config.sample_size, batch, args.calls, config.in_channels)
    ]
    keywords = conditions(unet, batch)
    expected = unet(*inputs[-1], **keywords, return_dict=False)[0]
    configs = configurations(copy.deepcopy(unet), rows, args.backend)
    kept = verify(configs, inputs, keywords, expected, args.quiet)
    if args.profile:
        results = profile_rows(network, batch, kept, inputs, keywords)
        print(show_profile(results))
    else:
        measure(kept, inputs, keywords, args.rounds, args.quiet)
        results = result_rows(network, batch, kept, machine, expected.element_size())
        print(show(results))
    if args.record:
        print(f"appended to {record.append(results).relative_to(record.ROOT)}")
    return len(kept) == len(configs)


if __name__ == "__main__":
    sys.exit(main())
