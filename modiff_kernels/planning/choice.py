"""Choosing the modes of a plan: the least time within a limit on the error and one on the state.

Errors add: that of the pictures is taken as the sum over the units of noise_of(SQNR) times a gain per mode, which comes
from whole runs in which every unit has that mode. It is an estimate; who uses it checks the plan it gives.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from modiff_kernels.config.plan import FLOAT_MODE, MODULATED, LayerPlan, Mode, ModeCost, noise_of

Costs = Mapping[str, Sequence[ModeCost]]
Modes = dict[str, Mode]


def gains_of(costs: Costs, errors: Mapping[Mode, float]) -> dict[Mode, float]:
    """Error of the pictures per noise of a unit, by mode. errors: of the pictures with all units in that mode."""
    gains = {}
    for mode, error in errors.items():
        noise = sum(noise_of(cost.sqnr_db) for unit in costs.values() for cost in unit if cost.mode == mode)
        gains[mode] = error / noise if noise > 0 else 0.0
    return gains


def error_of(costs: Costs, modes: Mapping[str, Mode], gains: Mapping[Mode, float]) -> float:
    """Estimated error of the pictures."""
    return _total(costs, dict(modes), gains)[1]


def choose(
    costs: Costs, gains: Mapping[Mode, float], max_error: float = math.inf, max_state_bytes: float = math.inf
) -> Modes:
    """Fast modes whose estimated error and state stay within the limits.

    costs: by unit, float among them, each with a time. Float has no error and no state, so there is always a choice.
    Error and state get prices (Lagrange multipliers), every unit takes the mode that costs least at them, and of all
    prices those count that give the fastest plan within the limits. Then every change of a single unit that gains time
    within the limits is made.
    """
    time_us = sum(max(cost.time_us for cost in unit) for unit in costs.values())
    plans = [dict.fromkeys(costs, FLOAT_MODE)]
    numbers = {
        path: [(cost.time_us, _error(cost, gains), cost.state_bytes, cost.mode) for cost in unit]
        for path, unit in costs.items()
    }
    for error_price in _prices(time_us, max_error):
        for state_price in _prices(time_us, max_state_bytes):
            plans.append(
                {
                    path: min(unit, key=lambda c: (c[0] + error_price * c[1] + state_price * c[2], c[2]))[3]
                    for path, unit in numbers.items()
                }
            )
    totals = [(_total(costs, plan, gains), plan) for plan in plans]
    allowed = [(time, plan) for (time, error, state), plan in totals if error <= max_error and state <= max_state_bytes]
    best = min(allowed, key=lambda pair: pair[0])[1]
    return _improved(costs, best, gains, max_error, max_state_bytes)


def _improved(
    costs: Costs, modes: Modes, gains: Mapping[Mode, float], max_error: float, max_state_bytes: float
) -> Modes:
    """`modes` after every change of a single unit that gains time within the limits, the largest gain first."""
    modes = dict(modes)
    _, error, state = _total(costs, modes, gains)
    while True:
        changes = []
        for path, unit in costs.items():
            old = _cost(unit, modes[path])
            for new in unit:
                new_error = error - _error(old, gains) + _error(new, gains)
                new_state = state - old.state_bytes + new.state_bytes
                if new.time_us < old.time_us and new_error <= max_error and new_state <= max_state_bytes:
                    changes.append((new.time_us - old.time_us, path, new.mode))
        if not changes:
            return modes
        _, path, mode = min(changes, key=lambda change: change[0])
        modes[path] = mode
        _, error, state = _total(costs, modes, gains)


def _prices(time_us: float, limit: float) -> list[float]:
    """Prices to try per unit of what is limited: from next to nothing to more than anything gains."""
    if math.isinf(limit):
        return [0.0]
    return [0.0, *(time_us / max(limit, 1e-30) * 10.0 ** (step / 2) for step in range(-6, 7))]


def within_state(plan: LayerPlan, max_state_bytes: int) -> LayerPlan:
    """`plan` with less state than `max_state_bytes`: the units that gain least take a mode that is no less faithful.

    ValueError if the costs of its modulated units are not known.
    """
    costs = {}
    for unit in plan.units:
        if unit.mode.kind != MODULATED:
            continue
        chosen = unit.cost(unit.mode)
        if chosen is None or unit.cost(FLOAT_MODE) is None or any(cost.time_us is None for cost in unit.costs):
            raise ValueError(
                f"max_state_bytes={max_state_bytes}: the plan does not say what {unit.path!r} costs, so what gains "
                "least is not known; give a plan that make_plan() or `modiff calibrate --plan` made"
            )
        noise = noise_of(chosen.sqnr_db)
        faithful = [c for c in unit.costs if c.mode.kind != MODULATED and noise_of(c.sqnr_db) <= noise]
        costs[unit.path] = [chosen, *faithful]
    if plan.state_bytes <= max_state_bytes:
        return plan
    gains = {cost.mode: 1.0 for unit in costs.values() for cost in unit}
    modes = choose(costs, gains, max_state_bytes=max_state_bytes)
    units = [
        unit
        if modes.get(unit.path, unit.mode) == unit.mode
        else dataclasses.replace(unit, mode=modes[unit.path], reason=f"less state than {unit.mode}")
        for unit in plan.units
    ]
    return dataclasses.replace(plan, units=tuple(units))


def reason_of(costs: Sequence[ModeCost], mode: Mode, state_is_limited: bool = False) -> str:
    """Why a unit with these costs got `mode`, in words."""
    chosen = _cost(costs, mode)
    fastest = min(costs, key=lambda cost: (cost.time_us, cost.state_bytes))
    if fastest.mode == mode:
        return "fastest"
    limits = []
    if state_is_limited and fastest.state_bytes > chosen.state_bytes:
        limits.append("state")
    if noise_of(fastest.sqnr_db) > noise_of(chosen.sqnr_db):
        limits.append("fidelity")
    return f"{fastest.mode} is faster, but {' and '.join(limits)} would leave the limits"


def _total(costs: Costs, modes: Modes, gains: Mapping[Mode, float]) -> tuple[float, float, int]:
    """Time, error and state of a plan."""
    chosen = [_cost(costs[path], mode) for path, mode in modes.items()]
    error = math.fsum(_error(cost, gains) for cost in chosen)
    return math.fsum(cost.time_us for cost in chosen), error, sum(cost.state_bytes for cost in chosen)


def _cost(costs: Sequence[ModeCost], mode: Mode) -> ModeCost:
    return next(cost for cost in costs if cost.mode == mode)


def _error(cost: ModeCost, gains: Mapping[Mode, float]) -> float:
    return 0.0 if cost.mode == FLOAT_MODE else gains[cost.mode] * noise_of(cost.sqnr_db)
