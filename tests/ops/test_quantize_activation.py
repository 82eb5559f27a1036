"""quantize_activation: codes, scales and zero points bit-exact against numpy."""

import itertools

import numpy as np
import pytest
import torch

from tests.ops.op_cases import (
    BITS,
    DTYPES,
    GRANULARITIES,
    QUANTIZE_SHAPES,
    activation,
    assert_codes_equal,
    granules,
    is_image,
    memory_format_of,
    oracle_codes,
    oracle_scale,
    run,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def check(backend, x, bits, granularity, affine):
    image = is_image(x.shape)
    values = granules(x, granularity, image)
    if affine:
        low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
        expected_scale = np.maximum((high - low) / np.float32(2**bits - 1), np.float32(2.0**-100))
        expected_zero = np.rint(-low * (np.float32(1) / expected_scale)) - 2 ** (bits - 1)
        expected_zero = np.clip(expected_zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    else:
        expected_scale = oracle_scale(np.abs(values).max(1), bits)
        expected_zero = np.zeros_like(expected_scale)

    x_q, scale, zero_point = run("quantize_activation", x, bits, granularity, affine, backend=backend)

    assert x_q.dtype == torch.int8
    assert x_q.shape == x.shape
    assert x_q.is_contiguous(memory_format=memory_format_of(image))
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert scale.shape == zero_point.shape == expected_scale.shape
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(zero_point.numpy(), expected_zero.astype(np.int32))
    assert_codes_equal(x_q, oracle_codes(values, expected_scale, bits, expected_zero), granularity, image)
    return x_q, scale, zero_point


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "symmetric"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", QUANTIZE_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_codes_match_oracle(backend, shape, bits, granularity, affine):
    check(backend, activation(shape) + 0.3, bits, granularity, affine)


@pytest.mark.parametrize(("affine", "dtype"), list(itertools.product([True, False], DTYPES)), ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(2, 33, 5, 4), (2, 9, 40)], ids=["image", "rows"])
def test_dtypes(backend, shape, granularity, dtype, affine):
    check(backend, activation(shape, dtype), 4, granularity, affine)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "symmetric"])
@pytest.mark.parametrize("kind", ["positive", "negative", "zeros", "constant", "outlier", "tiny", "huge"])
def test_extremes(backend, kind, affine):
    x = torch.rand(2, 6, 20)
    x = {
        "positive": x + 1,
        "negative": -x - 1,
        "zeros": x * 0,
        "constant": x * 0 + 2.5,
        "outlier": x.index_fill(2, torch.tensor([3]), 1e5),
        "tiny": x * 1e-38,
        "huge": x * 1e38,
    }[kind]
    check(backend, x, 8, "per_sample", affine)


@pytest.mark.parametrize("bits", BITS)
def test_zero_is_exact(backend, bits):
    """Conv padding stands for x = 0; a ReLU or SiLU puts many values there."""
    x = torch.relu(activation((2, 16, 6, 6)))
    x_q, _, zero_point = check(backend, x, bits, "per_sample", True)
    zeros = x == 0
    assert (x_q[zeros] == zero_point.view(-1, 1, 1, 1).expand_as(x_q)[zeros]).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "symmetric"])
def test_non_finite_input_raises(backend, value, affine):
    x = activation((2, 8, 4, 4))
    x[1, 3, 2, 1] = value
    with pytest.raises(ValueError, match="quantize_activation: x holds NaN or Inf"):
        run("quantize_activation", x, 8, "per_sample", affine, backend=backend)
