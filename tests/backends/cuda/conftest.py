"""The CUDA kernels at both of their places: emulated on the host under sanitizers, and on a GPU."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from modiff_kernels.backends import cuda
from modiff_kernels.backends.cuda import library
from tests.backends.cuda.emulation import (
    EMULATOR,
    SANITIZED,
    ProductEmulator,
    QuantizingEmulator,
    compile_module,
    compile_source,
)
from tests.backends.quantizing_cases import Place

KERNELS = {name: kernel.fn for name, kernel in cuda.KERNELS.items()}


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


def running(kind, name, tmp_path_factory, compiler, *flags):
    """The program emulator/<name>.cpp; a sanitizer's complaint fails the test whose call it ends."""
    program = tmp_path_factory.mktemp("emulator") / name
    compile_source(compiler, EMULATOR / f"{name}.cpp", program, *SANITIZED, *flags)
    emulator = kind(program)
    yield emulator
    emulator.close()


@pytest.fixture(scope="session")
def emulator(tmp_path_factory, compiler):
    """The quantising kernels on the host."""
    yield from running(QuantizingEmulator, "quantizing", tmp_path_factory, compiler)


@pytest.fixture(scope="session")
def product_emulator(tmp_path_factory, compiler):
    """The products of csrc/cuda/sm80 on the host."""
    yield from running(ProductEmulator, "products", tmp_path_factory, compiler)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    """The kernels where they run."""
    if request.param == "cuda":
        if (reason := cuda.unavailable()) is not None:
            pytest.skip(reason)
        return Place(KERNELS, torch.device("cuda"))
    quantize = request.getfixturevalue("emulator").quantize
    monkeypatch.setattr(library, "quantize_op", lambda: quantize)
    return Place(KERNELS, torch.device("cpu"))
