"""csrc/cuda/sm90 beside CUTLASS, where its headers are: `pip install --no-deps nvidia-cutlass`. No extra has it: what
it needs besides is large."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.backends.cuda.emulation import EMULATOR, ROOT, compile_source, cuda_includes


@pytest.fixture(scope="module")
def headers():
    if (found := find_spec("cutlass_library")) is None:
        pytest.skip("the headers of CUTLASS were not found: pip install --no-deps nvidia-cutlass")
    return Path(found.origin).parent / "source" / "include"


def test_layouts_are_those_of_cute(headers, compiler, tmp_path):
    compile_source(compiler, EMULATOR / "cute.cpp", tmp_path / "cute", f"-isystem{headers}", *cuda_includes())
    lines = subprocess.run([tmp_path / "cute"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 14
    for line in lines:
        _, count, differ = line.split()
        assert int(count) >= 4096, line
        assert int(differ) == 0, line


# What the operands of asm are, as we and as CUTLASS call them.
ROLES = {
    "smem": ("shared_address(to)", "shared_address(from)", "shared_address(row)", "smem_int_ptr"),
    "map": ("&map", "gmem_int_desc"),
    "remote": ("peer_address(barrier)",),  # remAddr32 there
    "barrier": ("shared_address(barrier)", "address", "smem_int_mbar", "smem_addr"),
    "count": ("arrivals", "arrive_count", "bytes", "transaction_bytes"),
    "mask": ("uint16_t{3}", "multicast_mask"),
    "parity": ("parity", "phase"),
    "x0": ("x", "channel", "crd0", "coord_c"),
    "x1": ("y", "corner.w", "crd1", "coord_w"),
    "x2": ("corner.h", "coord_h"),
    "x3": ("corner.n", "coord_n"),
    "offset0": ("static_cast<uint16_t>(offset_w)", "offset_w"),
    "offset1": ("static_cast<uint16_t>(offset_h)", "offset_h"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
COMPARED = (
    "wgmma.mma_async", "mbarrier.", "cp.async.bulk.tensor.2d.shared", "cp.async.bulk.tensor.4d.shared", "ldmatrix.",
    "cp.async.bulk.tensor.2d.global", "cp.async.bulk.commit_group", "cp.async.bulk.wait_group", "stmatrix.",
    "mapa.", "barrier.cluster.", "griddepcontrol.", "prefetch.tensormap",
)  # fmt: skip
LITERAL = r'"((?:\\.|[^"\\])*)"'


def instructions(source):
    """The instructions of COMPARED in its asm, with roles for operands that have one, without spaces; a predicate is p,
    a load without its cache hint and a barrier without the scope of clusters, which CUTLASS leaves out."""
    for found in re.finditer(r'\basm(?: volatile)?\s*\(((?:"(?:\\.|[^"\\])*"|[^"])*?)\);', re.sub(r"//.*", "", source)):
        literals = re.match(rf"(\s*{LITERAL})*", found[1])[0]
        text = re.sub(r"\\[nt]", " ", "".join(re.findall(LITERAL, literals)))
        operands = re.findall(r'"[+=]*\w"\s*\((.*?)\)(?=\s*[,:]|\s*$)', found[1][len(literals) :])
        for i, name in enumerate(operands if "wgmma" not in text else ()):
            text = re.sub(rf"%{i}\b", ROLE_OF.get(name.strip(), f"%{i}"), text)
        text = re.sub(r"\b(accumulate|passed|P1)\b", "p", text.replace(".global.tile.", ".global."))
        text = re.sub(r"(mbarrier\.\S*)\.(acquire|release)\.cluster", r"\1", text.replace("remAddr32", "remote"))
        text = text.replace(".L2::cache_hint", "").replace("[barrier], %5", "[barrier]").replace("mask, %6", "mask")
        parts = re.split(r";|^\s*\{", text)
        yield from (re.sub(r"\s", "", part) for part in parts if part.strip().startswith(COMPARED))


def test_instructions_are_spelled_as_in_cutlass(headers):
    names = (
        "mma_sm90_gmma",
        "mma_sm90_gmma_ext",
        "copy_sm90_tma",
        "copy_sm90_desc",
        "copy_sm90",
        "copy_sm75",
        "cluster_sm90",
    )
    sources = [
        *(headers / "cute" / "arch" / f"{name}.hpp" for name in names),
        *(headers / "cutlass" / "arch" / f"{name}.h" for name in ("barrier", "grid_dependency_control")),
    ]
    theirs = {i for source in sources for i in instructions(source.read_text())}
    names = "cuda/sm90/wgmma.cuh", "cuda/sm90/hopper_cta.cuh", "common/cta.h"
    ours = [i for name in names for i in instructions((ROOT / "csrc" / name).read_text())]
    assert len(ours) >= 25
    assert [i for i in ours if i not in theirs] == []
