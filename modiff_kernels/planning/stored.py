"""Fitted schedules that are stored beside a model, and the runs that they hold for."""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modiff_kernels.config.schedule import UPDATE, StepSchedule

FILE_NAME = "modiff_schedule.json"
FIT_AGAIN = "fit again with `modiff calibrate --schedule`, or move the file away"
NOTES = (
    "model", "scheduler", "steps", "evaluations", "towards", "images", "seed", "fitting_db", "held_out_db",
    "polynomial_db", "seconds", "command", "calls", "calls_computed", "fidelity_db", "update_s", "skip_s",
)  # fmt: skip
KEYS = {"schedule", "weights", "sampler", "timesteps", *NOTES}  # of an entry of the file
ENOUGH_DB = 40.0  # of several schedules for a run, "auto" takes the one with the fewest evaluations that has as much


class StoredSchedule(NamedTuple):
    """An entry of the file at `path`; None before it is stored. run: the runs that it holds for, as `run_of`, at any
    bits: a forecast errs by what the sampler does between two calls. notes: what else is known of it."""

    schedule: StepSchedule
    run: dict[str, Any]
    path: Path | None
    notes: Mapping[str, Any] = {}

    @property
    def evaluations(self) -> int:
        """Computed calls of a run."""
        return self.schedule.actions(len(self.run["timesteps"])).count(UPDATE)

    def difference(self, other: Mapping[str, Any]) -> str | None:
        """The first thing in which a run, as `run_of`, is not the one that was fitted, or None."""
        was, now = (
            {**run["sampler"], "calls": len(run["timesteps"]), "timesteps": run["timesteps"]}
            for run in (self.run, other)
        )
        name = next((name for name in {**was, **now} if was.get(name) != now.get(name)), None)
        return name and f"{name} {was.get(name)!r}, and this run has {now.get(name)!r}"

    def entry(self) -> dict[str, Any]:
        """Its form in the file."""
        rows = self.schedule.weights
        weights = {} if rows is None else {"weights": [list(row) for row in rows]}
        return {"schedule": self.schedule.without_weights(), **weights, **self.notes, **self.run}


def run_of(scheduler: Any, timesteps: Sequence[float]) -> dict[str, Any]:
    """The entries of the file that say which runs a schedule holds for: class and settings of the scheduler (without
    those that its class does not know), and timesteps."""
    known = inspect.signature(type(scheduler).__init__).parameters
    settings = {name: value for name, value in dict(getattr(scheduler, "config", {})).items() if name in known}
    sampler = json.loads(json.dumps({"class": type(scheduler).__name__, **settings}, default=str))
    return {"sampler": sampler, "timesteps": [round(float(timestep), 3) for timestep in timesteps]}


def best_of(
    stored: Sequence[StoredSchedule], scheduler: Any, timesteps: Sequence[float], evaluations: int | None = None
) -> StoredSchedule | None:
    """Of those for this run the one of so many evaluations; None: of the fewest with ENOUGH_DB, else of most."""
    run = run_of(scheduler, timesteps)
    fit = [found for found in stored if found.difference(run) is None]
    if evaluations is not None:
        return next((found for found in fit if found.evaluations == evaluations), None)
    fit.sort(key=lambda one: (min(one.notes.get("held_out_db") or 0.0, ENOUGH_DB), -one.evaluations), reverse=True)
    return next(iter(fit), None)


def read(path: Path) -> list[StoredSchedule]:
    """The schedules in the file at `path`, one or a list; ValueError naming it if one is damaged or has other keys."""
    try:
        stored = json.loads(path.read_text())
        if stored == []:
            raise ValueError("it has none")
        return [_read_entry(entry, path) for entry in (stored if isinstance(stored, list) else [stored])]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        wrong = f"{path} is no schedule of this version ({type(error).__name__}: {error})"
        raise ValueError(f"{wrong}; {FIT_AGAIN}") from error


def _read_entry(entry: Any, path: Path) -> StoredSchedule:
    if unknown := sorted(entry.keys() - KEYS):
        raise ValueError(f"unknown key {unknown[0]!r}")
    parsed = StepSchedule.parse(entry["schedule"])
    schedule = dataclasses.replace(parsed, weights=entry.get("weights", parsed.weights))
    run = {"sampler": dict(entry["sampler"]), "timesteps": [float(timestep) for timestep in entry["timesteps"]]}
    return StoredSchedule(schedule, run, path, {name: entry[name] for name in NOTES if name in entry})


def add(path: Path, found: StoredSchedule) -> str:
    """The text of the file at `path` with `found` in it, in the place of one for the same run and evaluations."""
    known = read(path) if path.is_file() else []
    kept = [old for old in known if (old.run, old.evaluations) != (found.run, found.evaluations)]
    entries = [json.dumps(one.entry()) for one in (*kept, found)]
    return "[\n" + ",\n".join(entries) + "\n]\n"


def beside(*models: Any) -> list[StoredSchedule]:
    """The schedules in the folder that one of `models` (UNet, pipeline, None) was loaded from, for a denoiser also in
    that around its own `unet` or `transformer`. ValueError as of `read`."""
    path = place_beside(FILE_NAME, *models)
    return [] if path is None else read(path)


def place_beside(file_name: str, *models: Any) -> Path | None:
    """The file or folder of this name in the folders of `beside`, None without one."""
    names = [getattr(getattr(model, "config", None), "_name_or_path", None) for model in models]
    folders = [Path(name) for name in names if isinstance(name, (str, Path)) and name]
    places = [place for own in folders for place in [own, *[own.parent] * (own.name in ("unet", "transformer"))]]
    return next((path for place in places if (path := place / file_name).exists()), None)
