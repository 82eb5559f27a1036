"""The backend cuda: what it refuses, its library, and, emulated, what the contract cannot ask for: tiles, splits of K,
the order of threads and the update of nibbles.
"""

import ctypes
import itertools
import re

import pytest
import torch

from modiff_kernels.backends import cuda, library_build_info, reference
from modiff_kernels.backends.cuda import library
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.operands import IDENTITY, Window
from tests.backends.cuda.emulation import ROOT
from tests.contract.cases import EPS32, SMALL, Case, activation, conv, group_norm, layer_norm, weight_of
from tests.contract.test_product import check_sums

THREE = Window((3, 3), padding=(1, 1))
ONE = Window((1, 1))
PRODUCT = {"window": THREE, "m": 4096, "k": 9 * 320, "n": 640, "weight_bits": 8, "layout": "kpack_v1"}


@pytest.mark.parametrize(
    ("op", "fields", "words"),
    [
        ("quantize", {"capability": (7, 5)}, "compute capability 7.5: the kernels need 8.0 or newer"),
        ("quantize", {"k": 8193, "granularity": "per_token"}, "8193 channels: rows are held in registers"),
        ("quantize", {"k": 8193, "prologue": "layer_norm"}, "of at most 8192 channels"),
        ("quantize", {"m": 1 << 31, "k": 8}, "rows; they are counted in 31 bits"),
        ("quantize", {"m": 1 << 20, "k": 1 << 21}, "more blocks than a launch"),
        ("quantize", {"k": 8193, "granularity": "per_sample"}, None),
        ("quantize", {"k": 8192, "granularity": "per_token", "capability": (12, 0)}, None),
        ("product", {}, None),
        ("product", {"capability": (8, 9), "weight_bits": 3}, None),
        ("product", {"window": Window((3, 3), (2, 2), (0, 0), (2, 1))}, None),
        ("product", {"k": 1 << 16, "window": ONE, "granularity": "per_token"}, None),
        ("product", {"m": (1 << 30) - 1, "n": 320, "k": 9 * 32}, None),
        ("product", {"capability": (7, 5)}, "compute capability 7.5"),
        ("product", {"k": 9 * 4}, "4 input channels: codes are read 16 at a time"),
        ("product", {"k": 9 * 16, "weight_bits": 4}, "4-bit weights with k=144: .* divisible by 32"),
        ("product", {"k": 9 * 7296}, "k=65664 products can overflow int32; at most 65536"),
        ("product", {"m": 1 << 28, "window": Window((3, 3), (2, 2), (1, 1))}, r"m=268435456 rows at stride \(2, 2\)"),
        ("product", {"m": 1 << 29, "n": 1 << 10}, "more blocks than a launch has"),
        ("product", {"group_size": 64}, "group_size=64: only one weight scale per output channel"),
        ("product", {"window": THREE._replace(groups=2)}, "groups=2: only convolutions over all channels"),
        ("product", {"layout": "vnni_v1"}, "layout 'kpack_v1', not 'vnni_v1'"),
        ("product", {"granularity": "per_token"}, "do not factor out of a convolution"),
        ("modulate", {"act_bits": 4, "weight_bits": 4, "capability": (8, 9)}, None),
        ("modulate", {"act_bits": 4, "weight_bits": 4, "capability": (9, 0)}, "sm_80 to sm_89"),
        ("modulate", {"act_bits": 3, "weight_bits": 4, "capability": (8, 0)}, "must have 4 bits"),
        ("modulate", {"act_bits": 4, "weight_bits": 8, "capability": (8, 0)}, "must have 4 bits"),
        ("modulate", {"act_bits": 4, "weight_bits": 4, "capability": (8, 0), "granularity": "per_block"}, "have 8 bits"),
        ("modulate", {"act_bits": 4, "weight_bits": 4, "capability": (8, 0), "k": 9 * 48}, "48 input channels: nibbles"),
    ],
)
def test_reasons(op, fields, words):
    base = {"m": 16, "k": 320} if op == "quantize" else PRODUCT
    reason = cuda.why_not(Problem(op, "cuda", **{**base, **fields}))
    assert reason is None if words is None else re.search(words, reason)


def test_unavailable(monkeypatch, tmp_path):
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
    assert ask() == cuda.build_info() == "it does not load"
    assert "build it again" in library_build_info("modiff_namespace_of_no_library")


def test_a_library_that_is_missing_or_broken_is_a_reason(monkeypatch, tmp_path):
    ask = library.why_not_loaded.__wrapped__
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libmodiff_cuda.so")
    assert "libmodiff_cuda.so was not built" in ask()
    assert "MODIFF_CUDA=OFF" in ask()
    (tmp_path / "libmodiff_cuda.so").write_text("no library")
    assert "libmodiff_cuda.so does not load" in ask()


def test_the_library_loads_without_a_gpu():
    """Where it was built. Architectures: test_machine_code.py compares them with the machine code."""
    if not library.LIBRARY.exists():
        assert "was not built" in library.why_not_loaded()
        return
    assert library.why_not_loaded() is None
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in ("modiff_cuda::quantize", "modiff_cuda::product"):
        assert has_kernel(op, "CUDA")
        assert not has_kernel(op, "CPU")
    assert not hasattr(ctypes.CDLL(str(library.LIBRARY)), "cudaMalloc"), "the CUDA runtime inside must stay hidden"
    info = cuda.build_info()
    assert set(info) == {"compiler", "oldest_torch", "nvcc", "architectures"}
    assert f'"torch>={info["oldest_torch"]}"' in (ROOT / "pyproject.toml").read_text()


# --- emulated: the fixtures compile the kernels for the host --------------------------------------------------------


OP, PLACES = "product", ("sm80-emulated",)  # of the tests with a `place`


@pytest.fixture
def sm80(place, emulator, monkeypatch):
    """The emulator of sm_80, whose choices a test may change."""
    program = emulator("product")
    for name in ("tile", "splits", "falling"):
        monkeypatch.setattr(program, name, getattr(program, name))
    return program


def test_every_tile_of_sm80_gives_the_same_sums(place, sm80):
    """In both orders of threads: falling, copies arrive when they are issued; rising, when they are waited for."""
    matrix, image = Case((130, 160), 130), conv((1, 32, 12, 12), 136)
    for sm80.tile, (case, bits) in itertools.product(range(3), [(matrix, 4), (image, 3), (image, 8)]):
        sm80.splits, sm80.falling = 1, not sm80.falling
        assert check_sums(place, case, bits, "per_sample", bits == 8)
    sm80.tile = 2
    assert check_sums(place, Case((64 * 9 + 1, 16), 130), 8, "per_tensor", False)  # 10 x 3 tiles: a band of 8, a rest


def test_splits_of_k_of_sm80_give_the_same_sums(place, sm80):
    """320 codes are five steps, so that three splits have two, two and one; 288 are four and a half."""
    sm80.tile = 2
    for sm80.splits, (case, bits) in itertools.product((2, 3, 5), [(Case((5, 320), 33), 4), (conv((1, 32, 4, 4), 65), 8)]):
        assert check_sums(place, case, bits, "per_sample", sm80.splits == 2)


def test_nibbles_are_multiplied_as_such(place, sm80):
    """The update of 4-bit codes and weights: like quantize and product, which the contract looks at."""
    for case in SMALL:
        weight = weight_of(place, case, 4).packed
        x, x_hat, y_hat = activation(case.x_shape), activation(case.x_shape), activation(case.y_shape)
        states = [(x_hat.clone(), y_hat.clone()) for _ in range(2)]
        arguments = (x, IDENTITY, states[0][0], None, weight, states[0][1], None, case.window, torch.float32)
        out, used, absmax = cuda.modulate(*arguments, 4, "per_sample", 1.0, True)
        codes, *wanted = reference.quantize(x, IDENTITY, states[1][0], None, 4, "per_sample", 1.0, True)
        expected = reference.product(codes, wanted[0], None, weight, states[1][1], None, None, case.window, torch.float32, True)
        assert torch.equal(used, wanted[0])
        assert torch.equal(absmax, wanted[1])
        torch.testing.assert_close(states[0][0], states[1][0], rtol=2 * EPS32, atol=2 * EPS32)
        torch.testing.assert_close(out, expected, rtol=4 * EPS32, atol=4 * EPS32)
        assert torch.equal(out, states[0][1])


def test_the_order_of_threads_changes_no_code(place, emulator):
    """A missing barrier lets a thread read what another has not written yet: then the order of turns shows."""
    program = emulator("quantize")
    cases = [group_norm((2, 96, 13, 5), 8), layer_norm((2, 35, 320)), layer_norm((1, 3, 5120))]
    cases += [(activation((3, 49, 64)), IDENTITY, *[torch.zeros(3, 49, 64)] * 2)]
    for (h, prologue, x, _), granularity in itertools.product(cases, ("per_tensor", "per_token", "per_block")):
        results = []
        for program.falling in (True, False):
            x_hat = torch.zeros_like(activation(x.shape))
            results.append((*place.quantize(h, prologue, x_hat, None, 4, granularity), x_hat))
        assert all(torch.equal(rising, falling) for rising, falling in zip(*results))
