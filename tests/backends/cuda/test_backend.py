"""What the backend cuda refuses and why, and its library."""

import ctypes
import re

import pytest
import torch

from modiff_kernels import backends
from modiff_kernels.backends import cuda, library_build_info, source_hash
from modiff_kernels.backends.cuda import library
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.operands import Window
from modiff_kernels.quant.packing import KPACK_V1
from tests.backends.cuda.emulation import ROOT

QUANTIZE = {"m": 16, "k": 320, "prologue": "identity", "granularity": "per_sample"}


def reason(op, **fields):
    return cuda.why_not(Problem(op, device_type="cuda", **fields))


def test_reasons_of_quantize():
    for fields, words in (
        ({"capability": (7, 5)}, "compute capability 7.5: the kernels need 8.0 .A100. or newer"),
        ({"k": 8193, "granularity": "per_token"}, "8193 channels: rows are held in registers"),
        ({"k": 8193, "prologue": "layer_norm"}, "of at most 8192 channels"),
        ({"m": 1 << 31, "k": 8}, "rows; they are counted in 31 bits"),
        ({"m": 1 << 20, "k": 1 << 21}, "more blocks than a launch"),
        ({"k": 8193}, None),
        ({"k": 8192, "prologue": "layer_norm", "capability": (12, 0)}, None),
    ):
        found = reason("quantize", **{**QUANTIZE, **fields})
        assert found is None if words is None else re.search(words, found)


WINDOW = Window((3, 3), padding=(1, 1))
CONV = {"m": 4096, "k": 9 * 320, "n": 640, "weight_bits": 8, "layout": KPACK_V1, "window": WINDOW}
POINT = {"window": Window((1, 1))}


def test_reasons_of_product():
    for fields, words in (
        ({}, None),
        ({"capability": (8, 9), "weight_bits": 3}, None),
        ({**POINT, "k": 1 << 16}, None),
        ({**POINT, "k": 1 << 13, "granularity": "per_token"}, None),
        ({"m": (1 << 30) - 1, "n": 320, "k": 9 * 32}, None),
        ({"capability": (7, 5)}, "compute capability 7.5: the kernels need 8.0 .A100. or newer"),
        ({"k": 9 * 4}, "4 input channels: codes are read 16 at a time, so their number must be divisible by 16"),
        ({"k": 9 * 16, "weight_bits": 4}, "4-bit weights with k=144: .* divisible by 32, .* use weight_bits=8"),
        ({"k": 9 * 7296}, "k=65664 products can overflow int32; at most 65536"),
        ({"m": 1 << 30}, "m=1073741824 rows at stride \\(1, 1\\); less than 2\\^30"),
        ({"m": 1 << 28, "window": Window((3, 3), (2, 2))}, "m=268435456 rows at stride \\(2, 2\\)"),
        ({"m": 1 << 29, "n": 1 << 10}, "more blocks than a launch has"),
        ({"group_size": 64}, "group_size=64: only one weight scale per output channel; use group_size=-1"),
        ({"window": WINDOW._replace(groups=2), "k": 9 * 160}, "groups=2: only convolutions over all channels"),
        ({"layout": "vnni_v1"}, "layout 'kpack_v1', not 'vnni_v1'"),
        ({"granularity": "per_token"}, "do not factor out of a convolution"),
    ):
        found = reason("product", **{**CONV, **fields})
        assert found is None if words is None else re.search(words, found)


def test_the_library_lists_the_tiles_that_may_be_asked_for():
    """What the list holds: test_maps.py. It needs no GPU."""
    if (why_not := library.why_not_loaded()) is not None:
        pytest.skip(why_not)
    values = library.tiles_op()([2, 16, 16, 640, 1280, 3, 3, 1, 1, 1, 1, 1, 1, 1], 8, 8, 90, 132)
    assert values[0] == 90
    assert set(values[::4]) == {90, 80}
    with pytest.raises(RuntimeError, match="14 geometry values expected, got 2"):
        library.tiles_op()([1, 2], 8, 8, 90, 132)


def test_unavailable(monkeypatch):
    ask = cuda.unavailable.__wrapped__
    monkeypatch.setattr(library, "why_not_loaded", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ask() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert ask() == "compute capability 7.5: the kernels need 8.0 (A100) or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert ask() is None
    monkeypatch.setattr(library, "why_not_loaded", lambda: "it does not load")
    assert ask() == "it does not load"


def test_a_library_that_is_missing_or_broken_is_a_reason(monkeypatch, tmp_path):
    ask = library.why_not_loaded.__wrapped__
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libmodiff_cuda.so")
    assert "libmodiff_cuda.so was not built" in ask()
    assert "MODIFF_CUDA=OFF" in ask()
    (tmp_path / "libmodiff_cuda.so").write_text("no library")
    assert "libmodiff_cuda.so does not load" in ask()


def test_the_library_loads_without_a_gpu_and_registers_its_ops():
    if not library.LIBRARY.exists():
        pytest.skip(library.why_not_loaded())
    assert library.why_not_loaded() is None
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in ("modiff_cuda::quantize", "modiff_cuda::product"):
        assert has_kernel(op, "CUDA")
        assert not has_kernel(op, "CPU")
    assert not hasattr(ctypes.CDLL(str(library.LIBRARY)), "cudaMalloc"), "the CUDA runtime inside must stay hidden"


def test_build_info_without_a_gpu():
    """Architectures: test_machine_code.py compares them with the machine code."""
    if not library.LIBRARY.exists():
        pytest.skip(library.why_not_loaded())
    info = cuda.build_info()
    assert set(info) == {"sources", "compiler", "oldest_torch", "nvcc", "architectures"}
    assert re.fullmatch("[0-9a-f]{64}", info["sources"])
    assert re.fullmatch(r"[A-Za-z]+ \d+(\.\d+)+", info["compiler"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"])
    assert f'"torch>={info["oldest_torch"]}"' in (ROOT / "pyproject.toml").read_text()


def test_build_info_of_a_library_that_is_missing_or_older(monkeypatch):
    monkeypatch.setattr(library, "why_not_loaded", lambda: "it does not load")
    assert cuda.build_info() == "it does not load"
    assert "build it again" in library_build_info("modiff_namespace_of_no_library")


def test_the_hash_of_the_sources_changes_with_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "modiff_kernels" / "backends" / "__init__.py"))
    assert source_hash() is None
    header = tmp_path / "csrc" / "cpu" / "a.h"
    header.parent.mkdir(parents=True)
    first, other, again = (header.write_text(text) and source_hash() for text in "121")
    assert first == again != other
