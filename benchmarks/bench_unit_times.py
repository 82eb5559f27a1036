"""How the time of a unit should be measured: three ways, and how well each predicts whole UNet calls.

    python benchmarks/bench_unit_times.py --cpu-time

Ways: *within* whole calls, as `make_plan` does; *alone*, the unit in a loop on its recorded inputs; *difference*, whole
calls with the unit in float against whole calls without. Whole plans with random modes are timed, and compared with the
float call plus what the units say. --cpu-time reads the CPU time of this thread, which other work on the machine
disturbs less; it needs one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import modiff_kernels as mk
from benchmarks.shapes import NETWORKS, build_unet
from modiff_kernels.config.plan import FLOAT_MODE, LayerPlan, Mode, UnitPlan
from modiff_kernels.evaluation import text_table
from modiff_kernels.integrations.measurement import CALLS_TIMED, Bench, Subject, Times, recorded

MODULATED = Mode("modulated", 8)
MODES = (Mode("quantized", 8), MODULATED)


def make_bench(network: str, batch: int, clock) -> Bench:
    """Copies of the network in all modes, on a DDIM trajectory."""
    from diffusers import DDIMScheduler

    unet = build_unet(network).to(memory_format=torch.channels_last)
    size = unet.config.sample_size

    def sample(own: torch.nn.Module):
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(CALLS_TIMED)
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(own(x, t).sample, t, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    calls, pictures = recorded(unet, sample)
    return Bench(unet, mk.ModiffConfig(), MODES, None, {}, sample, pictures, calls, clock, lambda: None)


def planned(bench: Bench, modes: dict[str, Mode]) -> Subject:
    units = tuple(UnitPlan(path, mode, bench.units[path]) for path, mode in modes.items())
    return bench.accelerated(dataclasses.replace(bench.config, plan=LayerPlan(units)))


def alone_s(bench: Bench, rounds: int) -> dict[tuple[str, Mode], float]:
    """Median seconds of each fused unit in a loop on the inputs it gets along the trajectory, the first call aside."""
    inputs: dict[str, list] = {}
    modules = dict(bench.modules())
    hooks = [
        bench.float.unet.get_submodule(name).register_forward_hook(
            lambda m, args, kwargs, out, path=path: inputs.setdefault(path, []).append((args, kwargs)), with_kwargs=True
        )
        for path, name in modules.items()
    ]
    for call in bench.calls:
        bench.float(call)
    for hook in hooks:
        hook.remove()
    seconds: dict[tuple[str, Mode], list[float]] = {}
    for path, name in modules.items():
        for mode, subject in {FLOAT_MODE: bench.float, **bench.subjects}.items():
            module = subject.unet.get_submodule(name)
            for _ in range(rounds):
                with subject.run():
                    for index, (args, kwargs) in enumerate(inputs[path]):
                        if subject.handle is not None:
                            subject.handle.state.begin_call()
                        start = bench.timer.mark()
                        module(*args, **kwargs)
                        end = bench.timer.mark()
                        if subject.handle is not None:
                            subject.handle.state.end_call()
                        if index:
                            seconds.setdefault((path, mode), []).append(bench.timer.seconds(start, end))
    return {key: statistics.median(values) for key, values in seconds.items()}


def medians(times: Times) -> dict[str, float]:
    return {path: statistics.median(values) for path, values in times.units.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", choices=NETWORKS, default=NETWORKS[0])
    add("--batch", type=int, default=8)
    add("--rounds", type=int, default=8)
    add("--plans", type=int, default=6, help="plans with random modes (%(default)s)")
    add("--units", type=int, default=4, help="units to take the difference of whole calls for (%(default)s)")
    add("--threads", type=int, default=1)
    add("--cpu-time", action="store_true", help="time of the thread on the CPU instead of the wall clock")
    args = parser.parse_args(argv)
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time needs --threads 1")
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        bench = make_bench(args.network, args.batch, time.thread_time if args.cpu_time else time.perf_counter)
        subjects = {FLOAT_MODE: bench.float, **bench.subjects}
        within = bench.time(subjects, args.rounds, per_unit=True)
        alone = alone_s(bench, args.rounds)
        random.seed(0)
        plans = [{path: random.choice((FLOAT_MODE, *MODES)) for path in bench.units} for _ in range(args.plans)]
        whole = bench.time({i: planned(bench, modes) for i, modes in enumerate(plans)}, args.rounds)
        paths = random.sample(list(bench.units), args.units)
        without = {p: planned(bench, {u: FLOAT_MODE if u == p else MODULATED for u in bench.units}) for p in paths}
        steps = bench.time({None: bench.subjects[MODULATED], **without}, args.rounds)

    units = {mode: medians(times) for mode, times in within.items()}
    rest_s = statistics.median(within[FLOAT_MODE].steps) - sum(units[FLOAT_MODE].values())
    rows = []
    for i, modes in enumerate(plans):
        measured_s = statistics.median(whole[i].steps)
        ratios = [
            (rest_s + sum(way[path, mode] for path, mode in modes.items())) / measured_s
            for way in ({(p, m): units[m][p] for p in modes for m in units}, alone)
        ]
        rows.append((f"random plan {i}", f"{1e3 * measured_s:.2f}", *(f"{ratio:.3f}" for ratio in ratios)))
    print(text_table(("whole calls", "ms", "within: predicted/measured", "alone"), rows) + "\n")
    rows = []
    for mode in units:
        sums = (sum(units[mode].values()), sum(seconds for (_, own), seconds in alone.items() if own == mode))
        rows.append((f"all units {mode}", *(f"{1e3 * seconds:.2f}" for seconds in sums)))
    print(text_table(("sum of units, ms", "within", "alone"), rows) + "\n")
    rows = []
    for path in paths:
        gains = sorted(a - b for a, b in zip(steps[path].steps, steps[None].steps))
        fifth = len(gains) // 5
        rows.append(
            (
                path,
                f"{1e6 * (units[FLOAT_MODE][path] - units[MODULATED][path]):.0f}",
                f"{1e6 * (alone[path, FLOAT_MODE] - alone[path, MODULATED]):.0f}",
                f"{1e6 * statistics.median(gains):.0f}",
                f"{1e6 * gains[fifth]:.0f} .. {1e6 * gains[-1 - fifth]:.0f}",
            )
        )
    print(text_table(("gain over float, us", "within", "alone", "difference", "its 20-80 %"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
