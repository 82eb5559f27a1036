"""The campaign, with parts that are small programs: order, what passes, and commands that their programs accept."""

import argparse
import os
import runpy
import sys
import tarfile
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
import pytest
pytestmark = pytest.mark.gpu
def test_passes(): pass
def test_skips(): pytest.skip("no GPU")
@pytest.mark.parametrize("emulated", [1], ids=["emulated"])
def test_of_the_host(emulated): raise SystemExit("not to be run")
"""


def status_of_tests(tmp_path, which, processes):
    """Of the campaign's command for GPU tests, on a small file of tests."""
    (tmp_path / "test_it.py").write_text(TESTS)
    real = _tests("tests", "", 60, str(tmp_path / "test_it.py"), "--rootdir", str(tmp_path))
    changed = {"14": processes, "not emulated and not interpreter": f"not emulated and not interpreter and ({which})"}
    words = [changed.get(word, word) for word in real.command]
    config = ("-c", os.devnull, "-o", "markers=gpu", "-W", "ignore")
    campaign = Campaign([Part("tests", "", (*words, *config), 60, needs=())], tmp_path / "work", 100)
    campaign.run()
    return campaign.outcomes["tests"].status


def test_a_part_with_only_skipped_tests_has_not_passed(tmp_path):
    assert status_of_tests(tmp_path, "skips", "0") == FAILED
    (tmp_path / "other").mkdir()
    assert status_of_tests(tmp_path / "other", "skips or passes", "1") == PASSED


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
    default = steps["step_sd15_default"]
    assert default[default.index("--plan") + 1] == "auto"


def test_what_is_carried_comes_to_its_place(tmp_path, monkeypatch, capsys):
    carried, site = tmp_path / "carried", tmp_path / "site"
    carried.mkdir()
    for name in ("LIBRARIES", "CACHE"):
        monkeypatch.setattr(gpu_campaign, name, tmp_path / name)
    (carried / "lib.so").write_text("library")
    with zipfile.ZipFile(carried / "good-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("good/__init__.py", "")
    (carried / "bad-1-py3-none-any.whl").write_text("")
    with tarfile.open(carried / gpu_campaign.CACHE_ARCHIVE, "w:xz") as archive:
        archive.add(carried / "lib.so", "key/kernel.cubin")
    variables = gpu_campaign.unpack(carried, site)
    assert variables["PYTHONPATH"].split(os.pathsep)[0] == str(site)
    assert (variables["TRITON_CACHE_DIR"], variables["TRITON_STORE_BINARY_ONLY"]) == (str(tmp_path / "CACHE"), "1")
    for place in ("LIBRARIES/lib.so", "CACHE/key/kernel.cubin", "site/good/__init__.py"):
        assert (tmp_path / place).is_file()
    assert "bad-1-py3-none-any.whl is left out" in capsys.readouterr().err


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
        words = [
            word.format(python="python", work=tmp_path, budget=100, jobs=4, test_seconds=90)
            for word in own.command[begin:]
        ]
        if begin is None or words[0] == "-c":
            continue
        if words[:2] == ["-m", "pytest"]:
            assert all((gpu_campaign.ROOT / word).exists() for word in words if word.startswith("tests/"))
            continue
        monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        run, name = (runpy.run_module, words[1]) if words[0] == "-m" else (runpy.run_path, words[0])
        with pytest.raises(Parsed):
            run(name, run_name="__main__")
