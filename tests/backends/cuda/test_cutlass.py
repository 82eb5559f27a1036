"""csrc/cuda/sm90 beside CUTLASS, where its headers are: `pip install --no-deps nvidia-cutlass`. No extra has it: what
it needs besides is large."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.backends.cuda.emulation import EMULATOR, compile_source, cuda_includes


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
