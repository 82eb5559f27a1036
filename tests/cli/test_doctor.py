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
    built = {"sources": "123", "compiler": "GNU 1.2", "nvcc": "9.9", "architectures": "sm_1 sm_2"}
    monkeypatch.setattr(dispatch.load("cuda"), "build_info", lambda: built)
    monkeypatch.setattr(dispatch.load("cpu"), "build_info", lambda: "it was not built")
    for sources, old in (("123", ""), ("456", "  OLDER than csrc: run `python setup.py build_ext --inplace`")):
        monkeypatch.setattr(doctor, "source_hash", lambda sources=sources: sources)
        assert main(["doctor"]) == 0
        lines = capsys.readouterr().out.partition("compiled libraries\n")[2].splitlines()
        assert f"  cuda  sources 123, compiler GNU 1.2, nvcc 9.9, architectures sm_1 sm_2{old}" in lines
        assert "  cpu   it was not built" in lines


def test_doctor_names_variables_that_are_wrong(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    wrong = {"BACKEND": ("fast", "give one of auto, cpu"), "CUDA": ("yes", "give one of AUTO, ON, OFF")}
    wrong |= {"CACHE": (f"{tmp_path}/file/plans", "no folder can be made"), "BAKEND": ("cpu", "it is not read")}
    for name, (value, _) in wrong.items():
        monkeypatch.setenv(f"MODIFF_{name}", value)
    monkeypatch.setenv("MODIFF_SKIP_BUILD", "0")
    assert main(["doctor"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "MODIFF_" in line}
    assert lines.pop("MODIFF_SKIP_BUILD").endswith("  0")
    assert all(f"{value}  WRONG: {text}" in lines[f"MODIFF_{name}"] for name, (value, text) in wrong.items())


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
