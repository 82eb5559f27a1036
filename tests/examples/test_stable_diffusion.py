"""The Stable Diffusion examples, on small pipelines of the same classes with random weights."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modiff_kernels.evaluation import networks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIZE = 64  # the UNet sees 8x8


@pytest.fixture
def stable_diffusion(monkeypatch):
    """The example as a module; sdxl.py imports it as a neighbour."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("stable_diffusion")


@pytest.fixture
def sdxl(stable_diffusion):
    return importlib.import_module("sdxl")


def options(folder, out, *more):
    return [str(word) for word in ("--model", folder, "--out", out, "--device", "cpu", "--steps", 4, *more)]


def test_modiff_sample_counts_the_steps_of_a_pipeline(sd_folder):
    model, seen = networks.load_model(str(sd_folder), "a lighthouse", torch.device("cpu")), []
    networks.sample_images(model, model.unet, "ddim", 3, [0, 1], on_step=lambda: seen.append(1) or True)
    assert len(seen) == 3


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def table(text):
    """The rows below the rule, as cells."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("configuration"))
    assert re.split(r"  +", lines[head]) == ["configuration", "s/image", "speed-up", "PSNR dB", "state MB"]
    return [re.split(r"  +", line) for line in lines[head + 2 : head + 4]]


class TestPictures:
    def test_the_same_seed_gives_the_same_picture(self, stable_diffusion, sd_folder, tmp_path, capsys):
        pictures = []
        for seed in (1, 1, 2):
            assert stable_diffusion.main(options(sd_folder, tmp_path / "0.png", "--seed", seed)) == 0
            pictures.append(pixels(tmp_path / "0.png"))
        assert pictures[0].shape == (SIZE, SIZE, 3)
        assert [np.array_equal(pictures[0], other) for other in pictures[1:]] == [True, False]
        assert re.search(r"0.png: 4 steps in \d+\.\d s, \d+\.\d MB of state", capsys.readouterr().out)

    @pytest.mark.parametrize("which", ["sd", "sdxl"])
    def test_compare(self, which, request, tmp_path, capsys):
        example = request.getfixturevalue("stable_diffusion" if which == "sd" else "sdxl")
        folder, out = request.getfixturevalue(f"{which}_folder"), tmp_path / "both.png"
        more = ("--compare", "--explain", "--size", 32, "--steps", 12)
        assert example.main(options(folder, out, *more, "--act-bits", 4, "--schedule", "forecast every=2")) == 0
        left, right = np.split(pixels(out).astype(float) / 255, 2, axis=1)
        assert left.shape == (32, 32, 3)
        text = capsys.readouterr().out
        full, ours = table(text)
        assert (full[0], *full[2:]) == ("float32 channels_last", "1.00x", "reference", "-")
        assert ours[0] == "modulated W8A4, forecast every=2"
        rounded = 1 / 6 / 255**2  # what pixels of two files differ by
        psnr_db = 10 * np.log10(1 / (np.square(left - right).mean() - rounded))
        assert float(ours[3]) == pytest.approx(psnr_db, abs=0.5)
        assert psnr_db > 20
        assert min(float(ours[1]), float(ours[4])) > 0
        assert "UNet2DConditionModel: " in text  # explain()
