import itertools
import random

import pytest

from modiff_kernels.config.plan import LayerPlan, Mode, ModeCost, UnitPlan
from modiff_kernels.planning.choice import choose, error_of, gains_of, reason_of, within_state

FLOAT, PLAIN, MODULATED = Mode("float"), Mode("quantized", 8), Mode("modulated", 4)
ONES = {PLAIN: 1.0, MODULATED: 1.0}


def unit(float_us, plain, modulated):
    """Costs from the time in float, (time, SQNR) plain and (time, SQNR, bytes) modulated."""
    return [ModeCost(FLOAT, float_us), ModeCost(PLAIN, *plain), ModeCost(MODULATED, *modulated)]


COSTS = {
    "a": unit(100.0, (40.0, 20.0), (50.0, 40.0, 1000)),  # modulation gains most per byte
    "b": unit(100.0, (60.0, 20.0), (90.0, 40.0, 1000)),
    "c": unit(10.0, (20.0, 40.0), (30.0, 40.0, 1000)),  # low bits lose
}


def test_the_error_limit():
    assert choose(COSTS, ONES) == {"a": PLAIN, "b": PLAIN, "c": FLOAT}, "the fastest modes, without a limit"
    modes = choose(COSTS, ONES, max_error=2.001e-4)  # that of two modulated units; one plain unit has 1e-2
    assert modes == {"a": MODULATED, "b": MODULATED, "c": FLOAT}
    assert error_of(COSTS, modes, ONES) == pytest.approx(2e-4)
    assert choose(COSTS, ONES, max_error=1.001e-4) == {"a": MODULATED, "b": FLOAT, "c": FLOAT}
    assert choose(COSTS, ONES, max_error=0.0) == dict.fromkeys("abc", FLOAT)


def test_less_state_in_the_same_time():
    costs = {"a": unit(9.0, (4.0, 20.0), (4.0, 40.0, 1000)), "b": unit(9.0, (8.0, 20.0), (4.0, 30.0, 1000))}
    assert choose(costs, ONES) == {"a": PLAIN, "b": MODULATED}
    assert choose(costs, ONES, max_error=2e-3) == {"a": MODULATED, "b": MODULATED}
    assert reason_of(costs["a"][::-1], PLAIN) == "fastest"


def test_gains_weigh_the_modes():
    gains = gains_of(COSTS, {PLAIN: 2.01e-4, MODULATED: 3e-4})
    assert gains[PLAIN] == pytest.approx(2.01e-4 / 0.0201)
    assert gains[MODULATED] == pytest.approx(1.0)
    assert choose(COSTS, gains, max_error=2.001e-4) == {"a": PLAIN, "b": PLAIN, "c": FLOAT}


def test_the_state_limit_leaves_the_least_profitable_units_unmodulated():
    no_plain = {path: [costs[0], costs[2]] for path, costs in COSTS.items()}
    assert choose(no_plain, ONES, max_state_bytes=2000) == {"a": MODULATED, "b": MODULATED, "c": FLOAT}
    assert choose(no_plain, ONES, max_state_bytes=1999) == {"a": MODULATED, "b": FLOAT, "c": FLOAT}
    assert choose(no_plain, ONES, max_state_bytes=999) == dict.fromkeys("abc", FLOAT)


def test_against_all_combinations():
    """Within the limits always, no single change gains, and not far from the best of all combinations."""
    random.seed(0)
    shares = []  # of what the best of all combinations gains over float
    for _ in range(40):
        costs = {
            str(i): unit(
                random.uniform(50, 200),
                (random.uniform(20, 150), random.uniform(15, 40)),
                (random.uniform(20, 150), random.uniform(30, 50), random.randint(1, 1000)),
            )
            for i in range(6)
        }
        max_error, max_state = random.uniform(0, 0.02), random.randint(0, 3000)

        def measured(modes, costs=costs):
            chosen = [next(c for c in costs[path] if c.mode == mode) for path, mode in modes.items()]
            return sum(c.time_us for c in chosen), sum(c.state_bytes for c in chosen)

        def allowed(modes, costs=costs, max_error=max_error, max_state=max_state, measured=measured):
            return error_of(costs, modes, ONES) <= max_error and measured(modes)[1] <= max_state

        modes = choose(costs, ONES, max_error, max_state)
        assert allowed(modes)
        for path, mode in itertools.product(costs, (FLOAT, PLAIN, MODULATED)):
            changed = {**modes, path: mode}
            assert not allowed(changed) or measured(changed)[0] >= measured(modes)[0]
        every = (dict(zip(costs, m)) for m in itertools.product((FLOAT, PLAIN, MODULATED), repeat=len(costs)))
        best = min(measured(other)[0] for other in every if allowed(other))
        in_float = sum(c[0].time_us for c in costs.values())
        shares.append((in_float - measured(modes)[0]) / (in_float - best) if in_float > best else 1.0)
    assert min(shares) >= 0.6
    assert sum(shares) / len(shares) >= 0.95


def test_reasons():
    assert reason_of(COSTS["a"], PLAIN) == "fastest"
    assert reason_of(COSTS["a"], MODULATED) == "quantized 8 is faster, but fidelity would leave the limits"
    no_plain = [COSTS["a"][0], COSTS["a"][2]]
    assert reason_of(no_plain, FLOAT, True) == "modulated 4 is faster, but state and fidelity would leave the limits"


def plan_of(modes):
    return LayerPlan(tuple(UnitPlan(path, mode, (), tuple(COSTS[path])) for path, mode in modes.items()))


def test_a_plan_within_less_state():
    plan = plan_of({"a": MODULATED, "b": MODULATED, "c": FLOAT})
    assert within_state(plan, 2000) == plan
    less = within_state(plan, 1500)
    assert {u.path: u.mode for u in less.units} == {"a": MODULATED, "b": FLOAT, "c": FLOAT}  # plain would lose fidelity
    assert less.units[1].reason == "less state than modulated 4"
    assert less.state_bytes == 1000
    assert within_state(plan, 0).is_float
    mixed = within_state(plan_of({"a": MODULATED, "b": MODULATED, "c": PLAIN}), 1000)
    assert [u.mode for u in mixed.units] == [MODULATED, FLOAT, PLAIN]
    faithful = {"a": unit(100.0, (70.0, 40.0), (50.0, 40.0, 1000))}
    one = LayerPlan((UnitPlan("a", MODULATED, (), tuple(faithful["a"])),))
    assert within_state(one, 0).units[0].mode == PLAIN
    assert within_state(LayerPlan.of({"a": "float", "b": "quantized 8"}), 0).units[1].mode == PLAIN
    with pytest.raises(ValueError, match=r"max_state_bytes=10: the plan does not say what 'a' costs"):
        within_state(LayerPlan.of({"a": "modulated 4"}), 10)
