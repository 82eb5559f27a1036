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
from benchmarks.studies.schedules import between_db, lines, panels, wins
from tests.cifar10_files import write_packed


def row(method, evaluations, db, sampler="DDIM", steps=20, network="float32"):
    values = {"network": network, "sampler": sampler, "steps": steps, "method": method}
    return {**values, "evaluations": evaluations, "converged_db": db}


REPORT = {
    "rows": [
        row("every call", 9, 25.0, steps=9),
        row("every call", 12, 24.0, steps=12),
        row("every call", 20, 31.0),
        row("every call", 50, 60.0, steps=50),
        row("every call", 8, 26.0, sampler="other", steps=8),
        row("every call", 10, 28.0, sampler="other", steps=10),
        row("forecast", 12, 29.0),
        row("forecast", 12, 30.0),
        row("forecast", 9, 27.0),
        row("hold", 10, 26.5),
        row("DeepCache", 8.0, 20.0),
        row("DeepCache", 10.0, 24.0),
        row("searched", 12, 30.5),
        row("forecast", 9, 99.0, network="W8A8"),
        row("every call", 50, 10.0, sampler="noisy", steps=50),
        row("forecast", 27, 11.0, sampler="noisy", steps=50),
    ]
}


def test_schedules_compare_at_equal_cost():
    (panel,) = panels(REPORT, "float32")  # a sampler with one number of steps has nothing beside it
    assert (panel.sampler, panel.steps, panel.every_call_db) == ("DDIM", 20, 31.0)
    assert panel.schedules["forecast"] == [(9, 27.0), (12, 30.0)], "the best at each cost"
    assert panel.any_sampler == [(8, 26.0), (10, 28.0), (20, 31.0)], "only what rises"
    high, low = lines(REPORT, "float32")
    assert (high.evaluations, low.evaluations) == (12, 9)
    assert (low.reached["forecast"], low.reached["hold"], low.reached["searched"]) == (27.0, None, None)
    assert (high.reached["DeepCache"], low.reached["DeepCache"]) == (24.0, 22.0)
    assert [high.reached[name] for name in (schedules.FEWER, schedules.ANY)] == [25.0, 28.0]
    curve = [(10.0, 20.0), (20.0, 30.0)]
    assert [between_db(curve, cost) for cost in (9.0, 12.5, 25.0)] == [None, 22.5, 30.0]
    assert wins([(2.0, 1.0), (1.0, 1.0), (None, 1.0), (3.0, 4.0)]) == (1, 3)


def test_the_plot_is_up_to_date(tmp_path):
    spec = importlib.util.spec_from_file_location("plot", record.ROOT / "tools" / "plot_pareto.py")
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    assert plot.main(["--check"]) == 0, "run python tools/plot_pareto.py"
    other = json.loads(json.dumps(REPORT))
    other["rows"][12]["converged_db"] += 0.01
    assert plot.digest(plot.shown_panels(other)) != plot.digest(plot.shown_panels(REPORT))


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
    rng = np.random.default_rng(0)
    few = rng.normal(size=(5, 20))  # than features
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, few + 1) == pytest.approx(20, rel=1e-6)
    for one, other in (((3, 4), (3, 5)), ((1, 4), (3, 4)), ((3,), (3,))):
        with pytest.raises(ValueError, match=r"must be \[N, F\] and \[M, F\]"):
            frechet_distance(np.zeros(one), np.zeros(other))
    linalg = pytest.importorskip("scipy.linalg")
    a, b = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(40, 6)) + 0.3
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
