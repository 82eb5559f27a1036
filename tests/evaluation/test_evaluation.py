"""Metrics, tables, grids of images and the reader of CIFAR-10."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from examples.cifar10 import load_cifar10
from modiff_kernels.evaluation import markdown_table, psnr, sqnr, ssim, text_table, to_json
from modiff_kernels.evaluation.images import image_grid
from tests.cifar10_files import write_packed

ROWS = [["plain W8A8", "45.1", "1.02"], ["a", "9", "-"]]


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


def test_tables():
    assert text_table(["configuration", "PSNR", "speed-up"], ROWS).splitlines() == [
        "configuration  PSNR  speed-up",
        "-------------  ----  --------",
        "plain W8A8     45.1      1.02",
        "a                 9         -",
    ]
    assert markdown_table(["a", "b", "c"], ROWS).splitlines() == [
        "| a | b | c |",
        "| --- | ---: | ---: |",
        "| plain W8A8 | 45.1 | 1.02 |",
        "| a | 9 | - |",
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_places_every_image(tmp_path, channels):
    dark, bright = np.zeros((3, 16, 16, channels)), np.ones((3, 16, 16, channels))
    image_grid({"dark": dark, "bright": bright}, tmp_path / "grid.png", cell=64, columns=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[0] == 2 * 68 + 4
    assert (grid[4:68, -68:-4] == 0).all()
    assert (grid[72:136, -68:-4] == 255).all()
    assert (grid[4:68, -136:-72] == 0).all()
    assert (grid[:68, :20] == 0).any(), "no label drawn"


def test_image_grid_keeps_large_images_and_survives_nan(tmp_path):
    image_grid({"nan": np.full((1, 100, 80, 3), np.nan)}, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").height == 108


def test_json_is_standard():
    text = to_json({"rows": [{"psnr_db": math.inf, "ssim": np.float32(0.5), "n": np.int64(3)}], "x": (1.5, "a")})
    assert json.loads(text) == {"rows": [{"psnr_db": None, "ssim": 0.5, "n": 3}], "x": [1.5, "a"]}


def test_cifar10_is_read_in_order_and_scaled_by_means_over_boxes(tmp_path):
    write_packed(tmp_path)
    images, labels = load_cifar10(tmp_path, "train")
    assert (images.shape, images.dtype) == ((11, 3, 32, 32), torch.uint8)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    box = torch.nn.functional.avg_pool2d(images.float(), 2)
    assert (load_cifar10(tmp_path, "train", 16)[0].float() - box).abs().max() <= 1  # PIL rounds once per axis
    with pytest.raises(FileNotFoundError, match="nowhere not found"):
        load_cifar10(tmp_path / "nowhere", "train")
    (tmp_path / "test_batch.bin").write_bytes(b"\0" * 3000)
    (tmp_path / "cifar10_test.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read .*cifar10_test.npz"):
        load_cifar10(tmp_path, "test")
    (tmp_path / "cifar10_test.npz").unlink()
    with pytest.raises(ValueError, match=r"test_batch.bin: 3000 bytes are no multiple of 3073"):
        load_cifar10(tmp_path, "test")
