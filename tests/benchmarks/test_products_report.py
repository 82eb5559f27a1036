"""The tables of performance.md out of made-up rows: which measurement counts, what is shown, in which order."""

import pytest

from benchmarks import product_cases, products_report, record
from benchmarks.bench_products import rows_of
from benchmarks.product_cases import RIVAL_FORM, Problem
from benchmarks.shapes import Layer
from benchmarks.tile_tuning import OP, OVER_BEST
from tools import readme_tables

LARGE, SMALL = Layer("conv", 640, 640, 32, 32, 3, 1, 1), Layer("linear", 320, 320, 64, 1, 1)
DEVICE = "NVIDIA H200"


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    """Every network is one large layer, which is almost all of it, and a small one."""
    monkeypatch.setattr(product_cases, "layer_table", lambda network: {LARGE: 4, SMALL: 1})
    product_cases.low_bit_layers.cache_clear()
    yield
    product_cases.low_bit_layers.cache_clear()


@pytest.fixture
def measure(tmp_path):
    """Append the rows of a form: the median of its time."""

    def append(form, backend, us, layer=LARGE, batch=8):
        rows = rows_of(form, backend, layer, batch, 8, [us], 60.0, DEVICE)
        record.append(rows, tmp_path / "nvidia-h200.csv")

    return append


def table(results, name):
    return readme_tables.filled(f"<!-- table: {name} -->\n<!-- end -->", results)


def lines(text):
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:2] == "| "]


def test_without_rows_there_is_nothing(tmp_path):
    for name in ("products sd15", "worst_products 5", "tiles 5"):
        assert "*No results recorded yet.*" in table(tmp_path, name)
    record.append([{"op": "unet_step", "verified": True}], tmp_path / "cpu.csv")
    assert "*No results recorded yet.*" in table(tmp_path, "products sd15")


def test_a_row_per_layer_with_its_rivals(tmp_path, measure):
    measure("accumulate", "cuda", 99.0)
    for form, backend, us in (
        ("bf16", "torch", 80.0), ("fp16", "torch", 78.0), ("accumulate", "cuda", 40.0), ("accumulate", "triton", 50.0),
        ("modulated", "triton", 65.0), ("modulated", "cuda", 52.0), (RIVAL_FORM, "cutlass-a", 70.0),
        (RIVAL_FORM, "cutlass-b", 45.0),
    ):  # fmt: skip
        measure(form, backend, us)
    text = table(tmp_path, "products sd15")
    header, _, row = lines(text)
    assert len(header) == len(row)
    problem = Problem(LARGE, 8, 0.0)
    share = product_cases.problems_by_share(["sd15"], [8], products_report.PEAKS["H200"])[0].share
    tops = product_cases.operations(LARGE, 8) / 40e-6 / 1e12
    rate = product_cases.bytes_moved("accumulate", LARGE, 8, 8) / 40e-6 / 1e9
    bound = product_cases.bound_us("accumulate", LARGE, 8, 8, products_report.PEAKS["H200"])
    assert row[:5] == [f"{problem.layer}, 8", f"{100 * share:.0f} %", "78.0", "45.0", "-"], "the faster of 16 bits"
    assert row[5:9] == ["40.0", f"{tops:.0f}", f"{rate:.0f}", f"{100 * bound / 40:.0f} %"], "the newest row counts"
    assert row[9] == "50.0"
    assert row[13:] == ["52.0", "1.95x", "1.50x"], "16 bits over the faster of both backends"
    assert "NVIDIA H200; torch" in text


def test_layers_that_hardly_matter_are_left_out(tmp_path, measure):
    for batch in (8, 1):
        measure("accumulate", "cuda", 40.0, LARGE, batch)
        measure("accumulate", "cuda", 4.0, SMALL, batch)
    rows = lines(table(tmp_path, "products sd15"))[2:]
    assert [row[0] for row in rows] == [f"{LARGE}, 1", f"{LARGE}, 8"]


def test_the_worst_are_those_furthest_from_their_bound(tmp_path, measure):
    for form, backend, us, layer, batch in (
        ("accumulate", "cuda", 60.0, LARGE, 8), ("accumulate", "triton", 300.0, LARGE, 8),
        ("accumulate", "triton", 700.0, LARGE, 16), ("accumulate", "triton", 99.0, LARGE, 1),
        ("quantize_residual", "cuda", 100.0, LARGE, 8),
        ("accumulate", "cuda", 1000.0, SMALL, 8), ("bf16", "torch", 5000.0, LARGE, 8),
    ):  # fmt: skip
        measure(form, backend, us, layer, batch)
    rows = lines(table(tmp_path, "worst_products 2"))[2:]
    assert [row[:2] for row in rows] == [
        ["quantize_residual, cuda", f"{LARGE}, 8"], ["accumulate, triton", f"{LARGE}, 16"],
    ]  # fmt: skip
    assert len(lines(table(tmp_path, "worst_products 9"))) == 2 + 3, "once per op, backend and layer"


def test_tiles_with_their_neighbours(tmp_path):
    def run(problem, times, gained):
        common = {"op": OP, "problem": problem, "verified": True, "device": DEVICE}
        rows = [
            {**common, "backend": f"cuda-{tile}", "metric": "time", "unit": "us", "p50": us}
            for tile, us in times.items()
        ]
        best = min(times, key=times.get)
        rows.append({**common, "backend": f"cuda-{best}", "metric": OVER_BEST, "unit": "x", "p50": gained})
        record.append(rows, tmp_path / "nvidia-h200.csv")

    run("a", {"sm90-256x160-k1": 9.0}, 9.0)
    run("a", {"sm90-256x160-k1": 4.0, "sm90-256x160-k2": 5.0, "sm80-128x128-k1": 6.0}, 1.25)
    run("b", {"sm90-128x64-k4": 2.0}, 1.5)
    rows = lines(table(tmp_path, "tiles 5"))[2:]
    assert rows == [
        ["cuda, b", "sm90-128x64-k4", "2.0", "-", "-", "-", "-", "1.50x"],
        ["cuda, a", "sm90-256x160-k1", "4.0", "sm90-256x160-k2", "5.0", "sm80-128x128-k1", "6.0", "1.25x"],
    ]
