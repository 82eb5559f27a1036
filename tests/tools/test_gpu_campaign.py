"""The campaign, with parts that are small programs: order, limits, what is kept of a part that is stopped."""

import argparse
import os
import runpy
import sys
import zipfile

import pytest

from tools import gpu_campaign
from tools.gpu_campaign import FAILED, PASSED, SKIPPED, STOPPED, Campaign
from tools.gpu_campaign_parts import PARTS, SETS, Part, _tests


def part(name, code, seconds=30, **more):
    return Part(name, "a test", ("{python}", "-c", code), seconds, **{"needs": (), "margin_seconds": 0, **more})


def statuses(campaign):
    return {name: outcome.status for name, outcome in campaign.outcomes.items()}


def test_parts_run_in_order_and_failures_stop_only_what_needs_them(tmp_path):
    note, ready = f"open({str(tmp_path / 'order')!r}, 'a').write", tmp_path / "ready"
    parts = [
        part("first", f"{note}('1')"),
        part("later", f"import os, sys; {note}('2'); sys.exit(not os.path.exists({str(ready)!r}))"),
        part("dependent", f"{note}('3')", needs=("later",)),
        part("tool", f"{note}('never')", program="no-such-program"),
        part("bounded", "raise SystemExit(3)"),
    ]
    campaign = Campaign(parts, tmp_path / "work", 100)
    campaign.run()
    expected = {"first": PASSED, "later": FAILED, "dependent": SKIPPED, "tool": SKIPPED, "bounded": STOPPED}
    assert statuses(campaign) == expected
    assert campaign.exit_code() == 1
    ready.touch()
    again = Campaign(parts, tmp_path / "work", 100)
    again.run()
    assert (tmp_path / "order").read_text() == "1223", "what has passed is not run again"
    assert statuses(again) == {**expected, "later": PASSED, "dependent": PASSED}


TESTS = """
import time, pytest
pytestmark = pytest.mark.gpu
def test_fails():
    value = 41
    assert value == 42
def test_passes(): pass
def test_skips(): pytest.skip("no GPU")
@pytest.mark.parametrize("emulated", [1], ids=["emulated"])
def test_of_the_host(emulated): raise SystemExit("not to be run")
def test_hangs(): time.sleep(60)
"""


def run_tests(tmp_path, which, seconds, *more):
    """The campaign's command for GPU tests, on a small file of tests."""
    (tmp_path / "test_it.py").write_text(TESTS)
    real = _tests("tests", "", seconds, str(tmp_path / "test_it.py"), "--rootdir", str(tmp_path), *more)
    changed = {"14": "1", "not emulated and not interpreter": f"not emulated and not interpreter and ({which})"}
    words = [changed.get(word, word) for word in real.command]
    config = ("-c", os.devnull, "-o", "markers=gpu", "-W", "ignore")
    campaign = Campaign([Part("tests", "", (*words, *config), seconds, needs=())], tmp_path / "work", 100)
    campaign.run()
    failures = tmp_path / "work" / "failures.txt"
    return campaign.outcomes["tests"], failures.read_text() if failures.exists() else ""


def test_a_part_that_is_out_of_time_keeps_its_tracebacks(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_campaign, "GRACE_SECONDS", 1.0)
    outcome, failures = run_tests(tmp_path, "fails or hangs", 30)
    assert outcome.status == STOPPED
    assert "test_fails" in failures
    assert "value = 41" in failures, "the whole traceback"
    assert "assert 41 == 42" in failures


def test_a_test_that_hangs_costs_itself_alone(tmp_path):
    outcome, failures = run_tests(tmp_path, "hangs or passes", 60, "--test-seconds", "2")
    assert outcome.status == FAILED
    assert "test_hangs did not end within 2 s; it was here:" in failures
    assert "in test_hangs" in failures


def test_a_part_with_only_skipped_tests_has_not_passed(tmp_path):
    assert run_tests(tmp_path, "skips", 60)[0].status == FAILED
    (tmp_path / "other").mkdir()
    assert run_tests(tmp_path / "other", "skips or passes", 60)[0].status == PASSED


def test_results_are_packed_below_a_size_and_only_what_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_campaign, "ROOT", tmp_path)
    results, out = tmp_path / "benchmarks" / "results", tmp_path / "out"
    files = [results / f"{name}.csv" for name in ("old", "new0", "new1", "new2")]
    files.append(tmp_path / "build" / "site" / "wheel.py")
    for path in (*files, out / "results-9.zip", results / "large.csv"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(300_000 if path.stem == "large" else 100_000))
    os.utime(files[0], (100, 100))
    left_out = gpu_campaign.pack(tmp_path / "build", 1000, out, 250_000)
    assert [line.split(":")[0] for line in left_out] == ["benchmarks/results/large.csv"]
    found = {}
    for path in out.iterdir():
        assert path.stat().st_size <= 250_000
        with zipfile.ZipFile(path) as archive:
            found |= {name: archive.read(name) for name in archive.namelist()}
    assert found == {f"benchmarks/results/new{i}.csv": files[1 + i].read_bytes() for i in range(3)}


def test_a_bad_wheel_is_left_out(tmp_path, capsys):
    with pytest.raises(SystemExit, match="holds no wheels"):
        gpu_campaign.install_wheels(tmp_path, tmp_path / "site")
    (tmp_path / "bad-1.0-py3-none-any.whl").write_text("no wheel")
    assert str(tmp_path / "site") in gpu_campaign.install_wheels(tmp_path, tmp_path / "site")["PYTHONPATH"]
    assert "bad-1.0-py3-none-any.whl could not be installed" in capsys.readouterr().err


def test_parts_fit_and_stand_behind_what_they_need():
    names = [part.name for part in PARTS]
    for index, own in enumerate(PARTS):
        assert set(own.needs) <= set(names[:index])
    assert {name for parts in SETS.values() for name in parts} == set(names)
    assert [part.name for part in gpu_campaign.selected(["machine"], "all")] == ["build", "machine"]
    steps = {part.name: part.command for part in PARTS if part.name.startswith("step_sd15")}
    for backend in ("cuda", "triton"):
        command = steps[f"step_sd15_{backend}"]
        assert command[command.index("--backend") + 1] == backend, "auto would time one of them alone"


class Parsed(Exception):
    """The arguments were accepted."""


def test_every_command_is_accepted_by_its_program(monkeypatch, tmp_path):
    """A campaign must not lose its time to an option that was renamed."""
    parse = argparse.ArgumentParser.parse_args

    def stop(*arguments, **keywords):
        parse(*arguments, **keywords)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.chdir(gpu_campaign.ROOT)
    for own in PARTS:
        begin = own.command.index("{python}") + 1 if "{python}" in own.command else None
        words = [word.format(python="python", work=tmp_path, budget=100) for word in own.command[begin:]]
        if begin is None or words[0] == "setup.py":
            continue
        if words[:2] == ["-m", "pytest"]:
            assert all((gpu_campaign.ROOT / word).exists() for word in words if word.startswith("tests/"))
            continue
        monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        run, name = (runpy.run_module, words[1]) if words[0] == "-m" else (runpy.run_path, words[0])
        with pytest.raises(Parsed):
            run(name, run_name="__main__")
