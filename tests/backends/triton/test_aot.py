"""Machine code of the Triton kernels for GPUs that are not here: tensor cores used, nothing spilled; the quantising
ones with wide memory accesses and exact arithmetic, read from PTX.

In a process of its own: kernels that were imported for the interpreter cannot be compiled."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modiff_kernels.backends.triton import tiles
from tools import aot_triton

TOOL = Path(aot_triton.__file__)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Reports of tools/aot_triton.py; fails if the tool does for another reason than broken rules."""
    path = tmp_path_factory.mktemp("aot") / "reports.json"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, str(TOOL), "--json", str(path), "--few"],
        capture_output=True, text=True, env={**clean, "OMP_NUM_THREADS": "1"}, timeout=3600,
    )  # fmt: skip
    assert path.exists(), done.stderr[-2000:]
    return json.loads(path.read_text())


def test_every_form_uses_the_tensor_cores_and_does_not_spill(found):
    broken = [f"sm_{report['capability']} {report['name']}: {report['failures']}" for report in found]
    assert not any(report["failures"] for report in found), "\n".join(broken)
    for capability in aot_triton.PRODUCT_INSTRUCTION:
        names = [report["name"] for report in found if report["capability"] == capability]
        for config in tiles.candidates(divmod(capability, 10)):
            assert any(str(config) in name for name in names), f"sm_{capability}: {config} was not compiled"


@pytest.fixture(scope="module")
def compiled(found):
    """The passes over float16 whose tiles are those of most layers."""
    chosen = []
    for row in found:
        constants = row["constants"]
        if row["kernel"] in ("quantize_kernel", "range_kernel") and row["types"]["h_ptr"] == "*fp16":
            elements = int(constants["BLOCK_R"]) * int(constants["BLOCK_C"])
            row["per_thread"] = elements // (32 * row["warps"])
            per_block = constants["GRANULARITY"] == "per_block"
            if constants["GRANULARITY"] != "per_tensor" and (elements == 4096 or (elements == 1024 and per_block)):
                chosen.append(row)
    assert {row["kernel"] for row in chosen} == {"quantize_kernel", "range_kernel"}
    assert {row["constants"]["PROLOGUE"] for row in chosen} >= {"identity", "group_norm"}
    assert {row["constants"]["GRANULARITY"] for row in chosen} >= {"per_sample", "per_block"}
    return chosen


def count(row, pattern):
    return sum(n for word, n in row["ptx"].items() if re.fullmatch(pattern, word))


def is_residual(row):
    return row["constants"].get("x_hat_ptr") != "None"


def test_tensors_move_in_16_byte_accesses(compiled):
    for row in compiled:
        assert count(row, r"(ld|st)\.global\.(b8|u8|b16|u16|v2\.b16|v4\.b8|v2\.b8)") == 0, row["constants"]
        # 16 or 32 elements of h, and of x_hat, for a thread, 8 per access.
        accesses = row["per_thread"] // 8
        assert accesses >= 2
        assert count(row, r"ld\.global\.v4\.b32") >= accesses * (2 if is_residual(row) else 1), row["constants"]
        if row["kernel"] == "quantize_kernel":  # codes of one byte, and x_hat
            stores = accesses // 2 + (accesses if is_residual(row) else 0)
            assert count(row, r"st\.global(\.L\S*)?\.v4\.b32") == stores, row["constants"]


def test_a_product_may_begin_before_the_end_of_the_codes(found):
    for row in found:
        wanted = row["kernel"] == "quantize_kernel" and row["capability"] >= 90
        assert count(row, r"griddepcontrol\.launch_dependents") == wanted, row["name"]


def test_scales_and_codes_are_rounded_as_the_contract_says(compiled):
    for row in compiled:
        if row["kernel"] == "quantize_kernel":
            assert count(row, r"div\.rn\.f32") >= 1, row["constants"]
            assert count(row, r"cvt\.rni\.f32\.f32") >= row["per_thread"], row["constants"]
        if row["constants"]["SILU"] == "False":  # the sigmoid may be approximate
            assert count(row, r"(div\.(full|approx)|rcp\.approx)(\.\w+)*") == 0, row["constants"]


def report(kernel, **changes):
    fields = {"registers": 128, "stack_bytes": 0, "shared_bytes": 1024, "instructions": 100, "counts": {"IGMMA": 2}}
    return aot_triton.Report("name", kernel, 90, 4, {}, {}, {}, **{**fields, **changes})


def test_rules():
    for changes, kernel, words in (
        ({}, "product_kernel", None),
        ({"counts": {"IMMA": 4}}, "product_kernel", "no IGMMA"),
        ({"counts": {}}, "product_kernel", "no IGMMA"),
        ({"counts": {}}, "finish_kernel", None),
        ({"counts": {"IGMMA": 2, "STL": 1}}, "product_kernel", "spills"),
        ({"stack_bytes": 8}, "product_kernel", "spills: 8 bytes of stack"),
        ({"shared_bytes": (227 << 10) + 1}, "product_kernel", "of shared memory, at most 232448"),
    ):
        failures = aot_triton.broken_rules(report(kernel, **changes))
        assert [words in failure for failure in failures] == ([] if words is None else [True])
