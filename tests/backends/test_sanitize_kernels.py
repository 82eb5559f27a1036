"""tools/sanitize_kernels.py: its families are right where they can run here, and it says what is wrong."""

import pytest

from modiff_kernels import ops
from modiff_kernels.ops import dispatch
from tools import sanitize_kernels


@pytest.mark.parametrize("backend", ["cpu", "onednn"])
def test_every_family_agrees_with_the_reference(backend, capsys):
    if (reason := dispatch.why_unavailable(backend)) is not None:
        pytest.skip(reason)
    assert sanitize_kernels.main(["--backend", backend]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"{len(list(sanitize_kernels.calls()))} calls, 0 failed")
    assert sum(": ok" in line for line in lines) > 100


def test_families_are_dealt_out():
    count = len(list(sanitize_kernels.calls()))
    names = [call.name for call in sanitize_kernels.calls()]
    assert len(set(names)) == count
    assert {name.split()[0] for name in names} == {"quantize", "product", "modulate"}
    assert sanitize_kernels.main(["--backend", "reference", "--match", "no such name"]) == sanitize_kernels.EMPTY


def test_a_wrong_kernel_is_found(monkeypatch, capsys):
    right = ops.quantize

    def wrong(*arguments, backend):
        codes, *rest = right(*arguments, backend=backend)
        codes[0, 0, 0] += backend == "cpu"
        return codes, *rest

    monkeypatch.setattr(ops, "quantize", wrong)
    match = "quantize identity (2, 33, 72) per_sample dynamic 4"
    assert sanitize_kernels.main(["--backend", "reference", "cpu", "--match", match]) == 1
    reference, cpu, _ = capsys.readouterr().out.splitlines()
    assert reference.endswith(": ok")
    assert "FAILED: 1 of 4752 codes of result 0 differ, by up to 1" in cpu
