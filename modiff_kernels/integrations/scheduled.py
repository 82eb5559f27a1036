"""Carries a `StepSchedule` out: takes the place of a UNet's `forward`.

A call that is held or forecast never enters the UNet: its layers keep their x_hat and y_hat, which stay consistent, and
see a larger residual next time."""

import contextlib
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from modiff_kernels.config.schedule import ACTION_NAMES, HOLD, UPDATE, StepSchedule
from modiff_kernels.integrations.hooks import wrap_forward
from modiff_kernels.integrations.steps import Steps
from modiff_kernels.nn import ModulationState
from modiff_kernels.planning import clock
from modiff_kernels.planning.clock import DEGREE, combine, polynomial
from modiff_kernels.planning.stored import StoredSchedule, best_of

WITH_SCHEDULER = "`with handle.sampling_run(scheduler=...):`"

JUST_BEGUN = "too little was computed since the context, or what it is conditioned on, began"
MANY_COMPUTED = 10  # calls for this reason, after which it is worth a warning

PART = StepSchedule("forecast", every=3)  # of runs that are the end of a fitted one


class Plan(NamedTuple):
    """What a schedule says of one run. letters: one per step. positions: of every step on the axis of polynomials;
    empty: its timestep. weights: of what the steps return, and the steps of the outputs that these belong to, the
    newest first; empty for polynomials."""

    letters: str = ""
    positions: Sequence[float] = ()
    weights: Sequence[tuple[Sequence[float], Sequence[int]]] = ()


class Trajectory:
    """One context of a scheduled run: its plan, what was done so far, and what a skipped call is made of.

    done: a letter per call so far. computed: steps whose outputs still hold. instead: how many calls were computed that
    are planned to be skipped, and why. values: the last computed outputs, copied, with their steps and positions.
    forms: the last outputs as returned, by `return_dict`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.length = max([DEGREE + 1, *[len(nodes) for _, nodes in plan.weights]])
        self.done: list[str] = []
        self.computed: list[int] = []
        self.instead: Counter[str] = Counter()
        self.values: dict[int, tuple[float, Tensor]] = {}
        self.forms: dict[bool, Any] = {}

    def push(self, step: int, position: float, value: Tensor) -> None:
        """Keep a copy of `value`. It takes the place of one at the same position, and of all those of another shape."""
        self.computed.append(step)
        kept = [item for item in self.values.items() if item[1][0] != position and item[1][1].shape == value.shape]
        self.values = dict([*kept, (step, (position, value.detach().clone()))][-self.length :])

    def has_fitted(self, step: int) -> bool:
        """Whether all outputs are held that the fitted weights of this step belong to."""
        return step < len(self.plan.weights) and all(node in self.values for node in self.plan.weights[step][1])

    def at(self, step: int, position: float | None, sample: Tensor) -> Tensor:
        """What the step returns, a new tensor in the dtype of the outputs: by fitted weights, or the polynomial through
        the last values at `position`, or the last value for None."""
        if self.has_fitted(step):
            weights, nodes = self.plan.weights[step]
            return combine(weights, [self.values[node][1] for node in nodes], sample)
        places, values = zip(*list(self.values.values())[-1 - DEGREE :])
        return values[-1].clone() if position is None else combine(polynomial(places, position), values)

    def can_skip(self, step: int, form: bool) -> bool:
        """Whether `step` can be made: as many outputs are there as the plan counts on, none left out in between."""
        letters = self.plan.letters[:step]
        planned = [i for i, letter in enumerate(letters) if letter == UPDATE][-1 - DEGREE :]
        enough = form in self.forms and len(self.computed) >= len(planned)
        return enough and all(i in self.computed or i < self.computed[0] for i in planned)

    def forget(self) -> None:
        """What was computed does not hold any more."""
        self.computed.clear()
        self.values.clear()

    def nbytes(self) -> int:
        return sum(value.nbytes for _, value in self.values.values())

    def describe(self) -> str:
        counts = ", ".join(f"{n} {ACTION_NAMES[letter]}" for letter, n in Counter(self.done).items())
        reasons = [f"; {n} computed that the schedule would skip: {why}" for why, n in self.instead.items()]
        return f"{''.join(self.done)} ({counts}{''.join(reasons)})"


class ScheduledUNet:
    """Installs a schedule. steps: those of the run. stored: those from which "auto" chooses."""

    def __init__(
        self, unet: nn.Module, state: ModulationState, schedule: StepSchedule | str | None,
        steps: Callable[[], Steps | None], stored: Sequence[StoredSchedule] = (),
    ) -> None:  # fmt: skip
        self.unet, self.state, self.schedule = unet, state, schedule
        self._steps, self.stored = steps, stored
        self._warned: set[str] = set()
        self._in_use: StepSchedule | None = None
        self._found: StoredSchedule | None = None  # where that is stored
        self._all_because: str | None = None  # why all calls of this run are computed from now on
        self._plan = Plan()
        parameters = inspect.signature(unet.forward).parameters
        self._form_place = [*parameters].index("return_dict") if "return_dict" in parameters else len(parameters)

    def install(self, undo: contextlib.ExitStack) -> None:
        self.state.scheduled = True
        undo.callback(setattr, self.state, "scheduled", False)
        wrap_forward(self.unet, self._forward, undo)

    def describe(self) -> str:
        """One line about the schedule, with the calls of the last run where there was one."""
        chosen: Any = self._in_use if isinstance(self.schedule, str) else self.schedule
        text = str(self.schedule or "none") if chosen is None else chosen.describe()
        if isinstance(self.schedule, str) and chosen is not None:
            path = self._found and self._found.path
            text = f"{self.schedule}, last {f'from {path.parent.name}/{path.name}: ' if path else ''}{text}"
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
            self._all_because = self._in_use = self._found = None
            self._plan = self._lay_out() if self.schedule else Plan()
        trajectory = state.trajectories.setdefault(state.context_name, Trajectory(self._plan))
        step, action, position, plan = state.step_index, UPDATE, None, trajectory.plan
        if 0 <= step < len(plan.letters):
            action = plan.letters[step]
            timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
            position = plan.positions[step] if plan.positions else clock.host_timestep(timestep)
        asked = bool(kwargs.get("return_dict", args[self._form_place] if len(args) > self._form_place else True))
        if action != UPDATE and (position is None or self._all_because or not trajectory.can_skip(step, asked)):
            trajectory.instead[self._all_because or JUST_BEGUN] += 1
            if trajectory.instead[JUST_BEGUN] == MANY_COMPUTED:
                self._warn(f"{JUST_BEGUN}; pass the same tensors of conditions at every call to which they apply")
            action = UPDATE
        trajectory.done.append(action)
        sample = args[0] if args else kwargs.get("sample")
        if action == UPDATE:
            output = trajectory.forms[asked] = original(*args, **kwargs)
            if position is not None:
                trajectory.push(step, position, sample_of(output))
                if trajectory.has_fitted(step) and not self._all_because:
                    return in_form(output, trajectory.at(step, None, sample))
            return output
        state.action = ACTION_NAMES[action]
        return in_form(trajectory.forms[asked], trajectory.at(step, None if action == HOLD else position, sample))

    def _lay_out(self) -> Plan:
        """The plan of the run that begins."""
        steps: Any = self._steps()
        scheduler, timesteps, name = steps.scheduler, steps.announced[steps.first :], type(steps.scheduler).__name__
        chosen: Any = None if isinstance(self.schedule, str) else self.schedule
        calls, reason = steps.calls if scheduler is None else len(timesteps), None
        words = str(self.schedule).split()
        asked = int(words[1]) if chosen is None and len(words) > 1 else None  # "auto 8"
        if scheduler is None and chosen is None:
            raise ValueError(f"schedule='auto' chooses by the sampler; open the run with {WITH_SCHEDULER}")
        if calls is None:
            text = f"so its last ones are not; open it with {WITH_SCHEDULER}, or num_calls=..."
            raise ValueError(f"schedule: the number of calls of this run is not known, {text}")
        if scheduler is not None and clock.is_stochastic(scheduler) and not (chosen and chosen.stochastic):
            reason = f"{name} adds noise at its steps"
        elif scheduler is not None and not timesteps:
            reason = f"the UNet is called with other timesteps than {name} announced"
        elif chosen is None and not steps.first and (found := best_of(self.stored, scheduler, timesteps, asked)):
            self._found, chosen = found, found.schedule
        elif chosen is None and asked is not None:
            reason = f"no schedule of {asked} evaluations is stored for it; `modiff calibrate --schedule` fits one"
        elif chosen is None and (chosen := clock.automatic(scheduler, calls)) is None:
            reason = f"{calls} calls are few"
        elif chosen.weights is None and set(chosen.actions(calls)) == {UPDATE}:
            reason = f"a run of {calls} calls is too short to skip any"
        if any(one._forward_hooks or one._forward_pre_hooks for path, one in self.unet.named_modules() if path):
            reason = "hooks are on modules of the UNet, which see computed calls alone"
        if reason is not None:
            self._compute_all(reason)
            return Plan()
        self._in_use = chosen
        if not chosen.needs_axis:
            return Plan(chosen.actions(calls), range(calls))
        places = clock.positions(steps.announced, scheduler)[steps.first :] if scheduler is not None else []
        if chosen.weights is None:
            return Plan(chosen.actions(calls), places)
        if not steps.first:
            return _fitted_plan(chosen, calls, places)
        # What a fit gives late in a run makes up for errors of before, which the part of a run does not make.
        self._warn(f"it was fitted to whole runs; from call {steps.first} on it is {str(PART)!r} instead")
        return Plan(PART.actions(calls), places)

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


def _fitted_plan(schedule: StepSchedule, calls: int, places: Sequence[float]) -> Plan:
    rows: Any = schedule.weights
    if calls != len(rows):
        text = "fit one for this run with `modiff calibrate --schedule`, or give its pattern alone:"
        text = f"{text} {schedule.without_weights()!r}"
        raise ValueError(f"schedule: it was fitted to runs of {len(rows)} calls, and this one has {calls}; {text}")
    letters = schedule.actions(calls)
    computed = [call for call, letter in enumerate(letters) if letter == UPDATE]
    nodes = [[call for call in computed if call <= i][: -len(row) : -1] for i, row in enumerate(rows)]
    return Plan(letters, places or range(calls), list(zip(rows, nodes)))


def sample_of(output: Any) -> Tensor:
    """What a network returns: a tensor, or the first entry of a tuple or output object. ValueError for another."""
    found = output if isinstance(output, Tensor) or not hasattr(output, "__getitem__") else output[0]
    found = getattr(found, "sample", found)
    if not isinstance(found, Tensor):
        text = "which are not one tensor for all of the batch; leave out the schedule"
        raise ValueError(f"schedule: the network returns {type(output).__name__} of {type(found).__name__}, {text}")
    return found


def in_form(form: Any, sample: Tensor) -> Any:
    """`sample` as the UNet returned the output `form`: a tensor, a tuple, or an output object."""
    if isinstance(form, Tensor):
        return sample
    if isinstance(form, tuple):
        return (sample, *form[1:])
    name = next(iter(form), "sample") if isinstance(form, Mapping) else "sample"
    return type(form)(**{**(form if isinstance(form, Mapping) else {}), name: sample})
