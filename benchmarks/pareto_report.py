"""Reads the report of benchmarks/pareto.py: what every way to spend fewer evaluations reaches at which cost.

A curve is a list of (evaluations, dB to the converged trajectory), by rising cost. dB are those of `converged_db`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

EVERY_CALL = "every call"
FORECAST = "forecast"

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One sampler and number of steps. every_call_db: what it reaches without schedule.

    schedules: the best of every method at each of its costs. fewer_steps: the same sampler with every call computed,
    the steps of the panel the last. any_sampler: the best of all samplers that compute every call, up to each cost.
    """

    sampler: str
    steps: int
    every_call_db: float
    schedules: dict[str, Curve]
    fewer_steps: Curve
    any_sampler: Curve


@dataclass(frozen=True)
class Line:
    """What is reached at one cost, in dB to the converged trajectory; None: nothing of it costs so little.

    schedules: by method, the best at no greater cost. deepcache_db: on the line between its intervals.
    """

    panel: Panel
    evaluations: float
    schedules: dict[str, float | None]
    deepcache_db: float | None
    fewer_steps_db: float | None
    any_sampler_db: float | None


def panels(report: dict[str, Any], network: str) -> list[Panel]:
    """Every sampler and number of steps that schedules were tried on, in the order of the rows.

    Samplers that were run with one number of steps are left out: there is nothing to compare with.
    """
    rows = [row for row in report["rows"] if row["network"] == network]
    plain = [row for row in rows if row["method"] == EVERY_CALL]
    found = []
    for sampler, steps in dict.fromkeys((row["sampler"], row["steps"]) for row in rows):
        own = [row for row in rows if (row["sampler"], row["steps"]) == (sampler, steps)]
        methods = dict.fromkeys(row["method"] for row in own if row["method"] != EVERY_CALL)
        fewer = _curve(row for row in plain if row["sampler"] == sampler and row["steps"] <= steps)
        if not methods or len(fewer) < 2:
            continue
        schedules = {method: _curve(row for row in own if row["method"] == method) for method in methods}
        rivals = _rising(_curve(row for row in plain if row["evaluations"] <= fewer[-1][0]))
        found.append(Panel(sampler, steps, fewer[-1][1], schedules, fewer, rivals))
    return found


def lines(report: dict[str, Any], network: str) -> list[Line]:
    """For every panel the costs of its uniform forecasts, the highest first."""
    return [
        Line(
            panel,
            cost,
            {method: best_db(curve, cost) for method, curve in panel.schedules.items() if method != "DeepCache"},
            between_db(panel.schedules.get("DeepCache", []), cost),
            best_db(panel.fewer_steps, cost),
            best_db(panel.any_sampler, cost),
        )
        for panel in panels(report, network)
        for cost, _ in reversed(panel.schedules[FORECAST])
    ]


def best_db(curve: Curve, evaluations: float) -> float | None:
    """The most that `curve` reaches for no more than `evaluations`."""
    return max((db for cost, db in curve if cost <= evaluations + 1e-9), default=None)


def between_db(curve: Curve, evaluations: float) -> float | None:
    """What `curve` reaches for just `evaluations`, on straight lines between its points; beyond the last, its value."""
    if not curve or evaluations < curve[0][0]:
        return None
    for (low, low_db), (high, high_db) in itertools.pairwise(curve):
        if evaluations <= high:
            return low_db + (high_db - low_db) * (evaluations - low) / (high - low)
    return curve[-1][1]


def wins(pairs: Iterable[tuple[float | None, float | None]]) -> tuple[int, int]:
    """How often the first is above the second, and of how many pairs that have both."""
    both = [(first, second) for first, second in pairs if first is not None and second is not None]
    return sum(first > second for first, second in both), len(both)


def _curve(rows: Iterable[dict[str, Any]]) -> Curve:
    """The best of `rows` at each cost."""
    best: dict[float, float] = {}
    for row in rows:
        cost = row["evaluations"]
        best[cost] = max(row["converged_db"], best.get(cost, row["converged_db"]))
    return sorted(best.items())


def _rising(curve: Sequence[tuple[float, float]]) -> Curve:
    """The points of `curve` that are above all cheaper ones."""
    kept: Curve = []
    for cost, db in curve:
        if not kept or db > kept[-1][1]:
            kept.append((cost, db))
    return kept
