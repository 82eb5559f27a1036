"""The backend's entry in the dispatch table, its library, and threads that take turns in another order."""

import ctypes
import inspect
import re

import pytest
import torch

from modiff_kernels.backends import cuda, library_build_info, reference
from modiff_kernels.backends.cuda import library
from modiff_kernels.ops import dispatch
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.packing import KPACK_V1
from tests.backends.cuda.emulation import ROOT
from tests.backends.quantizing_cases import run
from tests.ops.op_cases import activation
from tests.ops.test_fused_prologues import GroupNorm, LayerNorm


def why_not(op, **fields):
    return cuda.KERNELS[op].why_not(Problem(op, device_type="cuda", **fields))


def test_it_has_all_ops_that_run_in_a_step():
    assert set(cuda.KERNELS) == set(reference.KERNELS) - set(dispatch.REFERENCE_OPS)


def test_ops_take_the_arguments_of_the_schema():
    for name, kernel in cuda.KERNELS.items():
        expected = inspect.signature(reference.KERNELS[name].fn).parameters
        found = inspect.signature(kernel.fn).parameters
        assert list(found) == list(expected), name
        assert [p.default for p in found.values()] == [p.default for p in expected.values()], name


@pytest.mark.parametrize(
    ("op", "fields", "words"),
    [
        ("quantize_residual", {"capability": (7, 5)}, "compute capability 7.5: the kernels need 8.0 or newer"),
        ("quantize_residual", {"k": 8193, "granularity": "per_token"}, "8193 channels: rows are held in registers"),
        ("layer_norm_quantize_activation", {"k": 8193, "granularity": "per_tensor"}, "of at most 8192 channels"),
        ("quantize_residual", {"m": 1 << 31, "k": 8}, "rows; they are counted in 31 bits"),
        (
            "quantize_residual",
            {"m": 1 << 20, "k": 1 << 21, "granularity": "per_sample"},
            "more blocks than a launch",
        ),
        ("quantize_residual", {"k": 8193, "granularity": "per_sample"}, None),
        ("layer_norm_quantize_residual", {"k": 8192, "granularity": "per_token", "capability": (12, 0)}, None),
    ],
)
def test_reasons(op, fields, words):
    reason = why_not(op, **{"m": 16, "k": 320, **fields})
    assert reason is None if words is None else re.search(words, reason)


CONV = {"kernel_size": (3, 3), "padding": (1, 1), "k": 9 * 320, "n": 640, "weight_bits": 8, "layout": KPACK_V1}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, None),
        ({"capability": (8, 9), "weight_bits": 3}, None),
        ({"stride": (2, 2), "dilation": (2, 1), "padding": (0, 0)}, None),
        ({"k": 9 * 16}, None),
        ({"k": 1 << 16, "kernel_size": (1, 1), "padding": (0, 0)}, None),
        ({"k": 1 << 13, "kernel_size": (1, 1), "padding": (0, 0), "granularity": "per_token"}, None),
        ({"m": (1 << 30) - 1, "n": 320, "k": 9 * 32}, None),
        ({"capability": (7, 5)}, "compute capability 7.5: the kernels need 8.0 or newer"),
        ({"k": 9 * 4}, "4 input channels: codes are read 16 at a time, so their number must be divisible by 16"),
        ({"k": 9 * 24}, "24 input channels"),
        ({"k": 9 * 16, "weight_bits": 4}, "4-bit weights with k=144: .* divisible by 32; use weight_bits=8"),
        ({"k": 9 * 16, "weight_bits": 3}, "3-bit weights with k=144"),
        ({"k": 9 * 7296}, "k=65664 products can overflow int32; at most 65536"),
        ({"m": 1 << 30}, "m=1073741824 rows at stride \\(1, 1\\); less than 2\\^30"),
        ({"m": 1 << 28, "stride": (2, 2)}, "m=268435456 rows at stride \\(2, 2\\)"),
        ({"m": 1 << 29, "n": 1 << 10}, "more blocks than a launch has"),
        ({"group_size": 64}, "group_size=64: only one weight scale per output channel; use group_size=-1"),
        ({"groups": 2}, "groups=2: only convolutions over all channels"),
        ({"layout": "vnni_v1"}, "layout 'kpack_v1', not 'vnni_v1'"),
        ({"granularity": "per_token"}, "do not factor out of a convolution"),
    ],
)
@pytest.mark.parametrize("op", ["accumulate_conv2d", "quantized_conv2d", "modulated_conv2d", "initialize_conv2d"])
def test_reasons_of_products(op, fields, words):
    act_bits = {"modulated_conv2d": 4, "initialize_conv2d": 8}.get(op)
    reason = why_not(op, **{"m": 4096, "act_bits": act_bits, **CONV, **fields})
    assert reason is None if words is None else re.search(words, reason)


def test_a_first_call_in_high_precision_needs_the_layout_alone():
    fields = {**CONV, "m": 64, "act_bits": 0, "k": 9 * 3, "group_size": 64}
    assert why_not("initialize_conv2d", **fields) is None
    assert "not 'vnni_v1'" in why_not("initialize_conv2d", **{**fields, "layout": "vnni_v1"})


def test_the_quantising_pass_may_be_the_limit():
    fields = {**CONV, "kernel_size": (1, 1), "padding": (0, 0), "k": 8208, "m": 64, "act_bits": 8}
    assert "of at most 8192 channels" in why_not("modulated_conv2d", **fields, granularity="per_token")
    assert why_not("modulated_conv2d", **fields, granularity="per_sample") is None


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
    assert set(info) == {"compiler", "oldest_torch", "nvcc", "architectures"}
    assert re.fullmatch(r"[A-Za-z]+ \d+(\.\d+)+", info["compiler"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"])
    assert f'"torch>={info["oldest_torch"]}"' in (ROOT / "pyproject.toml").read_text()


def test_build_info_of_a_library_that_is_missing_or_older(monkeypatch):
    monkeypatch.setattr(library, "why_not_loaded", lambda: "it does not load")
    assert cuda.build_info() == "it does not load"
    assert "build it again" in library_build_info("modiff_namespace_of_no_library")


def test_it_is_second_to_triton_as_long_as_nothing_is_measured():
    assert dispatch.PRIORITY["cuda"] == ("triton", "cuda", "reference")


def test_weights_stay_in_the_portable_layout():
    packed = torch.zeros(4, 8, dtype=torch.int8)
    assert cuda.preferred_layout(None) == KPACK_V1
    assert cuda.prepare_weight(packed, 8, 4, 8, KPACK_V1, KPACK_V1) is packed
    with pytest.raises(ValueError, match="layout='vnni_v1' is not known here"):
        cuda.prepare_weight(packed, 8, 4, 8, KPACK_V1, "vnni_v1")


class TestOrderOfThreads:
    """A missing barrier lets a thread read what another has not written yet: then the order of turns shows."""

    @pytest.mark.parametrize("granularity", ["per_tensor", "per_sample", "per_token", "per_block"])
    def test_it_changes_no_residual(self, place, request, granularity):
        emulator = self.emulator(place, request)
        for case in (GroupNorm((2, 96, 13, 5), 8), LayerNorm((2, 35, 320)), LayerNorm((1, 3, 5120))):
            x_hat = torch.zeros_like(case.h)
            arguments = (case.h, *case.arguments, x_hat, None, 4, granularity)
            self.check(emulator, place, f"{case.name}_quantize_residual", *arguments)
        x = activation((3, 49, 64))
        self.check(emulator, place, "quantize_residual", x, torch.zeros_like(x), None, 4, granularity)

    @pytest.mark.parametrize("granularity", ["per_tensor", "per_sample", "per_token"])
    def test_it_changes_no_activation(self, place, request, granularity):
        emulator = self.emulator(place, request)
        self.check(emulator, place, "quantize_activation", activation((2, 49, 640)), 8, granularity, True)

    @staticmethod
    def emulator(place, request):
        if place.on_gpu:
            pytest.skip("a GPU chooses the order itself")
        return request.getfixturevalue("emulator")

    @staticmethod
    def check(emulator, place, op, *arguments):
        results = []
        for emulator.falling in (False, True):
            found, after = run(op, *arguments, place=place)
            results.append([*found, *(t for t in after if isinstance(t, torch.Tensor))])
        emulator.falling = False
        for rising, falling in zip(*results, strict=True):
            assert torch.equal(rising, falling)
