import math

import numpy as np
import pytest
import torch

from modiff_kernels.evaluation import frechet_distance, psnr, sqnr, ssim


def images(*shape):
    return np.random.default_rng(0).random(shape or (3, 16, 16, 3))


def test_psnr_is_the_definition_per_image():
    reference = images()
    noise = np.random.default_rng(1).normal(size=reference.shape) * np.array([0.1, 0.01, 0.001])[:, None, None, None]
    expected = -10 * np.log10((noise**2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(psnr(reference + noise, reference), expected, rtol=1e-10)
    assert np.isinf(psnr(reference, reference)).all()
    reference = reference.astype(np.float32)  # judged in float64
    assert psnr(reference + np.float32(1e-3), reference) == pytest.approx(60, abs=0.1)


@pytest.mark.parametrize("side", [3, 4, 5, 6, 7, 16])
def test_ssim_falls_with_noise_at_any_size(side):
    reference = images(2, side, side, 3)
    scores = [ssim(np.clip(reference + amount, 0, 1), reference).mean() for amount in (0.0, 0.1, 0.5)]
    assert pytest.approx(1.0) == scores[0] > scores[1] > scores[2]


def test_ssim_of_constant_images_is_the_luminance_term():
    a, b = np.full((1, 8, 8, 1), 0.5), np.full((1, 8, 8, 1), 0.25)
    c1 = 0.01**2
    assert ssim(a, b)[0] == pytest.approx((2 * 0.5 * 0.25 + c1) / (0.5**2 + 0.25**2 + c1))


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
    with pytest.raises(ValueError, match="at least 3"):
        ssim(images(1, 2, 2, 3), images(1, 2, 2, 3))


class TestFrechet:
    def test_normal_distributions_in_one_dimension(self):
        a, b = np.array([[0.0], [2.0], [4.0]]), np.array([[5.0], [6.0], [7.0]])  # means 2 and 6, deviations 2 and 1
        assert frechet_distance(a, b) == pytest.approx(4**2 + (2 - 1) ** 2)

    def test_against_the_matrix_square_root(self):
        linalg = pytest.importorskip("scipy.linalg")
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(40, 6)) + 0.3
        root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)

    def test_equal_sets_and_fewer_images_than_features(self):
        a = np.random.default_rng(0).normal(size=(5, 20))
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
        assert frechet_distance(a, a + 1) == pytest.approx(20, rel=1e-6)

    @pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((1, 4), (3, 4)), ((3,), (3,))])
    def test_other_shapes(self, shapes):
        with pytest.raises(ValueError, match=r"must be \[N, F\] and \[M, F\]"):
            frechet_distance(np.zeros(shapes[0]), np.zeros(shapes[1]))
