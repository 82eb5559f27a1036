import pytest
import torch

from benchmarks import bench_unet_step, record, shapes


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_trajectory_changes_slowly_and_ends_in_the_image():
    inputs = [x for x, _ in bench_unet_step.trajectory(16, 2, 50)]
    changes = [((a - b).norm() / b.norm()).item() for a, b in zip(inputs[1:], inputs[:-1], strict=True)]
    assert max(changes) < 0.25
    assert inputs[0].std() == pytest.approx(1.0, abs=0.15)
    assert inputs[-1].abs().max() < 1.2


def test_step_is_verified_timed_and_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "results_file", lambda: tmp_path / "device.csv")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    rows = "float-channels_last,plain-w8a8,modulated-w8a8"  # every name stands for the rows that begin with it
    options = [
        "--network",
        "cifar10_small16",
        "--batch",
        "1",
        "--calls",
        "4",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--rows",
        rows,
    ]
    assert bench_unet_step.main([*options, "--record", "--quiet", "--no-compile"]) == 0
    recorded = record.read(tmp_path / "device.csv")
    times = {row["problem"]: row for row in recorded if row["metric"] == "update_time"}
    assert list(times) == [f"cifar10_small16-b1-{key}" for key in rows.split(",")]
    assert all(row["n"] == "3" and row["verified"] == "True" for row in times.values())
    modulated = {row["metric"]: row for row in recorded if row["problem"].endswith("modulated-w8a8")}
    assert {"initialize_time", "speedup_vs_best_eager", "overhead_vs_plain", "state", "bound"} <= set(modulated)
    assert "peak_memory" not in modulated  # not known on a CPU
    assert float(modulated["update_time"]["sqnr_db"]) > 30
    assert "modulated-w8a8" in capsys.readouterr().out


def test_a_wrong_configuration_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(bench_unet_step, "LEAST_SQNR_DB", {"float": 1000.0, "modulated": 0.0})
    options = [
        "--network",
        "cifar10_small16",
        "--batch",
        "1",
        "--calls",
        "4",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--no-compile",
    ]
    assert bench_unet_step.main([*options, "--rows", "float-channels_last,modulated-w8a8", "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert "float32 eager channels_last: " in err
    assert "float-channels_last" not in out


def test_layer_table_of_the_shipped_model():
    table = shapes.layer_table("cifar10_small16")
    layers = {str(layer): count for layer, count in table.items()}
    assert layers["conv3x3-3-64@16x16-s1"] == 1
    assert sum(count for layer, count in table.items() if layer.kind == "linear") == 16
    with pytest.raises(ValueError, match="allowed: cifar10_small16, ddpm_cifar10, ldm8_churches, sd15, sdxl"):
        shapes.build_unet("sd14")
