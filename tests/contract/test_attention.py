"""attention at every place that has code for it: softmax(q k^T) v per head, against float64."""

import pytest
import torch

from modiff_kernels import ops

OP = "attention"

# samples, queries, keys, heads, width: one of everything, odd, around vectors (16), tiles (6) and blocks (48 queries),
# and the layers of the shipped model, DDPM CIFAR-10 and SD 1.5.
SHAPES = [(1, 1, 1, 1, 1), (2, 7, 5, 1, 3), (3, 15, 17, 2, 16), (1, 47, 33, 3, 17), (1, 49, 31, 1, 65)]
SHAPES += [(2, 96, 16, 2, 48), (8, 64, 64, 3, 32), (2, 256, 256, 1, 256), (1, 300, 77, 8, 40), (1, 40, 2048, 1, 40)]


def oracle(q, k, v, heads, scale):
    q, k, v = (t.double().unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(scale * q @ k.transpose(2, 3), 3) @ v).transpose(1, 2).flatten(2)


def check(place, q, k, v, heads, scale):
    out = place.call("attention", q, k, v, heads, scale)
    expected = oracle(q, k, v, heads, scale)
    # Sums of up to 2048 float32 products in order, and an exponential with a relative error of 2e-7.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-6 * max(1.0, expected.abs().max().item()))
    assert out.is_contiguous()
    assert out.shape == q.shape


def test_equals_float64(place):
    for samples, queries, keys, heads, width in SHAPES:
        q = torch.randn(samples, queries, heads * width)
        k, v = torch.randn(2, samples, keys, heads * width)
        check(place, q, k, v, heads, width**-0.5)


def test_columns_of_a_wider_tensor_and_large_scores(place):
    check(place, *torch.randn(2, 20, 3 * 24).chunk(3, dim=2), 2, 0.3)
    check(place, *(100 * torch.randn(3, 2, 20, 16)), 1, 1.0)


def test_nan_reaches_the_rows_that_read_it(place):
    q, k, v = torch.randn(3, 2, 20, 16)
    q[1, 3] = torch.nan
    out = place.call("attention", q, k, v, 1, 0.25)
    assert out[1, 3].isnan().all()
    assert out.isnan().sum() == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_are_left_to_torch(dtype):
    q, k, v = torch.randn(3, 2, 20, 16, dtype=dtype)
    out = ops.attention(q, k, v, 2, 0.35)
    torch.testing.assert_close(out.double(), oracle(q, k, v, 2, 0.35), rtol=0, atol=4 * torch.finfo(dtype).eps)
