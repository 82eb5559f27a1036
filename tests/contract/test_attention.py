"""attention at every place that has code for it: softmax(q k^T) v per head, against float64."""

import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.backends import cpu

OP = "attention"

# samples, queries, keys, heads, width: one of everything, odd, around vectors (16), tiles (6), parts (128 keys) and
# blocks (96 queries, 512 keys), and the layers of the shipped model, DDPM CIFAR-10, SD 1.5 and its VAE.
SHAPES = [(1, 1, 1, 1, 1), (2, 7, 5, 1, 3), (3, 15, 17, 2, 16), (1, 95, 127, 3, 17), (1, 97, 129, 1, 65)]
SHAPES += [(2, 96, 16, 2, 48), (8, 64, 64, 3, 32), (2, 256, 256, 1, 256), (1, 300, 77, 8, 40), (1, 40, 4096, 1, 40)]
SHAPES += [(1, 20, 513, 1, 512), (2, 97, 530, 2, 65), (1, 33, 600, 3, 17)]


def oracle(q, k, v, heads, scale):
    q, k, v = (t.double().unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(scale * q @ k.transpose(2, 3), 3) @ v).transpose(1, 2).flatten(2)


def check(place, q, k, v, heads, scale):
    out = place.call("attention", q, k, v, heads, scale)
    expected = oracle(q, k, v, heads, scale)
    # The kernel of the CPU has weights and values of 8 bits: at least 38.6 dB in six runs of all shapes. Without VNNI
    # weights have 7: 33.2 dB.
    least = 32 if (place.isa or cpu.isa()) == "avx512" else 37
    error = (out.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < 10 ** (-least / 20)
    assert out.is_contiguous()
    assert out.shape == q.shape


def test_equals_float64(place):
    for samples, queries, keys, heads, width in SHAPES:
        q = torch.randn(samples, queries, heads * width)
        k, v = torch.randn(2, samples, keys, heads * width)
        check(place, q, k, v, heads, width**-0.5)


def test_columns_of_a_wider_tensor_and_large_scores(place):
    check(place, *torch.randn(2, 20, 3 * 24).chunk(3, dim=2), 2, 0.3)
    for keys in (20, 600):  # tiles of AMX from 512 on
        check(place, *(100 * torch.randn(3, 2, keys, 16)), 1, 1.0)
    q, k, v = torch.randn(3, 2, 200, 16)
    check(place, 5 * q, k + 50 * torch.randn(16), v * torch.logspace(-1, 1, 200)[:, None], 1, 0.25)
    k[:, 0] *= 100  # all keys share a scale
    check(place, q, k, v, 1, 0.25)


@pytest.mark.parametrize("keys", [20, 600])
def test_nan_reaches_the_rows_that_read_it(place, keys):
    q, (k, v) = torch.randn(2, 20, 16), torch.randn(2, 2, keys, 16)
    q[1, 3] = torch.nan
    out = place.call("attention", q, k, v, 1, 0.25)
    assert out[1, 3].isnan().all()
    assert out.isnan().sum() == 16
    for spoilt in (k, v):
        before, spoilt[0, 5, 2] = spoilt[0, 5, 2].item(), torch.nan
        out = place.call("attention", torch.randn(2, 20, 16), k, v, 1, 0.25)
        assert out[0, :, 2].isnan().all()
        assert not out[1].isnan().any()
        spoilt[0, 5, 2] = before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_are_left_to_torch(dtype):
    q, k, v = torch.randn(3, 2, 20, 16, dtype=dtype)
    out = ops.attention(q, k, v, 2, 0.35)
    torch.testing.assert_close(out.double(), oracle(q, k, v, 2, 0.35), rtol=0, atol=4 * torch.finfo(dtype).eps)
