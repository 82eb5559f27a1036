"""A searched schedule that is stored beside a model, and the runs that it holds for."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modiff_kernels.config.schedule import StepSchedule

FILE_NAME = "modiff_schedule.json"
SEARCH_AGAIN = "search again with `modiff calibrate --schedule`, or move the file away"
NOTES = ("model", "scheduler", "steps", "images", "calls", "calls_computed", "fidelity_db", "held_out_db", "command")
KEYS = {"schedule", "sampler", "timesteps", *NOTES, "update_s", "skip_s"}  # of the file


class StoredSchedule(NamedTuple):
    """What `modiff calibrate --schedule` found in the file at `path`. run: the runs that it holds for, as `run_of`, at
    any bits: a forecast errs by what the sampler does between two calls."""

    schedule: StepSchedule
    run: dict[str, Any]
    path: Path

    def fits(self, scheduler: Any, timesteps: Sequence[float]) -> bool:
        """Whether a run with these timesteps is the one that was searched: same sampler, settings and calls."""
        return self.difference(scheduler, timesteps) is None

    def difference(self, scheduler: Any, timesteps: Sequence[float]) -> str | None:
        """The first thing in which a run with these timesteps is not the one that was searched, or None."""
        was, now = (
            {**run["sampler"], "calls": len(run["timesteps"]), "timesteps": run["timesteps"]}
            for run in (self.run, run_of(scheduler, timesteps))
        )
        name = next((name for name in {**was, **now} if was.get(name) != now.get(name)), None)
        return name and f"{name} {was.get(name)!r}, and this run has {now.get(name)!r}"


def run_of(scheduler: Any, timesteps: Sequence[float]) -> dict[str, Any]:
    """The entries of the file that say which runs a schedule holds for: class and settings of the scheduler (without
    those that its class does not know), and timesteps."""
    known = inspect.signature(type(scheduler).__init__).parameters
    settings = {name: value for name, value in dict(getattr(scheduler, "config", {})).items() if name in known}
    sampler = json.loads(json.dumps({"class": type(scheduler).__name__, **settings}, default=str))
    return {"sampler": sampler, "timesteps": [round(float(timestep), 3) for timestep in timesteps]}


def read(path: Path) -> StoredSchedule:
    """The schedule in the file at `path`. ValueError naming the file if it is not whole or has other keys."""
    try:
        stored = json.loads(path.read_text())
        if unknown := sorted(stored.keys() - KEYS):
            raise ValueError(f"unknown key {unknown[0]!r}")
        schedule = StepSchedule.parse(stored["schedule"])
        run = {"sampler": dict(stored["sampler"]), "timesteps": [float(timestep) for timestep in stored["timesteps"]]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        wrong = f"{path} is no schedule of this version ({type(error).__name__}: {error})"
        raise ValueError(f"{wrong}; {SEARCH_AGAIN}") from error
    return StoredSchedule(schedule, run, path)


def beside(*models: Any) -> StoredSchedule | None:
    """The schedule in the folder that one of `models` (UNet, pipeline, None) was loaded from, for a UNet also that
    around its own `unet`; None without a file. ValueError as of `read`."""
    for model in models:
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        if not isinstance(name, (str, Path)) or not name:
            continue
        folder = Path(name)
        for place in (folder, folder.parent) if folder.name == "unet" else (folder,):
            if (path := place / FILE_NAME).is_file():
                return read(path)
    return None
