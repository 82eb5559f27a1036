"""A searched schedule that is stored beside a model, and the runs that it holds for."""

import dataclasses
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modiff_kernels.config.schedule import StepSchedule

FILE_NAME = "modiff_schedule.json"
SEARCH_AGAIN = "search again with `modiff calibrate --schedule`, or move the file away"


@dataclasses.dataclass(frozen=True)
class StoredSchedule:
    """What `modiff calibrate --schedule` found. sampler: as `sampler_settings`; timesteps: of its run; path: the file.

    The bits of the network are not part of it: a forecast errs by what the sampler does between two calls.
    """

    schedule: StepSchedule
    sampler: dict[str, Any]
    timesteps: tuple[float, ...]
    path: Path

    def fits(self, scheduler: Any, timesteps: Sequence[float]) -> bool:
        """Whether a run with these timesteps is the one that was searched: same sampler, settings and calls."""
        return self.timesteps == _rounded(timesteps) and self.sampler == sampler_settings(scheduler)


def sampler_settings(scheduler: Any) -> dict[str, Any]:
    """Class and settings of a scheduler, as JSON has them. Settings that its class does not know are left out."""
    known = inspect.signature(type(scheduler).__init__).parameters
    config = dict(getattr(scheduler, "config", {}))
    settings = {name: value for name, value in config.items() if name in known}
    return json.loads(json.dumps({"class": type(scheduler).__name__, **settings}, default=str))


def run_of(scheduler: Any, timesteps: Sequence[float]) -> dict[str, Any]:
    """The entries of the file that say which runs a schedule holds for."""
    return {"sampler": sampler_settings(scheduler), "timesteps": list(_rounded(timesteps))}


def read(path: Path) -> StoredSchedule:
    """The schedule in the file at `path`. ValueError naming the file if it is not whole or cannot be taken."""
    try:
        stored = json.loads(path.read_text())
        schedule = StepSchedule.parse(stored["schedule"])
        found = StoredSchedule(schedule, dict(stored["sampler"]), _rounded(stored["timesteps"]), path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"schedule='auto': {path} is no schedule of this version ({type(error).__name__}: {error}); {SEARCH_AGAIN}"
        ) from error
    if schedule.is_deep:
        raise ValueError(
            f"schedule='auto': {path} skips deep levels; give it as schedule={str(schedule)!r}, or {SEARCH_AGAIN}"
        )
    return found


def beside(*models: Any) -> StoredSchedule | None:
    """The schedule in the folder that one of `models` (UNet, pipeline, None) was loaded from, or None without a file.

    The folder of a pipeline counts for the UNet in its subfolder `unet` too. ValueError as of `read`.
    """
    for model in models:
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        if not isinstance(name, (str, Path)) or not name:
            continue
        folder = Path(name)
        for place in (folder, folder.parent) if folder.name == "unet" else (folder,):
            if (place / FILE_NAME).is_file():
                return read(place / FILE_NAME)
    return None


def _rounded(timesteps: Sequence[Any]) -> tuple[float, ...]:
    return tuple(round(float(timestep), 3) for timestep in timesteps)
