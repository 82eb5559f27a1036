import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tmp_path):
    row = {
        "name": "modulated W8A4", "mode": "modulated", "psnr_db": 45.04, "ssim": 0.99, "s_per_image": 0.01,
        "speedup": 2.5, "state_bytes": 3_000_000, "average_bits": 4.56, "backend": "cpu", "is_reference": False,
    }  # fmt: skip
    report = {"rows": [row], "command": "modiff compare", "notes": ["Times: medians.", "Warm-up took 3 s."]}
    (tmp_path / "compare.json").write_text(json.dumps(report))
    common = {
        "op": "unet_step",
        "backend": "cpu",
        "verified": True,
        "sqnr_db": 40.0,
        "problem": "net-b8-modulated-w8a8",
    }
    for value in (30.0, 20.0):
        rows = [
            {**common, "metric": "update_time", "unit": "ms", **record.percentiles([value])},
            {**common, "metric": "speedup_vs_best_eager", "unit": "x", **record.percentiles([60 / value])},
        ]
        record.append(rows, tmp_path / "device.csv")
    return tmp_path


def test_readme_is_up_to_date(tool):
    assert tool.main(["--check"]) == 0, "run python tools/readme_tables.py"


def test_tables_come_from_results(tool, results):
    text = "a\n<!-- table: compare -->\nold\n<!-- end -->\nb\n<!-- table: unet_step net -->\n<!-- end -->\nc\n"
    new = tool.filled(text, results)
    assert "| modulated W8A4 | 45.0 | 0.9900 | 0.0100 | 2.50x | 3.0 | 4.6 | cpu |" in new
    assert "Times: medians." in new
    assert "Warm-up" not in new
    assert "| modulated W8A8 | 20.0 | 20.0-20.0 | 3.00x | - | - | 40.0 | - |" in new, "the newest row counts"
    assert "old" not in new
    assert tool.filled(new, results) == new


def test_the_study_shows_the_best_of_every_method_beside_its_rival(tool, tmp_path):
    common = {"network": "float32", "sampler": "S", "steps": 20, "time_s": 1.0, "own_db": 40.0}
    rows = [
        {**common, "method": "every call", "schedule": None, "evaluations": 20, "converged_db": 35.0, "own_db": None},
        {**common, "method": "every call", "schedule": None, "evaluations": 10, "converged_db": 30.0, "steps": 10},
        {**common, "method": "every call", "schedule": None, "evaluations": 9, "converged_db": 31.0, "sampler": "T"},
        {**common, "method": "hold", "schedule": "hold every=2", "evaluations": 12, "converged_db": 31.0},
        {**common, "method": "hold", "schedule": "hold every=9", "evaluations": 11, "converged_db": 32.25},
        {**common, "method": "hold", "schedule": "hold every=8", "evaluations": 21, "converged_db": 36.0},
        {**common, "method": "auto", "schedule": "auto", "evaluations": 9, "converged_db": 99.0, "network": "W8A8"},
    ]
    report = {"rows": rows, "command": "python x", "model": "m", "images": 4, "notes": []}
    (tmp_path / "pareto.json").write_text(json.dumps(report))
    new = tool.pareto_table(tmp_path, "float32")
    assert "| S, 20 | hold every=9 | 11.0 | 1.00 | 40.0 | 32.2 | 30.0 | 31.0 |" in new
    assert new.count("\n| S") == 1
    assert "`python x`: m, 4 images." in new


def test_unknown_tables_and_missing_results(tool, results, tmp_path):
    with pytest.raises(ValueError, match="allowed: compare, unet_step"):
        tool.filled("<!-- table: other -->\n<!-- end -->", results)
    for name, folder in (("unet_step other", results), ("compare", tmp_path / "empty")):
        assert "*No results recorded yet.*" in tool.filled(f"<!-- table: {name} -->\n<!-- end -->", folder)
