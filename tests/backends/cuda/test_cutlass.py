"""csrc/cuda/sm90 beside CUTLASS, where its headers are: `pip install --no-deps nvidia-cutlass` (what that package needs
besides is large, so no extra has it)."""

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.backends.cuda.emulation import EMULATOR, ROOT, compile_source


@pytest.fixture(scope="module")
def headers():
    if (found := find_spec("cutlass_library")) is None:
        pytest.skip("the headers of CUTLASS were not found: pip install --no-deps nvidia-cutlass")
    return Path(found.origin).parent / "source" / "include"


def test_layouts_are_those_of_cute(headers, compiler, tmp_path):
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
    if not (cuda / "cuda_runtime_api.h").is_file():
        pytest.skip(f"the headers of CUDA were not found in {cuda}; set CUDA_HOME")
    flags = [flag for folder in (headers, cuda, cuda / "cccl") for flag in ("-isystem", str(folder))]
    compile_source(compiler, EMULATOR / "cute.cpp", tmp_path / "cute", *flags)
    lines = subprocess.run([tmp_path / "cute"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 14
    for line in lines:
        _, count, differ = line.split()
        assert int(count) > 4000, line
        assert int(differ) == 0, line


# What the operands of asm are, as we and as CUTLASS call them.
ROLES = {
    "smem": ("shared_address(to)", "smem_int_ptr"),
    "map": ("&map", "gmem_int_desc"),
    "barrier": ("shared_address(barrier)", "address", "smem_int_mbar", "smem_addr"),
    "count": ("arrivals", "arrive_count", "bytes", "transaction_bytes"),
    "parity": ("parity", "phase"),
    "x0": ("x", "channel", "crd0", "coord_c"),
    "x1": ("y", "corner.w", "crd1", "coord_w"),
    "x2": ("corner.h", "coord_h"),
    "x3": ("corner.n", "coord_n"),
    "offset0": ("static_cast<uint16_t>(offset_w)", "offset_w"),
    "offset1": ("static_cast<uint16_t>(offset_h)", "offset_h"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
NAMED = ("wgmma.mma_async", "mbarrier.", "cp.async.bulk.tensor.2d.shared", "cp.async.bulk.tensor.4d.shared")


def instructions(source):
    """The instructions of NAMED in its asm, with roles for operands that have one, without spaces; predicates are p."""
    for found in re.finditer(r'\basm(?: volatile)?\s*\(((?:"(?:\\.|[^"\\])*"|[^"])*?)\);', re.sub(r"//.*", "", source)):
        literals = re.match(r'(\s*"(?:\\.|[^"\\])*")*', found[1])[0]
        operands = re.findall(r'"[+=]*(\w)"\s*\((.*?)\)(?=\s*[,:]|\s*$)', found[1][len(literals) :])
        text = "".join(re.findall(r'"((?:\\.|[^"\\])*)"', literals)).replace("\\n", " ").replace("\\t", " ")
        for i, (_, name) in reversed([*enumerate(operands)]):
            if name.strip() in ROLE_OF and "wgmma" not in text:
                text = re.sub(rf"%{i}\b", f"<{ROLE_OF[name.strip()]}>", text)
        text = re.sub(r"\b(accumulate|passed|P1)\b", "p", text)
        text = (
            text.replace(".global.tile.", ".global.")
            .replace(".L2::cache_hint", "")
            .replace("[<barrier>], %5", "[<barrier>]")
        )
        for part in re.split("[;{]\\s*(?=[a-z@.])|;", text):
            if part.strip().startswith(NAMED):
                yield re.sub(r"\s", "", part)


def test_instructions_are_spelled_as_in_cutlass(headers):
    theirs = set()
    for name in ("cute/arch/mma_sm90_gmma.hpp", "cute/arch/mma_sm90_gmma_ext.hpp", "cute/arch/copy_sm90_tma.hpp",
                 "cutlass/arch/barrier.h"):  # fmt: skip
        theirs |= set(instructions((headers / name).read_text()))
    folder = ROOT / "csrc" / "cuda" / "sm90"
    ours = [i for name in ("wgmma.cuh", "hopper_cta.cuh") for i in instructions((folder / name).read_text())]
    assert len(ours) >= 10
    assert [i for i in ours if i not in theirs] == []
