"""Machine code of the Triton kernels for GPUs that are not here: tensor cores used, nothing spilled.

In a process of its own: kernels that were imported for the interpreter cannot be compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modiff_kernels.backends.triton import tiles
from tools import aot_triton

TOOL = Path(aot_triton.__file__)


def reports(tmp_path, *options):
    """Reports of tools/aot_triton.py, and its output; fails if the tool does for another reason than broken rules."""
    path = tmp_path / "reports.json"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, str(TOOL), "--json", str(path), *options],
        capture_output=True, text=True, env={**clean, "OMP_NUM_THREADS": "1"}, timeout=3600,
    )  # fmt: skip
    assert path.exists(), done.stderr[-2000:]
    return json.loads(path.read_text()), done.stdout


def assert_kept(found, text):
    broken = [
        f"sm_{report['capability']} {report['name']}: {report['failures']}" for report in found if report["failures"]
    ]
    assert not broken, "\n".join(broken) + "\n" + text[-3000:]


def test_every_form_uses_the_tensor_cores_and_does_not_spill(tmp_path):
    found, text = reports(tmp_path, "--few")
    assert_kept(found, text)
    for capability in aot_triton.PRODUCT_INSTRUCTION:
        names = [report["name"] for report in found if report["capability"] == capability]
        for config in tiles.candidates(divmod(capability, 10)):
            assert any(str(config) in name for name in names), f"sm_{capability}: {config} was not compiled"
        assert any(name.startswith("modulate_linear") for name in names)


def report(**changes):
    fields = {"registers": 128, "stack_bytes": 0, "shared_bytes": 1024, "instructions": 100, "counts": {"IGMMA": 2}}
    return aot_triton.Report("name", 90, **{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "kernel", "words"),
    [
        ({}, "product_kernel", None),
        ({"counts": {"IMMA": 4}}, "product_kernel", "no IGMMA"),
        ({"counts": {}}, "modulate_linear_kernel", "no IGMMA"),
        ({"counts": {}}, "finish_kernel", None),
        ({"counts": {"IGMMA": 2, "STL": 1}}, "product_kernel", "spills"),
        ({"stack_bytes": 8}, "product_kernel", "spills: 8 bytes of stack"),
        ({"shared_bytes": (227 << 10) + 1}, "product_kernel", "of shared memory, at most 232448"),
    ],
)
def test_rules(changes, kernel, words):
    failures = aot_triton.broken_rules(report(**changes), kernel)
    assert [words in failure for failure in failures] == ([] if words is None else [True])
