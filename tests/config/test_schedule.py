import pytest

import modiff_kernels as mk
from modiff_kernels.config.schedule import StepSchedule


@pytest.mark.parametrize(
    ("text", "calls", "expected"),
    [
        ("forecast every=2 first=3 last=1", 10, "UUUFUFUFUU"),
        ("hold every=3 first=1 last=0", 8, "UHHUHHUH"),
        ("U3F2UF2U", 9, "UUUFFUFFU"),
        ("UHFU", 4, "UHFU"),
        ("forecast every=2", 3, "UUU"),
        ("forecast every=2", 1, "U"),
    ],
)
def test_actions(text, calls, expected):
    assert StepSchedule.parse(text).actions(calls) == expected


def test_a_pattern_keeps_its_computed_calls_at_their_places():
    pattern = StepSchedule.parse("U2F3UF3U2")
    assert pattern.actions(11) == "UUFFFUFFFUU"
    assert pattern.actions(21) == "UFUFFFFFFFUFFFFFFFUFU"
    assert pattern.actions(6) == "UFUFUU"
    assert pattern.actions(5) == "UUUUU"
    assert StepSchedule.parse("UF2UH2U").actions(13) == "UFFFFFUHHHHHU"


def test_text_round_trips():
    fitted = "U2F weights=((1.0,0.0),(1.0,0.25,-0.5),(2.0,-1.0,0.125))"
    for text in ("forecast", "forecast every=3 first=1 last=2", "hold stochastic=True", "U3F2UF2U", fitted):
        schedule = StepSchedule.parse(text)
        assert str(schedule) == text
        assert schedule == eval(repr(schedule))


def test_other_spellings():
    assert str(StepSchedule.parse("UUUFFUF1U")) == "U3F2UFU"
    assert mk.StepSchedule("forecast", 3, last=2) == StepSchedule.parse("forecast every=3 last=2")


@pytest.mark.parametrize(
    ("options", "field", "allowed"),
    [
        ({"rule": "sometimes"}, "rule='sometimes'", "forecast, hold, or a pattern"),
        ({"rule": "FUU"}, "rule='FU2'", "begins with U"),
        ({"rule": "U5"}, "rule='U5'", "no schedule at all"),
        ({"rule": "hold", "every": 1}, "every=1", "2 or more"),
        ({"rule": "hold", "first": 0}, "first=0", "1 or more"),
        ({"rule": "hold", "last": -1}, "last=-1", "0 or more"),
        ({"rule": "UFU", "every": 3}, "every=3", "a pattern says itself"),
        ({"rule": "forecast", "weights": [[1, 0]]}, "weights=", "each of the 0 calls of a pattern"),
        ({"rule": "UF", "weights": [[1, 0]]}, "weights=", "two or more finite numbers for each of the 2 calls"),
        ({"rule": "UF", "weights": [[1, 0], [1, "x"]]}, "weights=", "two or more finite numbers"),
        ({"rule": "UF", "weights": [[1, 0], [float("nan"), 0]]}, "weights=", "finite numbers"),
        ({"rule": "UF", "weights": [[1, 0], [1, 1, 0]]}, "weights=", "at most 1 outputs and the sample at call 1"),
        ({"rule": "hold", "stochastic": 2}, "stochastic=2", "True or False"),
    ],
)
def test_impossible_values(options, field, allowed):
    with pytest.raises(ValueError, match=f"StepSchedule: .*{field}") as caught:
        StepSchedule(**options)
    assert allowed in str(caught.value)


@pytest.mark.parametrize("text", ["", "  ", "forecast 3", "forecast each=3", "forecast rule=hold", None])
def test_impossible_texts(text):
    with pytest.raises(ValueError, match=r"StepSchedule: .*; give |StepSchedule: .* is not allowed"):
        StepSchedule.parse(text)


def test_impossible_runs():
    for calls in (0, 2.5, True):
        with pytest.raises(ValueError, match="whole number"):
            StepSchedule("hold").actions(calls)


def test_description():
    assert StepSchedule.parse("hold every=2").describe() == "hold: skips calls, held"
    fitted = StepSchedule("U2", weights=[(1, 0), (1, 0, 0)])
    assert fitted.describe() == "U2: skips calls, forecast with fitted weights"
