import itertools

import pytest

from modiff_kernels.config.schedule import StepSchedule
from modiff_kernels.planning.search import computed_for_speedup, search

WEIGHTS = [0, 5, 1, 9, 2, 8, 3, 7, 4, 20]


def additive(schedule):
    """A fidelity that falls by a weight per skipped call; order 1 over sigma is the best choice."""
    actions = schedule.actions(len(WEIGHTS))
    penalty = (schedule.order != 1) + (schedule.axis != "sigma")
    return 60 - penalty - sum(weight for weight, letter in zip(WEIGHTS, actions, strict=True) if letter != "U")


def neighbours(schedule):
    """A fidelity that depends on which calls are skipped together: the square of every gap."""
    gaps = [len(list(group)) for letter, group in itertools.groupby(schedule.actions(12)) if letter != "U"]
    return 60.0 - sum(gap**2 for gap in gaps)


def test_the_fewest_calls_within_the_budget():
    evaluated = []
    found = search(lambda s: evaluated.append(s) or additive(s), 10, budget_db=45)
    assert len(evaluated) < 12 + 9 * 8 / 2, "losses are not all measured again"
    assert found.schedule.actions(10) == "UFFUFUFUFU"  # 1 + 2 + 3 + 4 + 5 = 15 are lost
    assert (found.computed, found.fidelity_db) == (5, 45)
    assert (found.schedule.order, found.schedule.axis) == (1, "sigma")
    assert search(additive, 10, budget_db=45.1).computed == 6


@pytest.mark.parametrize("computed", [3, 4, 6, 8])
def test_the_best_schedule_of_a_size(computed):
    found = search(neighbours, 12, computed=computed)
    assert found.computed == computed == found.schedule.actions(12).count("U")
    patterns = ("".join(letters) for letters in itertools.product("UF", repeat=11))
    best = max(neighbours(StepSchedule("U" + text)) for text in patterns if text.count("U") == computed - 1)
    assert found.fidelity_db >= best - 2  # greedy: the best but for a move of two calls at once
    letters = found.schedule.actions(12)
    for i in range(1, 11):
        swapped = letters[:i] + letters[i : i + 2][::-1] + letters[i + 2 :]
        assert neighbours(StepSchedule(swapped)) <= found.fidelity_db


def test_impossible_requests():
    with pytest.raises(ValueError, match="exactly one of budget_db and computed"):
        search(additive, 10)
    with pytest.raises(ValueError, match="computed=10 is not allowed; give 2 to 9 of the 10 calls"):
        search(additive, 10, computed=10)
    with pytest.raises(ValueError, match=r"without a single call of 10 the fidelity is 59\.0 dB, below the budget"):
        search(additive, 10, budget_db=70)


def test_calls_for_a_speedup():
    assert computed_for_speedup(50, 2.0, 1.0, 0.0) == 25
    assert computed_for_speedup(50, 5.0, 1.0, 0.1) == 5  # 5 + 45 * 0.1 = 9.5 of 10; a sixth call makes it 10.4
    with pytest.raises(ValueError, match=r"speed-up 20 is out of reach: two computed calls of 50 give 7\.4"):
        computed_for_speedup(50, 20.0, 1.0, 0.1)
