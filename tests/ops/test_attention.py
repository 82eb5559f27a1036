"""attention: softmax(q k^T) v per head, against float64."""

import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.ops import dispatch

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# samples, queries, keys, heads, width: one of everything, odd, around vectors (16), tiles (6) and blocks (48 queries),
# and the layers of the shipped model, DDPM CIFAR-10 and SD 1.5.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 7, 5, 1, 3),
    (3, 15, 17, 2, 16),
    (1, 47, 33, 3, 17),
    (1, 49, 31, 1, 65),
    (2, 96, 16, 2, 48),
    (8, 64, 64, 3, 32),
    (2, 256, 256, 1, 256),
    (1, 300, 77, 8, 40),
    (1, 40, 2048, 1, 40),
]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Backends that have the op."""
    reason = dispatch.why_unavailable(request.param)
    if reason is None and request.param == "cpu" and torch.ops.modiff_cpu.isa() < 2:
        reason = "attention needs AVX-512"
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def oracle(q, k, v, heads, scale):
    q, k, v = (t.double().unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(scale * q @ k.transpose(2, 3), 3) @ v).transpose(1, 2).flatten(2)


def check(backend, q, k, v, heads, scale):
    out = ops.attention(q, k, v, heads, scale, backend)
    expected = oracle(q, k, v, heads, scale)
    # Sums of up to 2048 float32 products in order, and an exponential with a relative error of 2e-7.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-6 * max(1.0, expected.abs().max().item()))
    assert out.is_contiguous()
    assert out.shape == q.shape


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(backend, shape, threads):
    samples, queries, keys, heads, width = shape
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    q = torch.randn(samples, queries, heads * width)
    k, v = torch.randn(2, samples, keys, heads * width)
    check(backend, q, k, v, heads, width**-0.5)
    torch.set_num_threads(before)


def test_reads_columns_of_a_wider_tensor(backend):
    q, k, v = torch.randn(2, 20, 3 * 24).chunk(3, dim=2)
    check(backend, q, k, v, 2, 0.3)


def test_large_scores_do_not_overflow(backend):
    q, k, v = 100 * torch.randn(3, 2, 20, 16)
    check(backend, q, k, v, 1, 1.0)


def test_nan_reaches_the_rows_that_read_it(backend):
    q, k, v = torch.randn(3, 2, 20, 16)
    q[1, 3] = torch.nan
    out = ops.attention(q, k, v, 1, 0.25, backend)
    assert out[1, 3].isnan().all()
    assert out.isnan().sum() == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_are_left_to_torch(dtype):
    q, k, v = torch.randn(3, 2, 20, 16, dtype=dtype)
    out = ops.attention(q, k, v, 2, 0.35)
    torch.testing.assert_close(out.double(), oracle(q, k, v, 2, 0.35), rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_opcheck(backend):
    q, k, v = torch.randn(3, 2, 5, 8)
    torch.library.opcheck(torch.ops.modiff.attention.default, (q, k, v, 2, 0.5, backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads=3 does not divide the 16 columns"),
        ({"k": torch.randn(2, 4, 12)}, r"both must be \[2, tokens, 16\]"),
        ({"v": torch.randn(2, 3, 16)}, "both must be"),
        ({"q": torch.randn(2, 16, 5).transpose(1, 2)}, "contiguous rows"),
        ({"v": torch.randn(2, 4, 16, dtype=torch.float64)}, "v is torch.float64"),
        ({"score_scale": float("nan")}, "score_scale=nan"),
    ],
    ids=str,
)
def test_errors_say_what_is_allowed(change, message):
    arguments = {"q": torch.randn(2, 5, 16), "k": torch.randn(2, 4, 16), "v": torch.randn(2, 4, 16)}
    with pytest.raises((ValueError, TypeError), match=message):
        ops.attention(**{**arguments, "heads": 2, "score_scale": 0.25, **change})
