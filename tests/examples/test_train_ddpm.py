"""The training example, on a handful of synthetic images."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel

from tests.calibration.conftest import interrupt
from tests.cifar10_files import write_packed

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_ddpm.py"


@pytest.fixture(scope="module")
def train_ddpm():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        module = importlib.import_module("train_ddpm")
    small = module.PRESETS["small16"]
    module.PRESETS["tiny"] = {**small, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8}
    module.PRESETS["dit"] |= {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_packed(tmp_path_factory.mktemp("data"))


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    words = ["--data", data, "--out", out, "--batch-size", 2, "--steps", 2, "--device", "cpu", "--quiet", *more]
    words = words if "--network" in words else [*words, "--preset", "tiny"]
    return [str(word) for word in (*words, "--no-sample-grid")]


@pytest.mark.parametrize(("kind", "more"), [(UNet2DModel, []), (DiTTransformer2DModel, ["--network", "dit", "--bf16"])])
def test_trains_resumes_and_loads(train_ddpm, data, tmp_path, monkeypatch, kind, more):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_ddpm.main(arguments(data, whole, *more)) == 0

    # Stop a second run after its first step, then resume it: the result has to be the same.
    options = arguments(data, parts, "--checkpoint-every", "1", *more)
    with monkeypatch.context() as patch:
        interrupt(patch, train_ddpm.Trainer, "train_step", 2)
        with pytest.raises(KeyboardInterrupt):
            train_ddpm.main(options)
    assert not (parts / "config.json").exists()
    assert train_ddpm.main([*options, "--resume"]) == 0

    one, two = (kind.from_pretrained(folder) for folder in (whole, parts))
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
