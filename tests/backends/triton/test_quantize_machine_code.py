"""What the quantising kernels become on sm_90, read from PTX: width of the memory accesses and exact arithmetic.

Compiled in another process, because in this one the kernels may be interpreted.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import json, re, sys
from collections import Counter
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from modiff_kernels.backends.triton.aot import quantize_variants

rows = []
for variant in quantize_variants():
    is_pass = variant.kernel.__name__ in ("quantize_kernel", "range_kernel")
    elements = is_pass and variant.constexprs["BLOCK_R"] * variant.constexprs["BLOCK_C"]
    main = elements == 4096 or (elements == 1024 and variant.constexprs["GRANULARITY"] == "per_block")
    granularity = variant.constexprs.get("GRANULARITY")
    if not main or granularity == "per_tensor" or variant.signature["h_ptr"] != "*fp16":
        continue
    names = list(variant.signature)
    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs={(names.index(key),): value for key, value in variant.constexprs.items()},
        attrs={(names.index(key),): [["tt.divisibility", 16]] for key in variant.divisible},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": variant.num_warps}).asm["ptx"]
    words = re.findall(r"\\b[a-z]\\w*(?:\\.\\w+(?:::\\w+)?)+", ptx)
    constants = {key: str(value) for key, value in variant.constexprs.items()}
    per_thread = elements // (32 * variant.num_warps)
    rows.append(
        {"kernel": variant.kernel.__name__, "constants": constants, "words": Counter(words), "per_thread": per_thread}
    )
json.dump(rows, sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def count(row, pattern):
    return sum(n for word, n in row["words"].items() if re.fullmatch(pattern, word))


def is_residual(row):
    return row["constants"].get("x_hat_ptr") != "None"


def test_the_main_forms_are_there(compiled):
    assert {row["kernel"] for row in compiled} == {"quantize_kernel", "range_kernel"}
    assert {row["constants"]["PROLOGUE"] for row in compiled} >= {"identity", "group_norm"}
    assert {row["constants"]["GRANULARITY"] for row in compiled} >= {"per_sample", "per_block"}


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


def test_scales_and_codes_are_rounded_as_the_contract_says(compiled):
    for row in compiled:
        if row["kernel"] == "quantize_kernel":
            assert count(row, r"div\.rn\.f32") >= 1, row["constants"]
            assert count(row, r"cvt\.rni\.f32\.f32") >= row["per_thread"], row["constants"]
        if row["constants"]["SILU"] == "False":  # the sigmoid may be approximate
            assert count(row, r"(div\.(full|approx)|rcp\.approx)(\.\w+)*") == 0, row["constants"]
