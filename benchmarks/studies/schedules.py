"""What step schedules cost and lose, against fewer steps, other samplers, DeepCache and published forecasts.

    python -m benchmarks schedules --data DATA --keep kept --json benchmarks/results/pareto.json

Every row samples the same noise (seeds from 0 on) with the shipped model, in a network (float32, modulated W8A8, W8A4).
Its cost is counted in evaluations of the network, of DeepCache in parts of their flops. Its error is the mean PSNR in
dB to the same network and sampler with every call (own_db), and to the converged picture, of DDIM with as many steps as
the model was trained on, in float32 (converged_db). Samplers do not clip, so that all follow one trajectory.

All forecasts are weights of past outputs, so one executor runs them: `StepSchedule(pattern, weights=...)`, on calls
that are spread evenly, or with the first three and the last computed. TaylorSeer (2503.06923): finite differences per
interval. HiCache (2508.16984): the same in scaled Hermite polynomials, sigma 0.5. Spectrum
(2603.01623): Chebyshev polynomials of degree 4 through all outputs, no blend; its ridge is 1e-4 here, and the 0.1 that
was published in rows of their own.

The fits of `modiff_kernels.fit_schedule` are made in float32 on seeds from 1000 on, and are kept in the report. Towards
the converged picture they share the network's outputs on its trajectory (`recalled` of a fit counts those), so that
only the first fit of a sampler shows what one costs. DeepCache needs `pip install DeepCache`.

The report is written after every row, those that tell most first; --resume goes on with it, --budget ends it in time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import modiff_kernels as mk
from benchmarks import record
from benchmarks import shared as models
from benchmarks.baselines.deepcache import CachedUNet
from benchmarks.runner import NOT_FINISHED
from benchmarks.shared import Quantised, Row
from benchmarks.studies.features import Features, frechet_distance
from benchmarks.studies.pictures import OutOfTime
from benchmarks.studies.report import Report
from benchmarks.tables import loaded, shown
from examples.cifar10 import load_cifar10
from modiff_kernels.evaluation import markdown_table, psnr
from modiff_kernels.planning.fit import Fit
from modiff_kernels.planning.fit import pattern as pattern_of

NETWORKS = {
    "float32": Row("float32", "float32", "float"),
    "W8A8": Row("w8a8", "W8A8", "modulated", 8, 8),
    "W8A4": Row("w8a4", "W8A4", "modulated", 8, 4),
    "plain W8A8": Row("plain", "plain W8A8", "quantized", 8, 8),
}
IMAGES, FITTING_SEED = 16, 1000
FEW = (6, 8, 11, 14, 20, 25)  # steps with every call computed
COUNTS = (6, 8, 11)  # evaluations of schedules
KEY = ("network", "sampler", "steps", "method", "schedule", "evaluations", "batch")
Table = list[list[float]]


@dataclass(frozen=True)
class Sampler:
    """By its name on the command line; steps: of the run whose calls are skipped."""

    name: str
    steps: int = 25
    options: dict[str, Any] = field(default_factory=lambda: {"timestep_spacing": "linspace"})


SAMPLERS = {
    "DPM-Solver++": Sampler("dpmsolver++"),
    "DPM-Solver++ Karras": Sampler("dpmsolver++", 25, {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
    "DPM-Solver++ Lu": Sampler("dpmsolver++", 25, {"timestep_spacing": "linspace", "use_lu_lambdas": True}),
    "DDIM": Sampler("ddim", 50, {"clip_sample": False}),
    "UniPC": Sampler("unipc"),
    "DPM-Solver++(3)": Sampler("dpmsolver++", 25, {"timestep_spacing": "linspace", "solver_order": 3}),
}
FIRST = list(SAMPLERS)[:3]


def differences(nodes: list[int], call: int, order: int, basis: Callable[[float], Sequence[float]]) -> np.ndarray:
    """Weights of a forecast from finite differences per interval, times a basis in the place of k^m / m!."""
    nodes = nodes[-order - 1 :]
    interval, values, total = nodes[-1] - nodes[-2] if len(nodes) > 1 else 1, np.eye(len(nodes)), 0.0
    for factor in basis(call - nodes[-1])[: len(nodes)]:
        total = total + factor * values[-1]
        values = np.diff(values, axis=0) / interval
    return total[::-1]


def chebyshev(nodes: list[int], call: int, calls: int, ridge: float, degree: int = 4) -> np.ndarray:
    """Weights of a ridge regression on Chebyshev polynomials through all outputs."""
    design, at = (np.polynomial.chebyshev.chebvander(2 * np.asarray(x) / calls - 1, degree) for x in (nodes, [call]))
    return (at @ np.linalg.solve(design.T @ design + ridge * np.eye(degree + 1), design.T))[0][::-1]


RULES: dict[str, Callable[[list[int], int, int], Any]] = {
    "hold": lambda nodes, call, calls: [1.0],
    "TaylorSeer 1": lambda nodes, call, calls: differences(nodes, call, 1, lambda k: [1, k]),
    "TaylorSeer 2": lambda nodes, call, calls: differences(nodes, call, 2, lambda k: [1, k, k * k / 2]),
    "HiCache": lambda nodes, call, calls: differences(nodes, call, 2, lambda k: [1, k / 2, (k * k - 2) / 8]),
    "Spectrum": lambda nodes, call, calls: chebyshev(nodes, call, calls, 1e-4),
    "Spectrum, ridge 0.1": lambda nodes, call, calls: chebyshev(nodes, call, calls, 0.1),
}


def ruled(computed: Sequence[int], calls: int, rule: Callable[[list[int], int, int], Any]) -> mk.StepSchedule:
    """The schedule that computes these calls and forecasts the others by `rule`."""
    rows = []
    for call in range(calls):
        nodes = [node for node in computed if node <= call]
        rows.append([*([1.0] if nodes[-1] == call else map(float, rule(nodes, call, calls))), 0.0])
    return mk.StepSchedule(pattern_of(tuple(computed), calls), weights=rows)


def uniform(calls: int, count: int) -> list[list[int]]:
    """Computed calls: evenly spread, and with the first three and the last computed."""
    every = next(n for n in range(2, calls) if mk.StepSchedule.uniform(n).actions(calls).count("U") == count)
    begun = mk.StepSchedule.uniform(every).actions(calls)
    even = [round(k * (calls - 1) / (count - 1)) for k in range(count)]
    return [even, [call for call in range(calls) if begun[call] == "U"]]


class Recalled(torch.nn.Module):
    """A network that keeps its outputs in `held`, while `keeps`, and gives them again for the same sample."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet, self.config, self.keeps, self.recalled = unet, unet.config, False, 0
        self.held: dict[tuple[float, bytes], torch.Tensor] = {}

    def forward(self, sample: torch.Tensor, timestep: Any, return_dict: bool = False) -> tuple[torch.Tensor]:
        """The output in a tuple."""
        if not self.keeps:
            return self.unet(sample, timestep, return_dict=False)
        key = float(timestep), sample.contiguous().numpy().tobytes()
        self.recalled += key in self.held
        if key not in self.held:
            self.held[key] = self.unet(sample, timestep, return_dict=False)[0]
        return (self.held[key].clone(),)


class Study:
    """Samples in every way. kept: file for the converged pictures. deadline: of time.monotonic()."""

    def __init__(self, model: models.Model, report: Report, kept: Path, data: Path | None, deadline: float) -> None:
        self.model, self.report, self.data, self.deadline = model, report, data, deadline
        self.networks: dict[str, Quantised] = {}
        self.references: dict[tuple[str, str], np.ndarray] = {}
        self.recalling: dict[str, Recalled] = {}
        longest = models.make_scheduler(model, "ddim").config.num_train_timesteps
        if not kept.exists():
            np.save(kept, self.sample("float32", "DDIM", longest))
        self.converged = np.load(kept)

    def unet(self) -> Any:
        """A copy that shares the weights."""
        return models.share_copy(self.model.unet).to(memory_format=torch.channels_last)

    def sample(self, network: str, label: str, steps: int, schedule: Any = None, seeds=range(IMAGES)) -> np.ndarray:
        """Pictures by a network and a schedule."""
        if time.monotonic() > self.deadline:
            raise OutOfTime
        if network not in self.networks:
            row = dataclasses.replace(NETWORKS[network], schedule="hold")  # of a float network, which has nothing else
            self.networks[network] = Quantised(self.unet(), row)
        own, sampler = self.networks[network], SAMPLERS[label]
        own.handle.set_schedule(schedule)
        options = {"scheduler_options": sampler.options, "run": own.sampling_run}
        return models.sample_images(self.model, own.handle.unet, sampler.name, steps, seeds, **options)

    def row(self, network: str, label: str, steps: int, method: str, schedule: Any = None, batch: int = IMAGES) -> None:
        """Measure one row, unless the report has it."""
        pattern = schedule and schedule.without_weights()
        count = steps if schedule is None else schedule.actions(steps).count("U")
        found = dict(zip(KEY, (network, label, steps, method, pattern, count, batch)))
        if self.report.key_of(found) in self.report.known:
            return
        parts = [range(start, start + batch) for start in range(0, IMAGES, batch)]
        pictures = np.concatenate([self.sample(network, label, steps, schedule, seeds) for seeds in parts])
        self.judge(found, pictures)

    def judge(self, found: dict[str, Any], pictures: np.ndarray) -> None:
        """Add a row with its errors."""
        own = found["network"], found["sampler"]
        if own not in self.references:
            self.references[own] = self.sample(*own, SAMPLERS[own[1]].steps)
        errors = {"own_db": psnr(pictures, self.references[own]), "converged_db": psnr(pictures, self.converged)}
        means = {name: round(float(np.minimum(values, 200).mean()), 3) for name, values in errors.items()}
        if found["method"] == "every call" and found["steps"] == SAMPLERS[own[1]].steps:
            means["own_db"] = None
        self.report.add({**found, **means})

    def fit(self, label: str, steps: int, count: int, towards: str, images: int = IMAGES, on: str = "float32") -> Any:
        """A fit, made where the report has none: its schedule with all weights, and that of the states alone."""
        about = {"sampler": label, "steps": steps, "evaluations": count, "towards": towards, "images": images, "on": on}
        fits, sampler = self.report.content["fits"], SAMPLERS[label]
        found = next((fit for fit in fits if about.items() <= fit.items()), None)
        if found is None:
            if time.monotonic() > self.deadline:
                raise OutOfTime
            self.recalling = {label: self.recalling.get(label) or Recalled(self.unet())}  # of one sampler, for memory
            unet = self.recalling[label]
            if on != "float32":
                unet = Recalled(Quantised(self.unet(), NETWORKS[on]).handle.unet)
            begun: list[Table] = []
            unet.recalled, end = 0, Fit.end

            def pictures(seeds: Sequence[int], asked: int) -> np.ndarray:
                if time.monotonic() > self.deadline:
                    raise OutOfTime
                unet.keeps = asked > 100
                options = {"scheduler_options": sampler.options}
                return models.sample_images(self.model, unet, sampler.name, asked, seeds, **options)

            def seen(fit: Fit, computed: Any, rows: Table) -> Table:
                begun.append(rows)  # at first those of the states
                return end(fit, computed, rows)

            options = {"towards": towards, "images": images, "steps": steps, "seed": FITTING_SEED, "quiet": True}
            scheduler = models.make_scheduler(self.model, sampler.name, **sampler.options)
            with mock.patch.object(Fit, "end", seen):
                made = mk.fit_schedule(unet, count, scheduler=scheduler, sample=pictures, **options)
            found = {**about, **made.notes, "recalled": unet.recalled, **made.schedule.fields(), "states": begun[0]}
            fits.append(found)
            self.report.write()
        return [mk.StepSchedule(found["rule"], weights=found[name]) for name in ("weights", "states")]

    def baselines(self, network: str, label: str) -> None:
        """Rows of all that is not ours, and of uniform polynomials."""
        steps = SAMPLERS[label].steps
        for few in dict.fromkeys((*FEW, steps)):
            self.row(network, label, few, "every call")
        for count in COUNTS if label in FIRST[:2] else COUNTS[1:]:
            for computed in uniform(steps, count):
                for method, rule in RULES.items():
                    self.row(network, label, steps, method, ruled(computed, steps, rule))
                self.row(network, label, steps, "polynomial", mk.StepSchedule(pattern_of(tuple(computed), steps)))
        if network == "float32" and find_spec("DeepCache"):
            for interval in (2, 3, 5):
                self.deepcache(label, steps, interval)

    def deepcache(self, label: str, steps: int, interval: int) -> None:
        """A row of DeepCache."""
        name, key = f"interval {interval}", ("float32", label, steps, "DeepCache")
        if any(key == self.report.key_of(row)[:4] and row["schedule"] == name for row in self.report.rows):
            return
        sampler, unet, flops = SAMPLERS[label], self.unet(), []
        options: dict[str, Any] = {"scheduler_options": sampler.options}
        for count, run in ((1, contextlib.nullcontext), (steps, CachedUNet(unet, interval).run)):
            with FlopCounterMode(display=False) as counter:
                pictures = models.sample_images(
                    self.model, unet, sampler.name, count, range(IMAGES), run=run, **options
                )
            flops.append(counter.get_total_flops())
        self.judge(dict(zip(KEY, (*key, name, round(flops[1] / flops[0], 2), IMAGES))), pictures)

    def fits(self, network: str, label: str, counts: Sequence[int] = (8, 11)) -> None:
        """Rows of the fits at these evaluations, and of fitted samplers of as many steps."""
        steps = SAMPLERS[label].steps
        self.row(network, label, steps, "every call")
        for count in counts:
            for towards in ("own", "converged"):
                whole, states = self.fit(label, steps, count, towards)
                self.row(network, label, steps, f"fit, {towards}", whole)
                self.row(network, label, steps, f"fit of the states, {towards}", states)
                self.row(network, label, steps, f"polynomial, calls of the fit, {towards}", mk.StepSchedule(whole.rule))
        for count in counts:
            self.row(network, label, count, "fitted sampler", self.fit(label, count, count, "converged")[0])

    def distances(self, images: int = 256) -> None:
        """Fréchet distances to the test images."""
        if self.data is None:
            return
        features = Features(self.model.unet.config.sample_size)
        tested = load_cifar10(self.data, "test", features.size)[0].permute(0, 2, 3, 1).float().div(255).numpy()
        wanted: list[tuple[str, int, str, Any]] = [("DDIM", 50, "every call", None)]
        for label in FIRST[:2]:
            wanted.append((label, 25, "every call", None))
            wanted += [(label, 25, f"fit, {to}", self.fit(label, 25, 8, to)[0]) for to in ("own", "converged")]
        wanted += [(FIRST[2], 8, "every call", None)]
        wanted += [(FIRST[2], 8, "fitted sampler", self.fit(FIRST[2], 8, 8, "converged")[0])]
        known = self.report.content["distances"]
        for label, steps, method, schedule in wanted:
            about = {"sampler": label, "steps": steps, "method": method}
            about["evaluations"] = steps if schedule is None else schedule.actions(steps).count("U")
            if not any(about.items() <= other.items() for other in known):
                parts = [range(start, start + IMAGES) for start in range(0, images, IMAGES)]
                pictures = np.concatenate([self.sample("float32", label, steps, schedule, seeds) for seeds in parts])
                distance = frechet_distance(features(pictures), features(tested))
                known.append({**about, "images": images, "frechet_test": round(distance, 4)})
                self.report.write()

    def variations(self, images: Sequence[int]) -> None:
        """More and fewer images of a fit."""
        for count in images:
            whole, _ = self.fit(FIRST[0], 25, 8, "own", count)
            self.row("float32", FIRST[0], 25, f"fit of {count} images, own", whole)

    def transfer(self) -> None:
        """A fit on the quantised network, and pictures one by one."""
        self.row("W8A8", FIRST[0], 25, "fit on plain W8A8, own", self.fit(FIRST[0], 25, 8, "own", on="plain W8A8")[0])
        for network in ("float32", "W8A8"):
            self.row(network, FIRST[0], 25, "every call", batch=1)
            self.row(network, FIRST[0], 25, "fit, own", self.fit(FIRST[0], 25, 8, "own")[0], batch=1)

    def parts(self) -> Iterator[Callable[[], Any]]:
        """The work in order."""
        for label in FIRST:
            yield lambda label=label: self.baselines("float32", label)
            yield lambda label=label: self.fits("float32", label)
            yield lambda label=label: self.fits("W8A8", label)
        yield self.distances
        for label in list(SAMPLERS)[3:]:
            yield lambda label=label: self.baselines("float32", label)
            yield lambda label=label: self.fits("float32", label)
            yield lambda label=label: self.fits("W8A8", label)
        yield self.transfer
        yield lambda: self.variations((4, 8, 64))
        for label in SAMPLERS:
            yield lambda label=label: self.baselines("W8A8", label)
            yield lambda label=label: self.fits("W8A4", label)
        for label in FIRST[:2]:
            yield lambda label=label: self.fits("float32", label, (6,))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="a UNet folder (default: the shipped model)")
    add("--data", type=Path, help="folder of CIFAR-10 (examples/cifar10.py), for Fréchet distances")
    add("--threads", type=int, default=2)
    add("--budget", type=float, metavar="SECONDS", help="end after this time, with what is done")
    add("--keep", type=Path, required=True, metavar="DIR", help="folder for the converged pictures")
    add("--resume", action="store_true", help="keep what the report has and add what is missing")
    add("--json", type=Path, required=True, help="the report")


def main(args: argparse.Namespace) -> int:
    deadline = time.monotonic() + (args.budget or float("inf"))
    torch.set_num_threads(args.threads)
    models.quiet_libraries()
    model = models.load_model(args.model, None, torch.device("cpu"))
    same = {"model": model.name, "images": IMAGES, "threads": args.threads, "torch": torch.__version__}
    more = {"git_commit": record.environment()["git_commit"], "fits": [], "distances": []}
    report = Report(args.json, args.resume, same, more, KEY)
    try:
        study = Study(model, report, args.keep / "converged.npy", args.data, deadline)
        for part in tqdm(list(study.parts())):
            part()
    except OutOfTime:
        return NOT_FINISHED
    return 0
