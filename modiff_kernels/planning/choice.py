"""Choosing the modes of a plan: the least time within a limit on the error and one on the state.

Errors add: that of the pictures is taken as the sum over the units of noise_of(SQNR) times a gain per mode, which comes
from whole runs in which every unit has that mode. It is an estimate; who uses it checks the plan it gives."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from modiff_kernels.config.plan import FLOAT_MODE, MODULATED, LayerPlan, Mode, ModeCost, noise_of

LEAST_US = 1e-9  # that a change costs, so that what costs nothing can be compared
Costs = Mapping[str, Sequence[ModeCost]]


def gains_of(costs: Costs, errors: Mapping[Mode, float]) -> dict[Mode, float]:
    """Error of the pictures per noise of a unit, by mode. errors: of the pictures with all units in that mode."""
    noises = {mode: sum(noise_of(_cost(unit, mode).sqnr_db) for unit in costs.values()) for mode in errors}
    return {mode: error / noises[mode] if noises[mode] > 0 else 0.0 for mode, error in errors.items()}


def error_of(costs: Costs, modes: Mapping[str, Mode], gains: Mapping[Mode, float]) -> float:
    return math.fsum(_error(_cost(costs[path], mode), gains) for path, mode in modes.items())


def choose(
    costs: Costs, gains: Mapping[Mode, float], max_error: float = math.inf, max_state_bytes: float = math.inf
) -> dict[str, Mode]:
    """Fast modes whose estimated error and state stay within the limits. costs: by unit, float among them, each with a
    time. Float has no error and no state, so there is always a choice. From the fastest modes on, single units change
    until the limits are kept, always the one that comes closest to them for the time it costs. Then every change that
    gains time within the limits, or state in the same time, is made, the largest gain first."""
    chosen = {path: min(unit, key=_rank) for path, unit in costs.items()}
    within = False
    while True:
        error = math.fsum(_error(cost, gains) for cost in chosen.values())
        state = sum(cost.state_bytes for cost in chosen.values())
        excess = _excess(error, max_error) + _excess(state, max_state_bytes)
        within = within or excess == 0  # for good: rounding must not bring a change back
        best, best_score = None, (0.0, 0)
        for path, old in chosen.items():
            for new in costs[path]:
                saved_us = _time_us(old) - _time_us(new)
                new_error = error - _error(old, gains) + _error(new, gains)
                new_state = state - old.state_bytes + new.state_bytes
                left = _excess(new_error, max_error) + _excess(new_state, max_state_bytes)
                score = (saved_us, state - new_state) if within else ((excess - left) / max(-saved_us, LEAST_US), 0)
                if score > best_score and not (within and left > 0):
                    best, best_score = (path, new), score
        if best is None:
            return {path: cost.mode for path, cost in chosen.items()}
        chosen[best[0]] = best[1]


def _excess(value: float, limit: float) -> float:
    return max(value - limit, 0.0) / max(limit, 1e-30)


def within_state(plan: LayerPlan, max_state_bytes: int) -> LayerPlan:
    """`plan` with less state than `max_state_bytes`: the units that gain least take a mode that is no less faithful.
    ValueError if the costs of its modulated units are not known."""
    costs = {}
    for unit in plan.units:
        if unit.mode.kind != MODULATED:
            continue
        chosen = unit.cost(unit.mode)
        if chosen is None or unit.cost(FLOAT_MODE) is None or any(cost.time_us is None for cost in unit.costs):
            wrong = f"the plan does not say what {unit.path!r} costs"
            raise ValueError(f"max_state_bytes={max_state_bytes}: {wrong}; give one that make_plan() made")
        noise = noise_of(chosen.sqnr_db)
        faithful = [c for c in unit.costs if c.mode.kind != MODULATED and noise_of(c.sqnr_db) <= noise]
        costs[unit.path] = [chosen, *faithful]
    if plan.state_bytes <= max_state_bytes:
        return plan
    gains = {cost.mode: 1.0 for unit in costs.values() for cost in unit}
    modes = choose(costs, gains, max_state_bytes=max_state_bytes)
    units = list(plan.units)
    for i, unit in enumerate(units):
        if (mode := modes.get(unit.path, unit.mode)) != unit.mode:
            units[i] = dataclasses.replace(unit, mode=mode, reason=f"less state than {unit.mode}")
    return dataclasses.replace(plan, units=tuple(units))


def reason_of(costs: Sequence[ModeCost], mode: Mode, state_is_limited: bool = False) -> str:
    chosen = _cost(costs, mode)
    fastest = min(costs, key=_rank)
    if fastest.mode == mode:
        return "fastest"
    limits = []
    if state_is_limited and fastest.state_bytes > chosen.state_bytes:
        limits.append("state")
    if noise_of(fastest.sqnr_db) > noise_of(chosen.sqnr_db):
        limits.append("fidelity")
    return f"{fastest.mode} is faster, but {' and '.join(limits)} would leave the limits"


def _cost(costs: Sequence[ModeCost], mode: Mode) -> ModeCost:
    return next(cost for cost in costs if cost.mode == mode)


def _time_us(cost: ModeCost) -> float:
    return math.inf if cost.time_us is None else cost.time_us


def _rank(cost: ModeCost) -> tuple[float, int]:
    """What is faster comes first, and of what is as fast, what takes less state."""
    return _time_us(cost), cost.state_bytes


def _error(cost: ModeCost, gains: Mapping[Mode, float]) -> float:
    return 0.0 if cost.mode == FLOAT_MODE else gains[cost.mode] * noise_of(cost.sqnr_db)
