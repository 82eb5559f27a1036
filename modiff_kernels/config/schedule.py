"""`StepSchedule`: which calls of a run compute the network, and what takes the place of the others."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

UPDATE = "U"
HOLD, FORECAST = "H", "F"
DEEP_HOLD, DEEP_FORECAST = "h", "f"
RULES = {"forecast": FORECAST, "hold": HOLD, "deep-forecast": DEEP_FORECAST, "deep-hold": DEEP_HOLD}
ACTION_NAMES = {UPDATE: "update", **{letter: rule for rule, letter in RULES.items()}}
ORDERS = (1, 2, 3)
AXES = ("timestep", "log_snr", "sigma", "root_sigma")

_PATTERN = re.compile(r"(?:[UHFhf]\d*)+")
_PART = re.compile(r"([UHFhf])(\d*)")
_OPTION = re.compile(r"(\w+)=(\S+)")


@dataclasses.dataclass(frozen=True)
class StepSchedule:
    """An action for every call of a run. Immutable; impossible values raise ValueError naming field and value.

    rule: "forecast", "hold" (the whole network is skipped), "deep-forecast", "deep-hold" (its deep levels are), which
        compute the calls that `every`, `first` and `last` say; or a pattern with a letter per call: U computes, F
        forecasts and H holds the network's output, f and h do so with the tensor that enters up block `level`; a number
        repeats the letter before it, as in "U3F2UF2U". A pattern is stretched to the calls of the run.
    every: one call of this many is computed (2 or more). first, last: calls computed at both ends; first is 1 or more.
    order: degree of the polynomial through the last order + 1 computed values: 1, 2 or 3. Where fewer were computed it
        is lower; through one value it is a hold.
    axis: what the polynomial is in: "timestep", "log_snr", "sigma" (noise over signal) or "root_sigma", its root.
    level: for deep actions, the up block from which on the network is computed in every call (1 or more). None: last.
    stochastic: says that skipping with a sampler that adds noise is meant, and keeps the warning away.
    """

    rule: str
    every: int = 2
    first: int = 3
    last: int = 1
    order: int = 2
    axis: str = "root_sigma"
    level: int | None = None
    stochastic: bool = False
    tolerance: dataclasses.InitVar[float | None] = None  # gone; refused with the reason

    def __post_init__(self, tolerance: float | None) -> None:
        if not isinstance(self.rule, str) or (self.rule not in RULES and not _PATTERN.fullmatch(self.rule)):
            raise _error("rule", self.rule, f"{', '.join(RULES)}, or a pattern of U, F, H, f, h such as 'U3F2UF2U'")
        if self.rule not in RULES:
            object.__setattr__(self, "rule", _shortened(_expanded(self.rule)))
            self._check_pattern()
        for field, least in (("every", 2), ("first", 1), ("last", 0)):
            if not (_is_int(getattr(self, field)) and getattr(self, field) >= least):
                raise _error(field, getattr(self, field), f"a whole number, {least} or more")
        for field, allowed in (("order", ORDERS), ("axis", AXES), ("stochastic", (True, False))):
            value = getattr(self, field)
            if value not in allowed or (field == "order" and not _is_int(value)):
                raise _error(field, value, f"one of {', '.join(map(str, allowed))}")
        if self.level is not None and not (_is_int(self.level) and self.level >= 1):
            raise _error("level", self.level, "the index of an up block, 1 or more, or None for the last")
        if self.level is not None and not self.is_deep:
            raise _error("level", self.level, f"None, because {self.rule!r} skips no deep levels")
        if tolerance is not None:
            raise _error(
                "tolerance",
                tolerance,
                "None: there is no adaptive mode any more; it read the device at every forecast, and in its study a "
                "schedule without it was better at equal cost",
            )

    @classmethod
    def uniform(cls, every: int = 2, **options: Any) -> "StepSchedule":
        """Forecasts the output of the whole network but at every `every`-th call."""
        return cls("forecast", every=every, **options)

    @classmethod
    def parse(cls, text: str) -> "StepSchedule":
        """Read what `str(schedule)` writes: the rule or pattern, then field=value where it is not the default."""
        words = text.split() if isinstance(text, str) else []
        if not words:
            raise ValueError(f"StepSchedule: {text!r} is no schedule; give e.g. 'forecast every=3' or 'U3F2UF2U'")
        names = [field.name for field in dataclasses.fields(cls)[1:]]
        options: dict[str, Any] = {}
        for word in words[1:]:
            found = _OPTION.fullmatch(word)
            if found is None or found[1] not in (*names, "tolerance"):
                allowed = ", ".join(f"{name}=" for name in names)
                raise ValueError(f"StepSchedule: {word!r} in {text!r} is not allowed; give {allowed} without spaces")
            options[found[1]] = _value(found[2])
        return cls(words[0], **options)

    def __str__(self) -> str:
        options = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)[1:]
            if getattr(self, field.name) != field.default
        ]
        return " ".join([self.rule, *options])

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "StepSchedule":
        """Read what `to_json` wrote; ValueError on anything else."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"StepSchedule: the text is not JSON ({error}); give what to_json() returns") from error
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or "rule" not in values or not set(values) <= {*names, "tolerance"}:
            raise ValueError(f"StepSchedule: {text!r} is not an object with a rule; the fields are {', '.join(names)}")
        return cls(**values)

    @property
    def is_deep(self) -> bool:
        """Whether some calls skip the deep levels only."""
        return bool({DEEP_HOLD, DEEP_FORECAST} & set(self._letters()))

    @property
    def needs_axis(self) -> bool:
        """Whether some calls are forecast."""
        return bool({FORECAST, DEEP_FORECAST} & set(self._letters()))

    def actions(self, calls: int) -> str:
        """A letter for each of the `calls` calls of a run, the first of them U.

        A rule keeps its share of computed calls. A pattern keeps its computed calls at the same parts of the run; where
        there are no more calls than that, all are computed.
        """
        if not _is_int(calls) or calls < 1:
            raise ValueError(f"StepSchedule: a run of {calls!r} calls cannot be; give a whole number, 1 or more")
        if self.rule in RULES:
            return "".join(
                UPDATE
                if i < self.first or i >= calls - self.last or (i - self.first) % self.every == self.every - 1
                else RULES[self.rule]
                for i in range(calls)
            )
        pattern = _expanded(self.rule)
        if calls <= pattern.count(UPDATE):
            return UPDATE * calls
        ratio = (calls - 1) / (len(pattern) - 1)
        computed = {round(i * ratio) for i, letter in enumerate(pattern) if letter == UPDATE}
        skips = [(i * ratio, letter) for i, letter in enumerate(pattern) if letter != UPDATE]
        nearest = [min((abs(place - i), letter) for place, letter in skips)[1] for i in range(calls)]
        return "".join(UPDATE if i in computed else nearest[i] for i in range(calls))

    def describe(self, calls: int | None = None) -> str:
        """One line: the schedule, what it skips, and how many of `calls` calls are computed in full."""
        what = ["the whole network"] if {HOLD, FORECAST} & set(self._letters()) else []
        if self.is_deep:
            what.append(f"the levels below up block {'-1' if self.level is None else self.level}")
        how = f", forecast in {self.axis} with order {self.order}" if self.needs_axis else ", held"
        count = "" if calls is None else f"; {self.actions(calls).count(UPDATE)} of {calls} calls are computed"
        return f"{self}: skips {' or '.join(what)}{how}{count}"

    def _letters(self) -> str:
        return RULES.get(self.rule) or _expanded(self.rule)

    def _check_pattern(self) -> None:
        pattern = _expanded(self.rule)
        if pattern[0] != UPDATE:
            raise _error("rule", self.rule, "a pattern that begins with U: nothing can be repeated at the first call")
        if set(pattern) == {UPDATE}:
            raise _error("rule", self.rule, "a pattern with H, F, h or f, or no schedule at all to compute every call")
        used = [name for name in ("every", "first", "last") if getattr(self, name) != type(self).__dict__[name]]
        if used:
            raise _error(used[0], getattr(self, used[0]), "nothing: a pattern says itself which calls are computed")


def _expanded(pattern: str) -> str:
    return "".join(letter * int(count or 1) for letter, count in _PART.findall(pattern))


def _shortened(letters: str) -> str:
    runs = (found[0] for found in re.finditer(r"(.)\1*", letters))
    return "".join(run[0] + (str(len(run)) if len(run) > 1 else "") for run in runs)


def _value(text: str) -> Any:
    """`text` as None, a truth value, a number, or itself."""
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _error(field: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"StepSchedule: {field}={value!r} is not allowed; give {allowed}")
