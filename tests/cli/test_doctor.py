import sys

import pytest

from modiff_kernels.cli import doctor, main
from modiff_kernels.ops import dispatch


def test_doctor_says_why_something_is_missing(capsys, monkeypatch, fresh_dispatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "modiff_kernels.backends.cpu", None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "triton          cannot be imported" in out
    assert "cpu        not available" in out
    assert "[1]" in out


def test_doctor_says_what_the_libraries_were_built_with(capsys, monkeypatch, fresh_dispatch):
    built = {"compiler": "GNU 1.2", "oldest_torch": "2.11", "nvcc": "9.9", "architectures": "sm_1 sm_2"}
    monkeypatch.setattr(dispatch.load("cuda"), "build_info", lambda: built)
    monkeypatch.setattr(dispatch.load("cpu"), "build_info", lambda: "it was not built")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.partition("compiled libraries\n")[2].splitlines()
    assert "  cuda  compiler GNU 1.2, oldest_torch 2.11, nvcc 9.9, architectures sm_1 sm_2" in lines
    assert "  cpu   it was not built" in lines


@pytest.mark.parametrize(("part", "message"), [(0, "codes of quantize differ"), (1, "outputs are only")])
def test_doctor_fails_on_a_backend_that_disagrees(capsys, monkeypatch, part, message):
    computed = doctor._computed

    def wrong(kind, backend, act_bits, device):
        results = computed(kind, backend, act_bits, device)
        if backend == "cpu":
            results[part] = results[part] + 1
        return results

    monkeypatch.setattr(doctor, "_computed", wrong)
    assert main(["doctor"]) == 1
    assert f"cpu        FAILED: {message}" in capsys.readouterr().out


def test_doctor_says_what_is_there_and_checks_every_backend_when_one_is_forced(capsys, monkeypatch, fresh_dispatch):
    monkeypatch.setenv("MODIFF_BACKEND", "reference")
    dispatch.reset()
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in ("versions", "torch", "devices", "backends", "self-check", "ok (", "MODIFF_BACKEND  reference"):
        assert words in out
    assert "FAILED" not in out
    assert dispatch.forced_backend() == "reference"
