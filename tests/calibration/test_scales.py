"""Scale searches on histograms against brute force on the values themselves."""

import pytest
import torch

from modiff_kernels.calibration.scales import RATIOS, Histogram, Range, affine_scale, symmetric_scale


def histogram_of(*parts):
    bounds = Range()
    for part in parts:
        bounds.add(part)
    histogram = Histogram(bounds)
    for part in parts:
        histogram.add(part)
    return histogram


def error(x, scale, zero_point, bits, p):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.clamp(torch.round(x.double() / scale) + zero_point, low, high)
    return ((codes - zero_point) * scale - x.double()).abs().pow(p).mean().item()


@pytest.fixture
def values():
    """A heavy-tailed sample, as residuals are."""
    return torch.distributions.StudentT(4.0).sample((4, 5000))


def test_counts_add_up_over_a_stream(values):
    whole, parts = histogram_of(values), histogram_of(*values)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.sum() == values.numel()
    assert (whole.low, whole.high) == (values.min(), values.max())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_symmetric_minmax_clips_nothing_and_uses_all_codes(values, bits):
    scale = symmetric_scale(histogram_of(values), bits, "minmax", 2.4, 99.9)
    absmax = values.abs().max()
    assert scale.item() == pytest.approx((absmax / (2 ** (bits - 1) - 0.5)).item())
    both = torch.cat([values.flatten(), absmax[None], -absmax[None]])
    codes = torch.round(both / scale)
    assert codes.abs().max() == 2 ** (bits - 1) - 1 or codes.min() == -(2 ** (bits - 1))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("p", [2.0, 2.4])
def test_symmetric_mse_is_the_best_of_all_candidates(values, bits, p):
    found = symmetric_scale(histogram_of(values), bits, "mse", p, 99.9).item()
    candidates = values.abs().max().item() * RATIOS / (2 ** (bits - 1) - 0.5)
    best = min(error(values, scale.item(), 0, bits, p) for scale in candidates)
    assert error(values, found, 0, bits, p) <= best * 1.01  # the histogram moves values by up to half a bin
    if bits < 8:
        assert found < candidates[0] * 0.7  # few bits: clipping the tail pays


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_affine_mse_is_the_best_of_all_candidates(values, bits):
    x = torch.nn.functional.silu(values)
    scale, zero_point = affine_scale(histogram_of(x), bits, "mse", 2.4, 99.9)
    steps, qmin = 2**bits - 1, -(2 ** (bits - 1))
    errors = []
    for ratio in RATIOS.tolist():
        low, high = x.min().item() * ratio, x.max().item() * ratio
        step = (high - low) / steps
        errors.append(error(x, step, round(-low / step) + qmin, bits, 2.4))
    assert error(x, scale.item(), zero_point.item(), bits, 2.4) <= min(errors) * 1.01
    assert zero_point.dtype == torch.int32


def test_affine_minmax_covers_the_range_with_every_code():
    x = torch.linspace(-0.25, 3.5, 1001)
    scale, zero_point = affine_scale(histogram_of(x), 4, "minmax", 2.4, 99.9)
    codes = torch.round(x / scale) + zero_point
    assert codes.unique().tolist() == list(range(-8, 8))


def test_percentile():
    x = torch.linspace(-1, 1, 100_001)
    x[0] = -50.0
    scale = symmetric_scale(histogram_of(x), 8, "percentile", 2.4, 99.0)
    assert scale.item() * 127.5 == pytest.approx(0.99, abs=50 / 2048)  # within a bin
    scale, _ = affine_scale(histogram_of(x), 8, "percentile", 2.4, 99.0)
    assert scale.item() * 255 == pytest.approx(1.98, abs=2 * 50 / 2048)


def test_a_stream_of_zeros():
    assert symmetric_scale(histogram_of(torch.zeros(10)), 4, "mse", 2.4, 99.9) > 0
