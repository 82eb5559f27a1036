import math

import numpy as np
import pytest
import torch

from modiff_kernels.evaluation import psnr, sqnr, ssim


def images(*shape):
    return np.random.default_rng(0).random(shape or (3, 16, 16, 3))


def test_psnr_is_the_definition_per_image():
    reference = images()
    noise = np.random.default_rng(1).normal(size=reference.shape) * np.array([0.1, 0.01, 0.001])[:, None, None, None]
    expected = -10 * np.log10((noise**2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(psnr(reference + noise, reference), expected, rtol=1e-10)


def test_equal_images():
    assert np.isinf(psnr(images(), images())).all()
    np.testing.assert_allclose(ssim(images(), images()), 1.0)


@pytest.mark.parametrize("side", [3, 4, 5, 6, 7, 16])
def test_ssim_falls_with_noise_at_any_size(side):
    reference = images(2, side, side, 3)
    scores = [ssim(np.clip(reference + amount, 0, 1), reference).mean() for amount in (0.0, 0.1, 0.5)]
    assert scores[0] > scores[1] > scores[2]


def test_ssim_of_constant_images_is_the_luminance_term():
    a, b = np.full((1, 8, 8, 1), 0.5), np.full((1, 8, 8, 1), 0.25)
    c1 = 0.01**2
    assert ssim(a, b)[0] == pytest.approx((2 * 0.5 * 0.25 + c1) / (0.5**2 + 0.25**2 + c1))


def test_float32_input_is_judged_in_float64():
    reference = images().astype(np.float32)
    assert psnr(reference + np.float32(1e-3), reference) == pytest.approx(60, abs=0.1)


def test_sqnr_is_the_definition():
    reference = torch.full((4, 5), 2.0)
    assert sqnr(reference + 0.02, reference) == pytest.approx(40, abs=1e-4)
    assert sqnr(reference, reference) == math.inf
    assert sqnr(reference, torch.zeros(4, 5)) == -math.inf
    assert sqnr((reference + 0.25).half(), reference.half()) == pytest.approx(20 * math.log10(8), abs=1e-6)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_bad_shapes(metric):
    with pytest.raises(ValueError, match="differ in shape"):
        metric(images(2, 8, 8, 3), images(3, 8, 8, 3))
    with pytest.raises(ValueError, match=r"\[N, H, W, C\]"):
        metric(images(8, 8, 3), images(8, 8, 3))
    with pytest.raises(ValueError, match="differ in shape"):
        sqnr(torch.ones(2), torch.ones(3))


def test_ssim_refuses_images_too_small_for_a_window():
    with pytest.raises(ValueError, match="at least 3"):
        ssim(images(1, 2, 2, 3), images(1, 2, 2, 3))
