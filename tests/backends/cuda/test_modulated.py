"""Ops that quantise and multiply, against the reference backend, which is the definition: state, scales, output."""

import pytest
import torch

from modiff_kernels.backends import cuda, reference
from modiff_kernels.backends.cuda import library
from tests.backends.modulated_cases import Layer, assert_modulated, assert_same
from tests.ops.op_cases import ConvCase, LinearCase

LINEARS = [LinearCase((2, 3, 64), 65), LinearCase((65, 96), 40)]
CONVS = [
    ConvCase((2, 32, 5, 7), 24),
    ConvCase((2, 64, 4, 4), 65, (1, 1), padding=(0, 0)),
    ConvCase((1, 32, 7, 7), 8, stride=(2, 2)),
]


@pytest.fixture
def device(place, request, monkeypatch):
    """Where both kernels run."""
    if not place.on_gpu:
        emulator = request.getfixturevalue("product_emulator")
        emulator.tile, emulator.splits, emulator.falling = emulator.CHOOSE, 4, False
        monkeypatch.setattr(library, "product_op", lambda: emulator.product)
    return place.device


def kernel(kind, case):
    return cuda.KERNELS[f"{kind}_{case.kind}"].fn, getattr(reference, f"{kind}_{case.kind}")


@pytest.mark.parametrize("granularity", ["per_tensor", "per_sample", "per_token", "per_block"])
@pytest.mark.parametrize("case", [LINEARS[0], CONVS[1]], ids=str)
def test_modulated(device, case, granularity):
    layer = Layer(case, torch.float32, torch.float16)
    found, expected = kernel("modulated", case)
    got = layer.modulated(found, device, None, 4, granularity)
    assert_modulated(got, layer.modulated(expected, "cpu", None, 4, granularity))


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("act_bits", [8, 3])
@pytest.mark.parametrize("case", [LINEARS[1], CONVS[0], CONVS[2]], ids=str)
def test_modulated_formats(device, case, act_bits, bits):
    layer = Layer(case, torch.bfloat16, torch.float16, bits=bits)
    found, expected = kernel("modulated", case)
    got = layer.modulated(found, device, None, act_bits, "per_sample")
    assert_modulated(got, layer.modulated(expected, "cpu", None, act_bits, "per_sample"))


@pytest.mark.parametrize(
    ("capability", "act_bits", "weight_bits", "granularity", "packed"),
    [
        ((8, 0), 4, 4, "per_sample", True),
        ((8, 9), 4, 4, "per_tensor", True),
        ((9, 0), 4, 4, "per_sample", False),  # s4 is emulated there
        ((12, 0), 4, 4, "per_sample", False),
        ((8, 0), 4, 4, "per_block", False),  # its codes have 8 bits
        ((8, 0), 3, 4, "per_sample", False),
        ((8, 0), 4, 8, "per_sample", False),
        ((8, 0), 8, 4, "per_sample", False),
    ],
)
@pytest.mark.parametrize("case", [LINEARS[0], CONVS[0]], ids=str)
def test_four_bits_are_multiplied_as_such_where_that_is_native(
    device, case, capability, act_bits, weight_bits, granularity, packed, monkeypatch
):
    if device.type == "cuda":
        pytest.skip("a GPU has one capability")
    dtypes = []
    product = library.product_op()
    monkeypatch.setattr(library, "capability", lambda device: capability)
    monkeypatch.setattr(library, "product_op", lambda: lambda *a: dtypes.append(a[0].dtype) or product(*a))
    layer = Layer(case, torch.float16, torch.float16, bits=weight_bits)
    found, expected = kernel("modulated", case)
    got = layer.modulated(found, device, None, act_bits, granularity)
    assert_modulated(got, layer.modulated(expected, "cpu", None, act_bits, granularity))
    assert dtypes == [torch.uint8 if packed else torch.int8]


@pytest.mark.parametrize("case", [LINEARS[0], CONVS[0]], ids=str)
def test_modulated_without_out(device, case):
    layer = Layer(case, torch.float32, torch.float32)
    found, expected = kernel("modulated", case)
    got = layer.modulated(found, device, torch.full((1,), 0.05), 8, "per_tensor", write_out=False)
    assert got[0].shape == (0,)
    assert_same(got[4], layer.modulated(expected, "cpu", torch.full((1,), 0.05), 8, "per_tensor")[4], roundings=4)


@pytest.mark.parametrize("first_step_bits", [0, 8, 3])
@pytest.mark.parametrize("case", [LINEARS[0], *CONVS], ids=str)
def test_initialize(device, case, first_step_bits):
    layer = Layer(case, torch.float32, torch.float32)
    found, expected = kernel("initialize", case)
    with torch.backends.cudnn.flags(allow_tf32=False):
        out, x_hat, y_hat = layer.initialize(found, device, first_step_bits)
    wanted = layer.initialize(expected, "cpu", first_step_bits)
    assert_same(x_hat, wanted[1])
    assert_same(y_hat, wanted[2], roundings=16)  # float32 sums of up to 288 products where first_step_bits is 0
    assert_same(out, wanted[0], roundings=16)


def test_initialize_without_out(device):
    layer = Layer(LINEARS[0], torch.float16, torch.float16)
    for first_step_bits in (0, 8):
        out, x_hat, y_hat = layer.initialize(cuda.KERNELS["initialize_linear"].fn, device, first_step_bits, False)
        assert out.shape == (0,)
        assert x_hat.isfinite().all()
        assert y_hat.isfinite().all()
