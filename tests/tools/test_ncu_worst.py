"""The profiler's calls: which are made, what is kept, and the time they may take. ncu is a stand-in."""

import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks.budget import Budget
from benchmarks.shapes import Layer
from tools import ncu_worst
from tools.ncu_worst import Call

CALLS = [
    Call("accumulate", "cuda", Layer("conv", 16, 24, 6, 6, 3, 2, 1), 8),
    Call("quantize_residual", "triton", Layer("linear", 32, 24, 18, 1, 1), 2),
    Call("modulated", "cuda", Layer("linear", 32, 24, 18, 1, 1), 1),
]


def test_calls_travel_on_the_command_line():
    for call in CALLS:
        assert Call.parsed(call.text()) == call
        words = ncu_worst.command(call)
        assert words[:5] == ["ncu", "--clock-control", "none", "--profile-from-start", "off"]
        assert Call.parsed(words[-1]) == call
    assert CALLS[0].name() == "accumulate-cuda-conv3x3-16-24@6x6-s2-b8-w8"


@pytest.fixture
def ncu(monkeypatch):
    """Answers by op; `asked` are the ops, with the seconds they were given."""
    answers, asked = {}, []

    def run(command, timeout, **_):
        form = Call.parsed(command[-1]).form
        asked.append((form, timeout))
        answer = answers.get(form, (0, "==PROF== connected\n  kernel (1, 1)   \n", ""))
        if answer is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, *answer)

    monkeypatch.setattr(ncu_worst.subprocess, "run", run)
    return answers, asked


def test_what_is_said_of_the_kernels_is_kept(ncu, tmp_path):
    _, asked = ncu
    assert ncu_worst.profile(CALLS, tmp_path, Budget(None)) == (0, 0)
    assert (tmp_path / f"{CALLS[0].name()}.txt").read_text() == "  kernel (1, 1)\n"
    assert ncu_worst.profile(CALLS, tmp_path, Budget(None)) == (0, 0)
    assert len(asked) == 3, "what is there is not profiled again"


def test_failures_leave_no_file(ncu, tmp_path, capsys):
    answers, _ = ncu
    answers.update(
        accumulate=(0, "==ERROR== ERR_NVGPUCTRPERM: no permission", ""),
        quantize_residual=None,
        modulated=(1, "", "crash"),
    )
    assert ncu_worst.profile(CALLS, tmp_path, Budget(None)) == (3, 0)
    assert list(tmp_path.iterdir()) == []
    errors = capsys.readouterr().err
    assert all(words in errors for words in ("ERR_NVGPUCTRPERM", "it took too long", "crash"))


def test_it_ends_in_time(ncu, tmp_path):
    _, asked = ncu
    now = iter((0.0, 1.0, 1.0, 99.0, 99.0))
    assert ncu_worst.profile(CALLS, tmp_path, Budget(50, lambda: next(now))) == (0, 2)
    assert asked == [("accumulate", 49.0)]


def test_what_is_missing_is_said(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert ncu_worst.main([]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert ncu_worst.main([]) == 2
    assert "ncu was not found" in capsys.readouterr().err
    assert sys.executable in ncu_worst.command(CALLS[0])
