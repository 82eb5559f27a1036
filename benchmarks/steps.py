"""Time of one UNet call in each configuration, on an input that changes as it does in sampling.

    python -m benchmarks steps --network ddpm_cifar10 --batch 1 8 --record
    python -m benchmarks steps --network sd15 --device cuda --batch 16 --backend cuda triton --budget 500 --record

The input of call i is x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise at the i-th of 50 DDIM timesteps with one x_0 and one
noise: the trajectory of a perfect predictor. It is the same for all configurations, and needs no trained weights. First
calls and later ones (update) are kept apart. Before anything is timed, a configuration runs once and its last output is
checked against plain eager; one that fails is not timed.

On the CPU the configurations take turns run by run, and ratios pair calls of one place in neighbouring runs. Turns at
every call would time each network with caches full of the others, which no sampler does. On a GPU they come one by one,
the most telling first, so that --budget cuts off what stands last. --backend cuda triton times ours with each.

Baselines: eager in both memory formats; torch.compile, on CUDA with max-autotune, without and with CUDA graphs, and in
its default mode with graphs (on the CPU max-autotune and freezing took the same time within 3 % and are left out);
torchao's int8 (dynamic on CUDA, static on a CPU), OpenVINO and bfloat16 where they are installed. --plan FILE, made by
`modiff calibrate --plan` or make_plan() on this device, adds the rows "planned". Bound: benchmarks/bounds.py. Peak
memory is known on CUDA only, and counts the weights."""

import argparse
import functools
import time
from typing import Any

import torch

from benchmarks import bounds, record
from benchmarks.configurations import QUICK, STEP_ORDER, Network, Networks, chosen, label, step_rows
from benchmarks.runner import Entrant, Measure, Row, Session, add_options
from benchmarks.shapes import OF_STEPS, SMALL_NETWORKS, build_unet, conditions
from benchmarks.tables import show
from modiff_kernels.evaluation import sqnr
from modiff_kernels.planning.cost import Machine

LEAST_SQNR_DB = {"float": 80.0, "weight_only": 20.0, "quantized": 15.0, "modulated": 15.0}
"""Least SQNR of the last call of a run against eager contiguous, at 8 bits."""
LEAST_SQNR_16_BIT_DB = {"float16": 45.0, "bfloat16": 25.0}
"""The same for rows "float" of 16-bit networks, where two orders of summation differ."""
OVERHEAD = "overhead_vs_plain"
BASELINES = {
    "speedup_vs_best_eager": ("float-contiguous", "float-channels_last"),
    "speedup_vs_compile": ("float-compile", "float-compile-graphs", QUICK),
    OVERHEAD: ("plain-w8a8", "plain-w8a8.cuda", "plain-w8a8.triton"),
}
"""By metric the configurations whose fastest one it compares with."""


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


class Step:
    baselines = BASELINES

    def __init__(self, network: str, batch: int, networks: Networks, calls: int, machine: Machine):
        unet = networks.unet
        self.network, self.batch, self.networks = network, batch, networks
        self.machine = machine
        inputs = trajectory(unet.config.sample_size, batch, calls, unet.config.in_channels)
        self.inputs = [(x.to(unet.device, unet.dtype), t.to(unet.device)) for x, t in inputs]
        self.keywords = networks.conditions = conditions(unet, batch)
        if "class_labels" in self.keywords:  # a DiT takes the timestep of every image
            self.inputs = [(x, t.expand(batch)) for x, t in self.inputs]
        networks.shown = self.inputs
        self.expected = unet(*self.inputs[-1], **self.keywords, return_dict=False)[0]

    def make(self, config: Any) -> Network:
        return self.networks.make(config)

    def verify(self, entrant: Entrant) -> float | str:
        with entrant.subject.run():
            for x, t in self.inputs:
                out, _ = self._call(entrant.subject, x, t)
        found, least = sqnr(out.float(), self.expected.float()), least_sqnr_db(entrant.config, out.dtype)
        entrant.more["state"] = entrant.subject.quantised.state_bytes if entrant.subject.quantised else None
        entrant.more["backend"] = entrant.subject.backend
        return found if found >= least else f"{found:.1f} dB to full precision, at least {least} expected"

    def timed(self, entrant: Entrant) -> list[float]:
        with entrant.subject.run():
            seconds = [self._call(entrant.subject, x, t)[1] for x, t in self.inputs]
        entrant.more.setdefault("first", []).append(seconds[0])
        return seconds[1:]

    def _call(self, network: Network, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, float]:
        if network.row.channels_last:
            x = x.to(memory_format=torch.channels_last)
        synchronize(x.device)
        started = time.perf_counter()
        out = network.unet(x, t, **self.keywords, return_dict=False)[0]
        synchronize(x.device)
        return out, time.perf_counter() - started

    def rows(self, entrant: Entrant) -> list[Row]:
        config, row = entrant.config, functools.partial(self._row, entrant)
        rows = [row("update_time", "ms", [1e3 * s for s in entrant.times])]
        if config.mode == "modulated":
            rows.append(row("initialize_time", "ms", [1e3 * s for s in entrant.more["first"]]))
        if entrant.more["state"] is not None:
            rows.append(row("state", "bytes", [entrant.more["state"]]))
        if entrant.peak_bytes:
            rows.append(row("peak_memory", "bytes", [entrant.peak_bytes]))
        if config.weight_bits != 16:  # the machine's rates are those of the other rows
            mode = "quantized" if config.weight_bits == 8 and config.mode == "float" else config.mode
            sizes = (self.expected.element_size(), 2 if self.expected.is_cuda else 4)
            rows.append(row("bound", "ms", [bounds.bound_ms(self.network, self.batch, mode, self.machine, *sizes)]))
        return rows

    def ratio_rows(self, entrant: Entrant, metric: str, faster: list[float]) -> list[Row]:
        if metric == OVERHEAD and entrant.config.mode != "modulated":
            return []
        if metric == OVERHEAD:
            return [self._row(entrant, metric, "%", [100 * (1 / ratio - 1) for ratio in faster])]
        return [self._row(entrant, metric, "x", faster)]

    def _row(self, entrant: Entrant, metric: str, unit: str, values: list[float]) -> Row:
        name = problem(self.network, self.networks.unet, self.batch, entrant.config)
        return record.row("unet_step", name, entrant.more["backend"], metric, unit, values, sqnr_db=entrant.sqnr_db)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def problem(network: str, unet: torch.nn.Module, batch: int, config: Any) -> str:
    """What rows have in their column `problem`."""
    return f"{label(network, unet)}-b{batch}-{config.key}"


def least_sqnr_db(config: Any, dtype: torch.dtype) -> float:
    if min(config.act_bits, config.weight_bits) < 8:
        return 0.0 if config.mode == "quantized" else 10.0
    if config.mode == "float" and config.weight_bits == 8:
        return LEAST_SQNR_DB["quantized"]
    if config.mode == "float":
        name = "bfloat16" if config.weight_bits == 16 else str(dtype).removeprefix("torch.")
        return LEAST_SQNR_16_BIT_DB.get(name, LEAST_SQNR_DB["float"])
    return LEAST_SQNR_DB[config.mode]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--network", nargs="+", default=list(SMALL_NETWORKS), choices=OF_STEPS, help="default: %(default)s")
    add("--batch", type=int, nargs="+", default=[8], help="one or several (%(default)s)")
    add("--calls", type=int, default=12, choices=range(2, 51), metavar="2-50", help="of a run (%(default)s)")
    add_options(parser, rounds=3)


def main(args: argparse.Namespace) -> int:
    session = Session(args)
    machine, source = bounds.machine(session.device)
    print(f"bounds by rates {source}: {machine}")
    for network in args.network:
        unet = build_unet(network, session.device).to(session.dtype)
        for batch in args.batch:
            rows = step_rows(session.device, session.dtype, args.compile, args.plan)
            named = [(row, problem(network, unet, batch, row)) for row in chosen(rows, session, STEP_ORDER)]
            measures = [(row, Measure("unet_step", name, "update_time", 1e-3)) for row, name in named]
            make = lambda n=network, b=batch, u=unet: Step(n, b, Networks(u), args.calls, machine)  # noqa: E731
            new = session.run(f"{network}, batch {batch}", make, measures, args.rounds)
            print(show(new, "update_time"), flush=True)
        del unet
    return session.exit_code
