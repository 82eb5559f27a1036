"""The CUDA kernels emulated on the host under sanitizers."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest

from tests.backends.cuda.emulation import compile_module, running


@pytest.fixture(scope="session")
def compiler():
    """Name of the C++ compiler."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        pytest.skip(f"the C++ compiler {name!r} was not found")
    return name


@pytest.fixture(scope="session")
def host_module(tmp_path_factory, compiler):
    """Compiles emulator/<name>.cpp, functions of csrc as a Python module, and imports it."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11, of the extra `test`, was not found")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("Python.h was not found: the headers of this Python (python3-dev on Debian and Ubuntu) are missing")
    return lambda name: compile_module(compiler, name, tmp_path_factory.mktemp(name), pybind11.get_include())


@pytest.fixture(scope="session")
def quantize_emulator(tmp_path_factory, compiler):
    """`quantize` on the host."""
    with running("quantize", compiler, tmp_path_factory.mktemp("emulator")) as emulator:
        yield emulator


@pytest.fixture(scope="session")
def product_emulator(tmp_path_factory, compiler):
    """The product of csrc/cuda/sm80 on the host."""
    with running("product", compiler, tmp_path_factory.mktemp("emulator")) as emulator:
        yield emulator


@pytest.fixture(scope="session")
def hopper(tmp_path_factory, compiler):
    """The product of csrc/cuda/sm90 on the host."""
    with running("hopper", compiler, tmp_path_factory.mktemp("emulator")) as emulator:
        yield emulator
