"""Carries a `StepSchedule` out: takes the place of a UNet's `forward`.

A call that is held or forecast never enters the UNet: its layers keep their x_hat and y_hat, which stay consistent, and
see a larger residual next time.
"""

import contextlib
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from modiff_kernels.config.schedule import ACTION_NAMES, HOLD, UPDATE, StepSchedule
from modiff_kernels.integrations.hooks import wrap_forward
from modiff_kernels.integrations.steps import Steps
from modiff_kernels.nn import ModulationState
from modiff_kernels.planning import clock
from modiff_kernels.planning.stored import StoredSchedule

WITH_SCHEDULER = "`with handle.sampling_run(scheduler=...):`"

NOTHING_SKIPPED: tuple[str, Sequence[float], int] = "", (), 0
JUST_BEGUN = "too little was computed since the context, or what it is conditioned on, began"
MANY_COMPUTED = 10  # calls for this reason, after which it is worth a warning


class Trajectory:
    """One context of a scheduled run: its plan, what was done so far, and what a skipped call is made of.

    planned: a letter per step of the run. positions: of every step on the axis; empty: its timestep. order: degree of
    forecasts. done: a letter per call so far. computed: steps whose outputs still hold. instead: how many calls were
    computed that are planned to be skipped, and why. values: the last computed outputs, copied, with
    their positions. forms: the last outputs as returned, by `return_dict`.
    """

    def __init__(self, planned: str, positions: Sequence[float], order: int) -> None:
        self.planned, self.positions, self.length = planned, positions, order + 1
        self.done: list[str] = []
        self.computed: list[int] = []
        self.instead: Counter[str] = Counter()
        self.values: list[tuple[float, Tensor]] = []
        self.forms: dict[bool, Any] = {}

    def push(self, position: float, value: Tensor) -> None:
        """Keep a copy of `value`. It takes the place of one at the same position, and of all those of another shape."""
        kept = [(at, old) for at, old in self.values if at != position and old.shape == value.shape]
        self.values = [*kept, (position, value.detach().clone())][-self.length :]

    def at(self, position: float | None) -> Tensor:
        """The polynomial through the values at `position`, or the last value for None: a new tensor in their dtype."""
        if position is None or len(self.values) == 1:
            return self.values[-1][1].clone()
        total: Tensor | None = None  # in float32
        for node, value in self.values:
            others = [other for other, _ in self.values if other != node]
            weight = math.prod((position - other) / (node - other) for other in others)
            total = value.float() * weight if total is None else total.add_(value.float(), alpha=weight)
        return total.to(self.values[0][1].dtype)

    def can_skip(self, step: int, form: bool) -> bool:
        """Whether `step` can be made: as many outputs are there as the plan counts on, none left out in between."""
        planned = [i for i, letter in enumerate(self.planned[:step]) if letter == UPDATE][-self.length :]
        enough = form in self.forms and len(self.computed) >= len(planned)
        return enough and all(i in self.computed or i < self.computed[0] for i in planned)

    def forget(self) -> None:
        """What was computed does not hold any more."""
        self.computed.clear()
        self.values.clear()

    def nbytes(self) -> int:
        return sum(value.nbytes for _, value in self.values)

    def describe(self) -> str:
        counts = ", ".join(f"{n} {ACTION_NAMES[letter]}" for letter, n in Counter(self.done).items())
        reasons = [f"; {n} computed that the schedule would skip: {why}" for why, n in self.instead.items()]
        return f"{''.join(self.done)} ({counts}{''.join(reasons)})"


class ScheduledUNet:
    """Installs a schedule. steps: those of the run. stored: "auto" where it fits."""

    def __init__(
        self,
        unet: nn.Module,
        state: ModulationState,
        schedule: StepSchedule | str | None,
        steps: Callable[[], Steps | None],
        stored: StoredSchedule | None = None,
    ) -> None:
        self.unet, self.state, self.schedule = unet, state, schedule
        self._steps, self._stored = steps, stored
        self._warned: set[str] = set()
        self._in_use: StepSchedule | None = None
        self._all_because: str | None = None  # why all calls of this run are computed from now on
        self._plan = NOTHING_SKIPPED
        parameters = inspect.signature(unet.forward).parameters
        self._form_place = [*parameters].index("return_dict") if "return_dict" in parameters else len(parameters)

    def install(self, undo: contextlib.ExitStack) -> None:
        self.state.scheduled = True
        undo.callback(setattr, self.state, "scheduled", False)
        wrap_forward(self.unet, self._forward, undo)

    def describe(self) -> str:
        """One line about the schedule, with the calls of the last run where there was one."""
        chosen = self._in_use if self.schedule == "auto" else self.schedule
        text = str(self.schedule or "none") if chosen is None else chosen.describe()
        if self.schedule == "auto" and chosen is not None:
            found = self._stored is not None and chosen is self._stored.schedule
            text = f"auto, last {f'from {self._stored.path}: ' if found else ''}{text}"
        text += f"; every call is computed, because {self._all_because}" if self._all_because else ""
        runs = [f"last run, context {name}: {run.describe()}" for name, run in self.state.trajectories.items()]
        return "\n  ".join([text, *runs])

    def hear_of_noise(self, what: str) -> None:
        """`what` adds noise at the steps of this run, which a skipped call does not see."""
        if self._all_because is None and self._in_use is not None and not self._in_use.stochastic:
            self._compute_all(f"{what} adds noise at its steps")

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if not state.trajectories:
            self._all_because = self._in_use = None
            self._plan = self._lay_out() if self.schedule else NOTHING_SKIPPED
        trajectory = state.trajectories.setdefault(state.context_name, Trajectory(*self._plan))
        step, action, position = state.step_index, UPDATE, None
        if 0 <= step < len(trajectory.planned):
            action = trajectory.planned[step]
            timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
            position = trajectory.positions[step] if trajectory.positions else clock.host_timestep(timestep)
        asked = bool(kwargs.get("return_dict", args[self._form_place] if len(args) > self._form_place else True))
        if action != UPDATE and (position is None or self._all_because or not trajectory.can_skip(step, asked)):
            trajectory.instead[self._all_because or JUST_BEGUN] += 1
            if trajectory.instead[JUST_BEGUN] == MANY_COMPUTED:
                self._warn(f"{JUST_BEGUN}; pass the same tensors of conditions at every call to which they apply")
            action = UPDATE
        trajectory.done.append(action)
        if action == UPDATE:
            output = original(*args, **kwargs)
            if position is not None:
                trajectory.computed.append(step)
                trajectory.push(position, _sample_of(output))
            trajectory.forms[asked] = output
            return output
        state.action = ACTION_NAMES[action]
        return _in_form(trajectory.forms[asked], trajectory.at(None if action == HOLD else position))

    def _lay_out(self) -> tuple[str, Sequence[float], int]:
        """A letter per step of the run that begins, their positions on the axis, and the order of forecasts."""
        steps: Any = self._steps()
        scheduler, timesteps, name = steps.scheduler, steps.announced[steps.first :], type(steps.scheduler).__name__
        chosen: Any = None if self.schedule == "auto" else self.schedule
        calls, reason = steps.calls if scheduler is None else len(timesteps), None
        if scheduler is None and chosen is None:
            raise ValueError(f"schedule='auto' chooses by the sampler; open the run with {WITH_SCHEDULER}")
        if calls is None:
            text = f"so its last ones are not; open it with {WITH_SCHEDULER} (or num_calls=..., for axis=timestep)"
            raise ValueError(f"schedule: the number of calls of this run is not known, {text}")
        if scheduler is not None and clock.is_stochastic(scheduler) and not (chosen and chosen.stochastic):
            reason = f"{name} adds noise at its steps"
        elif scheduler is not None and not timesteps:
            reason = f"the UNet is called with other timesteps than {name} announced"
        elif chosen is None and self._stored is not None and self._stored.fits(scheduler, timesteps):
            chosen = self._stored.schedule
        elif chosen is None and (chosen := clock.automatic(scheduler, calls)) is None:
            reason = f"{calls} calls are few"
        elif set(chosen.actions(calls)) == {UPDATE}:
            reason = f"a run of {calls} calls is too short to skip any"
        if reason is not None:
            self._compute_all(reason)
            return NOTHING_SKIPPED
        self._in_use = chosen
        if not chosen.needs_axis:
            return chosen.actions(calls), range(calls), 0
        if scheduler is None and chosen.axis != "timestep":
            text = f"open the run with {WITH_SCHEDULER}, or give a schedule with axis=timestep"
            raise ValueError(f"schedule: axis={chosen.axis} needs the noise levels of the sampler; {text}")
        places = [] if scheduler is None else clock.positions(chosen.axis, steps.announced, scheduler)[steps.first :]
        return chosen.actions(calls), places, chosen.order

    def _compute_all(self, reason: str) -> None:
        """Compute every call of this run from now on."""
        self._all_because = reason
        advice = "; stochastic=True in the schedule skips all the same" if "noise" in reason else ""
        self._warn(f"every call is computed, because {reason}{advice}")

    def _warn(self, text: str) -> None:
        text = f"schedule {str(self.schedule)!r}: {text}"
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=2)


def _sample_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def _in_form(form: Any, sample: Tensor) -> Any:
    """`sample` as the UNet returned the output `form`: a tensor, a tuple, or an output object."""
    if isinstance(form, Tensor):
        return sample
    if isinstance(form, tuple):
        return (sample, *form[1:])
    return type(form)(sample=sample)
