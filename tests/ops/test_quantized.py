"""quantized_*: the plain low-bit layers against float64."""

import itertools

import pytest
import torch

from tests.ops.op_cases import (
    BITS,
    CASES,
    DTYPES,
    GRANULARITIES,
    SMALL_CASES,
    activation,
    make_weight,
    memory_format_of,
    per_row,
    run,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def check(
    backend,
    case,
    weight_bits,
    act_bits,
    granularity,
    *,
    affine=True,
    group_size=-1,
    out_dtype=torch.float32,
    skip=False,
):
    image = case.kind == "conv2d"
    formats = {"act_bits": act_bits, "granularity": granularity, "dtype": out_dtype}
    weight = make_weight(case, weight_bits, group_size, backend, "quantized", **formats)
    x = activation(case.x_shape, image=image) + 0.5
    x_q, scale, zero_point = run("quantize_activation", x, act_bits, granularity, affine, backend="reference")
    bias = torch.randn(case.n)
    skip = activation(case.y_shape, out_dtype, image=image) if skip else None
    arguments = (x_q, scale, zero_point, *weight.tensors, bias, skip, *weight.format, *case.conv_args, out_dtype)

    out = run(f"quantized_{case.kind}", *arguments, backend=backend)

    step, zero = (per_row(t.double(), case.x_shape, image) for t in (scale, zero_point))
    expected = case.apply(step * (x_q.double() - zero), weight.dense, bias.double())
    expected = expected if skip is None else expected + skip.double()
    eps = torch.finfo(out_dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=4e-6 * expected.abs().max().item())
    assert out.dtype == out_dtype
    assert out.is_contiguous(memory_format=memory_format_of(image))
    return out


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "symmetric"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(backend, case, granularity, affine):
    check(backend, case, 8, 8, granularity, affine=affine)


@pytest.mark.parametrize(("weight_bits", "act_bits"), list(itertools.product(BITS, BITS)))
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_bits(backend, case, weight_bits, act_bits):
    check(backend, case, weight_bits, act_bits, "per_sample")


@pytest.mark.parametrize("group_size", [16, 33])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_group_size(backend, case, group_size):
    check(backend, case, 4, 8, "per_sample", group_size=group_size)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_dtypes_and_skip(backend, case, out_dtype):
    check(backend, case, 8, 8, "per_sample", out_dtype=out_dtype, skip=True)
