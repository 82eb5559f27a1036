"""What step schedules cost and lose, against fewer steps, other samplers, DeepCache and published forecasts.

    python -m benchmarks schedules --data DATA --json benchmarks/results/pareto.json

Every row samples the same noise (seeds from 0 on) with the shipped model in a network (float32, modulated W8A8, W8A4).
Its cost is counted in evaluations, of DeepCache in parts by flops; its error is the mean PSNR in dB to the same network
and sampler with every call (own_db), and to the picture of DDIM with as many steps as the model was trained on, in
float32 (converged_db). Samplers do not clip, so that all follow one trajectory.

All forecasts are weights of past outputs, so one executor runs them: `StepSchedule(pattern, weights=...)`, on calls
that are spread evenly, or with the first three and the last computed. TaylorSeer (2503.06923): finite differences per
interval. HiCache (2508.16984): the same in scaled Hermite polynomials, sigma 0.5. Spectrum (2603.01623): Chebyshev
polynomials of degree 4 (lower where fewer outputs are known), no blend, ridge 1e-4; the published 0.1 has own rows.

Fits (`modiff_kernels.fit_schedule`) are made in float32 on seeds from 1000 on, and kept in the report. Those towards
the converged picture share the network's outputs there (`recalled` of them): only the first shows what a fit costs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
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
from benchmarks.shared import Quantised, Row
from benchmarks.studies.features import Features, frechet_distance
from benchmarks.studies.report import Report
from benchmarks.tables import loaded, shown
from examples.cifar10 import load_cifar10
from modiff_kernels.evaluation import markdown_table, psnr
from modiff_kernels.planning.fit import Fit, pattern

NETWORKS = {
    "float32": Row("float32", "float32", "float", schedule="hold"),  # which rows change
    "W8A8": Row("w8a8", "W8A8", "modulated", 8, 8, schedule="hold"),
    "W8A4": Row("w8a4", "W8A4", "modulated", 8, 4, schedule="hold"),
    "plain W8A8": Row("plain", "plain W8A8", "quantized", 8, 8),
}
LINSPACE = {"timestep_spacing": "linspace"}
SAMPLERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "DPM-Solver++": ("dpmsolver++", 25, LINSPACE),
    "DPM-Solver++ Karras": ("dpmsolver++", 25, {**LINSPACE, "use_karras_sigmas": True}),
    "DPM-Solver++ Lu": ("dpmsolver++", 25, {**LINSPACE, "use_lu_lambdas": True}),
    "DDIM": ("ddim", 50, {"clip_sample": False}),
    "UniPC": ("unipc", 25, LINSPACE),
    "DPM-Solver++(3)": ("dpmsolver++", 25, {**LINSPACE, "solver_order": 3}),
}
"""Name on the command line, steps and options."""
PLAIN, KARRAS, LU = list(SAMPLERS)[:3]
IMAGES, FITTING_SEED, DISTANCE_IMAGES = 16, 1000, 256
FEW = (6, 8, 11, 14, 20, 25)  # steps with every call computed
COUNTS = (6, 8, 11)  # evaluations of schedules
WHOLE, STATES, CALLS = "fit, {}", "fit of the states, {}", "polynomial, calls of the fit, {}"
KEY = ("network", "sampler", "steps", "method", "schedule", "evaluations", "batch")


def differences(nodes: list[int], factors: list[float]) -> Any:
    """Weights of the outputs at nodes, the newest first: finite differences per interval, times factors as k^m / m!."""
    interval, values, total = np.diff([nodes[0] - 1, *nodes])[-1], np.eye(len(nodes)), 0.0
    for factor in factors[: len(nodes)]:
        total, values = total + factor * values[-1], np.diff(values, axis=0) / interval
    return total[: -len(factors) - 1 : -1]


def chebyshev(nodes: list[int], k: int, calls: int, ridge: float) -> Any:
    """Weights of a ridge regression on Chebyshev polynomials through all outputs."""
    degree = min(4, len(nodes) - 1)
    rows = np.polynomial.chebyshev.chebvander(2 * np.array([nodes[-1] + k, *nodes]) / calls - 1, degree)
    return np.linalg.solve(rows[1:].T @ rows[1:] + ridge * np.eye(degree + 1), rows[0]) @ rows[:0:-1].T


RULES: dict[str, Callable[..., Any]] = {
    "hold": lambda nodes, k, calls: [1.0],
    "TaylorSeer 1": lambda nodes, k, calls: differences(nodes, [1, k]),
    "TaylorSeer 2": lambda nodes, k, calls: differences(nodes, [1, k, k * k / 2]),
    "HiCache": lambda nodes, k, calls: differences(nodes, [1, k / 2, (k * k - 2) / 8]),
    "Spectrum": lambda nodes, k, calls: chebyshev(nodes, k, calls, 1e-4),
    "Spectrum, ridge 0.1": lambda nodes, k, calls: chebyshev(nodes, k, calls, 0.1),
}
"""Weights of past outputs, the newest first, from the calls they are of, the calls since the last, and all calls."""


def ruled(computed: tuple[int, ...], calls: int, rule: Callable[..., Any]) -> mk.StepSchedule:
    """The schedule that computes these calls and forecasts the others by `rule`."""
    rows = []
    for call in range(calls):
        nodes = [node for node in computed if node <= call]
        weights = [1.0] if nodes[-1] == call else rule(nodes, call - nodes[-1], calls)
        rows.append([*map(float, weights), 0.0])
    return mk.StepSchedule(pattern(computed, calls), weights=rows)


def uniform(calls: int, count: int) -> list[tuple[int, ...]]:
    """Computed calls: evenly spread, and with the first three and the last computed."""
    every = next(n for n in range(2, calls) if mk.StepSchedule("forecast", every=n).actions(calls).count("U") == count)
    begun = mk.StepSchedule("forecast", every=every).actions(calls)
    even = [round(k * (calls - 1) / (count - 1)) for k in range(count)]
    return [tuple(even), tuple(call for call in range(calls) if begun[call] == "U")]


class Recalled(torch.nn.Module):
    """A network that keeps its outputs, while `keeps`, and gives them again for the same sample."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet, self.config, self.keeps, self.recalled = unet, unet.config, False, 0
        self.held: dict[tuple[float, bytes], Any] = {}

    def forward(self, sample: torch.Tensor, timestep: Any, return_dict: bool = False) -> Any:
        """The output in a tuple."""
        if not self.keeps:
            return self.unet(sample, timestep, return_dict=False)
        key = float(timestep), sample.contiguous().numpy().tobytes()
        self.recalled += key in self.held
        if key not in self.held:
            self.held[key] = self.unet(sample, timestep, return_dict=False)
        return self.held[key]


class Study:
    """Samples in every way. data: folder of CIFAR-10, or None."""

    def __init__(self, model: models.Model, report: Report, data: Path | None) -> None:
        self.model, self.report, self.data = model, report, data
        self.model.unet.to(memory_format=torch.channels_last)
        self.networks: dict[str, Quantised] = {}
        self.references: dict[Any, np.ndarray] = {}
        self.recalling: dict[str, Recalled] = {}
        longest = models.make_scheduler(model, "ddim").config.num_train_timesteps
        self.converged = self.sample("float32", "DDIM", longest)

    def pictures(self, unet: Any, label: str, steps: int, seeds: Sequence[int], run=contextlib.nullcontext) -> Any:
        """Sampled at once."""
        name, _, options = SAMPLERS[label]
        return models.sample_images(self.model, unet, name, steps, seeds, run=run, scheduler_options=options)

    def sample(self, network: str, label: str, steps: int, schedule=None, images=IMAGES, batch=IMAGES) -> np.ndarray:
        """Pictures of the first seeds by a network and a schedule."""
        if network not in self.networks:
            self.networks[network] = Quantised(models.share_copy(self.model.unet), NETWORKS[network])
        own, parts = self.networks[network], [range(images)[i : i + batch] for i in range(0, images, batch)]
        own.handle.set_schedule(schedule)
        return np.concatenate([self.pictures(own.handle.unet, label, steps, part, own.sampling_run) for part in parts])

    def row(self, *about: Any, schedule: mk.StepSchedule | None = None, batch: int = IMAGES) -> None:
        """Measure one row, unless the report has it. about: network, sampler, steps, method."""
        count = about[2] if schedule is None else schedule.actions(about[2]).count("U")
        found = (*about, schedule and schedule.without_weights(), count, batch)
        if found not in self.report.known:
            self.judge(found, self.sample(*about[:3], schedule, batch=batch))

    def judge(self, found: tuple[Any, ...], pictures: np.ndarray) -> None:
        """Add a row, of the values of KEY, with its errors."""
        if (own := found[:2]) not in self.references:
            self.references[own] = self.sample(*own, SAMPLERS[own[1]][1])
        row = dict(zip(KEY, found))
        for name, wanted in (("own_db", self.references[own]), ("converged_db", self.converged)):
            row[name] = round(float(np.minimum(psnr(pictures, wanted), 200).mean()), 3)
        self.report.add(row)

    def fit(self, label: str, steps: int, count: int, towards: str, images=IMAGES, on="float32") -> list[Any]:
        """A fit, made where the report has none: its schedule with all weights, and that of the states alone."""
        about = {"sampler": label, "steps": steps, "evaluations": count, "towards": towards, "images": images, "on": on}
        fits, (name, _, options) = self.report.content["fits"], SAMPLERS[label]
        found = next((fit for fit in fits if about.items() <= fit.items()), None)
        if found is None:
            if on not in self.recalling:
                unet = models.share_copy(self.model.unet)
                self.recalling[on] = Recalled(unet if on == "float32" else Quantised(unet, NETWORKS[on]).handle.unet)
            unet, jacobian, begun = self.recalling[on], Fit.jacobian, []
            unet.recalled = 0

            def pictures(seeds: Sequence[int], asked: int) -> Any:
                unet.keeps = asked > 100
                return self.pictures(unet, label, asked, seeds)

            def seen(fit: Fit, computed: Any, rows: Any) -> Any:
                begun.append(rows)  # those of the states, from which the end fit sets out
                return jacobian(fit, computed, rows)

            scheduler = models.make_scheduler(self.model, name, **options)
            more = {"steps": steps, "towards": towards, "images": images, "seed": FITTING_SEED, "quiet": True}
            with mock.patch.object(Fit, "jacobian", seen):
                made = mk.fit_schedule(unet, count, scheduler=scheduler, sample=pictures, **more)
            pattern = dataclasses.asdict(made.schedule)
            found = {**about, **made.notes, "recalled": unet.recalled, **pattern, "states": begun[0]}
            fits.append(found)
            self.report.write()
        return [mk.StepSchedule(found["rule"], weights=found[rows]) for rows in ("weights", "states")]

    def baselines(self, network: str, label: str) -> None:
        """Rows of all that is not fitted."""
        steps = SAMPLERS[label][1]
        for few in dict.fromkeys((*FEW, steps)):
            self.row(network, label, few, "every call")
        for count in COUNTS if label in (PLAIN, KARRAS) else COUNTS[1:]:
            for computed in uniform(steps, count):
                for method, rule in RULES.items():
                    self.row(network, label, steps, method, schedule=ruled(computed, steps, rule))
                self.row(network, label, steps, "polynomial", schedule=mk.StepSchedule(pattern(computed, steps)))
        for interval in (2, 3, 5) if network == "float32" and find_spec("DeepCache") else ():
            about = (network, label, steps, "DeepCache", f"interval {interval}")
            if any(about == known[: len(about)] for known in self.report.known):
                continue
            unet, flops = models.share_copy(self.model.unet), []
            for calls, run in ((1, contextlib.nullcontext), (steps, CachedUNet(unet, interval).run)):
                with FlopCounterMode(display=False) as counter:
                    pictures = self.pictures(unet, label, calls, range(IMAGES), run)
                flops.append(counter.get_total_flops())
            self.judge((*about, round(flops[1] / flops[0], 2), IMAGES), pictures)

    def fits(self, network: str, label: str, count: int, to: str) -> None:
        """Rows of a fit, and of a fitted sampler of as many steps."""
        steps = SAMPLERS[label][1]
        self.row(network, label, steps, "every call")
        if to == "converged":
            self.row(network, label, count, "fitted sampler", schedule=self.fit(label, count, count, to)[0])
        whole, states = self.fit(label, steps, count, to)
        for method, schedule in ((WHOLE, whole), (STATES, states), (CALLS, mk.StepSchedule(whole.rule))):
            self.row(network, label, steps, method.format(to), schedule=schedule)

    def distances(self) -> None:
        """Fréchet distances to the test images."""
        features, known = Features(self.model.unet.config.sample_size), self.report.content["distances"]
        tested = load_cifar10(self.data, "test", features.size)[0].permute(0, 2, 3, 1).float().div(255).numpy()
        wanted: list[Any] = [(name, SAMPLERS[name][1], "every call", None) for name in ("DDIM", PLAIN, KARRAS)]
        for name in (PLAIN, KARRAS):
            wanted += [(name, 25, WHOLE.format(to), self.fit(name, 25, 8, to)[0]) for to in ("own", "converged")]
        wanted += [(LU, 8, "every call", None), (LU, 8, "fitted sampler", self.fit(LU, 8, 8, "converged")[0])]
        for label, steps, method, schedule in wanted:
            count = steps if schedule is None else schedule.actions(steps).count("U")
            about = {"sampler": label, "steps": steps, "method": method, "evaluations": count}
            if not any(about.items() <= other.items() for other in known):
                pictures = self.sample("float32", label, steps, schedule, DISTANCE_IMAGES)
                distance = frechet_distance(features(pictures), features(tested))
                known.append({**about, "images": DISTANCE_IMAGES, "frechet_test": round(distance, 4)})
                self.report.write()

    def variations(self) -> None:
        """A fit on the quantised network, pictures one by one, and more and fewer images of a fit."""
        about, own = (PLAIN, 25, 8, "own"), self.fit(PLAIN, 25, 8, "own")[0]
        self.row("W8A8", PLAIN, 25, "fit on plain W8A8, own", schedule=self.fit(*about, on="plain W8A8")[0])
        for network in ("float32", "W8A8"):
            self.row(network, PLAIN, 25, WHOLE.format("own"), schedule=own, batch=1)
        for count in (4, 8, 64):
            self.row("float32", PLAIN, 25, f"fit of {count} images, own", schedule=self.fit(*about, count)[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="a UNet folder (default: the shipped model)")
    add("--data", type=Path, help="folder of CIFAR-10 (examples/cifar10.py), for Fréchet distances")
    add("--threads", type=int, default=2)
    add("--resume", action="store_true", help="keep what the report has and add what is missing")
    add("--json", type=Path, required=True, help="the report")


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    models.quiet_libraries()
    model = models.load_model(args.model, None, torch.device("cpu"))
    same = {"model": model.name, "images": IMAGES, "threads": args.threads, "torch": torch.__version__}
    more = {"git_commit": record.environment()["git_commit"], "fits": [], "distances": []}
    study = Study(model, Report(args.json, args.resume, same, more, KEY), args.data)
    for labels in ((PLAIN, KARRAS, LU), ("DDIM",), list(SAMPLERS)[4:]):
        for label in labels:
            study.baselines("float32", label)
        wanted = list(itertools.product(COUNTS[1:], ("converged", "own"), labels, ("float32", "W8A8")))
        for count, to, label, network in tqdm(wanted):
            study.fits(network, label, count, to)
        if PLAIN in labels and args.data is not None:
            study.distances()
    study.variations()
    for label in SAMPLERS:
        study.baselines("W8A8", label)
    for label, count, to in itertools.product(SAMPLERS, COUNTS[1:], ("converged", "own")):
        study.fits("W8A4", label, count, to)
    for label in (PLAIN, KARRAS):
        study.fits("float32", label, COUNTS[0], "converged")
    return 0


FORECASTS = (*[*RULES][:-1], "polynomial")
COLUMNS: dict[str, dict[str, Sequence[str]]] = {
    "own": {**{name: (name,) for name in FORECASTS}, "polynomial, calls of the fit": (CALLS.format("own"),)},
    "converged": {"fewer steps": ("every call",), "best without fit": FORECASTS, "fit to own": (WHOLE.format("own"),)}
    | {"fitted sampler": ("fitted sampler",)},
}
LISTS = {
    "fits": ("sampler", "steps", "evaluations", "towards", "images", "on", "held_out_db", "polynomial_db", "seconds"),
    "distances": ("sampler", "steps", "method", "evaluations", "frechet_test"),
}
"""Kinds of tables: of dB at equal evaluations, with the methods whose best a column shows, and of what is listed."""


def curve(
    report: Any, label: str, methods: Sequence[str], name="converged_db", network="float32"
) -> dict[float, float]:
    """By evaluations, the most that these methods reach with a sampler."""
    best: dict[float, float] = {}
    for row in report["rows"]:
        if (row["network"], row["sampler"], row["batch"]) == (network, label, IMAGES) and row["method"] in methods:
            best[row["evaluations"]] = max(row[name] or 0, best.get(row["evaluations"], 0))
    return dict(sorted(best.items()))


def table(results: Path, kind: str, network: str = "float32") -> str | None:
    """One of COLUMNS or LISTS."""
    report = loaded(results / "pareto.json")
    if report is None:
        return None
    if kind in LISTS:
        header = [name.replace("_db", " dB").replace("_", " ") for name in LISTS[kind]]
        cells = [[str(found[name]) for name in LISTS[kind]] for found in report[kind] if not found.get("recalled")]
    else:
        columns = {**COLUMNS[kind], "fit of the states": (STATES.format(kind),), "fit": (WHOLE.format(kind),)}
        header, cells = ["sampler, steps", "evaluations", *columns, *["every call"] * (kind == "converged")], []
        for label, (_, steps, _) in SAMPLERS.items():
            curves = [curve(report, label, methods, f"{kind}_db", network) for methods in columns.values()]
            for count in curves[-1]:
                reached = [found.get(count) for found in curves]
                most = max(db for db in reached if db is not None)
                texts = [shown(db, "**{:.1f}**" if db == most else "{:.1f}") for db in reached]
                texts += [shown(curves[0].get(steps), "{:.1f}")] * (kind == "converged")
                cells.append([f"{label}, {steps}", f"{count:g}", *texts])
    images = DISTANCE_IMAGES if kind == "distances" else IMAGES
    about = f"{report['model']}, {network}, {images} images; commit {report['git_commit']}, `{report['command']}`."
    return f"{markdown_table(header, cells)}\n\n{about}" if cells else None
