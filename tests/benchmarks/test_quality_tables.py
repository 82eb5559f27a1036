import json

import pytest

from benchmarks.record import RESULTS
from tools import quality_tables, readme_tables

REFERENCE = {
    "images": 4,
    "psnr_between_db": 60.0,
    "psnr_db": 50.0,
    "reference_psnr_db": 50.5,
    "ops": 10,
    "codes": 3_000_000,
    "differing": 4,
    "exact_codes": 1_000_000,
    "exact_differing": 1,
    "sqnr_db": 120.0,
    "worst_op": "accumulate_linear",
}


def row(bits, way, scheduled=False, sampler="DDIM-100", **more):
    return {
        "sampler": sampler,
        "bits": bits,
        "way": way,
        "scheduled": scheduled,
        "calls": 100,
        "calls_computed": 36 if scheduled else 100,
        "frechet_test": 3.25,
        "backend": "cpu",
        "state_bytes": 0,
        **more,
    }


def judged(bits, way, scheduled=False, psnr_db=40.0, **more):
    scores = {"psnr_db": psnr_db, "psnr_p5_db": 35.0, "ssim": 0.99, "frechet_full": 0.0123, "average_bits": 4.8}
    return row(bits, way, scheduled, state_bytes_per_image=2_670_592, **scores, **more)


@pytest.fixture
def results(tmp_path):
    """A folder with a report, its rows in another order than that of the table."""
    report = {
        "model": "some_model",
        "parameters": 1_845_283,
        "images": 512,
        "batch": 64,
        "dtype": "float32",
        "device": "a CPU",
        "features": "a network",
        "codes": "distill, DDIM-50, 64 trajectories",
        "commands": ["python benchmarks/quality.py --data DATA"],
        "environments": [{"torch": "2.13.0", "git_commit": "abc", "utc": "2026-01-02T03:04:05Z"}],
        "yardsticks": {"train_to_test": 0.5, "test_to_test": 0.9, "test_to_test_images": 512, "test_images": 10000},
        "rows": [
            judged("W4A4", "modulated", psnr_db=36.0),
            judged("W8A4", "plain", psnr_db=20.0, reference=REFERENCE),
            judged("W8A4", "modulated", reference=REFERENCE),
            judged("W8A4", "modulated", True, schedule="auto: every third", reference={**REFERENCE, "sqnr_db": None}),
            row("", "float"),
            judged("W8", "weights"),
            judged("W8A8", "plain", sampler="DDIM-50"),
        ],
    }
    (tmp_path / "q.json").write_text(json.dumps(report))
    return tmp_path


def lines(table):
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]


def test_rows_of_a_sampler(results):
    table = quality_tables.quality_table(results, "q", "DDIM-100")
    header, _, *rows = lines(table)
    assert [cells[0] for cells in rows] == [
        "full precision",
        "W8 float activations",
        "plain W8A4",
        "modulated W8A4",
        "modulated W8A4 scheduled",
        "modulated W4A4",
    ]
    assert dict(zip(header, rows[0]))["PSNR dB"] == "reference"
    shown = dict(zip(header, rows[4]))
    assert shown["calls computed"] == "36 of 100"
    assert shown["state kB/image"] == "2671"
    assert shown["Fréchet to full precision"] == "0.012"
    assert "Scheduled: auto: every third." in table
    assert "512 training images are 0.500 from the 10000 test images" in table
    assert "images/s" not in table
    assert quality_tables.quality_table(results, "q", "DPM-Solver++-20") == quality_tables.NOTHING
    assert quality_tables.quality_table(results, "none", "DDIM-50") == quality_tables.NOTHING


def test_agreement_is_summed_over_samplers_and_schedules(results):
    _, _, *rows = lines(quality_tables.quality_reference_table(results, "q"))
    assert [cells[:6] for cells in rows] == [
        ["plain W8A4", "1", "10", "3.0 M", "1 of 1.0 M", "1.5 ppm"],
        ["modulated W8A4", "2", "20", "6.0 M", "2 of 2.0 M", "1.5 ppm"],
    ]
    assert rows[1][6:] == ["120", "50.0", "50.5", "60.0"]


def test_papers_stand_beside_dense_rows(results):
    _, _, *rows = lines(quality_tables.quality_papers_table(results, "q"))
    by_bits = {cells[0]: cells[1:] for cells in rows}
    assert by_bits["full precision"][-2:] == ["3.25", "0"]
    assert by_bits["W8A4"] == [
        "306.06, 28.19",
        "24.09, 4.31",
        "332.75, 13.41",
        "311.5, 35.3",
        "3.25, 3.25",
        "0.012, 0.012",
    ]
    assert by_bits["W4A4"][-2:] == ["-, 3.25", "-, 0.012"]
    with pytest.raises(ValueError, match="sampler 'DDIM-7' is unknown; allowed: DDIM-50"):
        quality_tables.quality_papers_table(results, "q", "DDIM-7")


def test_pages_know_the_tables():
    text = "<!-- table: quality none DDIM-50 -->\n<!-- end -->\n<!-- table: quality_reference none -->\n<!-- end -->\n"
    text += "<!-- table: quality_papers none DDIM-50 -->\n<!-- end -->\n"
    assert readme_tables.filled(text, RESULTS).count(quality_tables.NOTHING) == 3
