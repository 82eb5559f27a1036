import types

import pytest

from benchmarks.budget import Budget
from benchmarks.contest import Contest, Entrant, fastest, ratios
from modiff_kernels.cli.rows import Row

ROWS = [Row(key, key, "float") for key in ("a", "b", "c")]


class Field:
    """Networks that note what is done with them, in order."""

    def __init__(self, seconds, **options):
        self.notes, self.measured, self.seconds = [], [], seconds
        defaults = {"rounds": 3, "in_turns": True, "budget": Budget(), "quiet": True}
        self.contest = Contest(self.make, self.verify, self.timed, self.take, **{**defaults, **options})

    def make(self, row):
        self.notes.append(f"make {row.key}")
        return types.SimpleNamespace(shared_bytes=0, remove=lambda: self.notes.append(f"remove {row.key}"))

    def verify(self, entrant):
        return "wrong" if self.seconds[entrant.row.key] is None else 40.0

    def timed(self, entrant):
        self.notes.append(entrant.row.key)
        seconds = self.seconds[entrant.row.key]
        if callable(seconds):
            return seconds()
        return [seconds]

    def take(self, entrants):
        assert all(entrant.network is not None for entrant in entrants), "they may be looked into"
        self.measured.append([(entrant.row.key, len(entrant.times)) for entrant in entrants])


def test_in_turns_each_round_begins_with_another():
    field = Field({"a": 1.0, "b": 2.0, "c": 3.0})
    assert field.contest.run(ROWS)
    assert "".join(field.notes[3:12]) == "abcbcacab"
    assert field.measured == [[("a", 3), ("b", 3), ("c", 3)]]


def test_one_by_one_each_is_gone_before_the_next():
    field = Field({"a": 1.0, "b": None, "c": 3.0}, in_turns=False)
    assert not field.contest.run(ROWS), "b is wrong"
    assert field.notes == [*("make a", "a", "a", "a", "remove a"), "make b", *("make c", "c", "c", "c", "remove c")]
    assert field.measured == [[("a", 3)], [("c", 3)]]


def test_what_is_measured_before_the_end_is_kept(capsys):
    budget = types.SimpleNamespace(is_over=False, limit=Budget().limit)
    rounds = iter((1.0, 1.0))

    def run_out():
        budget.is_over = True
        return [next(rounds)]

    field = Field({"a": run_out, "b": 2.0, "c": 3.0}, in_turns=False, budget=budget)
    assert not field.contest.run(ROWS)
    assert field.measured == [[("a", 2)]], "the third round failed"
    assert "the budget is used up; left out: b, c" in capsys.readouterr().err


def test_rounds_that_not_all_have_do_not_count():
    field = Field({"a": 1.0, "b": iter_of(2.0, 2.0), "c": 3.0})
    field.contest.run(ROWS)
    assert field.measured == [[("a", 2), ("b", 2), ("c", 2)]]


def iter_of(*seconds):
    left = list(seconds)
    return lambda: [left.pop()]


def test_ratios_pair_where_turns_were_taken():
    def entrant(turn, *times):
        return Entrant(Row("a", "a", "float"), times=list(times), turn=turn)

    assert ratios(entrant(0, 2.0, 9.0), entrant(0, 1.0, 3.0)) == [2.0, 3.0]
    assert ratios(entrant(0, 2.0, 8.0, 9.0), entrant(1, 2.0, 4.0)) == [pytest.approx(8 / 3)]
    a, b = entrant(0, 5.0, 1.0, 1.0), entrant(0, 2.0, 2.0, 2.0)
    assert fastest([a, b], ("a",)) is a, "by the median"
    assert fastest([a], ("b",)) is None
