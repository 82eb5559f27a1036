"""The machine code of the library that was built here, against the rules of tools/sass_rules.json; and the reader."""

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from modiff_kernels.backends.cuda import library
from tools import sass_report
from tools.sass_report import Instruction, Row

CSRC = Path(__file__).resolve().parents[3] / "csrc"
ARCHS = ["sm_80", "sm_86", "sm_90a"]  # sm_89 is made of the same PTX as sm_86
RULES = sass_report.load_rules(sass_report.RULES)


@pytest.fixture(scope="module")
def built():
    if not library.LIBRARY.exists():
        pytest.skip(library.why_not_loaded())
    pytest.importorskip("triton", reason="the disassemblers come with triton")
    return library.LIBRARY


@pytest.fixture(scope="module")
def rows(built):
    return sass_report.report(built, ARCHS)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=[rule["why"] for rule in RULES])
def test_rules_hold(rows, rule):
    assert {row.arch for row in rows} == set(ARCHS)
    assert sass_report.broken(rule, rows) == []


@pytest.mark.slow
def test_a_processor_newer_than_hopper(tmp_path):
    """They run what the driver makes of the PTX of sm_80; here a source of it is compiled for one, without spills."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if shutil.which(nvcc) is None:
        pytest.skip("no nvcc was found")
    source = CSRC / "cuda" / "sm80" / "product_unpacked.cu"
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_120a", "-Xptxas=-v", f"-I{CSRC}", "-c", source]
    done = subprocess.run([*command, "-o", tmp_path / "out.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills
    assert set(spills) == {("0", "0")}


@pytest.mark.slow
def test_wgmma_is_not_serialised(rows):
    """Where ptxas cannot keep a wgmma under way it waits after each one and says so in a remark (C7510) that nvcc
    cannot make an error. Then there are more arrivals and waits than the sources have: two (whole and half k-blocks),
    and two."""
    products = [row for row in rows if row.kernel.startswith("sm90::Product<")]
    assert len(products) == 8
    for row in products:
        _, blocks, columns = (int(number) for number in re.findall(r"\d+", row.kernel.split("<")[1]))
        wgmma = {name: count for name, count in row.opcodes.items() if name.startswith("IGMMA")}
        assert wgmma == {f"IGMMA.64x{columns}x32.S8.S8": (4 + 2) * blocks}
        assert (row.opcodes["WARPGROUP.ARRIVE"], row.opcodes["WARPGROUP.DEPBAR.LE"]) == (2, 2)


def test_the_library_has_every_architecture(built):
    cuobjdump = sass_report.disassembler("cuobjdump")
    listed = [line for kind in ("-lelf", "-lptx") for line in sass_report.lines(cuobjdump, kind, str(built))]
    found = set(re.findall(r"\.(sm_\w+\.(?:cubin|ptx))", "".join(listed)))
    assert found == {"sm_80.ptx", "sm_80.cubin", "sm_86.cubin", "sm_89.cubin", "sm_90a.cubin"}
    said = library.build_info()["architectures"].split()
    assert found == {f"{a}.cubin" if a.startswith("sm_") else f"{a.replace('compute', 'sm')}.ptx" for a in said}


def code(*texts):
    """Instructions of (opcode, stall, board it holds, boards it waits for). "BRA 2": to the third; "@": guarded."""
    found = []
    for i, (text, *control) in enumerate(texts):
        opcode, _, jump = text.lstrip("@").partition(" ")
        stall, write, waits = (*control, *(1, 7, 0)[len(control) :])
        word = stall | write << 5 | 7 << 8 | waits << 11
        found.append(Instruction(16 * i, opcode, text[0] == "@", 16 * int(jump) if jump else -1, word))
    return found


ROW = Row("sm_90a", "TilePass<float>", 96, 0, 1040, Counter({"LDG.E.128": 4, "STG.E": 2, "FADD": 9}))
ROW.code = code(("FADD", 4), ("@BRA 0", 1))
RULE = {"why": "w", "arch": "sm_90a", "kernel": "^Tile"}


class TestClocks:
    def test_by_hand(self):
        """Stalls add up; a result is waited for; two warps hide each other's waits, not the queue of memory."""
        fixed = code(("FADD", 4), ("FMUL", 2), ("FADD", 1))
        loaded = code(("LDS.128", 1, 0), ("FADD", 4, 7, 1))
        for region, warps, clocks in (
            (fixed, 1, 7),
            (fixed, 2, 8),
            (loaded, 1, 16 + 30 + 4),
            (loaded, 2, 16 + 16 + 30 + 4),
            (code(*[("STG.E.128",)] * 5), 1, 80),
            (code(("LDG.E", 2, 3), ("FADD", 1, 7, 0)), 1, 4),
        ):
            assert sass_report.clocks_of(region, warps) == clocks

    def test_tensor_cores_by_hand(self):
        """They are busy for 8 clocks an IMMA, whoever's; of many passes a warp's waits are filled by another's."""
        two, one = code(("IMMA", 2), ("IMMA", 8), ("FADD", 4)), code(("IMMA", 12))
        assert [sass_report.clocks_of(two, warps, tensor=8) for warps in (1, 2)] == [20, 37]  # one for an issue slot
        rules = {"warps": 1, "tensor": 8}, {"warps": 2, "tensor": 8}, {"warps": 2}
        assert [sass_report.clocks_by(rule, one) for rule in rules] == [12, 16, 13]

    def test_regions(self):
        kernel = code(
            ("MOV",), ("SYNCS",), ("UTMALDG.2D",), ("@BRA 2",), ("@BRA 1",), ("BRA 7",),
            ("STSM.16",), ("FADD",), ("@BRA 1",), ("STSM.16",), ("EXIT",), ("STSM.16",), ("BRX",),
        )  # fmt: skip
        for region, spans in (
            ("loop UTMALDG", [(2, 4)]),
            ("loop SYNCS", [(1, 5)]),
            ("loop MOV", []),
            ("stretch STSM", [(6, 10), (11, 12)]),
            ("stretch LDSM", []),
            ("before SYNCS", [(0, 1)]),
            ("before FADD", [(0, 6)]),
        ):
            assert sass_report.regions(kernel, region) == [kernel[first:end] for first, end in spans]


def test_a_broken_rule_says_how():
    for changes, reason in (
        ({}, None),
        ({"must": [r"LDG\.E\.128"], "never": ["STL", "LDL"], "registers": 96, "stack_bytes": 0}, None),
        ({"arch": "sm_.*", "kernels": 1}, None),
        ({"must": ["IGMMA"]}, "sm_90a TilePass<float>: no IGMMA"),
        ({"never": ["STG"]}, "sm_90a TilePass<float>: STG.E"),
        ({"registers": 95}, "sm_90a TilePass<float>: registers 96, at most 95"),
        ({"registers_exactly": 96}, None),
        ({"registers_exactly": 97}, "sm_90a TilePass<float>: registers 96, not 97"),
        ({"shared_bytes": 1024}, "sm_90a TilePass<float>: shared_bytes 1040, at most 1024"),
        ({"kernels": 2}, "sm_90a: applies to 1 kernels, 2 are expected"),
        ({"arch": "sm_90"}, "applies to no kernel"),
        ({"kernel": "RowPass"}, "applies to no kernel"),
        ({"most": {r"LDG\.E\.128": 4}}, None),
        ({"most": {r"STG\.E": 1}}, "sm_90a TilePass<float>: 2 times STG\\.E, at most 1"),
        ({"region": "loop FADD", "clocks": 5}, None),
        ({"region": "loop FADD", "clocks": 4}, "sm_90a TilePass<float>: loop FADD: 5 clocks, at most 4"),
        ({"region": "loop FADD", "region_never": ["BR"]}, "sm_90a TilePass<float>: loop FADD: BRA"),
        ({"region": "loop FADD", "region_must": ["MUFU"]}, "sm_90a TilePass<float>: loop FADD: no MUFU"),
        ({"region": "before BRA", "region_must": ["FADD"], "region_never": ["BRA"]}, None),
        ({"region": "loop MUFU"}, "sm_90a TilePass<float>: no loop MUFU"),
    ):
        assert sass_report.broken({**RULE, **changes}, [ROW]) == ([] if reason is None else [reason])
