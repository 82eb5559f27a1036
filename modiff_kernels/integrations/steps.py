"""Where a UNet call stands in its run: in which step and context, and what of before still holds.

Pipelines call a UNet several times per step: for guidance, for a corrector, for the views of a panorama. Each of these
passes is a trajectory of its own. They are told apart by what they are conditioned on, and else by their order; two
calls are of one step if their timestep is the same. All of it is known on the host: nothing reads a device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from modiff_kernels.integrations.forward import HostTimesteps
from modiff_kernels.nn import ModulationState
from modiff_kernels.nn.cache import tensor_version
from modiff_kernels.nn.run import DEFAULT_CONTEXT

PASS = f"{DEFAULT_CONTEXT}/{{}}"  # context of the second pass of a step and of later ones, which count from 1
NO_CONDITIONS = ("sample", "timestep", "return_dict")
MOST_SKIPPED = 3  # announced timesteps that a run may leave out and still go on; it may also take them backwards
NEAR = 5e-4  # of the largest timestep: as near are announced ones to what the UNet gets of them, in float16 too

Conditions = list[tuple[Any, int]]  # values and their versions


class Steps:
    """Follows the calls of the runs on one UNet.

    layout: number of calls and scheduler of a run that begins. announced: timesteps of this run's scheduler, as long as
    the calls are at them; else empty. first: index of the first call's.
    """

    def __init__(
        self, state: ModulationState, timesteps: HostTimesteps, layout: Callable[[], tuple[int | None, Any]]
    ) -> None:
        self._state, self._timesteps, self.layout = state, timesteps, layout
        self._run = 0
        self.announced: Sequence[float] = ()
        self.first = self._index = 0
        self._conditions: dict[str, Conditions] = {}
        self._formats: dict[str, Any] = {}

    def place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Take the next call; its context. Contexts that nothing of before fits to any more begin anew. RuntimeError
        for a timestep that was not announced, as of another scheduler."""
        state, known = self._state, self._conditions
        if self._run != state.run_index:
            self._begin_run()
        sample = args[0] if args else kwargs.get("sample")
        conditions = _conditions_of(args, kwargs)
        alike = [name for name, old in known.items() if _same(old, conditions)]
        name = self._follow(args[1] if len(args) > 1 else kwargs.get("timestep"), alike)
        if name not in alike:
            if name in known and name in state.trajectories:
                state.trajectories[name].forget()
            known[name] = [(_fixed(value), version) for value, version in conditions]
        layout = (sample.shape, sample.dtype, sample.device) if isinstance(sample, Tensor) else None
        if self._formats.setdefault(name, layout) != layout:
            self._formats[name] = layout
            state.begin_anew(name)
        return name

    def _begin_run(self) -> None:
        self._run = self._state.run_index
        scheduler = self.layout()[1]
        self.announced = () if scheduler is None else self._timesteps.announce(scheduler)
        self._started = False
        self._at: Any = None  # the last timestep: its value, or its memory, which is held
        self._held: Any = None
        self._passes: list[str] = []  # contexts of the passes of a step that the user did not name, in order
        self._done: set[str] = set()  # contexts that were called in this step
        self._conditions.clear()
        self._formats.clear()

    def _follow(self, timestep: Any, alike: Sequence[str]) -> str:
        """Go to the step of a call with this timestep; its context. alike: contexts with its conditions."""
        at = value = self._timesteps.value(timestep)
        if value is None and isinstance(timestep, Tensor) and timestep.ndim < 2:
            at = timestep.data_ptr(), tensor_version(timestep)
        same = at is not None and at == self._at
        self._at, self._held = at, timestep
        name = self._state.context_name
        named = name != DEFAULT_CONTEXT
        passes = [name] if named else self._passes
        mine = passes if named else [one for one in passes if one in alike]
        free = [one for one in mine or passes if one not in self._done]
        if same and (free or not (mine and self._repeats())):
            found = free[0] if free else name if named else PASS.format(len(passes))
        else:
            self._next_step(at, value, same)
            self._done.clear()
            found = mine[0] if mine else DEFAULT_CONTEXT
        if found not in passes:
            passes.append(found)
        self._done.add(found)
        return found

    def _repeats(self) -> bool:
        """Whether the next announced timestep is the same again, as of samplers of second order."""
        here, following = self.announced[self._index : self._index + 1], self._index + 1
        return bool(here) and self.announced[following : following + 1] == here

    def _next_step(self, at: Any, value: float | None, same: bool) -> None:
        state = self._state
        if not self._started:
            self._started, self._start = True, at
            found = None if value is None or not self.announced else self._find(value, 0)
            if found is None:
                self.announced = ()
            self.first = self._index = found or 0
            state.step_index = 0
            return
        following = self._index + 1
        if not self.announced:
            if at is not None and at == self._start:
                state.begin_anew()
            state.step_index += 1
            return
        found = following if same or value is None else self._find(value, following)
        if found is None and self._index != self.first:
            state.invalidate("another scheduler sampled")
            known = f"which the {type(self.layout()[1]).__name__} that began this run did not announce"
            text = "call `handle.wrap_scheduler(pipe)` with its pipeline, so that it begins runs too"
            other = "If a sampler leaves its timesteps, put `with handle.sampling_run():` around it"
            raise RuntimeError(
                f"the UNet was called with timestep {value:g}, {known}. If another scheduler samples now, {text}. {other}"
            )
        if found is None:  # a sampler that began at an announced timestep by chance
            found, self.announced = self._index + len(self.announced), ()
        if not -1 <= found - self._index <= MOST_SKIPPED + 1 or found == self.first:
            state.begin_anew()  # another picture, or another part of this one
        self._index, state.step_index = found, found - self.first

    def _find(self, value: float, start: int) -> int | None:
        """Index of an announced timestep: the first one from `start` on, or before it."""
        if self.announced[start : start + 1] == [value]:
            return start
        order = (*range(start, len(self.announced)), *range(min(start, len(self.announced))))
        for distance in (0.0, NEAR * max(map(abs, self.announced))):
            for index in order:
                if abs(self.announced[index] - value) <= distance:
                    return index
        return None


def _conditions_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Conditions:
    """What a call is conditioned on beside sample and timestep, but for the residuals of a ControlNet or T2I-Adapter,
    which change from call to call like the sample."""
    values = list(args[2:])
    values += [kwargs[name] for name in kwargs if name not in NO_CONDITIONS and "additional_residual" not in name]
    found = []
    for value in values:  # which grow
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, (list, tuple)):
            values += value
        elif value is not None:
            found.append((value, tensor_version(value) if isinstance(value, Tensor) else 0))
    return found


def _fixed(value: Any) -> Any:
    """`value` to be kept: a copy if it is on the host and its changes in place are not counted."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() and value.device.type == "cpu" else value


def _same(old: Conditions, new: Conditions) -> bool:
    return len(old) == len(new) and all(map(_unchanged, old, new))


def _unchanged(old: tuple[Any, int], new: tuple[Any, int]) -> bool:
    """Whether it is the same object, memory or, on the host, value."""
    (before, version), (now, version_now) = old, new
    if before is now:
        return version == version_now
    if not (isinstance(before, Tensor) and isinstance(now, Tensor)):
        return isinstance(before, (bool, int, float, str)) and bool(before == now)
    if before.shape != now.shape or before.dtype != now.dtype or before.device != now.device:
        return False
    if before.data_ptr() == now.data_ptr() and before.stride() == now.stride():
        return version == version_now
    return before.device.type == "cpu" and version == tensor_version(before) and torch.equal(before, now)
