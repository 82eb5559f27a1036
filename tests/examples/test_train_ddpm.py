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
