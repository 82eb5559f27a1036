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


def test_step_is_verified_timed_and_recorded(tmp_path, capsys):
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
    assert bench_unet_step.main([*options, "--record", "--results", str(tmp_path), "--quiet", "--no-compile"]) == 0
    recorded = record.read(record.results_file(tmp_path))
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


def test_one_by_one_rows_come_as_they_are_measured_and_an_error_ends_no_other(tmp_path, monkeypatch, capsys):
    """The most telling first; ratios to a baseline that comes later are made then."""
    made, make = [], bench_unet_step.Networks.make
    monkeypatch.setattr(bench_unet_step, "STEP_ORDER", ("plain-w8a8", "modulated-w8a8", "float-channels_last"))

    def failing(networks, row, pipe_of=None):
        made.append((row.key, record.results_file(tmp_path).exists()))
        if row.key == "modulated-w8a8":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return make(networks, row, pipe_of)

    monkeypatch.setattr(bench_unet_step.Networks, "make", failing)
    options = "--network cifar10_small16 --batch 1 --calls 4 --rounds 2 --threads 1 --no-compile --no-in-turns --record"
    rows = "float-channels_last,plain-w8a8,modulated-w8a8"
    assert bench_unet_step.main([*options.split(), "--rows", rows, "--results", str(tmp_path), "--quiet"]) == 1
    assert made == [("plain-w8a8", False), ("modulated-w8a8", True), ("float-channels_last", True)]
    assert (
        "modulated W8A8: out of memory (CUDA out of memory. Tried to allocate 3 GiB); left out"
        in capsys.readouterr().err
    )
    found = [(row["problem"].split("-b1-")[1], row["metric"]) for row in record.read(record.results_file(tmp_path))]
    first, later = found.index(("plain-w8a8", "update_time")), found.index(("float-channels_last", "update_time"))
    assert first < later < found.index(("plain-w8a8", "speedup_vs_best_eager"))
    assert not any(key == "modulated-w8a8" for key, _ in found)


def test_rows_that_are_recorded_are_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "commit", lambda: ("c0ffee", False))
    options = "--network cifar10_small16 --batch 1 --calls 4 --rounds 1 --threads 1 --no-compile --no-in-turns --record"
    options = [*options.split(), "--skip-recorded", "--results", str(tmp_path), "--quiet"]
    for rows in ("plain-w8a8", "plain-w8a8,float-channels_last"):
        assert bench_unet_step.main([*options, "--rows", rows]) == 0
    found = record.read(record.results_file(tmp_path))
    times = [(row["problem"].split("-b1-")[1], float(row["p50"])) for row in found if row["metric"] == "update_time"]
    assert [key for key, _ in times] == ["plain-w8a8", "float-channels_last"]
    (ratio,) = [row for row in found if row["metric"] == "speedup_vs_best_eager" and "plain" in row["problem"]]
    assert float(ratio["p50"]) == pytest.approx(times[1][1] / times[0][1], rel=1e-3)


def test_layer_table_of_the_shipped_model():
    table = shapes.layer_table("cifar10_small16")
    layers = {str(layer): count for layer, count in table.items()}
    assert layers["conv3x3-3-64@16x16-s1"] == 1
    assert sum(count for layer, count in table.items() if layer.kind == "linear") == 16
    with pytest.raises(ValueError, match="allowed: cifar10_small16, ddpm_cifar10, ldm8_churches, sd15, sdxl"):
        shapes.build_unet("sd14")
