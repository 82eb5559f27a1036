"""What every calibration method gets, and the options that all of them have.

A method is a function `(job: Job) -> dict[str, CalibratedLayer]` with options in a frozen dataclass, see `METHODS`."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from modiff_kernels.calibration.data import TIME_STEPS, CalibrationData, Sampler, collect, ndtc_calls, uniform_calls
from modiff_kernels.calibration.result import DESCRIPTION, CalibrationResult, replace_file
from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.layer import why_not_conv2d
from modiff_kernels.ops.check import FLOAT_DTYPES
from modiff_kernels.quant.calibrated import CalibratedLayer

T = TypeVar("T")
Layers = dict[str, CalibratedLayer]
Tensors = dict[str, Tensor]


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"calibrate: {name}={value!r} is not allowed; choose one of {', '.join(map(repr, allowed))}")


def choice(default: Any, allowed: Sequence[Any]) -> Any:
    return dataclasses.field(default=default, metadata={"check": lambda name, v: check_choice(name, v, allowed)})


def number(default: float, above: float = 0.0, most: float = math.inf, least: float | None = None) -> Any:
    """A field of options whose value is greater than `above` (or not below `least`), and up to `most`."""

    def check(name: str, value: Any) -> None:
        if not (above < value <= most if least is None else least <= value <= most):
            low = f"a number above {above:g}" if least is None else f"{least:g} or more"
            high = "" if most == math.inf else f" and up to {most:g}"
            raise ValueError(f"calibrate: {name}={value!r} is not allowed; give {low}{high}")

    return dataclasses.field(default=default, metadata={"check": check})


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that all methods have. Impossible values raise ValueError.

    time_steps: which calls of a run give data: "uniform" (equally spaced) or "ndtc" (PTQ4DM's clipped normal
        distribution, see `ndtc_calls`). mean, std: of "ndtc", in parts of all training steps.
    calls_per_sample: calls that every trajectory gives."""

    time_steps: str = choice("uniform", TIME_STEPS)
    calls_per_sample: int = number(16)
    mean: float = 0.4
    std: float = 0.4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "check" in field.metadata:
                field.metadata["check"](field.name, getattr(self, field.name))


class Split(NamedTuple):
    """A layer whose input channels are quantised in parts: its group_size, and its input_scale float32 [C] or None."""

    group_size: int
    input_scale: Tensor | None


@dataclasses.dataclass
class Job:
    """One calibration: what a method works on.

    unet: the full-precision network, not to be changed for good. config: what is calibrated for. options: of the
    method's dataclass. samples: trajectories. batch: images at once. seed: the noise of trajectory i has seed + i.
    request: JSON values that decide the result. folder: finished parts are kept in its `partial`, so that the same
    request goes on where it was interrupted; those of another one are thrown away. None: nothing is kept.
    layers: to calibrate, by path. splits: those that are quantised in parts. weights: layers of an earlier calibration
    whose codes are to be kept, or None."""

    unet: nn.Module
    sampler: Sampler
    config: ModiffConfig
    options: Any
    samples: int
    batch: int
    seed: int
    request: Mapping[str, Any]
    folder: Path | None
    quiet: bool
    layers: dict[str, nn.Module]
    weights: Mapping[str, CalibratedLayer] | None = None
    splits: dict[str, Split] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._request = json.dumps(self.request, sort_keys=True, default=str)
        self._parts = None if self.folder is None else Path(self.folder, "partial")
        if self._parts is None:
            return
        stamp = self._parts / "request.json"
        if self._parts.exists() and not (stamp.is_file() and stamp.read_text() == self._request):
            shutil.rmtree(self._parts)
        self._parts.mkdir(parents=True, exist_ok=True)
        replace_file(stamp, lambda new: new.write_text(self._request))

    def once(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """compute(), or what it gave in an earlier, interrupted calibration of the same request. The result must not
        depend on what was computed before: draw random numbers from `generator(name)`."""
        if self._parts is None:
            return compute()
        path = self._parts / f"{name}.safetensors"
        if path.is_file():
            return load_file(path)
        tensors = compute()
        replace_file(path, lambda new: save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, new))
        return tensors

    def layers_once(self, name: str, compute: Callable[[], Layers]) -> Layers:
        """compute(), kept like `once`."""
        folder = None if self._parts is None else self._parts / name
        if folder is not None and (folder / DESCRIPTION).is_file():
            return CalibrationResult.load(folder).layers
        layers = compute()
        if folder is not None:
            CalibrationResult(name, self.config, layers).save(folder)
        return layers

    def clear(self) -> None:
        if self._parts is not None:
            shutil.rmtree(self._parts)

    def generator(self, name: str) -> torch.Generator:
        """Random numbers that depend on the request and `name` only."""
        digest = hashlib.sha256(f"{self._request}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    @property
    def needs_scales(self) -> bool:
        return self.config.act_bits is not None and self.config.scale_mode == "static"

    def input_scale(self, path: str) -> Tensor | None:
        """What the input channels of a layer are multiplied by before they are quantised."""
        if self.weights is not None:
            return self.weights[path].input_scale
        return self.splits[path].input_scale if path in self.splits else None

    def bar(self, items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> "tqdm[T]":
        return tqdm(items, desc=description, total=total, unit=unit, disable=self.quiet, leave=False)

    def batches(self, data: CalibrationData, description: str) -> Iterable[Tensor]:
        """All points in their order, `batch` at a time, behind a progress bar."""
        return self.bar(torch.arange(len(data)).split(self.batch), description, unit="batch")

    def collected(self, name: str, calls: Tensor, description: str = "sample") -> CalibrationData:
        """Inputs of the UNet at calls[i] (int64 [samples, k]) of trajectory i, kept as part `name`."""

        def run() -> Tensors:
            seeds = range(self.seed, self.seed + self.samples)
            with self.bar((), description, total=self.samples, unit="image") as bar:
                return collect(self.sampler, calls, seeds, self.batch, bar.update).tensors()

        return CalibrationData.from_tensors(self.once(name, run))

    def data(self) -> CalibrationData:
        """Inputs of the UNet at the time steps that the options ask for."""
        options, timesteps = self.options, self.sampler.timesteps()
        if options.time_steps == "ndtc":
            drawn = (options.calls_per_sample, self.samples, options.mean, options.std, self.generator("ndtc"))
            calls = ndtc_calls(timesteps, self.sampler.scheduler.config.num_train_timesteps, *drawn)
        else:
            count = min(options.calls_per_sample, len(timesteps) - 1)
            calls = uniform_calls(len(timesteps), count, self.samples)
        return self.collected("data", calls)


def layers_of(unet: nn.Module, config: ModiffConfig) -> dict[str, nn.Module]:
    return {
        path: module
        for path, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and config.skips(path) is None
        and module.weight.dtype in FLOAT_DTYPES
        and not (isinstance(module, nn.Conv2d) and why_not_conv2d(module))
    }
