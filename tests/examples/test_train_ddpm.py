"""The training example, on a handful of synthetic images."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_ddpm.py"


@pytest.fixture(scope="module")
def train_ddpm():
    """The example, loaded as a module."""
    spec = importlib.util.spec_from_file_location("train_ddpm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder of the CIFAR-10 layout with a few random JPEGs."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("cifar10_train_0", 6), ("cifar10_train_1", 5), ("cifar10_test", 4)):
        blobs = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
            blobs.append(buffer.getvalue())
        np.savez(
            folder / f"{name}.npz",
            jpeg=np.frombuffer(b"".join(blobs), dtype=np.uint8),
            offsets=np.cumsum([0, *map(len, blobs)], dtype=np.int64),
            labels=np.zeros(count, dtype=np.uint8),
        )
    return folder


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    """A command line for a run of a few steps."""
    words = ["--data", data, "--out", out, "--batch-size", 2, "--steps", 2, "--device", "cpu", "--quiet", *more]
    return [str(word) for word in words]


def test_images_are_decoded_and_downscaled(train_ddpm, data):
    images = train_ddpm.load_images(data, "cifar10_train_*.npz", 16, quiet=True)
    assert images.shape == (11, 3, 16, 16)
    assert images.dtype == torch.uint8
    full = train_ddpm.load_images(data, "cifar10_train_*.npz", 32, quiet=True).float()
    box = torch.nn.functional.avg_pool2d(full, 2)
    assert (images.float() - box).abs().max() <= 1  # PIL rounds once per axis


def test_trains_resumes_and_loads(train_ddpm, data, tmp_path, monkeypatch):
    from diffusers import DDIMScheduler, UNet2DModel

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_ddpm.main(arguments(data, whole, "--no-sample-grid")) == 0

    # Stop a second run after its first step, then resume it: the result has to be the same.
    real, calls = train_ddpm.Trainer.train_step, []

    def stop_at_second(trainer):
        calls.append(trainer.step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(trainer)

    options = arguments(data, parts, "--no-sample-grid", "--checkpoint-every", "1")
    with monkeypatch.context() as patch:
        patch.setattr(train_ddpm.Trainer, "train_step", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            train_ddpm.main(options)
    assert not (parts / "config.json").exists()
    assert train_ddpm.main([*options, "--resume"]) == 0

    one, two = (UNet2DModel.from_pretrained(folder) for folder in (whole, parts))
    assert one.config.sample_size == 16
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert DDIMScheduler.from_pretrained(parts, subfolder="scheduler").config.num_train_timesteps == 1000
    record = json.loads((parts / "training.json").read_text())
    assert record["steps"] == 2
    assert record["images_seen"] == 4
    assert len(record["train_loss_curve"]) == 2
    assert 0 < record["test_loss_ema"] < 3


def test_resume_may_change_the_number_of_steps(train_ddpm, data, tmp_path):
    options = arguments(data, tmp_path, "--no-sample-grid")
    assert train_ddpm.main(options) == 0
    assert train_ddpm.main([*options, "--resume", "--steps", "3"]) == 0
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == 3
    assert record["steps_planned"] == [[0, 2], [2, 3]]
    assert [step for step, _ in record["train_loss_curve"]] == [1, 2, 3]


def test_checkpoint_of_other_options_is_refused(train_ddpm, data, tmp_path, capsys):
    options = arguments(data, tmp_path, "--no-sample-grid")
    assert train_ddpm.main(options) == 0
    assert train_ddpm.main([*options, "--resume", "--seed", "5"]) == 2
    assert "seed" in capsys.readouterr().err


def test_sample_grid_layout(train_ddpm, tmp_path):
    images = np.arange(64, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), dtype=np.uint8)
    train_ddpm.save_grid(images, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (512, 512, 3)
    assert (grid[::64, ::64, 0] == np.arange(64).reshape(8, 8)).all()


def test_missing_data_folder(train_ddpm, tmp_path, capsys):
    missing = tmp_path / "nowhere"
    assert train_ddpm.main(arguments(missing, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert str(missing) in error
    assert error.count("\n") == 1


def test_folder_without_data(train_ddpm, tmp_path, capsys):
    assert train_ddpm.main(arguments(tmp_path, tmp_path / "out")) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("bad", [["--preset", "huge"], ["--steps", "0"], ["--lr", "nan"], ["--ema", "1"]])
def test_bad_options(train_ddpm, tmp_path, capsys, bad):
    with pytest.raises(SystemExit) as stop:
        train_ddpm.main(["--out", str(tmp_path / "out"), *bad])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert bad[0] in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("preset", "millions"), [("small16", 1.85), ("base32", 9.0), ("ddpm_cifar10", 35.7)])
def test_preset_sizes(train_ddpm, preset, millions):
    with torch.device("meta"):
        model = train_ddpm.build_unet(preset, train_ddpm.PRESETS[preset]["size"])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.15)
