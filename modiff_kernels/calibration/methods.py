"""The registry of calibration methods, and what every one of them gets.

A method is a function `(job: Job) -> dict[str, CalibratedLayer]` with options in a frozen dataclass, registered under
its name::

    @register("my_method", MyOptions, "what it does, in a line")
    def my_method(job: Job) -> dict[str, CalibratedLayer]: ...
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from tqdm import tqdm

from modiff_kernels.calibration.data import TIME_STEPS, CalibrationData, Sampler, collect, ndtc_calls, uniform_calls
from modiff_kernels.calibration.workspace import Workspace
from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.layer import why_not_conv2d
from modiff_kernels.ops.check import FLOAT_DTYPES
from modiff_kernels.quant.calibrated import CalibratedLayer

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that all methods have.

    time_steps: which calls of a run give data: "uniform" (equally spaced) or "ndtc" (PTQ4DM's clipped normal
        distribution, see `ndtc_calls`). mean, std: of "ndtc", in parts of all training steps.
    calls_per_sample: calls that every trajectory gives.
    """

    time_steps: str = "uniform"
    calls_per_sample: int = 16
    mean: float = 0.4
    std: float = 0.4

    def __post_init__(self) -> None:
        check_choice("time_steps", self.time_steps, TIME_STEPS)
        check_positive("calls_per_sample", self.calls_per_sample)


@dataclasses.dataclass(frozen=True)
class Split:
    """A layer whose input channels are quantised in parts.

    group_size: of its weight. input_scale: float32 [C] that the input is multiplied by, or None.
    """

    group_size: int
    input_scale: Tensor | None


@dataclasses.dataclass
class Job:
    """One calibration: what a method works on.

    unet: the full-precision network, not to be changed for good. sampler: its sampler, for methods that sample. config:
    what is calibrated for. options: of the method's dataclass. samples: trajectories. batch: images at once. seed: of
    the first trajectory; the noise of trajectory i has seed + i. workspace: for everything that takes long. layers: the
    layers to calibrate, by path. splits: those that are quantised in parts. weights: layers of an earlier calibration
    whose codes are to be kept, or None.
    """

    unet: nn.Module
    sampler: Sampler
    config: ModiffConfig
    options: Any
    samples: int
    batch: int
    seed: int
    workspace: Workspace
    quiet: bool
    layers: dict[str, nn.Module]
    splits: dict[str, Split] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, CalibratedLayer] | None = None

    def input_scale(self, path: str) -> Tensor | None:
        """What the input channels of a layer are multiplied by before they are quantised."""
        return self.splits[path].input_scale if path in self.splits else None

    def bar(self, items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> "tqdm[T]":
        """A progress bar around `items`."""
        return tqdm(items, desc=description, total=total, unit=unit, disable=self.quiet, leave=False)

    def data(self) -> CalibrationData:
        """Inputs of the UNet at the time steps that the options ask for, from the full-precision sampler."""
        return CalibrationData.from_tensors(self.workspace.once("data", lambda: self._collect().tensors()))

    def layers_once(
        self, name: str, start: Mapping[str, CalibratedLayer], compute: Callable[[], Mapping[str, CalibratedLayer]]
    ) -> dict[str, CalibratedLayer]:
        """compute(), kept in the workspace: `start` with other codes, weight scales, act_scale and bias."""

        def tensors_of() -> dict[str, Tensor]:
            tensors: dict[str, Tensor] = {}
            for path, layer in compute().items():
                tensors |= {f"{path}/codes": layer.weight.codes, f"{path}/scale": layer.weight.scale}
                tensors |= {f"{path}/{k}": v for k in ("act_scale", "bias") if (v := getattr(layer, k)) is not None}
            return tensors

        tensors = self.workspace.once(name, tensors_of)
        return {
            path: dataclasses.replace(
                layer,
                weight=dataclasses.replace(
                    layer.weight, codes=tensors[f"{path}/codes"], scale=tensors[f"{path}/scale"]
                ),
                act_scale=tensors.get(f"{path}/act_scale"),
                bias=tensors.get(f"{path}/bias"),
            )
            for path, layer in start.items()
        }

    def _collect(self) -> CalibrationData:
        options, timesteps = self.options, self.sampler.timesteps()
        if options.time_steps == "ndtc":
            calls = ndtc_calls(
                timesteps,
                self.sampler.scheduler.config.num_train_timesteps,
                options.calls_per_sample,
                self.samples,
                options.mean,
                options.std,
                self.workspace.generator("ndtc"),
            )
        else:
            calls = uniform_calls(len(timesteps), min(options.calls_per_sample, len(timesteps) - 1), self.samples)
        with tqdm(total=self.samples, desc="sample", unit="image", disable=self.quiet, leave=False) as bar:
            return collect(self.sampler, calls, range(self.seed, self.seed + self.samples), self.batch, bar.update)


Function = Callable[[Job], dict[str, CalibratedLayer]]


@dataclasses.dataclass(frozen=True)
class Method:
    """A registered method. options: class of its options. defaults: values of options that differ from the class's."""

    name: str
    run: Function
    options: type
    defaults: dict[str, Any]
    summary: str

    def options_from(self, given: dict[str, Any]) -> Any:
        """The options, with the values `given`; ValueError names an unknown one and the known ones."""
        known = [field.name for field in dataclasses.fields(self.options)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(
                f"calibrate: method {self.name!r} has no option {', '.join(map(repr, unknown))}; its options are "
                f"{', '.join(known)}"
            )
        return self.options(**{**self.defaults, **given})


METHODS: dict[str, Method] = {}


def register(name: str, options: type, summary: str, **defaults: Any) -> Callable[[Function], Function]:
    """Decorator: make a function the method `name`. It may stand several times, with other defaults."""

    def decorate(function: Function) -> Function:
        METHODS[name] = Method(name, function, options, defaults, summary)
        return function

    return decorate


def method_of(name: str) -> Method:
    """The method `name`; ValueError lists all of them."""
    if name not in METHODS:
        raise ValueError(f"calibrate: method={name!r} is not known; choose one of {', '.join(map(repr, METHODS))}")
    return METHODS[name]


def layers_of(unet: nn.Module, config: ModiffConfig) -> dict[str, nn.Module]:
    """Every Linear and Conv2d of `unet` that `config` lets be low-bit, by path, in the order of the modules."""
    return {
        path: module
        for path, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and config.skips(path) is None
        and module.weight.dtype in FLOAT_DTYPES
        and not (isinstance(module, nn.Conv2d) and why_not_conv2d(module))
    }


def batches_of(job: Job, data: CalibrationData, description: str) -> Iterator[Tensor]:
    """Batches of points behind a progress bar."""
    yield from job.bar(list(data.batches(job.batch)), description, unit="batch")


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError unless option `name` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"calibrate: {name}={value!r} is not allowed; choose one of {', '.join(map(repr, allowed))}")


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless option `name` is above 0."""
    if not value > 0:
        raise ValueError(f"calibrate: {name}={value!r} is not allowed; give a number above 0")
