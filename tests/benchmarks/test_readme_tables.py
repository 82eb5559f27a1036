import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import record, step_profile

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
    text = "a\n<!-- table: compare -->\nold\n<!-- end -->\nb\n<!-- table: unet_step net 8 -->\n<!-- end -->\nc\n"
    new = tool.filled(text, results)
    assert "| modulated W8A4 | 45.0 | 0.9900 | 0.0100 | 2.50x | 3.0 | 4.6 | cpu |" in new
    assert "Times: medians." in new
    assert "Warm-up" not in new
    assert "| modulated W8A8 | 20.0 | 20.0-20.0 | 3.00x | - | - | 40.0 | - |" in new, "the newest row counts"
    assert "old" not in new
    assert tool.filled(new, results) == new


def test_calibrations_by_sampler_and_what_papers_claim(tool, tmp_path):
    common = {"ssim": 0.5, "frechet": 0.25, "calibration_cpu_s": 9.6, "peak_mib": 100.4, "features": "pool4"}

    def row(method, bits, way, psnr_db, sampler="DDIM-20"):
        return {**common, "sampler": sampler, "method": method, "bits": bits, "way": way, "psnr_db": psnr_db}

    rows = [
        row("qdiffusion", "W4", "float", 43.0),
        row("qdiffusion", "W4A4", "plain", 25.0),
        row("qdiffusion", "W4A4", "modulated", 42.0),
        row("qdiffusion", "W4A8", "plain", 41.0),  # without the other two it is not shown
        row("accuquant", "W4A8", "plain", 44.0),
        row("qdiffusion", "W4A4", "plain", 1.0, sampler="DDIM-100"),
    ]
    commands = ["python x --samplers DDIM-20 --y", "python x --samplers DDIM-100"]
    report = {"rows": rows, "commands": commands, "images": 4, "samples": 8, "torch": "2"}
    (tmp_path / "calibration.json").write_text(json.dumps(report))
    new = tool.calibration_table(tmp_path, "DDIM-20")
    assert [line for line in new.splitlines() if line.startswith("| W")] == [
        "| W4A4, qdiffusion | 43.0 | 25.0 | 42.0 | 0.500 | 0.500 | 0.25 | 0.25 | 10 | 100 |"
    ]
    assert new.endswith("torch 2. `python x --samplers DDIM-20 --y`\n")
    claims = tool.paper_claims_table(tmp_path, "DDIM-20", "DDIM-100")
    assert "| W4A8 qdiffusion, accuquant, plain | 41.0, 44.0 | - |" in claims
    assert "| W4A4 qdiffusion, plain and modulated | 25.0, 42.0 | - |" in claims


def test_the_profile_adds_up(tool, tmp_path):
    rows = [
        {
            "op": "unet_step_profile", "backend": "cpu", "verified": True, "problem": f"net-b8-{key}", "unit": "ms",
            "metric": kind, **record.percentiles([value]),
        }
        for key, value in (("float-channels_last", 3.0), ("modulated-w8a8", 0.5))
        for kind in step_profile.PARTS
    ]  # fmt: skip
    record.append(rows, tmp_path / "device.csv")
    new = tool.unet_step_profile_table(tmp_path, "net", "8")
    assert "| ms of a call | float32 eager channels_last | modulated W8A8 |" in new
    assert "| integer products | 3.00 | 0.50 |" in new
    assert "| sum | 24.00 | 4.00 |" in new


def test_the_study_shows_every_method_at_one_cost(tool, tmp_path):
    common = {"network": "W8A8", "sampler": "S", "steps": 20, "time_s": 1.0, "own_db": 40.0, "schedule": None}

    def row(method, evaluations, converged_db, **more):
        return {**common, "method": method, "evaluations": evaluations, "converged_db": converged_db, **more}

    rows = [
        row("every call", 20, 35.0),
        row("every call", 10, 30.0, steps=10),
        row("every call", 9, 31.0, steps=9, sampler="T"),
        row("forecast", 12, 31.0),
        row("hold", 11, 32.25),
        row("searched", 12, 33.04),
    ]
    report = {"rows": rows, "command": "python x", "model": "m", "images": 4, "notes": ["A note."]}
    path = tmp_path / "pareto.json"
    path.write_text(json.dumps(report))
    new = tool.pareto_table(tmp_path, "W8A8")
    assert "DeepCache" not in new, "it has no row"
    assert "| S, 20 | 12 | 32.2 | 31.0 | **33.0** | 30.0 | 31.0 | 35.0 |" in new
    assert "`python x`: m, W8A8, 4 images." in new
    assert "hold in 1 of 1, the uniform forecasts in 1 of 1" in new
    assert new.endswith("A note.\n")
    path.write_text(json.dumps({**report, "rows": [*rows, row("DeepCache", 12, 34.0)]}))
    new = tool.pareto_table(tmp_path, "W8A8")
    assert "| S, 20 | 12 | 32.2 | **34.0** | 31.0 | 33.0 | 30.0 | 31.0 | 35.0 |" in new
    assert "hold in 1 of 1, DeepCache in 0 of 1" in new


def test_unknown_tables_and_missing_results(tool, results, tmp_path):
    with pytest.raises(ValueError, match="allowed: compare, unet_step"):
        tool.filled("<!-- table: other -->\n<!-- end -->", results)
    for name, folder in (
        ("unet_step net 1", results),
        ("unet_step_profile net 8", results),
        ("compare", tmp_path / "empty"),
    ):
        assert "*No results recorded yet.*" in tool.filled(f"<!-- table: {name} -->\n<!-- end -->", folder)


def test_passes_show_the_faster_way_of_inductor(tool, tmp_path):
    rows = []

    def add(op, problem, backend, cache, value, metric="time"):
        row = {"op": op, "problem": problem, "backend": backend, "cache": cache, "metric": metric, "verified": True}
        rows.append({**row, **record.percentiles([value])})

    for cache, scale in (("warm", 1.0), ("cold", 2.0)):
        times = {"cpu": 10.0, "inductor-obvious": 30.0, "inductor-tuned": 12.0, "torch.compile": 25.0, "torch": 50.0}
        for backend, value in times.items():
            add("fused_pass", "net-geglu-8@4-b1-residual-a8", backend, cache, scale * value)
        add("fused_pass", "net-geglu-8@4-b1-residual-a8", "inductor-tuned", cache, 1.2 * scale, "over_ours")
        add("fused_pass", "net-geglu-8@4-b1-residual-a8", "cpu", cache, 40.0, "of_bound")
        times = {"cpu": 20.0, "graph-obvious": 21.0, "graph-tuned": 22.0, "graph-ours": 30.0, "graph-three": 40.0}
        for backend, value in times.items():
            add("fused_piece", "net-group_norm-8@4+qkv-b1-residual-a8", backend, cache, scale * value)
            if backend != "cpu":
                add("fused_piece", "net-group_norm-8@4+qkv-b1-residual-a8", backend, cache, value / 20, "over_ours")
    record.append(rows, tmp_path / "device.csv")
    line = "| geglu-8@4-b1-residual-a8 | 20 | 40 % | 24 | 2.40 (2.40-2.40) | 1.20 (1.20-1.20) | 2.50 | 5.00 |"
    assert line in tool.passes_table(tmp_path, "net")
    ratios = "1.05 (1.05-1.05) | 1.05 (1.05-1.05) | - | 1.50 (1.50-1.50) | 2.00 (2.00-2.00)"
    assert f"| net-group_norm-8@4+qkv-b1-residual-a8 | 40 | {ratios} |" in tool.pieces_table(tmp_path)
    assert "*No results" in tool.passes_table(tmp_path, "other")
