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


def test_unknown_tables_and_missing_results(tool, results, tmp_path):
    with pytest.raises(ValueError, match="allowed: compare, unet_step"):
        tool.filled("<!-- table: other -->\n<!-- end -->", results)
    for name, folder in (("unet_step other", results), ("compare", tmp_path / "empty")):
        assert "*No results recorded yet.*" in tool.filled(f"<!-- table: {name} -->\n<!-- end -->", folder)
