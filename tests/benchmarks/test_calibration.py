import json
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from benchmarks import calibration

ROWS = ["--samplers", "DDIM-20", "--methods", "minmax", "--bits", "W4A4"]
SMALL = ["--images", "2", "--batch", "2", "--samples", "2", "--set", "calls_per_sample=2", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    """The command sets the number of threads of the process; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet.save_pretrained(tmp_path / "tiny")
    DDIMScheduler(beta_end=0.002).save_pretrained(tmp_path / "tiny" / "scheduler")
    return tmp_path / "tiny"


def test_report(folder, tmp_path, monkeypatch):
    out = tmp_path / "c.json"
    sets = ["--set", "weight_method=rtn", "--set", "qdiffusion:weight_iterations=1"]
    keep = tmp_path / "kept"
    keep.mkdir()
    command = ["c", "--model", str(folder), "--json", str(out), *ROWS, *SMALL, *sets]
    monkeypatch.setattr(sys, "argv", [*command, "--keep", str(keep)])
    assert calibration.main() == 0
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert "kept" not in report["commands"][0]
    assert [(row["bits"], row["way"]) for row in rows] == [
        ("W4", "float"),
        ("W4A4", "plain"),
        ("W4A4", "modulated"),
    ]
    by_name = {(row["bits"], row["way"]): row for row in rows}
    assert by_name["W4A4", "plain"]["psnr_db"] < by_name["W4A4", "modulated"]["psnr_db"]
    assert by_name["W4A4", "plain"]["calibration_s"] > by_name["W4", "float"]["calibration_s"]  # both count
    for row in rows:
        assert row["features"] == "pool4"
        assert row["frechet"] > 0
        assert 50 < row["peak_mib"] < 4000
        assert row["calibration_cpu_s"] > 0
        assert row["options"]["weight_method"] == "rtn"
    with monkeypatch.context() as patch:  # another report from the same calibrations, which have their costs with them
        patch.setattr(calibration, "_measured", lambda command: 1 / 0)
        patch.setattr(sys, "argv", [*sys.argv, "--json", str(tmp_path / "again.json")])
        assert calibration.main() == 0
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == rows
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    monkeypatch.setattr(calibration.Study, "row", lambda *args: 1 / 0)
    assert calibration.main() == 0
    assert json.loads(out.read_text())["rows"] == rows


def test_pooled_features():
    images = np.random.default_rng(0).random((3, 8, 8, 2), dtype=np.float32)
    features = calibration.pool4(images)
    assert features.shape == (3, 32)
    assert features[1, 16] == pytest.approx(images[1, :2, :2, 1].mean())
    assert calibration.features_of("benchmarks.calibration:pool4") is calibration.pool4


def test_cost_of_a_command_and_of_one_that_fails():
    cost = calibration._measured([sys.executable, "-c", "x = bytearray(2**26); sum(range(10**6))"])
    assert cost.peak_mib > 64
    assert cost.cpu_s > 0
    assert cost.seconds > 0
    with pytest.raises(SystemExit, match=r"calibration failed \(exit code 3\)"):
        calibration._measured([sys.executable, "-c", "raise SystemExit(3)"])
