"""tools/sanitize_kernels.py: its families are right where they can run here, and it says what is wrong."""

from modiff_kernels import ops
from tools import sanitize_kernels


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
