import math

import pytest
import torch

from modiff_kernels.config.schedule import StepSchedule
from modiff_kernels.planning.fit import Fit, Target, fitted, pattern, search

CALLS = 12
LOG_SNR = [-6 + call for call in range(CALLS)]


class Problem:
    """x' = x + h out, with a network that bends over the calls; two passes a call, of which the second adds 10 %."""

    def __init__(self, seed, channels=2):
        self.start = torch.randn(3, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
        self.rates = torch.linspace(0.2, 2.0, 16).view(4, 4)
        self.computed = 0

    def network(self, call, x):
        self.computed += 1
        return -torch.tanh(self.rates * x[:, :2] * (0.3 + call / CALLS)) + 0.3 * torch.sin(self.rates * call * 0.7)

    def __call__(self, answer):
        x = self.start
        for call in range(CALLS):
            outputs = [answer(call, part, x, lambda call=call, x=x: self.network(call, x)) for part in (0, 1)]
            x = torch.cat([x[:, :2] + 0.2 * outputs[0] + 0.02 * outputs[1], x[:, 2:]], 1)
        return x

    def fit(self, known=None):
        states, outputs = [], []

        def answer(call, part, x, compute):
            output = compute()
            if part == 0:
                states.append(x)
                outputs.append(output)
            return output

        picture = self(answer)
        self.computed = 0
        return Fit(self, Target(states, outputs, picture, LOG_SNR), known=known)


@pytest.fixture(scope="module")
def found():
    return fitted(Problem(0).fit(), Problem(1).fit(), 5)


def test_a_fit_is_better_than_the_polynomial_on_other_pictures(found):
    other = Problem(2).fit()
    assert len(found.computed) == found.schedule.actions(CALLS).count("U") == 5
    assert other.fidelity(found.computed, found.rows) > other.fidelity(found.computed) + 6
    assert found.validation_db > found.polynomial_db + 6
    assert other.fidelity(tuple(range(CALLS))) == pytest.approx(200 + 20 * math.log10(other._range), abs=1)


def test_the_fit_of_the_states_is_the_least_at_every_span(found):
    """Against steps in each weight: the sample at the end of a span is nowhere nearer to the wanted one."""
    fit = Problem(0).fit()
    rows, _ = fit.states(found.computed)
    for begin, end in zip(found.computed, [*found.computed[1:], CALLS]):
        wanted = [*fit._target.states, fit._target.picture][end]

        def left(rows, end=end, wanted=wanted):
            return float((fit._run(found.computed, rows, {}, end) - wanted).square().sum())

        for k in range(len(rows[begin])):
            moved = [
                [w + 0.02 * (k == j) for j, w in enumerate(row)] if begin <= i < end else row
                for i, row in enumerate(rows)
            ]
            assert left(moved) > left(rows) * 0.98


def test_the_search_computes_the_computed_calls_alone_and_goes_on_where_it_stopped():
    problem, known = Problem(0), {}
    best = search(problem.fit(known), 4)
    assert problem.computed <= 2 * 4 * len(known), "two passes, and beginnings are not computed again"
    assert known[pattern(best, CALLS)] == max(known.values())
    again, half = Problem(0), dict(list(known.items())[: len(known) // 2])
    assert search(again.fit(half), 4) == best
    assert half == known
    assert again.computed < problem.computed


def test_every_call_may_be_computed_and_corrected():
    with pytest.raises(ValueError, match="polynomial reaches"):  # nothing can be won where the own run is wanted
        fitted(Problem(0).fit(), Problem(1).fit(), CALLS)
    with pytest.raises(ValueError, match="evaluations=13 is not allowed; give 2 to 12"):
        fitted(Problem(0).fit(), Problem(1).fit(), 13)


def test_the_fewest_calls_within_a_budget(found):
    least_db = found.validation_db - 1
    assert fitted(Problem(0).fit(), Problem(1).fit(), None, least_db).validation_db >= least_db
    message = r"no schedule of 12 calls has 190 dB: .* up to 11 computed calls is \d+\.\d dB"
    with pytest.raises(ValueError, match=message):
        fitted(Problem(0).fit(), Problem(1).fit(), None, 190.0)


def test_a_sample_with_other_channels():
    """More of them, as of a mask: the first count. Fewer, as of a learned variance: the sample has no weight."""
    wide = fitted(Problem(0, channels=3).fit(), Problem(1, channels=3).fit(), 5)
    assert wide.validation_db > wide.polynomial_db + 6
    fit = Problem(0).fit()
    fit._takes_sample = False
    rows, _ = fit.states((0, 3, 6, 9))
    assert all(row[-1] == 0 for row in rows)
    assert StepSchedule(pattern((0, 3, 6, 9), CALLS), weights=rows)
