"""Ops that quantise and multiply, against the reference backend, which is the definition: state, scales, output."""

import pytest
import torch

from modiff_kernels.backends import reference
from modiff_kernels.backends.triton import modulated
from modiff_kernels.backends.triton.modulated_linear import modulated_linear_one_launch
from modiff_kernels.backends.triton.tile_configs import ONE_LAUNCH
from tests.backends.modulated_cases import Layer, assert_modulated, assert_same
from tests.ops.op_cases import ConvCase, LinearCase

LINEARS = [LinearCase((1, 1), 1), LinearCase((2, 3, 63), 65), LinearCase((65, 64), 64), LinearCase((2, 40, 130), 129)]
CONVS = [
    ConvCase((2, 16, 5, 7), 24),
    ConvCase((2, 63, 4, 4), 65, (1, 1), padding=(0, 0)),
    ConvCase((1, 8, 7, 7), 8, stride=(2, 2)),
]
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float16)]  # x, state


def one_launch(x, x_hat, scale, packed, weight_scale, y_hat, skip, act_bits, granularity, clip_ratio, weight_bits,
               group_size, layout, write_out):  # fmt: skip
    return modulated_linear_one_launch(
        x, x_hat, scale, packed, weight_scale, y_hat, skip, act_bits, granularity, clip_ratio, weight_bits, group_size,
        write_out, ONE_LAUNCH.block_k,
    )  # fmt: skip


SCALES = [("per_token", None), ("per_token", "one"), ("per_token", "all"), ("per_sample", "all"), ("per_tensor", "one")]


def given_scale(case, granularity, which):
    count = {"per_tensor": 1, "per_sample": case.x_shape[0], "per_token": torch.Size(case.x_shape[:-1]).numel()}
    return None if which is None else torch.rand(1 if which == "one" else count[granularity]) * 0.1 + 0.01


@pytest.mark.parametrize(("granularity", "which"), SCALES)
@pytest.mark.parametrize("case", LINEARS, ids=str)
def test_one_launch(device, case, granularity, which, poisoned_empty):
    layer = Layer(case, torch.float16, torch.float16)
    scale = given_scale(case, granularity, which)
    got = layer.modulated(one_launch, device, scale, 4, granularity)
    assert_modulated(got, layer.modulated(reference.modulated_linear, "cpu", scale, 4, granularity))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, 64), (3, -1)])
@pytest.mark.parametrize("act_bits", [8, 3])
def test_one_launch_formats(device, act_bits, bits, group_size, dtypes, poisoned_empty):
    if torch.bfloat16 in dtypes and device.type != "cuda":
        pytest.skip("the interpreter truncates instead of rounding to bfloat16")
    layer = Layer(LinearCase((2, 33, 128), 70), *dtypes, bits, group_size)
    got = layer.modulated(one_launch, device, None, act_bits, "per_token")
    assert_modulated(got, layer.modulated(reference.modulated_linear, "cpu", None, act_bits, "per_token"))


def test_one_launch_without_out(device, poisoned_empty):
    layer = Layer(LINEARS[1], torch.float32, torch.float32)
    got = layer.modulated(one_launch, device, None, 8, "per_token", write_out=False)
    expected = layer.modulated(reference.modulated_linear, "cpu", None, 8, "per_token")
    assert got[0].shape == (0,)
    assert_same(got[4], expected[4], roundings=4)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # the interpreter, of the code of a NaN
def test_nan_reaches_absmax_and_scale(device):
    """No value is read on the host: NaN is not refused but shows in what later steps are checked by."""
    layer = Layer(LINEARS[2], torch.float32, torch.float32)
    layer.x[3, 5] = torch.nan
    _, used, absmax, _, _ = layer.modulated(one_launch, device, None, 8, "per_token")
    assert absmax.isnan().nonzero().flatten().tolist() == [3]
    assert used.isnan().nonzero().flatten().tolist() == [3]
    absmax = layer.modulated(one_launch, device, torch.ones(1), 8, "per_tensor")[2]
    assert absmax.isnan().all()


@pytest.mark.parametrize("granularity", ["per_tensor", "per_sample", "per_token", "per_block"])
@pytest.mark.parametrize("case", [LINEARS[1], CONVS[1]], ids=str)
def test_modulated(device, case, granularity, poisoned_empty):
    layer = Layer(case, torch.float32, torch.float16)
    name = f"modulated_{case.kind}"
    got = layer.modulated(getattr(modulated, name), device, None, 4, granularity)
    assert_modulated(got, layer.modulated(getattr(reference, name), "cpu", None, 4, granularity))


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_modulated_windows(device, case, poisoned_empty):
    layer = Layer(case, torch.float32, torch.float32, bits=4 if case.x_shape[1] % 8 == 0 else 8)
    got = layer.modulated(modulated.modulated_conv2d, device, None, 8, "per_sample")
    assert_modulated(got, layer.modulated(reference.modulated_conv2d, "cpu", None, 8, "per_sample"))


@pytest.mark.parametrize("one", [False, True])
def test_modulated_linear_takes_the_form_that_pays(device, one, monkeypatch, poisoned_empty):
    calls = []
    monkeypatch.setattr(modulated, "one_launch_pays", lambda *arguments: calls.append(arguments) or one)
    layer = Layer(LINEARS[1], torch.float32, torch.float32)
    for granularity, scale in (("per_token", None), ("per_sample", None), ("per_sample", torch.ones(1))):
        got = layer.modulated(modulated.modulated_linear, device, scale, 8, granularity)
        assert_modulated(got, layer.modulated(reference.modulated_linear, "cpu", scale, 8, granularity))
    assert len(calls) == 2, "dynamic scales per sample need all rows first"


@pytest.mark.parametrize("first_step_bits", [0, 8, 3])
@pytest.mark.parametrize("case", [LINEARS[1], *CONVS], ids=str)
def test_initialize(device, case, first_step_bits, poisoned_empty):
    layer = Layer(case, torch.float32, torch.float32)
    name = f"initialize_{case.kind}"
    with torch.backends.cudnn.flags(allow_tf32=False):
        out, x_hat, y_hat = layer.initialize(getattr(modulated, name), device, first_step_bits)
    expected = layer.initialize(getattr(reference, name), "cpu", first_step_bits)
    assert_same(x_hat, expected[1])
    assert_same(y_hat, expected[2], roundings=16)  # float32 sums of up to 144 products where first_step_bits is 0
    assert_same(out, expected[0], roundings=16)


def test_initialize_without_out(device, poisoned_empty):
    layer = Layer(LINEARS[1], torch.float16, torch.float16)
    for first_step_bits in (0, 8):
        out, x_hat, y_hat = layer.initialize(modulated.initialize_linear, device, first_step_bits, write_out=False)
        assert out.shape == (0,)
        assert x_hat.isfinite().all()
        assert y_hat.isfinite().all()
