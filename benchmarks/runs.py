"""Whole sampling runs through pipelines of diffusers: images per second of ours, full precision and DeepCache.

    python -m benchmarks runs --network cifar10_small16 --images 8 --record
    python -m benchmarks runs --network sd15 --images 8 --device cuda --backend cuda --budget 500 --record

A run is one call of the pipeline (benchmarks/pipelines.py says which, and what is left out), from noise to pictures or
latents, the sampler's own work included. Every configuration begins from the same noise. Before anything is timed, a
configuration samples once or twice (which compiles, captures and chooses kernels) and then once more; that result is
compared with full precision, eager in channels_last, and one that is too far away is not timed. PSNR is that of
pictures. With random weights it says little about quality: such a network reacts to errors as no trained one does.

On the CPU the configurations take turns; on a GPU they come one by one, the most telling first. The strongest forms
count as baselines: full precision compiled with max-autotune and CUDA graphs, and DeepCache as its package does it, and
compiled, with CUDA graphs (benchmarks/baselines/deepcache.py).

full_calls is how many calls of the UNet compute all of it; in the others nothing runs (schedules), or its shallow
levels do (DeepCache, deep levels). On a CPU outside_unet is the time of a step in the pipeline and the scheduler."""

import argparse
import contextlib
import functools
import time
from typing import Any

import torch

from benchmarks import record
from benchmarks.configurations import DEEPCACHE, QUICK, RUN_ORDER, Network, Networks, chosen, run_rows
from benchmarks.pipelines import SAMPLERS, Workload
from benchmarks.runner import Entrant, Measure, Row, Session, add_options
from benchmarks.shapes import NETWORKS, build_unet
from benchmarks.shared import Row as Configuration
from benchmarks.shared import quiet_libraries
from benchmarks.steps import synchronize
from benchmarks.tables import show
from modiff_kernels.evaluation import psnr, sqnr
from modiff_kernels.integrations.graphs import WARM_UP_CALLS

OP = "sampling"
LEAST_SQNR_DB = {"float32": 80.0, "float16": 30.0, "bfloat16": 6.0}
"""Least SQNR of the result of full precision in another form, by dtype: errors of rounding grow along a run."""
LEAST_SQNR_APPROXIMATE_DB = 3.0
"""The same in low bits, and where calls are not, or not wholly, computed: a wrong picture has 0 dB or less. Guidance
makes errors ten times as large; benchmarks/steps.py asks for more of a single call."""
FLOATS = ("float-contiguous", "float-channels_last", "float-compile", "float-compile-graphs", QUICK)
BASELINES = {
    "speedup_vs_float": FLOATS,
    **{f"speedup_vs_deepcache{n}": tuple(k for k in DEEPCACHE if DEEPCACHE[k] == n) for n in DEEPCACHE.values()},
}
"""By metric the configurations whose fastest one it compares with."""


class Run:
    baselines = BASELINES

    def __init__(self, workload: Workload, networks: Networks) -> None:
        self.workload, self.networks = workload, networks
        self.device = networks.unet.device
        self.expected = self._result(self.make(Configuration("reference", "full precision", "float")))

    def make(self, config: Any) -> Network:
        pipes: list[Any] = []

        def pipe_of(unet: torch.nn.Module) -> Any:
            pipes.append(self.workload.pipe(unet))
            return pipes[0]

        network = self.networks.make(config, pipe_of)
        network.pipe = pipes[0] if pipes else pipe_of(network.unet)
        return network

    def verify(self, entrant: Entrant) -> float | str:
        network = entrant.subject
        for _ in range(WARM_UP_CALLS if entrant.config.cuda_graphs else 1):  # of each kind, one that a run has once too
            self._result(network)
        result = self._result(network)
        found, least = sqnr(result, self.expected), least_sqnr_db(entrant.config, self.networks.unet.dtype)
        if not found >= least:
            return f"{found:.1f} dB to full precision, at least {least:g} expected"
        if self.workload.in_pixels:
            pictures = [x.permute(0, 2, 3, 1).clamp(0, 1).numpy() for x in (result, self.expected)]
            entrant.more["psnr"] = float(psnr(*pictures).mean())
        entrant.more |= {"full_calls": self.workload.steps, "backend": network.backend}
        if network.cached:
            entrant.more["full_calls"] = network.cached.calls_full
        if network.quantised:
            entrant.more["full_calls"] -= network.quantised.handle.skipped_calls()
            entrant.more["state"] = network.quantised.handle.state.nbytes()
        return found

    def timed(self, entrant: Entrant) -> list[float]:
        return [self._seconds(entrant.subject)]

    def _seconds(self, network: Network) -> float:
        synchronize(self.device)
        started = time.perf_counter()
        with self._run(network):
            self.workload.sample(network.pipe)
        synchronize(self.device)
        return time.perf_counter() - started

    def _result(self, network: Network) -> torch.Tensor:
        with self._run(network):
            return self.workload.sample(network.pipe).float().cpu()

    def _run(self, network: Network) -> contextlib.AbstractContextManager[Any]:
        """The run, where the pipeline does not begin it by itself."""
        return contextlib.nullcontext() if network.quantised else network.run(network.pipe.scheduler)

    def _outside_unet_s(self, network: Network) -> float:
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
        return (whole_s - sum(marks)) / self.workload.steps

    def rows(self, entrant: Entrant) -> list[Row]:
        row, more = functools.partial(self._row, entrant), entrant.more
        rows = [
            row("run_time", "s", entrant.times),
            row("images_per_s", "1/s", [self.workload.images / s for s in entrant.times]),
            row("full_calls", "calls", [more["full_calls"]]),
        ]
        units = {"psnr": "dB", "state": "bytes"}
        rows += [row(name, units[name], [more[name]]) for name in units if name in more]
        if entrant.peak_bytes:
            rows.append(row("peak_memory", "bytes", [entrant.peak_bytes]))
        if self.device.type == "cpu":  # where calls of the UNet end when they return
            rows.append(row("outside_unet", "ms", [1e3 * self._outside_unet_s(entrant.subject)]))
        return rows

    def ratio_rows(self, entrant: Entrant, metric: str, faster: list[float]) -> list[Row]:
        return [self._row(entrant, metric, "x", faster)]

    def _row(self, entrant: Entrant, metric: str, unit: str, values: list[float]) -> Row:
        name = problem(self.workload, entrant.config.key)
        return record.row(OP, name, entrant.more["backend"], metric, unit, values, sqnr_db=entrant.sqnr_db)


def problem(workload: Workload, key: str) -> str:
    """What rows have in their column `problem`."""
    return f"{workload.label}-{workload.sampler.key}-n{workload.images}-{key}"


def least_sqnr_db(config: Any, dtype: torch.dtype) -> float:
    exact = config.mode == "float" and config.act_bits == 32 and config.schedule is None
    if exact and config.key not in DEEPCACHE:
        return LEAST_SQNR_DB[str(dtype).removeprefix("torch.")]
    return LEAST_SQNR_APPROXIMATE_DB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--network", nargs="+", default=["cifar10_small16"], choices=NETWORKS, help="default: the shipped model")
    add("--images", type=int, nargs="+", default=[8], help="of a run, one or several numbers (%(default)s)")
    add("--sampler", nargs="+", default=list(SAMPLERS), choices=SAMPLERS, help="default: all")
    add_options(parser, rounds=4)


def main(args: argparse.Namespace) -> int:
    session = Session(args)
    quiet_libraries()
    for network in args.network:
        unet = build_unet(network, session.device).to(session.dtype)
        for images in args.images:
            for sampler in args.sampler:
                workload = Workload(network, unet, SAMPLERS[sampler], images)
                rows = run_rows(session.device, session.dtype, args.compile, args.plan)
                rows = chosen(rows, session, RUN_ORDER)
                measures = [(row, Measure(OP, problem(workload, row.key), "run_time", 1.0)) for row in rows]
                make = lambda w=workload, u=unet: Run(w, Networks(u))  # noqa: E731
                new = session.run(f"{network}, {sampler}, {images} images", make, measures, args.rounds)
                print(show(new, "run_time"), flush=True)
        del unet
    return session.exit_code
