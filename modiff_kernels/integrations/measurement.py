"""What `make_plan` measures: time, fidelity and state of units and of whole UNets, on copies that share the weights.

Each mode has a copy of the UNet with a state of its own. Their inputs are those of a real trajectory, recorded from one
sampling in float.

Time of a unit: that of its forward pass within whole UNet calls, so that the caches hold what the rest of the call
leaves there and shared work is counted once; the copies take turns at every call, those that initialise do not count
(benchmarks/bench_unit_times.py compares this with two other ways). Fidelity of a unit: SQNR of its output against
float, both fed with the float trajectory.
"""

import contextlib
import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from modiff_kernels.calibration.result import CalibrationResult
from modiff_kernels.config import ModiffConfig
from modiff_kernels.config.plan import FLOAT_MODE, Mode, ModeCost
from modiff_kernels.integrations.accelerate import accelerate
from modiff_kernels.integrations.handle import Handle, channels_last
from modiff_kernels.integrations.replacements import config_of
from modiff_kernels.integrations.timing import timer_of
from modiff_kernels.metrics import psnr
from modiff_kernels.nn import ModulationState

MAX_SQNR_DB = 300.0  # stands for equal
CALLS_TIMED = 12  # of a trajectory
LEAST_CALLS = 2  # the first one initialises

Sample = Callable[[nn.Module], Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]


def share_copy(unet: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are those of `unet`."""
    memo = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    return copy.deepcopy(unet, memo)


@dataclasses.dataclass
class Subject:
    """A UNet that takes its turn.

    handle: None for float. in_channels_last: convert inputs as `accelerate` does. state_bytes: x_hat and y_hat, known
    after its pictures were sampled.
    """

    unet: nn.Module
    handle: Handle | None = None
    in_channels_last: bool = True
    state_bytes: int = 0

    def run(self) -> contextlib.AbstractContextManager[Any]:
        """One sampling run."""
        return contextlib.nullcontext() if self.handle is None else self.handle.sampling_run()

    def __call__(self, call: Call) -> Any:
        args, kwargs = call
        if self.handle is None and self.in_channels_last:
            args, kwargs = tree_map(channels_last, (args, kwargs))
        return self.unet(*args, **kwargs)


@dataclasses.dataclass
class Times:
    """Seconds of the calls that counted, in order: of the whole UNet, and of each unit."""

    steps: list[float] = dataclasses.field(default_factory=list)
    units: dict[str, list[float]] = dataclasses.field(default_factory=dict)


class Bench:
    """The copies of one UNet and what is measured on them.

    unet: the original. modes: the low-bit modes, a copy for each. sample: gives pictures, calls: its UNet calls,
    pictures: its result in float. on_run: called after every trajectory that was computed. units: paths of the units,
    with their layers.
    """

    def __init__(
        self,
        unet: nn.Module,
        config: ModiffConfig,
        modes: Sequence[Mode],
        calibration: CalibrationResult | None,
        static_scales: Mapping[str, Tensor | float],
        sample: Sample,
        pictures: np.ndarray,
        calls: list[Call],
        clock: Callable[[], float] | None,
        on_run: Callable[[], None],
    ) -> None:
        self.unet = unet
        self.config = config
        self.calibration = calibration
        self.static_scales = static_scales
        self.sample = sample
        self.pictures = pictures
        self.calls = calls
        self.timer = timer_of(next(unet.parameters()).device, clock)
        self.on_run = on_run
        self.float = Subject(share_copy(unet))
        self.subjects = {mode: self.accelerated(config_of(config, mode)) for mode in modes}
        handles = [subject.handle for subject in self.subjects.values()]
        self.units = handles[-1].replaced.units()

    def accelerated(self, config: ModiffConfig) -> Subject:
        """A copy of the UNet with `config`."""
        unet = share_copy(self.unet)
        scales = self.static_scales if config.scale_mode == "static" else {}
        return Subject(unet, accelerate(unet, config, calibration=self.calibration, static_scales=scales))

    def float_subjects(self) -> dict[str, Subject]:
        """The float forms to beat: the UNet in its memory format, and in channels_last."""
        convs = [module for module in self.unet.modules() if isinstance(module, nn.Conv2d)]
        if all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs):
            return {"float channels_last": self.float}
        converted = copy.deepcopy(self.unet).to(memory_format=torch.channels_last)
        return {"float": Subject(self.float.unet, None, False), "float channels_last": Subject(converted)}

    def psnr_db(self, subject: Subject) -> float:
        """Mean PSNR of the subject's pictures against those that were recorded."""
        with subject.run():
            pictures = self.sample(subject.unet)
            if subject.handle is not None:
                subject.state_bytes = subject.handle.state.nbytes()
        if subject.handle is not None:  # samplers run in inference mode, whose tensors cannot be updated outside of it
            subject.handle.state.release()
        self.on_run()
        return float(psnr(pictures, self.pictures).mean())

    def fidelity(self) -> dict[tuple[str, Mode], float]:
        """SQNR in dB of every unit in every mode, over the float trajectory."""
        sums: dict[tuple[str, Mode], Any] = {}

        def compare(path: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            exact = _tensor_of(output).double()
            for mode, subject in self.subjects.items():
                out = _tensor_of(subject.unet.get_submodule(name)(*args, **kwargs))
                noise, signal = sums.get((path, mode), (0.0, 0.0))
                sums[path, mode] = noise + (out - exact).square().sum(), signal + exact.square().sum()

        with contextlib.ExitStack() as undo:
            for path, name in self.modules():
                module = self.float.unet.get_submodule(name)
                undo.callback(
                    module.register_forward_hook(
                        lambda m, args, kwargs, out, path=path, name=name: compare(path, name, args, kwargs, out),
                        with_kwargs=True,
                    ).remove
                )
            for subject in self.subjects.values():
                undo.enter_context(subject.run())
            for call in self.calls:
                with contextlib.ExitStack() as call_end:
                    for subject in self.subjects.values():
                        call_end.enter_context(subject.handle.state.call())
                    self.float(call)
        self.on_run()
        return {key: _sqnr_db(float(noise), float(signal)) for key, (noise, signal) in sums.items()}

    def modules(self) -> Iterator[tuple[str, str]]:
        """(unit, path of a module whose output belongs to it): a fused block, or the layers."""
        fused = next(iter(self.subjects.values())).handle.replaced.fused
        for path, layers in self.units.items():
            yield from ((path, name) for name in ([path] if path in fused else layers))

    def costs(
        self, path: str, times: Mapping[Mode, Times], sqnr_db: Mapping[tuple[str, Mode], float]
    ) -> list[ModeCost]:
        """What a unit costs in every mode, from what `time` and `fidelity` gave."""
        costs = []
        for mode, measured in times.items():
            handle = None if mode == FLOAT_MODE else self.subjects[mode].handle
            state = 0 if handle is None else self._state_bytes(handle.state, path)
            time_us = 1e6 * statistics.median(measured.units[path])
            costs.append(ModeCost(mode, time_us, None if handle is None else sqnr_db[path, mode], state))
        return costs

    def _state_bytes(self, state: ModulationState, path: str) -> int:
        """Bytes of x_hat and y_hat of a unit; their keys are those of its layers, or lie below its path."""
        holders = [*state.inputs.items(), *state.outputs.items()]
        own = [holder for key, holder in holders if key in self.units[path] or key.startswith(f"{path}.")]
        return sum(held.tensor.nbytes for holder in own for held in holder.contexts.values())

    def time(self, subjects: Mapping[Any, Subject], rounds: int, per_unit: bool = False) -> dict[Any, Times]:
        """Times of the subjects' calls in turns over the first calls of the trajectory, `rounds` times."""
        times = {name: Times() for name in subjects}
        calls = self.calls[:CALLS_TIMED]
        with contextlib.ExitStack() as undo:
            spans = {name: self._spans(subject.unet, undo) if per_unit else [] for name, subject in subjects.items()}
            for _ in range(rounds):
                with contextlib.ExitStack() as runs:
                    for subject in subjects.values():
                        runs.enter_context(subject.run())
                    for index, call in enumerate(calls):
                        order = list(subjects)
                        shift = index % len(order)
                        for name in order[shift:] + order[:shift]:
                            spans[name].clear()
                            start = self.timer.mark()
                            subjects[name](call)
                            end = self.timer.mark()
                            self.timer.wait()
                            if index:
                                self._note(times[name], start, end, spans[name])
                self.on_run()
        return times

    def _note(self, times: Times, start: Any, end: Any, spans: list[tuple[str, Any, Any]]) -> None:
        times.steps.append(self.timer.seconds(start, end))
        totals: dict[str, float] = {}
        for path, begun, ended in spans:
            totals[path] = totals.get(path, 0.0) + self.timer.seconds(begun, ended)
        for path, seconds in totals.items():
            times.units.setdefault(path, []).append(seconds)

    def _spans(self, unet: nn.Module, undo: contextlib.ExitStack) -> list[tuple[str, Any, Any]]:
        """A list that every call of `unet` appends (unit, begin, end) to."""
        spans: list[tuple[str, Any, Any]] = []
        begun: list[Any] = []

        def leave(path: str) -> None:
            spans.append((path, begun.pop(), self.timer.mark()))

        for path, name in self.modules():
            module = unet.get_submodule(name)
            undo.callback(module.register_forward_pre_hook(lambda m, x: begun.append(self.timer.mark())).remove)
            undo.callback(module.register_forward_hook(lambda m, x, y, path=path: leave(path)).remove)
        return spans


def recorded(unet: nn.Module, sample: Sample) -> tuple[list[Call], np.ndarray]:
    """The arguments of all calls of `unet` in one sampling, and its pictures. A tensor that stays equal stays one."""
    calls: list[Call] = []
    last: dict[int, Tensor] = {}

    def kept(value: Any, place: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        if place not in last or last[place].shape != value.shape or not torch.equal(last[place], value):
            last[place] = value.clone()
        return last[place]

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values, structure = tree_flatten((args, kwargs))
        with torch.inference_mode(False), torch.no_grad():
            calls.append(tree_unflatten([kept(value, place) for place, value in enumerate(values)], structure))

    hook = unet.register_forward_pre_hook(record, with_kwargs=True)
    try:
        pictures = np.asarray(sample(unet))
    finally:
        hook.remove()
    if len(calls) < LEAST_CALLS:
        raise ValueError(
            f"make_plan: the sampling called the UNet {len(calls)} times; give one with {LEAST_CALLS} calls or more"
        )
    return calls, pictures


def _sqnr_db(noise: float, signal: float) -> float:
    if noise <= 0.0:
        return MAX_SQNR_DB
    return 10 * math.log10(signal / noise) if signal > 0 else 0.0


def _tensor_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample
