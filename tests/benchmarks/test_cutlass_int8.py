"""The rival's loader: what is compiled and when, what a kernel is given, and that a wrong one is not timed. No kernel
runs here; a stand-in for the compiled library computes with the backend reference.
"""

import ctypes
import re
import shutil
import subprocess

import pytest
import torch

from benchmarks.cutlass_int8 import build, rival
from benchmarks.product_cases import RIVAL_FORM, Case
from benchmarks.shapes import Layer

GEMM = next(kernel for kernel in build.KERNELS if kernel.source == "gemm_sm90")
CONVS = [kernel for kernel in build.KERNELS if kernel.source.startswith("conv")]
CPU = torch.device("cpu")
LAYERS = [Layer("linear", 32, 24, 18, 1, 1), Layer("conv", 32, 24, 5, 5, 1), Layer("conv", 16, 24, 6, 7, 3, 2, 1)]


class StandIn:
    """A compiled library that writes what it should, times `factor`, for sizes that it takes."""

    def __init__(self, case, factor=1.0, takes=True):
        self.case, self.factor, self.takes, self.sizes = case, factor, takes, None
        self.workspace_bytes = lambda array: 64 if takes else -1
        self.run = self._run

    def _run(self, codes, weight, scale, weight_scale, out, sizes, workspace, stream):
        self.sizes = list(sizes)
        value = (self.case.expected(RIVAL_FORM) * self.factor).half()
        data = (value.permute(0, 2, 3, 1) if value.ndim == 4 else value).contiguous()
        ctypes.memmove(out, data.data_ptr(), 2 * data.numel())
        return 0


class Function:
    """What ctypes gives: attributes can be set."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)


def rival_of(libraries, monkeypatch, tmp_path):
    """A Rival with these stand-ins by kernel."""
    for kernel in libraries:
        kernel.library(tmp_path).touch()
    found = {str(kernel.library(tmp_path)): library for kernel, library in libraries.items()}
    for library in found.values():
        library.workspace_bytes, library.run = Function(library.workspace_bytes), Function(library.run)
    return rival.Rival(tmp_path, found.__getitem__)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_kernel_gets_the_sizes_and_writes_the_output(layer, monkeypatch, tmp_path):
    case = Case(layer, 3, 8, CPU)
    kernel = CONVS[0] if layer.kernel == 3 else GEMM
    library = StandIn(case)
    ours = rival_of({kernel: library}, monkeypatch, tmp_path)
    assert len(ours) == 1
    name, times, sqnr_db = ours.best(case, lambda call: [float(call().isfinite().all())], lambda call: [9.0])
    assert (name, times) == (kernel.name, [1.0])
    assert sqnr_db > 60
    sizes = {"linear": [54, 24, 32], "conv1": [75, 24, 32], "conv3": [3, 6, 7, 16, 24, 3, 2, 1]}
    assert library.sizes == sizes["linear" if layer.kind == "linear" else f"conv{layer.kernel}"]


def test_the_fastest_right_kernel_counts(monkeypatch, tmp_path):
    case = Case(LAYERS[2], 2, 8, CPU)
    times = iter([[5.0], [3.0], [4.0]])
    libraries = {
        CONVS[0]: StandIn(case), CONVS[1]: StandIn(case, takes=False), CONVS[2]: StandIn(case),
        CONVS[3]: StandIn(case, factor=1.1), CONVS[4]: StandIn(case), GEMM: StandIn(case),
    }  # fmt: skip
    ours = rival_of(libraries, monkeypatch, tmp_path)
    assert ours.best(case, lambda call: [3.5, 3.6], lambda call: next(times))[:2] == (CONVS[2].name, [3.5, 3.6])
    assert libraries[GEMM].sizes is None, "a convolution with a window is no matrix"


def test_without_a_right_kernel_it_says_why(monkeypatch, tmp_path):
    case = Case(LAYERS[2], 2, 8, CPU)
    libraries = {CONVS[0]: StandIn(case, factor=2.0), CONVS[1]: StandIn(case, takes=False)}
    never = lambda call: pytest.fail("a wrong kernel was timed")  # noqa: E731
    found = rival_of(libraries, monkeypatch, tmp_path).best(case, never, never)
    assert re.search(rf"{CONVS[0].name}: .* dB to the reference.*{CONVS[1].name} does not take these sizes", found)
    assert not rival.Rival(tmp_path / "nothing built")


def test_a_library_that_does_not_load_is_left_out(tmp_path, capsys):
    GEMM.library(tmp_path).write_text("no library")
    assert len(rival.Rival(tmp_path)) == 0
    assert f"{GEMM.name} does not load" in capsys.readouterr().err


def test_kernels_have_different_names_and_libraries(tmp_path):
    assert len({kernel.name for kernel in build.KERNELS}) == len(build.KERNELS)
    other = build.Kernel(GEMM.source, (*GEMM.macros[:-1], ("SCHEDULER", "Another")))
    assert GEMM.library(tmp_path) != other.library(tmp_path)
    assert all((build.SOURCES / f"{kernel.source}.cu").is_file() for kernel in build.KERNELS)


def test_headers_are_found_in_a_checkout_and_in_the_wheel(tmp_path):
    header = "include/cutlass/cutlass.h"
    for folder in (tmp_path / "checkout", tmp_path / "wheel" / build.WITHIN_WHEEL):
        (folder / header).parent.mkdir(parents=True)
        (folder / header).touch()
        assert build.headers(tmp_path / folder.relative_to(tmp_path).parts[0]) == folder
    assert build.headers(tmp_path / "elsewhere") is None


def test_only_what_is_missing_is_compiled(monkeypatch, tmp_path):
    kernels = [GEMM, *CONVS[:2]]
    GEMM.library(tmp_path).touch()
    commands = []

    def compiler(command, **_):
        commands.append(command)
        if CONVS[1].library(tmp_path).stem in command[-1]:
            return subprocess.CompletedProcess(command, 1, "", "no such tile")
        open(command[-1], "w").close()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(build.subprocess, "run", compiler)
    assert build.build(kernels, tmp_path / "cutlass", tmp_path) == {CONVS[1]: "no such tile"}
    assert len(commands) == 2
    assert CONVS[0].library(tmp_path).exists()
    assert "-arch=sm_90a" in commands[0]
    assert set(CONVS[0].defines()) <= set(commands[0])


def test_what_is_missing_is_said(capsys, monkeypatch, tmp_path):
    assert build.main(["--cutlass", str(tmp_path)]) == 2
    assert f"{tmp_path} has no include/cutlass/cutlass.h" in capsys.readouterr().err
    monkeypatch.setattr(build, "headers", lambda folder: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build.main([]) == 2
    assert "nvcc was not found" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build.main(["--kernel", "gemm_sm70"])
    assert "gemm_sm70 is unknown" in capsys.readouterr().err
