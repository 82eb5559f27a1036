"""What step schedules cost and what they lose, against fewer steps, better samplers and DeepCache.

    python -m benchmarks schedules --json benchmarks/results/pareto.json

Every row samples the same noise with the shipped model (or --model). Its cost is counted in evaluations of the network,
a part of one where only the shallow levels run, in multiply-accumulates of Conv2d and Linear for one picture (macs),
and in seconds. Its error is the mean PSNR in dB against the same network and sampler computed at every call (own_db)
and against the converged trajectory, DDIM with as many steps as the model was trained on, in float32 (converged_db).
Samplers do not clip, so that all of them follow the same trajectory.

Rows of the method "searched" take the schedules that `modiff_kernels.planning.search` finds, in float32 and from other
noise than that of the rows, for as many computed calls as the uniform rules have; the report lists the searches.
DeepCache rows need `pip install DeepCache`; without it they are left out, and the report says so.

The report is written after every row. `--resume` keeps the rows and searches that it has and measures only those
that are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from modiff_kernels.planning.search import search
from torch import nn
from tqdm import tqdm

from benchmarks import shared as models
from benchmarks.baselines.deepcache import CachedUNet
from benchmarks.shared import Quantised, Row
from benchmarks.studies.report import Report
from benchmarks.tables import loaded
from modiff_kernels.config.schedule import UPDATE, StepSchedule
from modiff_kernels.evaluation import markdown_table, psnr

EVERY_CALL, FORECAST = "every call", "forecast"
FEWER, ANY = "same sampler, fewer steps", "any sampler, fewer steps"
COLUMNS = {
    "hold": "hold",
    "DeepCache": "DeepCache",
    FORECAST: "the uniform forecasts",
    "searched": "",
    FEWER: "fewer steps of the same sampler",
    ANY: "the best of all samplers",
}
"""Of the table, and in words what the searched schedules are compared with."""
Found = dict[str, Any]
NETWORKS = {
    "float32": Row("float32", "float32", "float"),
    "W8A8": Row("w8a8", "W8A8", "modulated", 8, 8),
    "W8A4": Row("w8a4", "W8A4", "modulated", 8, 4),
}
SCHEDULES = {
    "hold": [f"hold every={n}" for n in (2, 3, 5)],
    "forecast": [f"forecast every={n}{more}" for n in (2, 3) for more in ("", " axis=sigma")],
    "auto": ["auto"],
}
DEEPCACHE_INTERVALS = (2, 3, 5)
SEARCHED_EVERY = (2, 3, 5)  # schedules are searched for the number of calls that these uniform rules compute
SEARCH_SEED = 1000  # the rows are measured on seeds from 0 on, the search sees others


@dataclass(frozen=True)
class Sampler:
    """A sampler by its name on the command line, the options of its scheduler, and the numbers of steps to try: with
    schedules (the others stand for taking fewer steps), and with schedules that are searched for.
    """

    label: str
    name: str
    steps: tuple[int, ...]
    scheduled: tuple[int, ...]
    searched: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


UNCLIPPED = {"clip_sample": False}
LINSPACE = {"timestep_spacing": "linspace"}
# Every number of steps that a schedule may cost, so that none is compared with a sampler that was given less.
FEW = (*range(7, 30), 34, 38, 50)
SAMPLERS = (
    Sampler("DDIM", "ddim", (*FEW, 100), (20, 50, 100), (20, 50), UNCLIPPED),
    Sampler("DPM-Solver++", "dpmsolver++", FEW, (20, 25, 50), (20, 25), LINSPACE),
    Sampler("DPM-Solver++ Karras", "dpmsolver++", FEW, (20, 25), (20, 25), {**LINSPACE, "use_karras_sigmas": True}),
    Sampler("DPM-Solver++ Lu", "dpmsolver++", FEW, (20, 25), (20, 25), {**LINSPACE, "use_lu_lambdas": True}),
    Sampler("DPM-Solver++(3)", "dpmsolver++", FEW, (20, 25), (20, 25), {**LINSPACE, "solver_order": 3}),
    Sampler("UniPC", "unipc", FEW, (20, 25), (20, 25), LINSPACE),
    Sampler("DDPM (adds noise)", "ddpm", (50,), (50,)),
)


KEY = ("network", "sampler", "steps", "method", "schedule")
"""What tells a row of the report from all others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default=None, help="a UNet folder (default: the shipped model)")
    add("--images", type=int, default=16, help="pictures, one batch (%(default)s)")
    add("--networks", default=",".join(NETWORKS), help="of %(default)s")
    add("--samplers", default="", help="parts of sampler names, separated by commas (default: all)")
    add("--threads", type=int, default=2)
    add("--resume", action="store_true", help="keep what the report has and add what is missing")
    add("--json", type=Path, required=True, help="the report")


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    models.quiet_libraries()
    model = models.load_model(args.model, None, torch.device("cpu"))
    same = {"model": model.name, "images": args.images, "threads": args.threads, "torch": torch.__version__}
    report = Report(args.json, args.resume, same, {"searches": [], "notes": []}, KEY)
    study = Study(model, args.images, report.content["searches"])
    report.content["macs_per_evaluation"] = per_evaluation = sum(study.macs.values())
    if not study.has_deepcache and all(row["method"] != "DeepCache" for row in report.rows):
        report.content["notes"] = ["DeepCache is not installed (pip install DeepCache): its rows are left out."]
    wanted = [part for part in args.samplers.split(",") if part]
    samplers = [s for s in SAMPLERS if not wanted or any(part in s.label for part in wanted)]
    for name in tqdm(args.networks.split(","), desc="networks"):
        for sampler in tqdm(samplers, desc=name, leave=False):
            for row in study.rows(NETWORKS[name], sampler, report.known):
                report.add({**row, "macs": round(row["evaluations"] * per_evaluation)})
    report.write()
    return 0


class Study:
    """Samples one batch of `images` pictures in every way. searches: those made before, new ones are appended."""

    def __init__(self, model: models.Model, images: int, searches: list[dict[str, Any]]) -> None:
        self.model = model
        self.seeds = range(images)
        self.searches = searches
        self.has_deepcache = find_spec("DeepCache") is not None
        self.macs = _multiplications(model.unet)
        longest = models.make_scheduler(model, "ddim").config.num_train_timesteps
        unet = models.share_copy(model.unet).to(memory_format=torch.channels_last)
        self.converged = self._sample(unet, Sampler("", "ddim", (), (), (), UNCLIPPED), longest)

    def rows(self, network: Row, sampler: Sampler, known: Container[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
        """All rows of one network and sampler but those whose KEY is known."""
        for steps in sampler.steps:
            dense = None
            for method, text in self._trials(network, sampler, steps):
                if (network.name, sampler.label, steps, method, text) in known:
                    continue
                if dense is None:
                    dense, dense_row = self._scheduled(network, sampler, steps, None)
                if method == EVERY_CALL:
                    pictures, row = dense, dense_row
                elif method == "DeepCache":
                    pictures, row = self._deepcache(sampler, steps, text)
                else:
                    pictures, row = self._scheduled(network, sampler, steps, text)
                own_db = None if pictures is dense else float(psnr(pictures, dense).mean())
                common = {"network": network.name, "sampler": sampler.label, "steps": steps, "method": method}
                yield {**common, **row, "own_db": own_db, "converged_db": float(psnr(pictures, self.converged).mean())}

    def _trials(self, network: Row, sampler: Sampler, steps: int) -> Iterator[tuple[str, str | None]]:
        """Method and schedule of every row with so many steps."""
        yield EVERY_CALL, None
        if steps not in sampler.scheduled:
            return
        for method, texts in SCHEDULES.items():
            yield from ((method, text) for text in texts)
        if network.mode == "float" and self.has_deepcache:
            yield from (("DeepCache", f"interval {interval}") for interval in DEEPCACHE_INTERVALS)
        if steps in sampler.searched:
            yield from (("searched", found["schedule"]) for found in self._searched(sampler, steps))

    def _searched(self, sampler: Sampler, steps: int) -> Iterator[dict[str, Any]]:
        """The searches for one sampler, most computed calls first; made where they were not yet."""
        about = {"sampler": sampler.label, "steps": steps}
        made = {found["computed"]: found for found in self.searches if about.items() <= found.items()}
        calls = self._calls(sampler, steps)
        sizes = {StepSchedule.uniform(every).actions(calls).count(UPDATE) for every in SEARCHED_EVERY}
        fidelity: Callable[[StepSchedule], float] | None = None
        tried: dict[str, float] = {}
        for computed in sorted(sizes, reverse=True):
            if computed not in made:
                fidelity = fidelity or self._fidelity_of_search(sampler, steps)
                found = search(fidelity, calls, computed=computed, known=tried)
                made[computed] = {**about, "computed": computed, "schedule": str(found.schedule)}
                made[computed] |= {"search_db": found.fidelity_db, "tried": len(tried)}
                self.searches.append(made[computed])
            yield made[computed]

    def _fidelity_of_search(self, sampler: Sampler, steps: int) -> Callable[[StepSchedule], float]:
        """Mean PSNR of a schedule against every call, in float32 and on seeds that no row has."""
        seeds = range(SEARCH_SEED, SEARCH_SEED + len(self.seeds))
        unet = models.share_copy(self.model.unet).to(memory_format=torch.channels_last)
        quantised = Quantised(unet, Row("search", "search", "float", schedule="forecast"))

        def pictures(schedule: StepSchedule | None) -> np.ndarray:
            quantised.handle.set_schedule(schedule)
            return self._sample(unet, sampler, steps, quantised.sampling_run, seeds)

        dense = pictures(None)
        return lambda schedule: float(psnr(pictures(schedule), dense).mean())

    def _scheduled(self, network: Row, sampler: Sampler, steps: int, text: str | None) -> tuple[np.ndarray, Found]:
        stochastic = " stochastic=True" if text not in (None, "auto") and sampler.name == "ddpm" else ""
        unet = models.share_copy(self.model.unet).to(memory_format=torch.channels_last)
        if text is None and network.mode == "float":
            return self._costed(unet, sampler, steps, text, contextlib.nullcontext, lambda path: 0)
        row = dataclasses.replace(network, schedule=None if text is None else text + stochastic)
        own = Quantised(unet, row)
        return self._costed(unet, sampler, steps, text, own.sampling_run, lambda path: own.handle.skipped_calls())

    def _deepcache(self, sampler: Sampler, steps: int, text: str) -> tuple[np.ndarray, Found]:
        unet = models.share_copy(self.model.unet).to(memory_format=torch.channels_last)
        done = dict.fromkeys(self.macs, 0)
        for path in self.macs:
            unet.get_submodule(path).register_forward_hook(lambda *_, p=path: done.update({p: done[p] + 1}))
        run, calls = CachedUNet(unet, int(text.split()[1])).run, self._calls(sampler, steps)
        return self._costed(unet, sampler, steps, text, run, lambda path: calls - done[path])

    def _costed(self, unet, sampler, steps, text, run, skipped: Callable[[str], int]) -> tuple[np.ndarray, Found]:
        """Pictures, and what they cost; skipped: how many calls left out the layer at a path."""
        started = time.perf_counter()
        pictures = self._sample(unet, sampler, steps, run)
        seconds = time.perf_counter() - started
        left_out = sum(macs * skipped(path) for path, macs in self.macs.items()) / sum(self.macs.values())
        return pictures, {"schedule": text, "evaluations": self._calls(sampler, steps) - left_out, "time_s": seconds}

    def _calls(self, sampler: Sampler, steps: int) -> int:
        scheduler = models.make_scheduler(self.model, sampler.name, **sampler.options)
        scheduler.set_timesteps(steps)
        return len(scheduler.timesteps)

    def _sample(self, unet, sampler: Sampler, steps: int, run=contextlib.nullcontext, seeds=None) -> np.ndarray:
        options = {"scheduler_options": sampler.options, "run": run}
        return models.sample_images(self.model, unet, sampler.name, steps, seeds or self.seeds, **options)


def _multiplications(unet: nn.Module) -> dict[str, int]:
    """Multiply-accumulates of each Conv2d and Linear in one call for one picture."""
    counted: dict[str, int] = {}

    def count(module: Any, output: torch.Tensor, path: str) -> None:
        counted[path] = output.numel() // module.weight.shape[0] * module.weight.numel()

    layers = {path: m for path, m in unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    hooks = [m.register_forward_hook(lambda m, _, out, p=path: count(m, out, p)) for path, m in layers.items()]
    with torch.inference_mode():
        unet(torch.zeros(1, unet.config.in_channels, *[unet.config.sample_size] * 2), 0)
    for hook in hooks:
        hook.remove()
    return counted


Curve = list[tuple[float, float]]
"""(Evaluations, dB to the converged trajectory), by rising cost."""


@dataclass(frozen=True)
class Panel:
    """One sampler and number of steps. every_call_db: what it reaches without schedule.

    schedules: the best of every method at each of its costs. fewer_steps: the same sampler with every call computed,
    the steps of the panel the last. any_sampler: the best of all samplers that compute every call, up to each cost.
    """

    sampler: str
    steps: int
    every_call_db: float
    schedules: dict[str, Curve]
    fewer_steps: Curve
    any_sampler: Curve


def panels(report: dict[str, Any], network: str) -> list[Panel]:
    """Every sampler and number of steps that schedules were tried on, in the order of the rows.

    Samplers that were run with one number of steps are left out: there is nothing to compare with.
    """
    rows = [row for row in report["rows"] if row["network"] == network]
    plain = [row for row in rows if row["method"] == EVERY_CALL]
    found = []
    for sampler, steps in dict.fromkeys((row["sampler"], row["steps"]) for row in rows):
        own = [row for row in rows if (row["sampler"], row["steps"]) == (sampler, steps)]
        methods = dict.fromkeys(row["method"] for row in own if row["method"] != EVERY_CALL)
        fewer = _curve(row for row in plain if row["sampler"] == sampler and row["steps"] <= steps)
        if not methods or len(fewer) < 2:
            continue
        schedules = {method: _curve(row for row in own if row["method"] == method) for method in methods}
        others = _rising(_curve(row for row in plain if row["evaluations"] <= fewer[-1][0]))
        found.append(Panel(sampler, steps, fewer[-1][1], schedules, fewer, others))
    return found


@dataclass(frozen=True)
class Line:
    """What is reached at one cost: dB to the converged trajectory by column, None where nothing costs so little.

    That of a method is the best at no greater cost, that of DeepCache lies on the line between its intervals.
    """

    panel: Panel
    evaluations: float
    reached: dict[str, float | None]


def lines(report: dict[str, Any], network: str) -> list[Line]:
    """For every panel the costs of its uniform forecasts, the highest first."""
    found = []
    for panel in panels(report, network):
        for cost, _ in reversed(panel.schedules[FORECAST]):
            curves = {**panel.schedules, FEWER: panel.fewer_steps, ANY: panel.any_sampler}
            reached = {name: best_db(curves.get(name, []), cost) for name in COLUMNS}
            reached["DeepCache"] = between_db(panel.schedules.get("DeepCache", []), cost)
            found.append(Line(panel, cost, reached))
    return found


def best_db(curve: Curve, evaluations: float) -> float | None:
    """The most that `curve` reaches for no more than `evaluations`."""
    return max((db for cost, db in curve if cost <= evaluations + 1e-9), default=None)


def between_db(curve: Curve, evaluations: float) -> float | None:
    """What `curve` reaches for just `evaluations`, on straight lines between its points; beyond the last, its value."""
    if not curve or evaluations < curve[0][0]:
        return None
    for (low, low_db), (high, high_db) in itertools.pairwise(curve):
        if evaluations <= high:
            return low_db + (high_db - low_db) * (evaluations - low) / (high - low)
    return curve[-1][1]


def wins(pairs: Iterable[tuple[float | None, float | None]]) -> tuple[int, int]:
    """How often the first is above the second, and of how many pairs that have both."""
    both = [(first, second) for first, second in pairs if first is not None and second is not None]
    return sum(first > second for first, second in both), len(both)


def _curve(rows: Iterable[dict[str, Any]]) -> Curve:
    """The best of `rows` at each cost."""
    best: dict[float, float] = {}
    for row in rows:
        cost = row["evaluations"]
        best[cost] = max(row["converged_db"], best.get(cost, row["converged_db"]))
    return sorted(best.items())


def _rising(curve: Sequence[tuple[float, float]]) -> Curve:
    """The points of `curve` that are above all cheaper ones."""
    return [(cost, db) for i, (cost, db) in enumerate(curve) if all(db > other for _, other in curve[:i])]


def table(results: Path, network: str) -> str | None:
    """What every method reaches at the costs of the uniform forecasts, and how often the searched schedules win."""
    report = loaded(results / "pareto.json")
    if report is None:
        return None
    found = lines(report, network)
    shown = [name for name in COLUMNS if any(line.reached[name] is not None for line in found)]
    cells = []
    for line in found:
        highest = max(db for db in line.reached.values() if db is not None)
        texts = ["-" if line.reached[name] is None else f"{line.reached[name]:.1f}" for name in shown]
        texts = [f"**{text}**" if text == f"{highest:.1f}" else text for text in texts]
        name = f"{line.panel.sampler}, {line.panel.steps}"
        cells.append([name, f"{line.evaluations:g}", *texts, f"{line.panel.every_call_db:.1f}"])
    pairs = {name: [(line.reached["searched"], line.reached[name]) for line in found] for name in COLUMNS}
    counted = {words: wins(pairs[name]) for name, words in COLUMNS.items() if words}
    counts = ", ".join(f"{name} in {won} of {of}" for name, (won, of) in counted.items() if of)
    notes = " ".join([f"The searched schedules are above {counts} lines." if counts else "", *report["notes"]]).strip()
    caption = f"`{report['command']}`: {report['model']}, {network}, {report['images']} images. {notes}".rstrip()
    return f"{markdown_table(('sampler, steps', 'evaluations', *shown, 'every call'), cells)}\n\n{caption}"
