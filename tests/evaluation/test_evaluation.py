"""Metrics, tables, grids of images and the reader of CIFAR-10."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from examples.cifar10 import load_cifar10
from modiff_kernels.evaluation import markdown_table, psnr, report, sqnr, ssim, text_table, to_json
from modiff_kernels.evaluation.table import strip
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


def row(key, mode="modulated", weight_bits=8, act_bits=8, **more):
    numbers = {"psnr_db": 40.0, "ssim": 1.0, "s_per_image": 0.5, "speedup": 2.0, "state_bytes": 0, "average_bits": 8.0}
    common = {"backend": "cpu", "schedule": None, "calls_computed": 3, "actions": "", "is_reference": False}
    named = {"key": key, "name": key, "mode": mode, "weight_bits": weight_bits, "act_bits": act_bits}
    return {**numbers, **common, **named, **more}


FLOAT = row("float-contiguous", "float", 32, 32, psnr_db=None, is_reference=True, average_bits=32.0, speedup=1.0)


@pytest.mark.parametrize(("size", "factor", "channels"), [(16, 6, 3), (60, 2, 1), (200, 1, 3)])
def test_a_sheet_places_images_and_amplified_differences(tmp_path, size, factor, channels):
    low_bit, side = row("modulated-w8a4"), size * factor
    pictures = {FLOAT["name"]: np.full((3, size, size, channels), 0.5)}
    pictures[low_bit["name"]] = pictures[FLOAT["name"]] - 0.05
    pictures[low_bit["name"]][2] = np.nan
    report.sheet(tmp_path / "grid.png", FLOAT, [low_bit], pictures)
    grid = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    assert grid.shape[0] == 3 * (side + 4) + 4
    for line, values in enumerate(((128, 128, 128), (115, 115, 0), (128, 128, 0))):  # of 10 times 0.05: half
        top = 4 + line * (side + 4)
        for column, value in enumerate(values):
            left = grid.shape[1] - (3 - column) * (side + 4)
            assert (abs(grid[top : top + side, left : left + side] - value) <= 1).all()
    assert (grid[:side, :20] == 0).any(), "no label drawn"


def test_plots_show_the_numbers():
    rows = [row(f"modulated-w8a{bits}", act_bits=bits, s_per_image=bits / 8, psnr_db=bits + 30.0) for bits in (8, 4)]
    axis = report.scatter([FLOAT, *rows, row("plain-w8a8", "quantized", psnr_db=math.inf)]).axes[0]
    reference, modulated = sorted(axis.lines, key=lambda line: line.get_label())
    assert list(reference.get_xdata()) == [2.0, 2.0], "images per second in full precision"
    assert [list(modulated.get_xdata()), list(modulated.get_ydata())] == [[1.0, 2.0], [38.0, 34.0]]
    assert [text.get_text() for text in axis.texts] == ["W8A8", "W8A4"]
    times = {"a": ("modulated 8", 30.0, 10.0), "b": ("float", None, 20.0)}
    calls, state, time = report.layers("title", {"a": 2_000_000, "b": 0}, times, "UFFU").axes
    assert calls.get_title() == "2 of 4 calls are computed (dark)"
    assert [bar.get_width() for bar in state.patches] == [2.0, 0.0]
    assert [bar.get_width() for bar in time.patches] == [30.0, 0.0, 10.0, 20.0]
    assert strip("UUFFHU") == "##..=#"


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
