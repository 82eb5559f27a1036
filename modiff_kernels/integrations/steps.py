"""Where a UNet call stands in its run: in which step and context, and what of before still holds.

Pipelines call a UNet several times per step: for guidance, for a corrector, for the views of a panorama. Each of these
passes is a trajectory of its own. They are told apart by what they are conditioned on, and else by their order; calls
are of one step if their timestep is the same. All of it is known on the host: nothing reads a device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modiff_kernels.integrations.forward import HostTimesteps
from modiff_kernels.nn import ModulationState
from modiff_kernels.nn.cache import tensor_version
from modiff_kernels.nn.run import DEFAULT_CONTEXT
from modiff_kernels.planning import clock

PASS = f"{DEFAULT_CONTEXT}/{{}}"  # context of the second pass of a step, which is number 1, and of later ones
NOT_CONDITIONS = ("sample", "timestep", "return_dict")
MOST_AHEAD = 4  # announced timesteps that a call may be ahead of the one before; it may also be one behind
NEAR = 5e-4  # of the largest timestep: as near to an announced one is what the UNet gets of it, in float16 too


class Steps:
    """Follows the calls of the run that has just begun. calls, scheduler: how many were announced, and who samples.
    announced: the timesteps of the scheduler if the calls are at them, else empty. first: index of the first call's."""

    def __init__(self, state: ModulationState, timesteps: HostTimesteps, calls: int | None, scheduler: Any) -> None:
        self.run_index, self.calls, self.scheduler = state.run_index, calls, scheduler
        self.announced: Sequence[float] = [] if scheduler is None else timesteps.announce(scheduler)
        self.first = 0
        self._state, self._timesteps = state, timesteps
        self._index: int | None = None
        self._at: Any = None  # the last timestep: its value, or its memory, which is held
        self._passes: list[str] = []  # contexts of the passes of a step that the user did not name, in order
        self._done: set[str] = set()  # contexts that were called in this step
        self._sample: tuple[Any, int] = None, 0  # of the last call, with its version
        self._known: dict[str, tuple[Any, list[tuple[Any, int]]]] = {}  # by context: format of the sample, conditions

    def place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Take the next call; its context. A context begins anew where another picture begins or the sample has another
        format; a schedule forgets where the conditions are others. RuntimeError for a timestep of another scheduler."""
        state, sample = self._state, args[0] if args else kwargs.get("sample")
        form = (sample.shape, sample.dtype, sample.device) if isinstance(sample, Tensor) else None
        conditions = _conditions_of(args, kwargs)
        known = [(name, old) for name, (_, old) in self._known.items() if len(old) == len(conditions)]
        alike = [name for name, old in known if all(map(_unchanged, old, conditions))]
        before, self._sample = self._sample, (sample, tensor_version(sample) if isinstance(sample, Tensor) else 0)
        again = before[0] is sample and before[1] == self._sample[1]
        name = self._follow(args[1] if len(args) > 1 else kwargs.get("timestep"), alike, again)
        if name in self._known and self._known[name][0] != form:
            state.begin_anew(name)
        elif name not in alike and name in state.trajectories:
            state.trajectories[name].forget()
        self._known[name] = form, conditions
        return name

    def _follow(self, timestep: Any, alike: Sequence[str], again: bool) -> str:
        """Go to the step of a call with this timestep; its context. alike: contexts with its conditions. again: whether
        the sample is that of the call before."""
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
        coming = self.announced[self._index or 0 :][:2]
        # Samplers of second order announce timesteps twice; loops that only take the time repeat everything.
        repeats = again or (len(coming) == 2 and coming[0] == coming[1])
        if same and (free or not (mine and repeats)):
            found = free[0] if free else name if named else PASS.format(len(passes))
        else:
            self._next_step(value, same)
            self._done.clear()
            found = mine[0] if mine else DEFAULT_CONTEXT
        if found not in passes:
            passes.append(found)
        self._done.add(found)
        return found

    def _next_step(self, value: float | None, same: bool) -> None:
        index, state = self._index, self._state
        if index is None:
            if value is None and state.scheduled and self.announced:
                value = clock.host_timestep(self._held)  # read once a run
            found = None if value is None else self._find_in_units(value)
            self.announced = [] if found is None else self.announced
            self._index = self.first = found or 0
            self._start = self._at if found is None else None
            state.step_index = 0
            return
        found = index + 1
        if self.announced and not same and value is not None:
            found = self._find(self._scale * value + self._offset, found)
        if found is None and index == self.first:  # one of other timesteps was an announced one by chance
            found, self.announced, self._start = index + len(self.announced) + MOST_AHEAD, [], self._at
        if found is None:
            state.invalidate("another scheduler sampled")
            known = f"which the {type(self.scheduler).__name__} that began this run did not announce"
            text = "If another scheduler samples now, call `handle.wrap_scheduler(pipe)` with its pipeline, so that it"
            other = "begins runs too; if a sampler leaves its timesteps, put `with handle.sampling_run():` around it"
            raise RuntimeError(f"the UNet was called with timestep {value:g}, {known}. {text} {other}")
        begins = found == self.first or (not same and self._start is not None and self._at == self._start)
        if begins or not -1 <= found - index <= MOST_AHEAD:
            state.begin_anew()  # another picture, or another part of this one
        self._index, state.step_index = found, found - self.first

    def _find_in_units(self, value: float) -> int | None:
        """`_find` of the first call, whose network may get the timestep as part of all, of noise or of signal."""
        whole = float(getattr(getattr(self.scheduler, "config", None), "num_train_timesteps", None) or 1)
        forms = [(1.0, 0.0), (whole, 0.0), (-whole, whole)]
        for self._scale, self._offset in forms if value > 1 else [*forms[1:], forms[0]]:
            if (found := self._find(self._scale * value + self._offset, 0)) is not None:
                return found
        return None

    def _find(self, value: float, start: int) -> int | None:
        """Index of the announced timestep nearest to `value`, if near: from `start` on, or before it."""
        announced = self.announced
        if announced[start : start + 1] == [value]:
            return start
        order = [*range(start, len(announced)), *range(min(start, len(announced)))]
        found = min(order, key=lambda index: abs(announced[index] - value), default=None)
        dtype = getattr(self._held, "dtype", None)
        near = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else NEAR
        return None if found is None or abs(announced[found] - value) > near * max(announced) else found


def _conditions_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, int]]:
    """What a call is conditioned on, with versions. Residuals of a ControlNet change at every call, as the sample."""
    names = [name for name in kwargs if name not in NOT_CONDITIONS and "additional_residual" not in name]
    values, found = [*args[2:], *[kwargs[name] for name in names]], []
    for value in values:  # which grow
        if isinstance(value, (dict, list, tuple)):
            values += value.values() if isinstance(value, dict) else value
        elif value is not None:
            found.append((value, tensor_version(value) if isinstance(value, Tensor) else 0))
    return found


def _unchanged(old: tuple[Any, int], new: tuple[Any, int]) -> bool:
    """Whether it is the same object, memory or, on the host, value."""
    (before, version), (now, version_now) = old, new
    if before is now:
        return version == version_now
    if not isinstance(before, Tensor) or not isinstance(now, Tensor):
        return isinstance(before, (int, float, str)) and bool(before == now)
    if (before.shape, before.dtype, before.device) != (now.shape, now.dtype, now.device):
        return False
    if before.data_ptr() == now.data_ptr() and before.stride() == now.stride():
        return version == version_now
    return before.device.type == "cpu" and version == tensor_version(before) and torch.equal(before, now)
