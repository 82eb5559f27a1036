import types

import pytest

from benchmarks import contest, record
from benchmarks.budget import Budget
from benchmarks.contest import Contest, Entrant, Scores, fastest, ratios, recorded
from modiff_kernels.evaluation.configurations import Row

ROWS = [Row(key, key, "float") for key in ("a", "b", "c")]


class Field:
    """Networks that note what is done with them, in order."""

    def __init__(self, seconds, **options):
        self.notes, self.taken, self.seconds, self.shared = [], [], seconds, 0
        defaults = {"rounds": 3, "in_turns": True, "budget": Budget(), "quiet": True}
        self.contest = Contest(self, **{**defaults, **options})

    def make(self, row):
        self.notes.append(f"make {row.key}")
        return types.SimpleNamespace(shared_bytes=self.shared, remove=lambda: self.notes.append(f"remove {row.key}"))

    def verify(self, entrant):
        return "wrong" if self.seconds[entrant.row.key] is None else 40.0

    def timed(self, entrant):
        self.notes.append(entrant.row.key)
        seconds = self.seconds[entrant.row.key]
        if callable(seconds):
            return seconds()
        return [seconds]

    def measured(self, entrants):
        assert all(entrant.network is not None for entrant in entrants), "they may be looked into"
        self.taken.append([(entrant.row.key, len(entrant.times)) for entrant in entrants])


def test_in_turns_each_round_begins_with_another():
    field = Field({"a": 1.0, "b": 2.0, "c": 3.0})
    assert field.contest.run(ROWS)
    assert "".join(field.notes[3:12]) == "abcbcacab"
    assert field.taken == [[("a", 3), ("b", 3), ("c", 3)]]


def test_one_by_one_each_is_gone_before_the_next():
    field = Field({"a": 1.0, "b": None, "c": 3.0}, in_turns=False)
    assert not field.contest.run(ROWS), "b is wrong"
    assert field.notes == [*("make a", "a", "a", "a", "remove a"), "make b", *("make c", "c", "c", "c", "remove c")]
    assert field.taken == [[("a", 3)], [("c", 3)]]


def test_what_is_measured_before_the_end_is_kept(capsys):
    budget = types.SimpleNamespace(is_over=False, limit=Budget().limit)
    rounds = iter((1.0, 1.0))

    def run_out():
        budget.is_over = True
        return [next(rounds)]

    field = Field({"a": run_out, "b": 2.0, "c": 3.0}, in_turns=False, budget=budget)
    assert not field.contest.run(ROWS)
    assert field.taken == [[("a", 2)]], "the third round failed"
    assert "the budget is used up; left out: b, c" in capsys.readouterr().err


def test_rounds_that_not_all_have_do_not_count():
    field = Field({"a": 1.0, "b": iter_of(2.0, 2.0), "c": 3.0})
    field.contest.run(ROWS)
    assert field.taken == [[("a", 2), ("b", 2), ("c", 2)]]


def iter_of(*seconds):
    left = list(seconds)
    return lambda: [left.pop()]


def test_ratios_to_a_baseline_that_comes_later_are_made_then():
    def entrant(key, seconds, turn):
        return Entrant(Row(key, key, "float"), times=[seconds], turn=turn)

    slow, ours, fast, slower = (
        entrant(k, s, i) for i, (k, s) in enumerate((("a", 8.0), ("b", 2.0), ("c", 4.0), ("a", 9.0)))
    )
    scores = Scores({"vs_float": ("a", "c"), "vs_none": ("d",)}, [])
    told = [[(e.row.key, m, r) for e, m, r in scores.add([new])] for new in (ours, slow, fast, slower)]
    assert told == [
        [],
        [("a", "vs_float", [1.0]), ("b", "vs_float", [4.0])],
        [("c", "vs_float", [1.0]), ("b", "vs_float", [2.0]), ("a", "vs_float", [0.5])],
        [("a", "vs_float", [4 / 9])],
    ], "a slower baseline changes nothing"


def test_memory_is_that_of_the_timed_runs(monkeypatch):
    """What torch reserves beyond what it had before, without what compiling took, and the weights that are shared."""
    held = {"now": 100, "peak": 0}
    monkeypatch.setattr(contest, "reserved_bytes", lambda: held["now"])
    monkeypatch.setattr(contest, "peak_bytes", lambda: held["peak"])
    monkeypatch.setattr(contest, "reset_peak", lambda: held.update(peak=held["now"]))
    found = []

    def timed():
        held.update(peak=max(held["peak"], 130))
        return [1.0]

    field = Field({"a": timed, "b": 1.0}, in_turns=False)
    field.verify = lambda entrant: held.update(peak=900) or 40.0
    field.measured = lambda entrants: found.extend((e.row.key, e.peak_bytes) for e in entrants)
    field.shared = 7
    field.contest.run(ROWS[:2])
    assert found == [("a", 37), ("b", 7)]


def test_ratios_pair_where_turns_were_taken():
    def entrant(turn, *times):
        return Entrant(Row("a", "a", "float"), times=list(times), turn=turn)

    assert ratios(entrant(0, 2.0, 9.0), entrant(0, 1.0, 3.0)) == [2.0, 3.0]
    assert ratios(entrant(0, 2.0, 8.0, 9.0), entrant(1, 2.0, 4.0)) == [pytest.approx(8 / 3)]
    a, b = entrant(0, 5.0, 1.0, 1.0), entrant(0, 2.0, 2.0, 2.0)
    assert fastest([a, b], ("a",)) is a, "by the median"
    assert fastest([a], ("b",)) is None


def test_what_is_recorded_of_this_commit_and_device(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "commit", lambda: ("c0ffee", False))

    def add(problem, metric, value, **more):
        row = {"op": "run", "problem": problem, "backend": "cpu", "metric": metric, "sqnr_db": 41.0, "verified": True}
        row |= {"git_commit": "c0ffee", "dirty": False, "device": "H200", **record.percentiles([value]), **more}
        record.append([row], tmp_path / "rows.csv")

    add("a", "time", 1.0)
    add("a", "time", 5.0)
    add("a", "state", 7.0)
    add("b", "time", 1.0, git_commit="0ther")
    add("c", "time", 1.0, dirty=True)
    add("d", "time", 1.0, device="H100")
    add("e", "time", 2.0)
    rows = {key: Row(key, key, "float") for key in "abcdef"}
    paths = [tmp_path / "rows.csv", tmp_path / "none.csv"]
    a, e = recorded(("run", "time", 1e-3), rows, paths, "H200")
    assert (a.row.key, a.times, a.sqnr_db, a.more["backend"]) == ("a", [5e-3], 41.0, "cpu")
    assert e.times == [2e-3]
    assert a.turn != e.turn, "they did not take turns"
    assert recorded(("other", "time", 1.0), rows, paths, "H200") == []
    monkeypatch.setattr(record, "commit", lambda: ("c0ffee", True))
    assert recorded(("run", "time", 1e-3), rows, paths, "H200") == [], "the code is not that of the rows"
