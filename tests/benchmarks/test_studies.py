"""Studies: what tables and the plot make of known rows, a small run of quality, and the Frechet distance."""

import argparse
import importlib.util
import json

import numpy as np
import pytest
import torch

from benchmarks import record
from benchmarks.studies import quality, schedules
from benchmarks.studies.features import frechet_distance
from tests.cifar10_files import write_packed


def row(method, evaluations, db, network="float32", batch=16):
    values = {"network": network, "sampler": "DPM-Solver++", "steps": 25, "method": method, "batch": batch}
    return {**values, "evaluations": evaluations, "own_db": None, "converged_db": db}


REPORT = {
    "rows": [
        row("every call", 8, 25.0),
        row("every call", 25, 38.0),
        row("hold", 8, 29.0),
        row("hold", 8, 30.0),
        row("fit, converged", 8, 41.0),
        row("fit, converged", 11, 45.5),
        row("fit, converged", 8, 99.0, batch=1),
        row("fit, converged", 8, 99.0, network="W8A8"),
    ],
    "fits": [{name: name for name in schedules.LISTS["fits"]}],
    **dict.fromkeys(("model", "git_commit", "command"), "x"),
}


def test_published_forecasts_are_weights_of_past_outputs():
    for name, nodes, call, expected in (
        ("hold", [0, 2], 3, [1]),
        ("TaylorSeer 1", [0, 2], 3, [1.5, -0.5]),
        ("TaylorSeer 2", [0, 2, 4], 5, [1.5 + 0.125, -0.5 - 0.25, 0.125]),
        ("HiCache", [0, 2, 4], 5, [1.25 - 1 / 32, -0.25 + 1 / 16, -1 / 32]),
        ("Spectrum", [0, 5, 10], 15, [3, -3, 1]),  # nearly the polynomial through all
    ):
        schedule = schedules.ruled(nodes, call + 1, schedules.RULES[name])
        assert schedule.weights[call] == pytest.approx([*expected, 0], abs=0.02), name
        assert schedule.weights[nodes[-1]] == (1, 0)
    assert schedules.uniform(25, 8) == [(0, 3, 7, 10, 14, 17, 21, 24), (0, 1, 2, 7, 12, 17, 22, 24)]


def test_schedules_compare_at_equal_cost(tmp_path):
    (tmp_path / "pareto.json").write_text(json.dumps(REPORT))
    assert schedules.table(tmp_path, "own", "W8A4") is None
    text = schedules.table(tmp_path, "converged")
    assert "| DPM-Solver++, 25 | 8 | 25.0 | 30.0 | - | - | - | **41.0** | 38.0 |" in text
    assert "| DPM-Solver++, 25 | 11 | - | - | - | - | - | **45.5** | 38.0 |" in text
    assert "| held_out_db | polynomial_db |" in schedules.table(tmp_path, "fits")


def test_the_plot_is_up_to_date():
    spec = importlib.util.spec_from_file_location("plot", record.ROOT / "tools" / "plot_pareto.py")
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    assert plot.main(["--check"]) is None
    lines = {label: points for label, _, points in plot.panels(REPORT)["DPM-Solver++"]}
    assert lines["fitted schedule (ours)"] == [(8, 41.0), (11, 45.5)]
    assert (lines["hold the last output"], lines["HiCache"]) == ([(8, 30.0)], [])


def test_quality_judges_by_the_float_images_of_the_same_noise(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["x", "study"])
    monkeypatch.setattr(quality, "SAMPLERS", {"DDIM-50": ("ddim", 3)})
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    (tmp_path / "data").mkdir()
    write_packed(tmp_path / "data", {"cifar10_train_0": 9, "cifar10_test": 16})
    words = ("--data", tmp_path / "data", "--images", "3", "--batch", "2", "--device", "cpu", "--quiet", "--resume")
    words += ("--keep", tmp_path / "kept", "--json", tmp_path / "q.json", "--samplers", "DDIM-50", "--bits", "W8A8")
    args = parser.parse_args([*map(str, words), "--threads", str(torch.get_num_threads())])
    assert quality.main(args) == 0
    report = json.loads((tmp_path / "q.json").read_text())
    rows = {(found["way"], found["scheduled"]): found for found in report["rows"]}
    ours = {(way, scheduled) for way in ("modulated", "plain") for scheduled in (False, True)}
    assert set(rows) == ours | {("float", False), ("weights", False)}
    assert rows["modulated", False]["psnr_db"] > 30
    assert rows["modulated", False]["images"] == 3
    assert "psnr_db" not in rows["float", False]
    assert (report["failures"], report["yardsticks"]["test_images"]) == ({}, 16)
    before = (tmp_path / "q.json").read_text().count("frechet_test")
    assert quality.main(args) == 0
    assert (tmp_path / "q.json").read_text().count("frechet_test") == before, "all rows were there"


def test_frechet_distance():
    a, b = np.array([[0.0], [2.0], [4.0]]), np.array([[5.0], [6.0], [7.0]])  # means 2 and 6, deviations 2 and 1
    assert frechet_distance(a, b) == pytest.approx(4**2 + (2 - 1) ** 2)
    few = np.random.default_rng(0).normal(size=(5, 20))  # than features
    assert frechet_distance(few, few + 1) == pytest.approx(20, rel=1e-6)
