"""The training example, on a handful of synthetic images."""

import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from modiff_kernels.evaluation.networks import load_model
from tests.calibration.conftest import interrupt, threads  # noqa: F401 (for all tests here)
from tests.cifar10_files import write_packed

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_ddpm.py"


@pytest.fixture(scope="module")
def train_ddpm():
    spec = importlib.util.spec_from_file_location("train_ddpm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = module.PRESETS["small16"]
    module.PRESETS["tiny"] = {**small, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8}
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_packed(tmp_path_factory.mktemp("data"))


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    words = ["--data", data, "--out", out, "--batch-size", 2, "--steps", 2, "--device", "cpu", "--quiet", *more]
    return [str(word) for word in (*words, "--preset", "tiny", "--no-sample-grid")]


def test_trains_resumes_and_loads(train_ddpm, data, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_ddpm.main(arguments(data, whole)) == 0

    # Stop a second run after its first step, then resume it: the result has to be the same.
    options = arguments(data, parts, "--checkpoint-every", "1")
    with monkeypatch.context() as patch:
        interrupt(patch, train_ddpm.Trainer, "train_step", 2)
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
    assert (record["steps"], record["images_seen"]) == (2, 4)
    assert len(record["train_loss_curve"]) == 2
    assert 0 < record["test_loss_ema"] < 3


def test_resume_may_change_the_number_of_steps_and_nothing_else(train_ddpm, data, tmp_path, capsys):
    options = arguments(data, tmp_path)
    assert train_ddpm.main(options) == 0
    assert train_ddpm.main([*options, "--resume", "--steps", "3"]) == 0
    record = json.loads((tmp_path / "training.json").read_text())
    assert (record["steps"], record["steps_planned"]) == (3, [[0, 2], [2, 3]])
    assert [step for step, _ in record["train_loss_curve"]] == [1, 2, 3]
    assert train_ddpm.main([*options, "--resume", "--seed", "5"]) == 2
    assert "seed" in capsys.readouterr().err


def test_minutes_end_training_and_the_learning_rate(train_ddpm, data, tmp_path, monkeypatch):
    now = itertools.count(1.0)
    monkeypatch.setattr(train_ddpm.time, "perf_counter", lambda: next(now))
    rates, real = [], train_ddpm.Trainer.train_step

    def step(trainer):
        loss = real(trainer)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(train_ddpm.Trainer, "train_step", step)
    options = arguments(data, tmp_path, "--minutes", "0.5")
    at = options.index("--steps")
    del options[at : at + 2]
    saved, save = [], train_ddpm.Trainer.save_checkpoint

    def save_then_stop(trainer):
        save(trainer)
        saved.append(trainer.step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_ddpm, "CHECKPOINT_S", 5)
        patch.setattr(train_ddpm.Trainer, "save_checkpoint", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train_ddpm.main(options)
    assert train_ddpm.main([*options, "--resume"]) == 0
    record = json.loads((tmp_path / "training.json").read_text())
    assert 0 < saved[0] < record["steps"]
    assert 30 <= record["duration_seconds"] < 33  # of both runs, on this clock
    assert "--minutes 0.5" in record["command"]
    assert "--steps" not in record["command"]
    assert (tmp_path / "config.json").exists()
    assert rates[-1] < 0.2 * max(rates)


def test_learning_rate_follows_what_is_further(train_ddpm):
    for step, wanted in ((0, 1 / 50), (49, 1), (525, 0.5)):
        assert train_ddpm.lr_factor(step, 1000) == pytest.approx(wanted)
    for step, elapsed, wanted in ((0, 0.025, 0.5), (525, 0.25, 0.5), (525, 0.75, 0.5 - 0.5**1.5), (525, 1.2, 0)):
        assert train_ddpm.lr_factor(step, 1000, elapsed=elapsed) == pytest.approx(wanted)
    assert train_ddpm.lr_factor(0, 1000, elapsed=0.425, begun=0.4) == pytest.approx(0.5)


def test_large_models_are_saved_in_small_files(train_ddpm, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ddpm, "SHARD", "20KB")
    assert train_ddpm.main(arguments(data, tmp_path)) == 0
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) >= 4
    assert max(file.stat().st_size for file in files) < 25e3
    saved = UNet2DModel.from_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), None, torch.device("cpu")).unet.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in saved.state_dict().items())


def test_compiling_changes_nothing_and_a_compiler_that_fails_is_no_end(train_ddpm, data, tmp_path, monkeypatch, capsys):
    def broken(model):
        def call(*args, **more):
            model(*args, **more)[0].sum().backward()  # gradients that must not reach the optimiser
            raise RuntimeError("no compiler\nsecond line")

        return call

    def record_of(name, compiler, *options):
        with monkeypatch.context() as patch:
            patch.setattr(train_ddpm.torch, "compile", compiler)
            assert train_ddpm.main(arguments(data, tmp_path / name, *options)) == 0
        return json.loads((tmp_path / name / "training.json").read_text())

    alone = record_of("alone", None, "--no-compile")
    compiled = record_of("compiled", lambda model: lambda *args, **more: model(*args, **more), "--compile")
    failed = record_of("failed", broken, "--compile")
    assert "torch.compile failed, going on without it: no compiler\n" in capsys.readouterr().err
    assert [record["compiled"] for record in (alone, compiled, failed)] == [False, True, False]
    assert alone["train_loss_curve"] == compiled["train_loss_curve"] == failed["train_loss_curve"]


def test_sample_grid_layout(train_ddpm, tmp_path):
    images = np.arange(64, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), dtype=np.uint8)
    train_ddpm.save_grid(images, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (512, 512, 3)
    assert (grid[::64, ::64, 0] == np.arange(64).reshape(8, 8)).all()


def test_missing_data_and_bad_options(train_ddpm, tmp_path, capsys):
    for missing in ("nowhere", "."):
        assert train_ddpm.main(arguments(tmp_path / missing, tmp_path / "out")) == 2
        assert str(tmp_path / missing) in capsys.readouterr().err
    for option, value in {"--preset": "huge", "--steps": "0", "--lr": "nan", "--ema": "1", "--minutes": "-1"}.items():
        with pytest.raises(SystemExit, match="2"):
            train_ddpm.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), option, value])
        error = capsys.readouterr().err
        assert option in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(("preset", "millions"), [("small16", 1.85), ("base32", 9.0), ("ddpm_cifar10", 35.7)])
def test_preset_sizes(train_ddpm, preset, millions):
    with torch.device("meta"):
        model = train_ddpm.build_unet(preset, train_ddpm.PRESETS[preset]["size"])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.15)
