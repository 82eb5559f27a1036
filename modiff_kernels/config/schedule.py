"""`StepSchedule`: which calls of a run compute the network, and what takes the place of the others."""

import ast
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

from modiff_kernels.config.check import is_int, not_allowed

UPDATE = "U"
HOLD, FORECAST = "H", "F"
RULES = {"forecast": FORECAST, "hold": HOLD}
ACTION_NAMES = {UPDATE: "update", **{letter: rule for rule, letter in RULES.items()}}

AUTO = re.compile(r"auto(?: [1-9]\d*)?")  # with the number of evaluations

_error = functools.partial(not_allowed, "StepSchedule")
_PATTERN = re.compile(r"(?:[UHF]\d*)+")
_PART = re.compile(r"([UHF])(\d*)")


@dataclasses.dataclass(frozen=True)
class StepSchedule:
    """An action for every call of a run. Immutable; impossible values raise ValueError naming field and value.

    rule: "forecast" or "hold", which compute the calls that `every`, `first` and `last` say; or a pattern with a letter
        per call: U computes, F forecasts and H holds the network's output; a number repeats the letter before it, as in
        "U3F2UF2U". A pattern is stretched to the calls of the run.
    every: one call of this many is computed (2 or more). first, last: calls computed at both ends; first is 1 or more.
    weights: of what every call of the pattern returns, a row of numbers for each: of the last computed outputs, the
        newest first (its own where it is computed), then of the sample. `fit_schedule` makes them; they hold for runs
        with as many calls. None: the polynomial, and the network's output where it is computed.
    stochastic: says that skipping with a sampler that adds noise is meant, and keeps the warning away."""

    rule: str
    every: int = 2
    first: int = 3
    last: int = 1
    stochastic: bool = False
    weights: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str) or (self.rule not in RULES and not _PATTERN.fullmatch(self.rule)):
            raise _error("rule", self.rule, f"{', '.join(RULES)}, or a pattern of U, F and H such as 'U3F2UF2U'")
        if self.rule not in RULES:
            self._check_pattern()
        for field, least in (("every", 2), ("first", 1), ("last", 0)):
            if not is_int(value := getattr(self, field), least):
                raise _error(field, value, f"a whole number, {least} or more")
        if self.stochastic not in (True, False):
            raise _error("stochastic", self.stochastic, "True or False")
        if self.weights is not None:
            self._check_weights()

    def _check_weights(self) -> None:
        pattern = "" if self.rule in RULES else _expanded(self.rule)
        try:
            rows = tuple(tuple(map(float, row)) for row in self.weights or ())
        except (TypeError, ValueError):
            rows = ()
        if len(rows) != len(pattern) or not all(len(row) > 1 and all(map(math.isfinite, row)) for row in rows):
            text = f"a row of two or more finite numbers for each of the {len(pattern)} calls of a pattern"
            raise _error("weights", self.weights, text)
        for call, row in enumerate(rows):
            if (held := pattern[: call + 1].count(UPDATE)) < len(row) - 1:
                raise _error("weights", row, f"at most {held} outputs and the sample at call {call}")
        object.__setattr__(self, "weights", rows)

    def _check_pattern(self) -> None:
        pattern = _expanded(self.rule)
        shortest = re.sub(r"(.)\1+", lambda found: f"{found[1]}{len(found[0])}", pattern)
        object.__setattr__(self, "rule", shortest)
        if pattern[:1] != UPDATE:
            raise _error("rule", shortest, "a pattern that begins with U: nothing can be repeated at the first call")
        if set(pattern) == {UPDATE} and self.weights is None:
            raise _error("rule", shortest, "a pattern with H or F, or no schedule at all to compute every call")
        for field in ("every", "first", "last"):
            if getattr(self, field) != getattr(type(self), field):
                raise _error(field, getattr(self, field), "nothing: a pattern says itself which calls are computed")

    @classmethod
    def parse(cls, text: str) -> "StepSchedule":
        """Read what `str(schedule)` writes: the rule or pattern, then field=value where it is not the default."""
        if not isinstance(text, str) or not text.split():
            raise ValueError(f"StepSchedule: {text!r} is no schedule; give e.g. 'forecast every=3' or 'U3F2UF2U'")
        rule, *words = text.split()
        names = [field.name for field in dataclasses.fields(cls)[1:]]
        options: dict[str, Any] = {}
        for word in words:
            name, _, value = word.partition("=")
            if not value or name not in names:
                allowed = ", ".join(f"{name}=" for name in names)
                raise ValueError(f"StepSchedule: {word!r} in {text!r} is not allowed; give {allowed} without spaces")
            try:
                options[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):  # a word
                options[name] = value
        return cls(rule, **options)

    def __str__(self) -> str:
        options = [field for field in dataclasses.fields(self)[1:] if getattr(self, field.name) != field.default]
        values = (f"{field.name}={getattr(self, field.name)}".replace(" ", "") for field in options)
        return " ".join([self.rule, *values])

    def without_weights(self) -> str:
        """The text of the pattern alone, as it is printed."""
        return " ".join(word for word in str(self).split() if not word.startswith("weights="))

    @property
    def needs_axis(self) -> bool:
        """Whether some calls are forecast."""
        return self.weights is not None or FORECAST in (RULES.get(self.rule) or _expanded(self.rule))

    def actions(self, calls: int) -> str:
        """A letter for each of the `calls` calls of a run, the first of them U. A pattern keeps its computed calls at
        the same parts of the run; where there are no more calls than that, all are computed."""
        if not is_int(calls, 1):
            raise ValueError(f"StepSchedule: a run of {calls!r} calls cannot be; give a whole number, 1 or more")
        if self.rule in RULES:
            inner = range(self.first, calls - self.last)
            skipped = {i for i in inner if (i - self.first) % self.every != self.every - 1}
            return "".join(RULES[self.rule] if i in skipped else UPDATE for i in range(calls))
        pattern = _expanded(self.rule)
        if calls == len(pattern):
            return pattern
        if calls <= pattern.count(UPDATE):
            return UPDATE * calls
        ratio = (calls - 1) / (len(pattern) - 1)
        computed = {round(i * ratio) for i, letter in enumerate(pattern) if letter == UPDATE}
        skips = [(i * ratio, letter) for i, letter in enumerate(pattern) if letter != UPDATE]
        nearest = [min((abs(place - i), letter) for place, letter in skips)[1] for i in range(calls)]
        return "".join(UPDATE if i in computed else nearest[i] for i in range(calls))

    def describe(self) -> str:
        """One line: the schedule, and what takes the place of calls."""
        how = "forecast" if self.needs_axis else "held"
        how = how if self.weights is None else "forecast with fitted weights"
        return f"{self.without_weights()}: skips calls, {how}"


def _expanded(pattern: str) -> str:
    return "".join(letter * int(count or 1) for letter, count in _PART.findall(pattern))
