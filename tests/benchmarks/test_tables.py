"""The table maker: pivots of known rows, pages that are written and checked."""

import argparse

import pytest

from benchmarks import record, tables
from benchmarks.tables import Pivot, filled, ratio, spread, value


def write(folder, rows, device="a device"):
    path = folder / f"{record.file_stem(device)}.csv"
    for index, row in enumerate(rows):
        common = {"op": "x", "backend": "cpu", "metric": "time", "cache": "warm", "sqnr_db": 40.0, "verified": True}
        common |= {"utc": f"2026-01-01T00:00:{index:02}Z", "git_commit": "c0ffee", "dirty": False, "repro": "python x"}
        record.append([{**common, "device": device, **row, **record.percentiles(row.get("p50", [1.0]))}], path)


COLUMNS = {"us": value("a"), "20-80": spread("a"), "b/a": ratio(("b",), ("a",)), "none": value("c")}
TIMES = Pivot("x", "{0}-(.+)", "layer", COLUMNS, ("backend",), needed=("a",))


def test_a_pivot_shows_the_newest_row_of_each_cell(tmp_path):
    write(
        tmp_path,
        [
            {"problem": "net-l1", "backend": "a", "p50": [9.0]},
            {"problem": "net-l1", "backend": "b", "p50": [6.0]},
            {"problem": "net-l1", "backend": "a", "p50": [1.0, 2.0, 4.0]},
            {"problem": "net-l2", "backend": "b"},
            {"problem": "other-l1", "backend": "a"},
            {"op": "y", "problem": "net-l3", "backend": "a"},
        ],
    )
    found = TIMES(tmp_path, "net")
    assert "| layer | us | 20-80 | b/a |\n" in found, "a column with nothing in it is left out"
    assert found.count("\n|") == 2, "a line without what is needed is left out"
    assert "| l1 | 2.00 | 1.40-3.20 | 3.00x |" in found
    assert "`python x`: a device; torch" in found
    assert TIMES(tmp_path, "unknown") is None


def test_the_device_that_was_measured_last_counts_or_all(tmp_path):
    write(tmp_path, [{"problem": "net-l1", "backend": "a", "p50": [7.0]}] * 2, "new")
    write(tmp_path, [{"problem": "net-l1", "backend": "a", "p50": [5.0]}], "old")
    assert "7.00" in TIMES(tmp_path, "net")
    assert "5.00" not in TIMES(tmp_path, "net")
    every = Pivot("x", "{0}-(.+)", "layer", COLUMNS, ("backend",), every=True)(tmp_path, "net")
    assert every.index("**new**") < every.index("7.00") < every.index("**old**") < every.index("5.00")


def test_a_page_is_written_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tables.MAKERS, "times", TIMES)
    write(tmp_path, [{"problem": "net-l1", "backend": "a"}])
    (tmp_path / "page.md").write_text("before\n\n<!-- table: times net -->\n\nold\n\n<!-- end -->\n\nafter\n")

    def run(check):
        args = argparse.Namespace(check=check, results=tmp_path)
        return tables.main(args, tmp_path, ["page.md"])

    assert run(check=True) == 1
    assert "page.md: tables are out of date" in capsys.readouterr().err
    assert (run(check=False), run(check=True)) == (0, 0)
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("before\n\n<!-- table: times net -->\n\n| layer |")
    assert text.endswith("<!-- end -->\n\nafter\n")
    assert filled(text, tmp_path) == text
    (tmp_path / "page.md").write_text("<!-- table: times nothing -->\n<!-- end -->\n")
    assert run(check=False) == 1
    assert "has no rows" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is unknown; allowed: steps, runs"):
        filled("<!-- table: nonsense -->\n<!-- end -->", tmp_path)


def test_the_tables_of_the_documents_are_up_to_date_and_none_is_empty():
    assert tables.main(argparse.Namespace(check=True, results=record.RESULTS)) == 0
