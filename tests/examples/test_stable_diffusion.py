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
        psnr_db = 10 * np.log10(1 / np.square(left - right).mean())
        assert float(ours[3]) == pytest.approx(psnr_db, abs=0.5)  # pixels in a file are rounded
        assert psnr_db > 20
        assert min(float(ours[1]), float(ours[4])) > 0
        assert "UNet2DConditionModel: " in text  # explain()

    def test_compiled(self, stable_diffusion, sd_folder, tmp_path, monkeypatch, capsys):
        """Both sides go through torch.compile, which has a stand-in here."""
        compiled = []
        monkeypatch.setattr(torch, "compile", lambda target, **keywords: compiled.append(target) or target)
        assert stable_diffusion.main(options(sd_folder, tmp_path / "both.png", "--compare", "--compile")) == 0
        assert len(compiled) == 2
        full, ours = table(capsys.readouterr().out)
        assert (full[0], ours[0]) == ("float32 channels_last, compiled", "modulated W8A8, compiled")


class TestBadInput:
    def test_one_line_and_exit_code_2(self, stable_diffusion, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for words, message in (
            (["--model", "no/such/folder"], "--model no/such/folder: no such folder; give a folder of diffusers"),
            (["--model", "."], "--model .: no model_index.json in this folder"),
            (["--size", "63"], "--size: must be a multiple of 8, such as 56, got 63"),
            (["--act-bits", "5"], "--act-bits: invalid choice: 5"),
            (["--schedule", "sometimes"], "ModiffConfig: schedule='sometimes' is not allowed"),
            (["--prompt", " "], "--prompt: is empty"),
            (["--out", "no/folder/picture.png"], "--out: must be a .png file in a folder that exists"),
            (["--device", "cpu", "--cuda-graphs"], "--cuda-graphs: needs a GPU, but the device is cpu"),
        ):
            try:
                code = stable_diffusion.main(words)
            except SystemExit as stop:
                code = stop.code
            self.check(code, message, capsys)

    def test_other_folders(self, stable_diffusion, sdxl_folder, tmp_path, capsys):
        code = stable_diffusion.main(options(sdxl_folder, tmp_path / "picture.png"))
        self.check(code, "is a StableDiffusionXLPipeline, this example samples a StableDiffusionPipeline", capsys)
        (tmp_path / "model_index.json").write_text("{")
        code = stable_diffusion.main(options(tmp_path, tmp_path / "picture.png"))
        self.check(code, f"--model {tmp_path}: cannot be loaded: ", capsys)

    def check(self, code, message, capsys):
        assert code == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1]  # below progress bars of libraries
        assert error.count("error:") == 1
        assert "Traceback" not in error
