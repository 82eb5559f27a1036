"""The runner: whom it times, in which order, what it compares and what it leaves out."""

import argparse
import types

import pytest
import torch

from benchmarks import record, runner
from benchmarks.runner import Entrant, LeftOut, Measure, Scores, Session, ratios, recorded


def config(key, name=None):
    return types.SimpleNamespace(key=key, name=name or key, compiled=False)


class Field:
    """A case whose subjects take the seconds that are given; None is a wrong one. Notes what is done, in order."""

    baselines = {"vs_a": ("a",)}  # noqa: RUF012

    def __init__(self, seconds):
        self.seconds, self.notes, self.timed_rows = seconds, [], []

    def make(self, item):
        self.notes.append(f"make {item.key}")
        if self.seconds[item.key] == "left out":
            raise LeftOut("no such kernel")
        return types.SimpleNamespace(shared_bytes=7, remove=lambda: self.notes.append(f"remove {item.key}"))

    def verify(self, entrant):
        return "wrong" if self.seconds[entrant.config.key] is None else 40.0

    def timed(self, entrant):
        self.notes.append(entrant.config.key)
        seconds = self.seconds[entrant.config.key]
        return [seconds() if callable(seconds) else seconds]

    def rows(self, entrant):
        assert entrant.subject is not None, "it may be looked into"
        self.timed_rows.append((entrant.config.key, len(entrant.times), entrant.peak_bytes))
        return [{"op": "x", "problem": entrant.config.key, "metric": "time", **record.percentiles(entrant.times)}]

    def ratio_rows(self, entrant, metric, faster):
        return [{"op": "x", "problem": entrant.config.key, "metric": metric, **record.percentiles(faster)}]


@pytest.fixture
def session(tmp_path):
    def make(**options):
        parser = argparse.ArgumentParser()
        runner.add_options(parser, rounds=3)
        args = parser.parse_args(["--quiet", "--results", str(tmp_path)])
        vars(args).update(threads=torch.get_num_threads(), **options)
        return Session(args)

    return make


def run(session, field, keys="abc", rounds=3):
    measures = [(config(key), Measure("x", key, "time", 1.0)) for key in keys]
    return session.run("case", lambda: field, measures, rounds)


def test_in_turns_each_round_begins_with_another(session):
    field, own = Field({"a": 1.0, "b": 2.0, "c": 3.0}), session()
    rows = {(row["problem"], row["metric"]): row["p50"] for row in run(own, field)}
    assert "".join(field.notes[3:12]) == "abcbcacab"
    assert [rows[key, "vs_a"] for key in "abc"] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert (own.done, own.exit_code) == (3, 0)


def test_one_by_one_each_is_gone_before_the_next_and_a_wrong_one_is_not_timed(session, capsys):
    field, own = Field({"a": 1.0, "b": None, "c": 3.0, "d": "left out"}), session(in_turns=False)
    rows = run(own, field, "abcd")
    assert field.notes == ["make a", *"aaa", "remove a", "make b", "make c", *"ccc", "remove c", "make d"]
    assert {row["problem"] for row in rows} == {"a", "c"}
    assert (own.done, own.failed, own.exit_code) == (2, 1, 1), "what does not exist here is no failure"
    assert "case, b: wrong; not timed" in capsys.readouterr().err


def test_rounds_that_not_all_have_do_not_count(session):
    left = [2.0, 2.0]
    field = Field({"a": 1.0, "b": left.pop, "c": 3.0})
    run(session(), field)
    assert [(key, count) for key, count, _ in field.timed_rows] == [("a", 2), ("b", 2), ("c", 2)]


def test_memory_is_that_of_the_timed_runs(session, monkeypatch):
    """What torch reserves beyond what it had before, without what compiling took, and the weights that are shared."""
    held = {"now": 100, "peak": 0}
    monkeypatch.setattr(runner, "reserved_bytes", lambda peak=False: held["peak" if peak else "now"])
    monkeypatch.setattr(runner, "reset_peak", lambda: held.update(peak=held["now"]))
    field = Field({"a": lambda: held.update(peak=max(held["peak"], 130)) or 1.0, "b": 1.0})
    field.verify = lambda entrant: held.update(peak=900) or 40.0
    run(session(in_turns=False), field, "ab", 1)
    assert field.timed_rows == [("a", 1, 37), ("b", 1, 7)]


def test_ratios_pair_where_turns_were_taken_and_later_baselines_count():
    def entrant(key, turn, *times):
        return Entrant(config(key), times=list(times), turn=turn)

    assert ratios(entrant("a", 0, 2.0, 9.0), entrant("b", 0, 1.0, 3.0)) == [2.0, 3.0]
    assert ratios(entrant("a", 0, 2.0, 8.0, 9.0), entrant("b", 1, 2.0, 4.0)) == [pytest.approx(8 / 3)]
    slow, ours, fast, slower = (entrant(k, i, s) for i, (k, s) in enumerate(zip("abca", (8.0, 2.0, 4.0, 9.0))))
    scores = Scores({"vs_float": ("a", "c"), "vs_none": ("d",)}, [])
    told = [[(e.config.key, m, r) for e, m, r in scores.add([new])] for new in (ours, slow, fast, slower)]
    assert told == [
        [],
        [("a", "vs_float", [1.0]), ("b", "vs_float", [4.0])],
        [("c", "vs_float", [1.0]), ("b", "vs_float", [2.0]), ("a", "vs_float", [0.5])],
        [("a", "vs_float", [4 / 9])],
    ], "the fastest baseline counts, a slower one changes nothing"


def add(path, problem, value, **more):
    row = {"op": "x", "problem": problem, "backend": "cuda", "metric": "time", "sqnr_db": 41.0, "verified": True}
    row |= {"git_commit": "c0ffee", "dirty": False, "device": "H200", **record.percentiles([value]), **more}
    record.append([row], path)


def test_what_is_recorded_of_this_commit_device_and_backend(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "commit", lambda: ("c0ffee", False))
    path = tmp_path / "rows.csv"
    add(path, "a", 1.0)
    add(path, "a", 5.0, backend="cuda-64x128")
    add(path, "b", 1.0, git_commit="0ther")
    add(path, "c", 1.0, dirty=True)
    add(path, "d", 1.0, device="H100")
    rows = record.read(path)

    def found(backend, problems="abcd"):
        measures = [(config(key), Measure("x", key, "time", 1e-3, backend)) for key in problems]
        return [(e.config.key, e.times, e.more["backend"]) for e in recorded(measures, rows, "H200")]

    assert found("cuda") == found(None) == [("a", [5e-3], "cuda-64x128")]
    assert found("triton") == [], "it was another backend's"
    monkeypatch.setattr(record, "commit", lambda: ("c0ffee", True))
    assert found("cuda") == [], "the code is not that of the rows"
