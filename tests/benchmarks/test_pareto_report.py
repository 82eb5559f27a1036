"""What the table and the plot of the study show, against small reports whose answers are plain."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.pareto_report import between_db, lines, panels, wins

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "schedules_pareto.png"


@pytest.fixture(scope="module")
def plot():
    spec = importlib.util.spec_from_file_location("plot_pareto", ROOT / "tools" / "plot_pareto.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(method, evaluations, db, sampler="DDIM", steps=20, network="float32", schedule=None):
    values = {"network": network, "sampler": sampler, "steps": steps, "method": method, "schedule": schedule}
    return {**values, "evaluations": evaluations, "time_s": 1.0, "own_db": 40.0, "converged_db": db}


REPORT = {
    "rows": [
        row("every call", 9, 25.0, steps=9),
        row("every call", 12, 24.0, steps=12),
        row("every call", 20, 31.0),
        row("every call", 50, 60.0, steps=50),
        row("every call", 8, 26.0, sampler="other", steps=8),
        row("every call", 10, 28.0, sampler="other", steps=10),
        row("every call", 12, 27.0, sampler="other", steps=12),
        row("forecast", 12, 29.0, schedule="a"),
        row("forecast", 12, 30.0, schedule="b"),
        row("forecast", 9, 27.0, schedule="c"),
        row("hold", 10, 26.5),
        row("DeepCache", 8.0, 20.0),
        row("DeepCache", 10.0, 24.0),
        row("searched", 12, 30.5),
        row("forecast", 9, 99.0, network="W8A8"),
        row("every call", 50, 10.0, sampler="noisy", steps=50),
        row("forecast", 27, 11.0, sampler="noisy", steps=50),
    ],
    "command": "python x",
    "model": "m",
    "images": 4,
    "notes": [],
}


def test_panels_hold_the_best_of_every_method_and_its_rivals():
    (panel,) = panels(REPORT, "float32")  # a sampler with one number of steps has no rival
    assert (panel.sampler, panel.steps, panel.every_call_db) == ("DDIM", 20, 31.0)
    assert panel.schedules["forecast"] == [(9, 27.0), (12, 30.0)]
    assert panel.fewer_steps == [(9, 25.0), (12, 24.0), (20, 31.0)]
    assert panel.any_sampler == [(8, 26.0), (10, 28.0), (20, 31.0)]


def test_lines_compare_at_equal_cost():
    high, low = lines(REPORT, "float32")
    assert (high.evaluations, low.evaluations) == (12, 9)
    assert high.schedules == {"forecast": 30.0, "hold": 26.5, "searched": 30.5}
    assert low.schedules == {"forecast": 27.0, "hold": None, "searched": None}
    assert (high.deepcache_db, low.deepcache_db) == (24.0, 22.0)
    assert (high.fewer_steps_db, low.fewer_steps_db) == (25.0, 25.0)
    assert (high.any_sampler_db, low.any_sampler_db) == (28.0, 26.0)


def test_between_points_and_wins():
    curve = [(10.0, 20.0), (20.0, 30.0)]
    assert [between_db(curve, cost) for cost in (9.0, 10.0, 12.5, 20.0, 25.0)] == [None, 20.0, 22.5, 30.0, 30.0]
    assert between_db([], 10.0) is None
    assert wins([(2.0, 1.0), (1.0, 1.0), (None, 1.0), (1.0, None), (3.0, 4.0)]) == (1, 3)


def test_the_plot_shows_the_rows(plot):
    shown = plot.shown_panels(REPORT)
    (panel,) = shown
    by_label = {label: points for label, _, points in plot.curves(panel)}
    assert by_label["forecast, searched"] == [(12, 30.5)]
    assert by_label["same sampler, fewer steps"] == panel.fewer_steps
    other = json.loads(json.dumps(REPORT))
    next(row for row in other["rows"] if row["method"] == "searched")["converged_db"] += 0.01
    assert plot.digest(plot.shown_panels(other)) != plot.digest(shown)


def test_the_plot_can_be_drawn(plot, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot is drawn by matplotlib, of the extra dev")
    shown = plot.shown_panels(REPORT)
    path = tmp_path / "plot.png"
    plot.draw(shown, path)
    assert plot.drawn_digest(path) == plot.digest(shown)
    with Image.open(path) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(picture.width * picture.height)}
    searched, deepcache, forecast = (0x2C, 0xA0, 0x2C), (0xD6, 0x27, 0x28), (0x1F, 0x77, 0xB4)
    assert {searched, deepcache, forecast} <= colours


def test_the_picture_of_the_documentation_is_up_to_date(plot, tmp_path):
    assert plot.main(["--check"]) == 0, "run python tools/plot_pareto.py"
    assert PICTURE.stat().st_size < 150_000
    assert plot.drawn_digest(tmp_path / "missing.png") is None
    assert plot.drawn_digest(ROOT / "docs" / "compare_grid.png") is None
