"""The CUDA kernels at both of their places: emulated on the host under sanitizers, and on a GPU."""

import os
import shutil

import pytest
import torch

from modiff_kernels.backends import cuda
from tests.backends.cuda.emulation import SANITIZED, SOURCE, Emulator, compile_source
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
def emulator(tmp_path_factory, compiler):
    """A running program with the kernels; a sanitizer's complaint fails the test whose call it ends."""
    program = tmp_path_factory.mktemp("emulator") / "emulator"
    compile_source(compiler, SOURCE, program, *SANITIZED)
    running = Emulator(program)
    yield running
    running.close()


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    """The quantising kernels where they run."""
    if request.param == "cuda":
        if (reason := cuda.unavailable()) is not None:
            pytest.skip(reason)
        return Place(KERNELS, torch.device("cuda"))
    running = request.getfixturevalue("emulator")
    monkeypatch.setattr(cuda, "quantize_op", lambda: running.quantize)
    return Place(KERNELS, torch.device("cpu"))
