"""The campaign's runner, with parts that are small programs: order, limits, resuming, and what comes back."""

import argparse
import json
import os
import runpy
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tools import gpu_campaign
from tools.gpu_campaign import FAILED, PASSED, SKIPPED, STOPPED, WAITING, Campaign
from tools.gpu_campaign_parts import PARTS, SETS, Part


def part(name, code, seconds=20, **more):
    return Part(name, "a test", ("{python}", "-c", code), seconds, **{"needs": (), "margin_seconds": 0, **more})


def statuses(campaign):
    return {name: outcome.status for name, outcome in campaign.outcomes.items()}


def test_parts_run_in_order_and_failures_stop_only_what_needs_them(tmp_path):
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    parts = [
        part("first", f"{note}('1')"),
        part("broken", "raise SystemExit('cause of the failure')"),
        part("dependent", f"{note}('never')", needs=("broken",)),
        part("other", f"{note}('2')", needs=("first",)),
        part("tool", f"{note}('never')", program="no-such-program"),
        Part("command", "a test", ("no-such-program",), 20, needs=()),
    ]
    campaign = Campaign(parts, tmp_path / "work", 100)
    seen = []
    campaign.run(on_part=lambda: seen.append(json.loads(campaign.state_file.read_text())["parts"]))
    assert (tmp_path / "order").read_text() == "12"
    expected = {
        "first": PASSED,
        "broken": FAILED,
        "dependent": SKIPPED,
        "other": PASSED,
        "tool": SKIPPED,
        "command": SKIPPED,
    }
    assert statuses(campaign) == expected
    assert campaign.outcomes["broken"].returncode == 1
    assert campaign.outcomes["dependent"].reason == "needs broken"
    assert [parts["first"]["status"] for parts in seen] == [PASSED] * 6
    assert campaign.exit_code() == 1
    assert "cause of the failure" in campaign.summary()


def test_the_same_campaign_goes_on_where_it_was(tmp_path):
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    ready = tmp_path / "ready"
    parts = [
        part("always", f"{note}('a')", every_time=True),
        part("once", f"{note}('b')"),
        part("later", f"import os, sys; {note}('c'); sys.exit(not os.path.exists({str(ready)!r}))"),
    ]
    Campaign(parts, tmp_path / "work", 100).run()
    ready.touch()
    again = Campaign(parts, tmp_path / "work", 100)
    again.run()
    assert (tmp_path / "order").read_text() == "abcac"
    assert set(statuses(again).values()) == {PASSED}
    assert again.exit_code() == 0


def test_a_part_ends_with_everything_it_started_when_its_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_campaign, "GRACE_SECONDS", 0.5)
    pid = tmp_path / "pid"
    code = (  # a child that ignores the request to end
        "import signal, subprocess, sys, time\n"
        "child = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)'\n"
        "process = subprocess.Popen([sys.executable, '-c', child])\n"
        f"open({str(pid)!r}, 'w').write(str(process.pid)); print('begun', flush=True); time.sleep(60)"
    )
    campaign = Campaign([part("slow", code, seconds=3)], tmp_path / "work", 100)
    begun = time.monotonic()
    campaign.run()
    assert time.monotonic() - begun < 10
    assert statuses(campaign) == {"slow": STOPPED}
    assert campaign.exit_code() == 3
    assert "begun" in campaign.summary()
    child = int(pid.read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or " Z " in state.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child is still running")


def test_a_part_that_ends_in_its_time_with_work_left_goes_on(tmp_path):
    parts = [part("bounded", "raise SystemExit(3)")]
    campaign = Campaign(parts, tmp_path / "work", 100)
    campaign.run()
    assert statuses(campaign) == {"bounded": STOPPED}
    assert campaign.exit_code() == 3
    Campaign([part("bounded", "pass")], tmp_path / "work", 100).run()
    assert statuses(Campaign(parts, tmp_path / "work", 100)) == {"bounded": PASSED}


def test_no_part_is_begun_that_has_no_time_left(tmp_path):
    now = [0.0]
    seconds = gpu_campaign.TAIL_SECONDS + gpu_campaign.LEAST_SECONDS + 5
    campaign = Campaign([part(name, "pass") for name in "ab"], tmp_path / "work", seconds, clock=lambda: now[0])

    def spend():
        now[0] += 6

    campaign.run(on_part=spend)
    assert statuses(campaign) == {"a": PASSED, "b": WAITING}
    assert campaign.exit_code() == 3


def test_a_command_is_told_what_it_may_use(tmp_path):
    code = "import sys; open(sys.argv[2] + '/told', 'w').write(sys.argv[1])"
    command = ("{python}", "-c", code, "{budget}", "{work}")
    Campaign([Part("p", "", command, 300, needs=(), margin_seconds=20)], tmp_path, 1000).run()
    assert (tmp_path / "told").read_text() == "280"
    seconds = 100 + gpu_campaign.TAIL_SECONDS
    Campaign([Part("q", "", command, 300, needs=(), margin_seconds=20)], tmp_path, seconds).run()
    assert 75 <= int((tmp_path / "told").read_text()) <= 80


def test_parts_that_need_data_wait_for_it(tmp_path):
    code = "import sys; open(sys.argv[1] + '/told', 'w').write(sys.argv[2])"
    needy = Part("p", "", ("{python}", "-c", code, "{data}", "{minutes}"), 110, needs=(), margin_seconds=20)
    campaign = Campaign([needy], tmp_path / "work", 1000)
    campaign.run()
    assert campaign.outcomes["p"].reason == "needs --data"
    assert campaign.exit_code() == 3
    Campaign([needy], tmp_path / "work", 1000, data=tmp_path).run()
    assert (tmp_path / "told").read_text() == "1.50"


def test_results_are_packed_below_a_size(tmp_path):
    files = []
    for index in range(5):
        path = tmp_path / f"file{index}"
        path.write_bytes(os.urandom(100_000))
        files.append(path)
    large = tmp_path / "large"
    large.write_bytes(os.urandom(300_000))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results-9.zip").write_text("of an earlier run")
    left_out = gpu_campaign.pack([*files, large], tmp_path / "out", 250_000)
    assert len(left_out) == 1
    assert left_out[0].startswith("large: ")
    archives = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in archives] == ["results-1.zip", "results-2.zip", "results-3.zip"]
    found = {}
    for path in archives:
        assert path.stat().st_size <= 250_000
        with zipfile.ZipFile(path) as archive:
            found |= {name: archive.read(name) for name in archive.namelist()}
    assert found == {path.name: path.read_bytes() for path in files}


def test_only_what_the_campaign_wrote_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_campaign, "ROOT", tmp_path)
    old, new = (tmp_path / "benchmarks" / "results" / name for name in ("old.csv", "new.csv"))
    log, wheel = tmp_path / "build" / "logs" / "a.log", tmp_path / "build" / "site" / "module.py"
    for path in (old, new, log, wheel):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.utime(old, (100, 100))
    assert gpu_campaign.result_files(tmp_path / "build", since=1000) == [new, log]


def test_bad_input_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit, match="'nonsense' is unknown; allowed: environment, build"):
        gpu_campaign.main(["--part", "nonsense"])
    with pytest.raises(SystemExit) as refused:
        gpu_campaign.main(["--seconds", "3"])
    assert refused.value.code == 2
    assert "--seconds 3 is too little" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="holds no wheels"):
        gpu_campaign.install_wheels(tmp_path, tmp_path / "site")


def test_nothing_runs_without_a_gpu(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tools/gpu_campaign.py", "--work", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=gpu_campaign.ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "sees no CUDA device; nothing was run" in done.stderr
    assert not (tmp_path / "work").exists()


def test_what_a_part_needs_comes_with_it_and_before_it():
    assert [part.name for part in gpu_campaign.selected(["machine"], "all")] == ["build", "machine"]
    names = [part.name for part in PARTS]
    assert len(set(names)) == len(names)
    for index, part in enumerate(PARTS):
        assert set(part.needs) <= set(names[:index])
    assert {name for parts in SETS.values() for name in parts} == set(names)


class Parsed(Exception):
    """The arguments were accepted."""


@pytest.mark.parametrize("part", [p for p in PARTS if "{python}" in p.command], ids=lambda p: p.name)
def test_every_command_is_accepted_by_its_program(part, monkeypatch, tmp_path):
    """A campaign must not lose its time to an option that was renamed."""
    begin = part.command.index("{python}") + 1
    values = {"python": "python", "work": tmp_path, "data": tmp_path, "budget": 100, "minutes": "1.67"}
    words = [word.format(**values) for word in part.command[begin:]]
    if words[:2] == ["-m", "pytest"]:
        for word in words:
            assert not word.startswith("tests/") or (gpu_campaign.ROOT / word.split("::")[0]).exists(), word
        return
    if words[0] == "setup.py":
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(*arguments, **keywords):
        parse(*arguments, **keywords)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.chdir(gpu_campaign.ROOT)
    monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
    run, name = (runpy.run_module, words[1]) if words[0] == "-m" else (runpy.run_path, words[0])
    with pytest.raises(Parsed):
        run(name, run_name="__main__")
