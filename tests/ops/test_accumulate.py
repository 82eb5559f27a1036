"""accumulate_*: exact integer sums, scales of every length, state dtypes, skip, outputs that alias nothing."""

import numpy as np
import pytest
import torch

from modiff_kernels import ops
from tests.ops.op_cases import (
    CASES,
    DTYPES,
    GRANULARITIES,
    SMALL_CASES,
    ConvCase,
    LinearCase,
    activation,
    make_weight,
    memory_format_of,
    per_row,
    run,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def codes_like(case, bits=8):
    image = case.kind == "conv2d"
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), case.x_shape, dtype=torch.int8)
    return codes.to(memory_format=memory_format_of(image))


def scale_for(case, granularity):
    rows = int(np.prod(case.x_shape)) // case.x_shape[1 if case.kind == "conv2d" else -1]
    count = {"per_tensor": 1, "per_sample": case.x_shape[0], "per_token": rows}[granularity]
    return torch.rand(count) * 0.01 + 0.001


def expected_delta(case, codes, scale, weight):
    """float64, the scale applied to the input: the definition, whatever the kernel window."""
    image = case.kind == "conv2d"
    return case.apply(codes.double() * per_row(scale.double(), case.x_shape, image), weight.dense)


def accumulate(backend, case, codes, scale, weight, y_hat, skip=None, out_dtype=torch.float32, write_out=True):
    arguments = (codes, scale, *weight.tensors, y_hat, skip, *weight.format, *case.conv_args, out_dtype, write_out)
    return run(f"accumulate_{case.kind}", *arguments, backend=backend)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("case", "weight_bits"),
    [(case, 8) for case in CASES] + [(case, bits) for case in SMALL_CASES for bits in (3, 4)],
    ids=str,
)
def test_matches_float64(backend, case, weight_bits, granularity):
    image = case.kind == "conv2d"
    weight = make_weight(case, weight_bits, -1, backend, "accumulate", act_bits=8, granularity=granularity)
    codes, scale = codes_like(case), scale_for(case, granularity)
    y_hat = activation(case.y_shape, image=image)
    before, codes_before = y_hat.clone(), codes.clone()
    out = accumulate(backend, case, codes, scale, weight, y_hat)
    expected = before.double() + expected_delta(case, codes, scale, weight)
    torch.testing.assert_close(y_hat.double(), expected, rtol=2e-6, atol=2e-6 * expected.abs().max().item())
    assert torch.equal(out, y_hat)
    assert out.data_ptr() != y_hat.data_ptr()
    assert out.is_contiguous(memory_format=memory_format_of(image))
    assert torch.equal(codes, codes_before)


@pytest.mark.parametrize("group_size", [4, 16, 33, 64, 2000])
@pytest.mark.parametrize("weight_bits", [3, 8])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_group_size(backend, case, weight_bits, group_size):
    weight = make_weight(case, weight_bits, group_size, backend, "accumulate", act_bits=4)
    codes, scale = codes_like(case, 4), scale_for(case, "per_sample")
    y_hat = activation(case.y_shape, image=case.kind == "conv2d")
    expected = y_hat.double() + expected_delta(case, codes, scale, weight)
    accumulate(backend, case, codes, scale, weight, y_hat)
    torch.testing.assert_close(y_hat.double(), expected, rtol=2e-6, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("case", [LinearCase((3, 4096), 5), ConvCase((1, 512, 3, 3), 4)], ids=str)
def test_integer_sums_are_exact(backend, case):
    """Sums beyond 2^24, where float32 accumulation goes wrong; scales of one show the sum itself."""
    image = case.kind == "conv2d"
    weight = make_weight(case, 8, -1, backend, "accumulate", act_bits=8)
    ones = torch.ones_like(weight.scale)
    codes = torch.full(case.x_shape, -128, dtype=torch.int8).to(memory_format=memory_format_of(image))
    codes[..., 0] = 127
    y_hat = torch.zeros(case.y_shape).to(memory_format=memory_format_of(image))
    weight.scale = ones
    accumulate(backend, case, codes, torch.ones(1), weight, y_hat)
    shape = case.weight_shape
    dense = weight.codes.double()
    dense = dense.reshape(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2) if image else dense
    assert torch.equal(y_hat, case.apply(codes.double(), dense).float())


def test_worst_case_sums_do_not_saturate(backend):
    case = LinearCase((2, 4608), 16)
    weight = make_weight(case, 8, -1, backend, "accumulate", act_bits=8)
    for value in (-128, 127):
        extreme = torch.full((16, 4608), value, dtype=torch.int8)
        packed = ops.prepare_weight(ops.pack_weight(extreme, 8), 8, 16, 4608, layout_to=weight.layout, backend=backend)
        weight.packed, weight.scale = packed, torch.ones(16)
        for code in (-128, 127):
            y_hat = torch.zeros(2, 16)
            codes = torch.full((2, 4608), code, dtype=torch.int8)
            accumulate(backend, case, codes, torch.ones(1), weight, y_hat)
            assert (y_hat == value * code * 4608).all()


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_dtypes_and_skip(backend, case, state_dtype, out_dtype, with_skip):
    image = case.kind == "conv2d"
    formats = {"dtype": out_dtype, "state_dtype": state_dtype, "act_bits": 4}
    weight = make_weight(case, 8, -1, backend, "accumulate", **formats)
    codes, scale = codes_like(case, 4), scale_for(case, "per_sample")
    y_hat = activation(case.y_shape, state_dtype, image=image)
    skip = activation(case.y_shape, out_dtype, image=image) if with_skip else None
    expected = y_hat.double() + expected_delta(case, codes, scale, weight)
    skip_before = None if skip is None else skip.clone()
    out = accumulate(backend, case, codes, scale, weight, y_hat, skip, out_dtype)
    largest = expected.abs().max().item()
    eps = torch.finfo(state_dtype).eps
    torch.testing.assert_close(y_hat.double(), expected, rtol=eps, atol=2e-6 * largest)
    total = y_hat.double() + (0 if skip is None else skip.double())
    out_eps = max(torch.finfo(out_dtype).eps, eps)
    torch.testing.assert_close(out.double(), total, rtol=out_eps, atol=(out_eps + 2e-6) * largest)
    assert out.dtype == out_dtype
    assert skip is None or torch.equal(skip, skip_before)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_write_out_false(backend, case):
    image = case.kind == "conv2d"
    weight = make_weight(case, 8, -1, backend, "accumulate", act_bits=8)
    codes, scale = codes_like(case), scale_for(case, "per_sample")
    y_hat = activation(case.y_shape, image=image)
    expected = y_hat.clone()
    accumulate(backend, case, codes, scale, weight, expected)
    out = accumulate(backend, case, codes, scale, weight, y_hat, write_out=False)
    assert out.shape == (0,)
    assert torch.equal(y_hat, expected)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_zero_codes_give_y_hat(backend, case):
    image = case.kind == "conv2d"
    weight = make_weight(case, 8, -1, backend, "accumulate", act_bits=8)
    codes = torch.zeros_like(codes_like(case))
    y_hat = activation(case.y_shape, image=image)
    before = y_hat.clone()
    skip = activation(case.y_shape, image=image)
    out = accumulate(backend, case, codes, scale_for(case, "per_sample"), weight, y_hat, skip)
    assert torch.equal(y_hat, before)
    torch.testing.assert_close(out, before + skip)
    out.fill_(torch.nan)
    assert torch.equal(y_hat, before), "out shares memory with y_hat"


def test_linear_scales_cover_consecutive_rows(backend):
    """A Linear flattened to two dimensions keeps its per-sample scales."""
    case = LinearCase((12, 16), 8)
    weight = make_weight(case, 8, -1, backend, "accumulate", act_bits=8)
    codes, scale = codes_like(case), torch.rand(3)
    flat, full = torch.zeros(12, 8), torch.zeros(3, 4, 8)
    accumulate(backend, case, codes, scale, weight, flat)
    accumulate(backend, case, codes.view(3, 4, 16), scale, weight, full)
    assert torch.equal(flat, full.view(12, 8))
