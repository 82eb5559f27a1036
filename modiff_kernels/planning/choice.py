"""Choosing the modes of a plan: the least time within a limit on the error and one on the state.

Errors add: that of the pictures is taken as the sum over the units of noise_of(SQNR) times a gain per mode, which comes
from whole runs in which every unit has that mode. It is an estimate; who uses it checks the plan it gives.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from modiff_kernels.config.plan import FLOAT_MODE, MODULATED, LayerPlan, Mode, ModeCost, noise_of

Costs = Mapping[str, Sequence[ModeCost]]
Modes = dict[str, Mode]


class _Option(NamedTuple):
    """A mode that a unit may take, and what it adds to a plan."""

    time_us: float
    error: float
    state_bytes: int
    mode: Mode


def gains_of(costs: Costs, errors: Mapping[Mode, float]) -> dict[Mode, float]:
    """Error of the pictures per noise of a unit, by mode. errors: of the pictures with all units in that mode."""
    gains = {}
    for mode, error in errors.items():
        noise = sum(noise_of(cost.sqnr_db) for unit in costs.values() for cost in unit if cost.mode == mode)
        gains[mode] = error / noise if noise > 0 else 0.0
    return gains


def error_of(costs: Costs, modes: Mapping[str, Mode], gains: Mapping[Mode, float]) -> float:
    """Estimated error of the pictures."""
    return math.fsum(_error(_cost(costs[path], mode), gains) for path, mode in modes.items())


def choose(
    costs: Costs, gains: Mapping[Mode, float], max_error: float = math.inf, max_state_bytes: float = math.inf
) -> Modes:
    """Fast modes whose estimated error and state stay within the limits.

    costs: by unit, float among them, each with a time. Float has no error and no state, so there is always a choice.
    Error and state get prices (Lagrange multipliers), every unit takes the mode that costs least at them, and of all
    prices those count that give the fastest plan within the limits. Then every change of a single unit that gains time
    within the limits is made, the largest gain first.
    """
    units = {
        path: [_Option(_time_us(cost), _error(cost, gains), cost.state_bytes, cost.mode) for cost in unit]
        for path, unit in costs.items()
    }

    def at(error_price: float, state_price: float) -> dict[str, _Option]:
        def price(option: _Option) -> tuple[float, int]:
            paid = error_price * option.error + state_price * option.state_bytes
            return option.time_us + paid, option.state_bytes

        return {path: min(unit, key=price) for path, unit in units.items()}

    def total(plan: Mapping[str, _Option]) -> tuple[float, float, int]:
        chosen = plan.values()
        return math.fsum(o.time_us for o in chosen), math.fsum(o.error for o in chosen), sum(o[2] for o in chosen)

    slowest_us = sum(max(option.time_us for option in unit) for unit in units.values())
    prices = itertools.product(_prices(slowest_us, max_error), _prices(slowest_us, max_state_bytes))
    plans = [{path: next(o for o in unit if o.mode == FLOAT_MODE) for path, unit in units.items()}]
    plans += [at(*pair) for pair in prices]
    totals = [(total(plan), plan) for plan in plans]
    allowed = [(time, plan) for (time, error, state), plan in totals if error <= max_error and state <= max_state_bytes]
    best = min(allowed, key=lambda pair: pair[0])[1]
    while True:
        _, error, state = total(best)
        changes = [
            (new.time_us - old.time_us, path, new)
            for path, old in best.items()
            for new in units[path]
            if new.time_us < old.time_us
            and error - old.error + new.error <= max_error
            and state - old.state_bytes + new.state_bytes <= max_state_bytes
        ]
        if not changes:
            return {path: option.mode for path, option in best.items()}
        _, path, option = min(changes, key=lambda change: change[0])
        best[path] = option


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
    fastest = min(costs, key=lambda cost: (_time_us(cost), cost.state_bytes))
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


def _error(cost: ModeCost, gains: Mapping[Mode, float]) -> float:
    return 0.0 if cost.mode == FLOAT_MODE else gains[cost.mode] * noise_of(cost.sqnr_db)
