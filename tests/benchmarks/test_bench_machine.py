"""Ceilings of a machine: amounts, checks and rows, at small sizes on the CPU."""

import pytest
import torch

from benchmarks import bench_machine, record

CPU = torch.device("cpu")


def test_rows_count_operations_and_bytes(monkeypatch):
    monkeypatch.setattr(bench_machine, "time_s", lambda call, device: (call(), [1e-3, 1e-3])[1])
    found = [
        bench_machine.copied(CPU, 10_000),
        bench_machine.multiplied(CPU, 128, torch.float32),
        bench_machine.multiplied(CPU, 128, torch.int8),
        bench_machine.convolved(CPU, (2, 80, 8), torch.float32),
    ]
    rows = [measured.row("a device", "perf_counter") for measured in found]
    assert [row["unit"] for row in rows] == ["GB/s", "TOPS", "TOPS", "TOPS"]
    amounts = (20_000 * 1e-6, 2 * 128**3 * 1e-9, 2 * 128**3 * 1e-9, 2 * 9 * 80 * 80 * 2 * 8 * 8 * 1e-9)
    assert [row["p50"] for row in rows] == pytest.approx(amounts)
    assert all(set(row) <= set(record.COLUMNS) and row["verified"] for row in rows)


def test_wrong_products_are_refused():
    expected = torch.randn(8, 8, dtype=torch.float64)
    assert bench_machine.checked(expected.float(), expected, "p") > 100
    with pytest.raises(RuntimeError, match=r"p: 40\.0 dB to float64, at least 60 expected"):
        bench_machine.checked(1.01 * expected.float(), expected, "p")
    with pytest.raises(RuntimeError, match="integers differ"):
        bench_machine.checked(torch.ones(2, 2, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.float64), "p")
    with pytest.raises(RuntimeError, match="nan dB"):
        bench_machine.checked(torch.full((8, 8), torch.nan), expected, "p")
