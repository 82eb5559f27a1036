"""Scale searches on histograms against brute force on the values themselves."""

import pytest
import torch

from modiff_kernels.calibration.static import RATIOS, Histogram, StaticOptions, find_scale


def histogram_of(*parts):
    histogram = Histogram(float(min(part.min() for part in parts)), float(max(part.max() for part in parts)))
    for part in parts:
        histogram.add(part)
    return histogram


def found(x, bits, search, affine, p=2.4, percentile=99.9):
    return find_scale(histogram_of(x), StaticOptions(scale_search=search, p=p, percentile=percentile), bits, affine)


def error(x, scale, zero_point, bits, p):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.clamp(torch.round(x.double() / scale) + zero_point, low, high)
    return ((codes - zero_point) * scale - x.double()).abs().pow(p).mean().item()


@pytest.fixture
def values():
    return torch.distributions.StudentT(4.0).sample((4, 5000))  # heavy-tailed, as residuals are


def test_counts_add_up_over_a_stream(values):
    whole, parts = histogram_of(values), histogram_of(*values)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.sum() == values.numel()


@pytest.mark.parametrize("bits", [3, 4, 7, 8])
def test_symmetric_scales(values, bits):
    absmax = values.abs().max().item()
    scale, zero_point = found(values, bits, "minmax", False)
    assert scale.item() == pytest.approx(absmax / (2 ** (bits - 1) - 0.5))
    assert zero_point.item() == 0
    candidates = absmax * RATIOS / (2 ** (bits - 1) - 0.5)
    for p in (2.0, 2.4):
        least = found(values, bits, "mse", False, p)[0].item()
        best = min(error(values, scale.item(), 0, bits, p) for scale in candidates)
        assert error(values, least, 0, bits, p) <= best * 1.01  # the histogram moves values by up to half a bin
        assert bits > 4 or least < candidates[0] * 0.7  # few bits: clipping the tail pays


@pytest.mark.parametrize("bits", [3, 4, 7, 8])
def test_affine_mse_is_the_best_of_all_candidates(values, bits):
    x = torch.nn.functional.silu(values)
    scale, zero_point = found(x, bits, "mse", True)
    errors = []
    for ratio in RATIOS.tolist():
        low, high = x.min().item() * ratio, x.max().item() * ratio
        step = (high - low) / (2**bits - 1)
        errors.append(error(x, step, round(-low / step) - 2 ** (bits - 1), bits, 2.4))
    assert error(x, scale.item(), zero_point.item(), bits, 2.4) <= min(errors) * 1.01
    assert zero_point.dtype == torch.int32


def test_affine_minmax_covers_the_range_with_every_code():
    x = torch.linspace(-0.25, 3.5, 1001)
    scale, zero_point = found(x, 4, "minmax", True)
    assert (torch.round(x / scale) + zero_point).unique().tolist() == list(range(-8, 8))


def test_percentile_and_a_stream_of_zeros():
    x = torch.linspace(-1, 1, 100_001)
    x[0] = -50.0
    for affine, covered in ((False, 0.99 / 127.5), (True, 1.98 / 255)):
        scale, _ = found(x, 8, "percentile", affine, percentile=99.0)
        assert scale.item() == pytest.approx(covered, abs=50 / 2048 / 127)  # within a bin
    assert found(torch.zeros(10), 4, "mse", False)[0] > 0
