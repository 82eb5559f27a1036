"""Search for the step schedule that computes the fewest calls within a fidelity budget.

The search asks `evaluate(schedule)` for the fidelity in dB and is deterministic if that is. Nothing is evaluated twice:
give the same `known` again and an interrupted search goes on where it stopped.
"""

import math
from collections.abc import Callable, MutableMapping
from typing import NamedTuple

from modiff_kernels.config.schedule import AXES, FORECAST, ORDERS, UPDATE, StepSchedule

PROBE_EVERY = 3  # orders and axes are compared on the rule that computes one call of so many


class Found(NamedTuple):
    """A schedule and its fidelity on the seeds that were searched. computed: its calls that compute the network."""

    schedule: StepSchedule
    computed: int
    fidelity_db: float


def search(
    evaluate: Callable[[StepSchedule], float],
    calls: int,
    *,
    budget_db: float | None = None,
    computed: int | None = None,
    known: MutableMapping[str, float] | None = None,
    on_evaluation: Callable[[int], None] = lambda remaining: None,
) -> Found:
    """The best forecast schedule that was found for runs of `calls` calls.

    Exactly one of budget_db (the fewest computed calls whose fidelity is that high) and computed (the highest fidelity
    of so many computed calls) is given. known: fidelities by text, read and added to. on_evaluation: called after each
    new evaluation with the number of computed calls of the schedule at hand. ValueError if no call can be left out.

    Order and axis are those that do best on a uniform rule. Then calls are taken away one by one, always that whose
    loss costs least (the loss of a call is only measured again where its last value could win: it grows with the calls
    that are gone). A schedule that falls below the budget, or has the size asked for, is improved by moving calls
    by one.
    """
    if (budget_db is None) == (computed is None):
        raise ValueError("search: give exactly one of budget_db and computed")
    if computed is not None and not 2 <= computed < calls:
        raise ValueError(f"search: computed={computed} is not allowed; give 2 to {calls - 1} of the {calls} calls")
    known = {} if known is None else known
    floor_db = -math.inf if budget_db is None else budget_db
    size = calls

    def fidelity(schedule: StepSchedule) -> float:
        text = str(schedule)
        if text not in known:
            known[text] = evaluate(schedule)
            on_evaluation(size)
        return known[text]

    probes = [StepSchedule.uniform(PROBE_EVERY, order=order, axis=axis) for order in ORDERS for axis in AXES]
    probe = max(probes, key=fidelity)

    def schedule_of(letters: str) -> StepSchedule:
        return StepSchedule(letters, order=probe.order, axis=probe.axis)

    def score(letters: str) -> float:
        return fidelity(schedule_of(letters))

    letters, best = UPDATE * calls, None
    losses: dict[int, float] = {}  # fidelity without the call, when it was last measured
    least = 2 if computed is None else computed
    while size > least:
        if not losses:
            losses = {i: math.inf for i, letter in enumerate(letters) if letter == UPDATE and i > 0}
        size -= 1
        letters = _without_cheapest(letters, losses, score)
        if score(letters) < floor_db or size == computed:
            letters, losses = _moved(letters, score), {}
        if score(letters) < floor_db:
            break
        best = Found(schedule_of(letters), size, score(letters))
    if best is None:
        below = f"the fidelity is {score(letters):.1f} dB, below the budget of {floor_db:g} dB"
        raise ValueError(f"search: without a single call of {calls} {below}; give a lower budget or more steps")
    return best


def _without_cheapest(letters: str, losses: dict[int, float], score: Callable[[str], float]) -> str:
    """`letters` without the computed call whose loss leaves the highest score; `losses` is brought up to date."""
    measured: set[int] = set()
    while True:
        call = max(losses, key=lambda i: (losses[i], i))
        shorter = letters[:call] + FORECAST + letters[call + 1 :]
        if call in measured:
            del losses[call]
            return shorter
        losses[call] = score(shorter)
        measured.add(call)


def _moved(letters: str, score: Callable[[str], float]) -> str:
    best, improved = score(letters), True
    while improved:
        improved = False
        for call in range(1, len(letters)):
            for other in (call - 1, call + 1):
                if not 0 < other < len(letters) or letters[call] == FORECAST or letters[other] == UPDATE:
                    continue
                moved = list(letters)
                moved[call], moved[other] = FORECAST, UPDATE
                if (value := score("".join(moved))) > best:
                    letters, best, improved = "".join(moved), value, True
    return letters


def computed_for_speedup(calls: int, speedup: float, update_s: float, skip_s: float) -> int:
    """Most calls that may be computed for a run `speedup` times as fast as one that computes all of them. update_s,
    skip_s: seconds of a call that is computed and of one that is not, sampler included. ValueError if below two."""
    allowed = calls * update_s / speedup
    computed = int((allowed - calls * skip_s) / (update_s - skip_s)) if update_s > skip_s else 0
    if computed < 2:
        most = calls * update_s / (2 * update_s + (calls - 2) * skip_s)
        raise ValueError(f"speed-up {speedup:g} is out of reach: two computed calls of {calls} give {most:.1f}")
    return min(computed, calls - 1)
