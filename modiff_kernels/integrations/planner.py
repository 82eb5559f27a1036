"""`make_plan`: measures every mode of every unit of a UNet in real sampling on this device, and chooses.

Each mode has a copy of the UNet that shares the weights and has a state of its own; inputs are those of one sampling in
float. Time of a unit: that of its forward pass within whole UNet calls, in which the copies take turns; the host is
ahead of a GPU, so that kernels are timed and no Python. Fidelity of a unit: SQNR of its output, fed with the float
trajectory (docs/layer_plan.md).

Plans are chosen by the sums of their units' times and errors, which are estimates; so what a plan does to whole calls
and pictures is measured before it is taken, against float and against all units in one mode."""

import contextlib
import copy
import dataclasses
import functools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from operator import truediv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

from modiff_kernels.calibration.result import CalibrationResult, read_result
from modiff_kernels.config import LayerPlan, ModiffConfig
from modiff_kernels.config.plan import FLOAT_MODE, Candidate, Mode, ModeCost, UnitPlan, noise_of
from modiff_kernels.integrations import plan_cache
from modiff_kernels.integrations.accelerate import accelerate, resolve
from modiff_kernels.integrations.handle import Handle, channels_last
from modiff_kernels.integrations.plans import low_bit_modes, timer_of
from modiff_kernels.integrations.replacements import config_of
from modiff_kernels.integrations.scheduled import sample_of
from modiff_kernels.log import logger
from modiff_kernels.metrics import psnr
from modiff_kernels.nn import ModulationState
from modiff_kernels.nn.call import CallForm, denoisers_of
from modiff_kernels.planning import choice
from modiff_kernels.planning.choice import Costs

MAX_LOSS_DB = 0.5
LEAST_GAIN = 1.02  # a measured difference below 2 % is noise, and float is exact
CHOICES = 3  # plans whose pictures are looked at before one mode for all is taken
LEAST_STEP = 1.05  # by which an estimate that did not hold becomes worse, so that the next plan is another one
LEAST_REPEAT_DB = 60.0  # of two float samplings from the same noise in different memory formats
MAX_SQNR_DB = 300.0  # stands for equal
CALLS_TIMED = 12  # of a trajectory
LEAST_CALLS = 2  # the first one initialises

Sample = Callable[[nn.Module], Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]


def share_copy(unet: nn.Module) -> nn.Module:
    memo = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    return copy.deepcopy(unet, memo)


@dataclasses.dataclass
class Subject:
    """A UNet that takes its turn, and what was measured on it.

    handle, modes: of its low-bit layers and units, none in float. in_channels_last: convert inputs as `accelerate`
    does. psnr_db, state_bytes (x_hat and y_hat): known after `Bench.sample_with`. steps, units: seconds of the calls
    that counted in the last `Bench.time`, in order: of the whole UNet, and by unit."""

    name: str
    unet: nn.Module
    handle: Handle | None = None
    modes: Mapping[str, Mode] = dataclasses.field(default_factory=dict)
    in_channels_last: bool = True
    psnr_db: float = math.inf
    state_bytes: int = 0
    steps: list[float] = dataclasses.field(default_factory=list)
    units: dict[str, list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))

    def run(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.handle is None else self.handle.sampling_run()

    def __call__(self, call: Call) -> Any:
        args, kwargs = call
        if self.handle is None and self.in_channels_last:
            args, kwargs = tree_map(channels_last, (args, kwargs))
        return self.unet(*args, **kwargs)

    @property
    def candidate(self) -> Candidate:
        exact = self.handle is None or math.isinf(self.psnr_db)
        step_us = 1e6 * statistics.median(self.steps)
        return Candidate(self.name, step_us, None if exact else self.psnr_db, self.state_bytes)


@dataclasses.dataclass
class Bench:
    """The copies of one UNet and what is measured on them.

    unet: the original. modes: the low-bit modes, a copy for each. sample: gives pictures, calls: its UNet calls,
    pictures: its result in float. clock: gives seconds in the place of the device's own. on_run: called after every
    trajectory that was computed. units: paths of the units, with their layers. float, subjects: the copies, by mode."""

    unet: nn.Module
    config: ModiffConfig
    modes: Sequence[Mode]
    calibration: CalibrationResult | str | None
    sample: Sample
    calls: list[Call]
    pictures: np.ndarray
    clock: Callable[[], float] | None
    on_run: Callable[[], None]

    def __post_init__(self) -> None:
        self.timer = timer_of(next(self.unet.parameters()).device, self.clock)
        configs = {mode: dataclasses.replace(config_of(self.config, mode), plan=mode.kind) for mode in self.modes}
        handles = {mode: self._accelerated(config) for mode, config in configs.items()}
        self.units = handles[self.modes[-1]].replaced.units()
        self.float = Subject("float channels_last", share_copy(self.unet))
        self.subjects = {
            mode: Subject(f"all {mode}", handle.unet, handle, dict.fromkeys(self.units, mode))
            for mode, handle in handles.items()
        }
        fused = handles[self.modes[0]].replaced.fused
        # (unit, path of a module whose output belongs to it): a fused block, or the layers
        own = {path: (path,) if path in fused else layers for path, layers in self.units.items()}
        self._modules = [(path, name) for path, names in own.items() for name in names]

    def _accelerated(self, config: ModiffConfig) -> Handle:
        return accelerate(share_copy(self.unet), config, calibration=self.calibration)

    def planned(self, modes: Mapping[str, Mode]) -> Subject:
        plan = LayerPlan(tuple(UnitPlan(path, mode, self.units[path]) for path, mode in modes.items()))
        handle = self._accelerated(dataclasses.replace(self.config, plan=plan))
        counts = Counter(map(str, modes.values())).most_common()
        mixed = "plan: " + ", ".join(f"{count} {mode}" for mode, count in counts)
        return Subject(mixed if len(counts) > 1 else f"all {counts[0][0]}", handle.unet, handle, modes)

    def float_subjects(self) -> list[Subject]:
        """The float forms to beat: the UNet in its memory format, and in channels_last."""
        convs = [module for module in self.unet.modules() if isinstance(module, nn.Conv2d)]
        if all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs):
            return [self.float]
        converted = copy.deepcopy(self.unet).to(memory_format=torch.channels_last)
        plain = Subject("float", self.float.unet, in_channels_last=False)
        return [plain, Subject("float channels_last", converted)]

    def sample_with(self, subject: Subject) -> None:
        """Notes the state of `subject`, and the mean PSNR of its pictures against those that were recorded."""
        with subject.run():
            pictures = self.sample(subject.unet)
            if subject.handle is not None:
                subject.state_bytes = subject.handle.state.nbytes()
        if subject.handle is not None:  # samplers run in inference mode, whose tensors cannot be updated outside of it
            subject.handle.state.release()
        self.on_run()
        subject.psnr_db = float(psnr(pictures, self.pictures).mean())

    def costs(self, rounds: int) -> dict[str, list[ModeCost]]:
        sqnr_db = self._fidelity()
        subjects = {FLOAT_MODE: self.float, **self.subjects}
        self.time(list(subjects.values()), rounds, per_unit=True)
        costs: dict[str, list[ModeCost]] = {path: [] for path in self.units}
        for path in costs:
            for mode, subject in subjects.items():
                time_us = 1e6 * statistics.median(subject.units[path])
                state = 0 if subject.handle is None else self._state_bytes(subject.handle.state, path)
                costs[path].append(ModeCost(mode, time_us, sqnr_db.get((path, mode)), state))
        return costs

    def _fidelity(self) -> dict[tuple[str, Mode], float]:
        """SQNR in dB of every unit in every mode, over the float trajectory."""
        sums: dict[tuple[str, Mode], Any] = {}

        def compare(path: str, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            exact = sample_of(output).double()
            for mode, subject in self.subjects.items():
                out = sample_of(subject.unet.get_submodule(name)(*args, **kwargs))
                noise, signal = sums.get((path, mode), (0.0, 0.0))
                sums[path, mode] = noise + (out - exact).square().sum(), signal + exact.square().sum()

        with contextlib.ExitStack() as undo:
            for path, name in self._modules:
                module, hook = self.float.unet.get_submodule(name), functools.partial(compare, path, name)
                undo.enter_context(module.register_forward_hook(hook, with_kwargs=True))
            for subject in self.subjects.values():
                undo.enter_context(subject.run())
            for call in self.calls:
                with contextlib.ExitStack() as call_end:
                    for subject in self.subjects.values():
                        call_end.enter_context(subject.handle.state.call())
                    self.float(call)
        self.on_run()
        return {key: _sqnr_db(float(noise), float(signal)) for key, (noise, signal) in sums.items()}

    def _state_bytes(self, state: ModulationState, path: str) -> int:
        """Bytes of x_hat and y_hat of a unit; their keys are those of its layers, or lie below its path."""
        holders = [*state.inputs.items(), *state.outputs.items()]
        own = [holder for key, holder in holders if key in self.units[path] or key.startswith(f"{path}.")]
        return sum(held.tensor.nbytes for holder in own for held in holder.contexts.values())

    def time(self, subjects: Sequence[Subject], rounds: int, per_unit: bool = False) -> None:
        """Times the subjects' calls in turns over the first calls of the trajectory, `rounds` times."""
        with contextlib.ExitStack() as undo:
            turns = [(subject, self._spans(subject.unet, undo) if per_unit else {}) for subject in subjects]
            for subject in subjects:
                subject.steps.clear()
                subject.units.clear()
            for _ in range(rounds):
                with contextlib.ExitStack() as runs:
                    for subject in subjects:
                        runs.enter_context(subject.run())
                    for index, call in enumerate(self.calls[:CALLS_TIMED]):
                        first = index % len(turns)
                        for subject, spans in turns[first:] + turns[:first]:
                            spans.clear()
                            seconds = self.timer.timed(subject, call)
                            if index:
                                subject.steps.append(seconds)
                                for path, marks in spans.items():
                                    subject.units[path].append(sum(self.timer.seconds(*pair) for pair in marks))
                self.on_run()

    def _spans(self, unet: nn.Module, undo: contextlib.ExitStack) -> dict[str, list[tuple[Any, Any]]]:
        """A dict that every call of `unet` fills with the marks (begin, end) of the units."""
        spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        begun: list[Any] = []

        def leave(path: str) -> None:
            spans[path].append((begun.pop(), self.timer.mark()))

        for path, name in self._modules:
            module = unet.get_submodule(name)
            undo.enter_context(module.register_forward_pre_hook(lambda m, x: begun.append(self.timer.mark())))
            undo.enter_context(module.register_forward_hook(lambda m, x, y, path=path: leave(path)))
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

    with unet.register_forward_pre_hook(record, with_kwargs=True):
        pictures = np.asarray(sample(unet))
    if len(calls) < LEAST_CALLS:
        raise ValueError(f"make_plan: sampling called the UNet {len(calls)} times; give one with {LEAST_CALLS} or more")
    return calls, pictures


def _sqnr_db(noise: float, signal: float) -> float:
    if noise <= 0.0:
        return MAX_SQNR_DB
    return 10 * math.log10(signal / noise) if signal > 0 else 0.0


def make_plan(
    target: Any,
    config: ModiffConfig | None = None,
    *,
    sample: Sample | None = None,
    call: Mapping[str, Any] | None = None,
    max_loss_db: float = MAX_LOSS_DB,
    rounds: int = 5,
    calibration: CalibrationResult | str | Path | None = "auto",
    use_cache: bool = True,
    progress: bool = True,
    clock: Callable[[], float] | None = None,
) -> LayerPlan:
    """The fastest layer plan for `target` on this device whose pictures are nearly as good as low bits allow.

    target: a pipeline or UNet that is not accelerated; it is not changed. config: bits, scales and the rest; its
    schedule is not used, its max_state_bytes is respected. sample: takes a UNet, samples with it from the same noise at
    every call and returns the pictures, floats [N, H, W, C] in 0..1 in an array or on the CPU; batch and size must be
    those that the plan is for. Without it a pipeline is called with the arguments `call` and a generator of seed 0.
    max_loss_db: how far the mean PSNR may fall below that of the best single mode. rounds: how often the trajectory is
    timed. calibration: as for `accelerate`. use_cache: take the plan that was stored for this device,
    model, shape, configuration, versions and max_loss_db, if there is one, and store a new one; what is sampled and
    calibrated is not part of that. progress: show a bar. clock: gives seconds, in the place of the device's own.

    The plan is all float where nothing is faster than the best float form by 2 %. Errors: TypeError for a target
    without a UNet; ValueError for a UNet without a layer that can be replaced, a missing `sample`, one that gives other
    pictures every time, and impossible values; RuntimeError if the UNet is accelerated."""
    result = calibration if calibration in (None, "auto") else read_result(calibration)
    if config is None:
        config = result.config if isinstance(result, CalibrationResult) else ModiffConfig()
    unet, pipe = resolve(target)
    modes = low_bit_modes(config)
    if not max_loss_db > 0 or rounds < 1:
        raise ValueError(f"make_plan: max_loss_db={max_loss_db!r}, rounds={rounds!r} are not allowed; give more than 0")
    if sample is None:
        if pipe is None:
            raise ValueError("make_plan: a UNet alone cannot be sampled; give sample=, a function of a UNet")
        sample = _sampler_of(pipe, dict(call or {}))
    own = dataclasses.replace(config, schedule=None, plan=None, max_state_bytes=None, cuda_graphs=False)
    with tqdm(desc="plan", unit="run", disable=not progress, leave=False) as bar, torch.no_grad():
        calls, pictures = recorded(unet, sample)
        args, kwargs = calls[0]
        args = CallForm(unet).as_unet(args, kwargs)[0]
        key = plan_cache.key_of(unet, config, (args[0] if args else kwargs["sample"]).shape)
        known = plan_cache.stored(key) if use_cache else None
        if known is not None and known.source == "measured" and known.max_loss_db == max_loss_db:
            return known
        bench = Bench(unet, own, modes, result, sample, calls, pictures, clock, bar.update)
        bar.reset(2 + len(modes) + CHOICES + 2 * rounds)
        plan = _measured(bench, max_loss_db, config.max_state_bytes, rounds)
        plan = dataclasses.replace(plan, key=key, max_loss_db=max_loss_db)
    if use_cache:
        try:
            plan_cache.store(plan)
        except OSError as error:
            logger.warning("the plan could not be stored in %s (%s); set MODIFF_CACHE", plan_cache.folder(), error)
    return plan


def _measured(bench: Bench, max_loss_db: float, max_state_bytes: int | None, rounds: int) -> LayerPlan:
    bench.sample_with(bench.float)
    if bench.float.psnr_db < LEAST_REPEAT_DB:
        text = "let `sample` begin from the same noise at every call"
        raise ValueError(f"make_plan: two float samplings differ ({bench.float.psnr_db:.1f} dB); {text}")
    costs = bench.costs(rounds)
    for subject in bench.subjects.values():
        bench.sample_with(subject)
    least_db = max(subject.psnr_db for subject in bench.subjects.values()) - max_loss_db
    limit = math.inf if max_state_bytes is None else max_state_bytes
    plans = [each for each in bench.subjects.values() if each.psnr_db >= least_db and each.state_bytes <= limit]
    mixed = _verified(bench, costs, least_db, limit)
    if mixed is not None and all(mixed.modes != plan.modes for plan in plans):
        plans.append(mixed)
    floats = bench.float_subjects()
    bench.time([*floats, *plans], rounds)
    return _decided(bench, costs, floats, plans, limit < math.inf)


def _verified(bench: Bench, costs: Costs, least_db: float, limit: float) -> Subject | None:
    """The fastest plan by the estimate whose pictures are good enough; None if no estimate held. A plan whose pictures
    are worse than estimated makes the estimates worse by as much for the next one."""
    gains = choice.gains_of(costs, {mode: noise_of(subject.psnr_db) for mode, subject in bench.subjects.items()})
    for _ in range(CHOICES):
        chosen = choice.choose(costs, gains, noise_of(least_db), limit)
        if all(mode == FLOAT_MODE for mode in chosen.values()):
            return None
        subject = bench.planned(chosen)
        bench.sample_with(subject)
        if subject.psnr_db >= least_db:
            return subject
        worse = noise_of(subject.psnr_db) / choice.error_of(costs, chosen, gains)
        gains = {mode: gain * max(worse, LEAST_STEP) for mode, gain in gains.items()}
    return None


def _decided(
    bench: Bench, costs: Costs, floats: Sequence[Subject], plans: Sequence[Subject], limited: bool
) -> LayerPlan:
    """The fastest of `plans` if it gains over the best float form, else float. Of those that are as fast, up to what is
    noise, it is the one with the least state."""
    candidates = tuple(subject.candidate for subject in (*floats, *plans))
    best = min(floats, key=lambda subject: statistics.median(subject.steps))
    gains = [statistics.median(map(truediv, best.steps, plan.steps)) for plan in plans]
    most = max(gains, default=0.0)
    as_fast = [pair for pair in zip(gains, plans) if pair[0] >= max(most / LEAST_GAIN, min(most, LEAST_GAIN))]
    gain, chosen = min(as_fast, key=lambda pair: (pair[1].state_bytes, -pair[0]), default=(0.0, None))
    if chosen is None or gain < LEAST_GAIN:
        found = "no plan is within the limits"
        if chosen is not None:
            found = f"the fastest plan ({chosen.name}) is {gain:.3f}x as fast as {best.name}"
        summary = f"all float: {found}; {LEAST_GAIN}x is asked for"
        decided = dict.fromkeys(costs, (FLOAT_MODE, "nothing gains"))
    else:
        summary = f"{chosen.name}: {gain:.2f}x as fast as {best.name}, {chosen.psnr_db:.1f} dB to float"
        decided = {path: (mode, choice.reason_of(costs[path], mode, limited)) for path, mode in chosen.modes.items()}
        if len(set(chosen.modes.values())) == 1:
            whole = "one mode for all is the fastest as a whole"
            decided = {path: (mode, why if why == "fastest" else whole) for path, (mode, why) in decided.items()}
    left_out = [each for each in bench.subjects.values() if each not in plans]
    if left_out:
        listed = (f"{each.name} ({each.psnr_db:.1f} dB, state {each.state_bytes / 1e6:.1f} MB)" for each in left_out)
        summary += f"; not within the limits: {', '.join(listed)}"
    units = [UnitPlan(path, mode, bench.units[path], tuple(costs[path]), why) for path, (mode, why) in decided.items()]
    return LayerPlan(tuple(units), None, "measured", candidates, summary)


def _sampler_of(pipe: Any, options: dict[str, Any]) -> Sample:
    """Pictures of a pipeline with another UNet in it, always from the same noise."""

    def sample(unet: nn.Module) -> Any:
        [(name, own)] = denoisers_of(pipe).items()
        setattr(pipe, name, unet)
        try:
            generator = torch.Generator().manual_seed(0)
            return pipe(**{"generator": generator, "output_type": "np", **options}).images
        finally:
            setattr(pipe, name, own)

    return sample
