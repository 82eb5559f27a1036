"""The arithmetic of the GPU benchmark, by hand, and what it does without a GPU."""

import sys

import pytest
import torch

from benchmarks import bench_products, shapes
from benchmarks.shapes import Layer
from modiff_kernels.ops import dispatch

CONV = Layer("conv", 640, 320, 32, 32, 3, 1, 1)
DOWN = Layer("conv", 320, 320, 64, 64, 3, 2, 1)
LINEAR = Layer("linear", 1280, 10240, 256, 1, 1)
H200 = bench_products.peaks_of("NVIDIA H200")


def test_operations():
    assert bench_products.operations(CONV, 2) == 2 * 2 * 1024 * 320 * 640 * 9
    assert bench_products.operations(DOWN, 1) == 2 * 1024 * 320 * 320 * 9
    assert bench_products.operations(LINEAR, 8) == 2 * 8 * 256 * 10240 * 1280


def test_bytes():
    inputs, outputs, weights = 8 * 256 * 1280, 8 * 256 * 10240, 10240 * 1280
    moved = {form: bench_products.bytes_moved(form, LINEAR, 8, 4) for form in bench_products.FORMS}
    assert moved == {
        "bf16": 2 * (inputs + outputs + weights),
        "int_mm": inputs + weights + 4 * outputs,
        "quantized": inputs + weights / 2 + 2 * outputs,
        "accumulate": inputs + weights / 2 + 6 * outputs,
        "quantize_residual": 7 * inputs,
        "modulated": 8 * inputs + weights / 2 + 6 * outputs,
    }


def test_bounds_are_those_of_the_roofline():
    """A 640-channel 3x3 convolution at batch 8 is bound by the tensor cores, its quantisation by memory."""
    layer = Layer("conv", 640, 640, 32, 32, 3, 1, 1)
    assert bench_products.bound_us("bf16", layer, 8, 8, H200) == pytest.approx(61.07, abs=0.01)
    assert bench_products.bound_us("accumulate", layer, 8, 8, H200) == pytest.approx(30.52, abs=0.01)
    assert bench_products.bound_us("quantize_residual", layer, 8, 8, H200) == pytest.approx(7.65, abs=0.01)
    assert bench_products.bound_us("modulated", layer, 8, 8, H200) == pytest.approx(38.17, abs=0.01)


def test_weights_bound_the_deepest_level():
    layer = Layer("conv", 1280, 1280, 8, 8, 3, 1, 1)
    eight, four = (bench_products.bound_us("quantized", layer, 1, bits, H200) for bits in (8, 4))
    assert 1.9 < eight / four < 2.0


def test_peaks_of_unknown_devices_are_not_guessed():
    assert bench_products.peaks_of("NVIDIA H100 80GB HBM3").memory_tb == 3.35
    assert bench_products.peaks_of("NVIDIA GeForce RTX 4090") is None
    rows = bench_products.rows_of("accumulate", "cuda", CONV, 1, 8, [10.0, 20.0, 30.0], 80.0, "NVIDIA GeForce RTX 4090")
    assert [row["metric"] for row in rows] == ["time", "bandwidth", "rate"]


def test_rows():
    rows = bench_products.rows_of("accumulate", "cuda", CONV, 1, 8, [10.0, 20.0, 40.0], 80.0, "NVIDIA H200")
    found = {row["metric"]: row for row in rows}
    assert found["time"]["p50"] == 20.0
    assert found["rate"]["p50"] == pytest.approx(2 * 1024 * 320 * 640 * 9 / 20e-6 / 1e12)
    assert found["of_bound"]["p50"] == pytest.approx(100 * bench_products.bound_us("accumulate", CONV, 1, 8, H200) / 20)
    assert all(row["verified"] and row["device"] == "NVIDIA H200" for row in rows)
    assert found["time"]["problem"] == "conv3x3-640-320@32x32-s1-b1-w8"
    assert found["time"]["backend"] == "cuda"


def test_forms_of_torch_are_timed_once():
    both = list(bench_products.BACKENDS)
    assert {form: bench_products.backends_of(form, both) for form in bench_products.FORMS} == {
        "bf16": ["torch"],
        "int_mm": ["torch"],
        "quantized": both,
        "accumulate": both,
        "quantize_residual": both,
        "modulated": both,
    }


def test_int_mm_is_asked_only_where_torch_has_it():
    everything = list(bench_products.FORMS)
    assert bench_products.forms_of(LINEAR, 1, 8, everything) == everything
    for layer, batch, bits in ((CONV, 1, 8), (LINEAR, 1, 4), (Layer("linear", 64, 64, 16, 1, 1), 1, 8)):
        assert "int_mm" not in bench_products.forms_of(layer, batch, bits, everything)


@pytest.mark.parametrize("layer", [Layer("conv", 16, 24, 6, 6, 3, 2, 1), Layer("linear", 32, 24, 18, 1, 1)], ids=str)
def test_forms_are_verified(layer):
    """On the CPU, with the reference in the place of the kernels: every form passes, a wrong one does not."""
    device = torch.device("cpu")
    for form in bench_products.forms_of(layer, 2, 8, list(bench_products.FORMS)):
        cases = [bench_products.Case(layer, 2, 8, device, "reference") for _ in range(2)]
        assert bench_products.verified(form, *cases) >= 30
    case = bench_products.Case(layer, 2, 8, device, "reference")
    case.weight_scale[0] *= 2
    with pytest.raises(AssertionError, match="dB to the reference"):
        bench_products.verified("quantized", case, bench_products.Case(layer, 2, 8, device, "reference"))


def test_without_a_gpu_it_says_why(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", ["bench_products.py"])
    assert bench_products.main() == 2
    errors = capsys.readouterr().err
    for backend in bench_products.BACKENDS:
        assert f"{backend} is not timed here: {dispatch.why_unavailable(backend)}" in errors


def test_layer_tables_of_stable_diffusion():
    """Products of all convolutions of one UNet call, in GFLOP: 400.3 + 43.6 (SD 1.5) and 1556.0 + 67.1 (SDXL)."""
    pytest.importorskip("diffusers", reason="the layer tables are read off diffusers networks")
    for network, gflop in (("sd15", 443.9), ("sdxl", 1623.1)):
        table = shapes.layer_table(network)
        total = sum(n * bench_products.operations(layer, 1) for layer, n in table.items() if layer.kind == "conv")
        assert total / 1e9 == pytest.approx(gflop, abs=0.1)
