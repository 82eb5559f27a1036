import pytest

from benchmarks import record

ROW = {"op": "unet_step", "problem": "p", "backend": "cpu", "metric": "time", "unit": "ms", "verified": True}


def test_rows_are_complete_and_appended(tmp_path):
    path = tmp_path / "results" / "device.csv"
    for value in (1.0, 2.5):
        record.append([{**ROW, **record.percentiles([value])}], path)
    rows = record.read(path)
    assert [row["p50"] for row in rows] == ["1", "2.5"]
    assert tuple(rows[0]) == record.COLUMNS == tuple(record.read(next(record.RESULTS.glob("*.csv")))[0])
    for column in ("device", "threads", "torch", "git_commit", "dirty", "utc", "repro"):
        assert rows[0][column] != "", column


def test_only_verified_rows_with_known_columns(tmp_path):
    with pytest.raises(ValueError, match="not verified"):
        record.append([{**ROW, "verified": False}], tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"unknown columns \['speed'\]"):
        record.append([{**ROW, "speed": 3}], tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()
