"""The arithmetic of the GPU benchmark, by hand; its order, budget and resumption; what it does without a GPU."""

import sys

import pytest
import torch

from benchmarks import bench_products, product_cases, record, shapes
from benchmarks.bench_products import Bench
from benchmarks.bounds import peaks_of
from benchmarks.budget import Budget
from benchmarks.product_cases import FORMS, OUR_FORMS, RIVAL_FORM, TORCH_FORMS, Case, Problem
from benchmarks.shapes import Layer
from modiff_kernels.ops import dispatch

CONV = Layer("conv", 640, 320, 32, 32, 3, 1, 1)
DOWN = Layer("conv", 320, 320, 64, 64, 3, 2, 1)
LINEAR = Layer("linear", 1280, 10240, 256, 1, 1)
H200 = peaks_of("NVIDIA H200")
CPU = torch.device("cpu")
SMALL = [Layer("conv", 16, 24, 6, 6, 3, 2, 1), Layer("linear", 32, 24, 18, 1, 1), Layer("conv", 16, 24, 5, 5, 1)]


def test_operations():
    assert product_cases.operations(CONV, 2) == 2 * 2 * 1024 * 320 * 640 * 9
    assert product_cases.operations(DOWN, 1) == 2 * 1024 * 320 * 320 * 9
    assert product_cases.operations(LINEAR, 8) == 2 * 8 * 256 * 10240 * 1280


def test_bytes():
    inputs, outputs, weights = 8 * 256 * 1280, 8 * 256 * 10240, 10240 * 1280
    moved = {form: product_cases.bytes_moved(form, LINEAR, 8, 4) for form in FORMS}
    assert moved == {
        "bf16": 2 * (inputs + outputs + weights),
        "fp16": 2 * (inputs + outputs + weights),
        "int_mm": inputs + weights + 4 * outputs,
        RIVAL_FORM: inputs + weights + 2 * outputs,
        "quantized": inputs + weights / 2 + 2 * outputs,
        "accumulate": inputs + weights / 2 + 6 * outputs,
        "quantize_residual": 7 * inputs,
        "modulated": 8 * inputs + weights / 2 + 6 * outputs,
    }


def test_bounds_are_those_of_the_roofline():
    """A 640-channel 3x3 convolution at batch 8 is bound by the tensor cores, its quantisation by memory."""
    layer = Layer("conv", 640, 640, 32, 32, 3, 1, 1)
    expected = {"bf16": 61.07, "accumulate": 30.52, RIVAL_FORM: 30.52, "quantize_residual": 7.65, "modulated": 38.17}
    for form, us in expected.items():
        assert product_cases.bound_us(form, layer, 8, 8, H200) == pytest.approx(us, abs=0.01)


def test_weights_bound_the_deepest_level():
    layer = Layer("conv", 1280, 1280, 8, 8, 3, 1, 1)
    eight, four = (product_cases.bound_us("quantized", layer, 1, bits, H200) for bits in (8, 4))
    assert 1.9 < eight / four < 2.0


def test_peaks_of_unknown_devices_are_not_guessed():
    assert peaks_of("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12
    assert peaks_of("NVIDIA GeForce RTX 4090") is None
    rows = bench_products.rows_of("accumulate", "cuda", CONV, 1, 8, [10.0, 20.0, 30.0], 80.0, "NVIDIA GeForce RTX 4090")
    assert [row["metric"] for row in rows] == ["time", "bandwidth", "rate"]


def test_rows():
    rows = bench_products.rows_of("accumulate", "cuda", CONV, 1, 8, [10.0, 20.0, 40.0], 80.0, "NVIDIA H200")
    found = {row["metric"]: row for row in rows}
    assert found["time"]["p50"] == 20.0
    assert found["rate"]["p50"] == pytest.approx(2 * 1024 * 320 * 640 * 9 / 20e-6 / 1e12)
    assert found["of_bound"]["p50"] == pytest.approx(100 * product_cases.bound_us("accumulate", CONV, 1, 8, H200) / 20)
    assert all(row["verified"] and row["device"] == "NVIDIA H200" for row in rows)
    assert found["time"]["problem"] == "conv3x3-640-320@32x32-s1-b1-w8"
    assert found["time"]["backend"] == "cuda"


def test_whom_a_form_is_timed_with():
    both = list(bench_products.BACKENDS)
    for form in FORMS:
        wanted = both if form in OUR_FORMS else ["torch"] if form in TORCH_FORMS else ["cutlass"]
        assert bench_products.backends_of(form, both, True) == wanted
    assert bench_products.backends_of(RIVAL_FORM, both, False) == []


def test_rivals_are_asked_only_what_they_have():
    everything = list(FORMS)
    assert product_cases.forms_of(LINEAR, 1, 8, everything) == everything
    assert product_cases.forms_of(Layer("conv", 64, 64, 8, 8, 1), 1, 8, everything) == everything, "1x1 is a matrix"
    assert "int_mm" not in product_cases.forms_of(CONV, 1, 8, everything)
    for layer, bits in ((CONV, 4), (LINEAR, 4)):
        assert {"int_mm", RIVAL_FORM}.isdisjoint(product_cases.forms_of(layer, 1, bits, everything))
    assert "int_mm" not in product_cases.forms_of(Layer("linear", 64, 64, 16, 1, 1), 1, 8, everything)
    assert RIVAL_FORM not in product_cases.forms_of(Layer("conv", 24, 64, 8, 8, 3, 1, 1), 1, 8, everything)


@pytest.mark.parametrize("layer", SMALL, ids=str)
def test_forms_are_verified(layer):
    """On the CPU, with the reference in the place of the kernels: every form passes, and leaves the state it should."""
    case = Case(layer, 3, 8, CPU)
    for form in (*TORCH_FORMS, *OUR_FORMS):
        if form in product_cases.forms_of(layer, 3, 8, FORMS):
            for _ in range(2):  # the state of the first call is that of the second
                call = lambda form=form: case.run(form, "reference")  # noqa: E731
                assert product_cases.Check(form, case).sqnr_db(call) >= 30


@pytest.mark.parametrize("sample", [0, 2])
def test_a_wrong_result_at_either_end_is_found(sample):
    case = Case(SMALL[0], 3, 8, CPU)

    def wrong(form, change):
        def call():
            out = case.run(form, "reference")
            change(out)
            return out

        return call

    def doubled(out):
        out[sample] *= 2

    with pytest.raises(AssertionError, match="dB to the reference"):
        product_cases.Check("quantized", case).sqnr_db(wrong("quantized", doubled))
    with pytest.raises(AssertionError, match="integers differ"):
        product_cases.Check("quantize_residual", case).sqnr_db(
            wrong("quantize_residual", lambda out: out[sample].sub_(1))
        )
    with pytest.raises(AssertionError, match="not all values are finite"):
        product_cases.Check("quantized", case).sqnr_db(wrong("quantized", lambda out: out[1].fill_(torch.nan)))
    with pytest.raises(AssertionError, match="y_hat is not that of the reference"):
        product_cases.Check("accumulate", case).sqnr_db(wrong("accumulate", lambda out: case.y_hat[sample].add_(1)))


class TestOrder:
    @pytest.fixture
    def networks(self, monkeypatch):
        """`a` is two small layers and a large one, `b` is almost all of the layer that both have."""
        both, large = Layer("linear", 64, 64, 256, 1, 1), Layer("linear", 512, 512, 4096, 1, 1)
        tables = {
            "a": {both: 2, large: 1, Layer("conv", 3, 64, 8, 8, 3, 1, 1): 1},
            "b": {both: 9, Layer("linear", 64, 16, 256, 1, 1): 1},
        }
        monkeypatch.setattr(product_cases, "layer_table", tables.__getitem__)
        product_cases.low_bit_layers.cache_clear()
        yield both, large
        product_cases.low_bit_layers.cache_clear()

    def test_the_largest_of_every_step_come_first(self, networks):
        both, large = networks
        problems = product_cases.problems_by_share(["a", "b"], [1], H200)
        assert {problem.layer for problem in problems[:2]} == {large, both}
        assert len(problems) == 3, "each once, without conv_in"
        alone = product_cases.problems_by_share(["b"], [1], H200)
        assert sum(problem.share for problem in alone) == pytest.approx(1)
        shares = {problem.layer: problem.share for problem in problems}
        assert shares[both] == pytest.approx(alone[0].share), "that of b, where it is larger"

    def test_a_step_of_many_layers_is_not_left_behind(self, monkeypatch):
        """Ten layers of about a tenth, three of about a third: a third of the step before the second of these."""
        many = {Layer("linear", 512, 512 + 16 * i, 4096, 1, 1): 1 for i in range(10)}
        few = {Layer("linear", 1024, 1024 + 16 * i, 4096, 1, 1): 1 for i in range(3)}
        monkeypatch.setattr(product_cases, "layer_table", {"many": many, "few": few}.__getitem__)
        product_cases.low_bit_layers.cache_clear()
        first = [problem.layer for problem in product_cases.problems_by_share(["few", "many"], [8], H200)[:6]]
        product_cases.low_bit_layers.cache_clear()
        assert len(set(first) & set(few)) == 2
        assert len(set(first) & set(many)) == 4

    def test_every_batch_is_a_problem(self, networks):
        problems = product_cases.problems_by_share(["b"], [1, 8], H200)
        assert {problem.batch for problem in problems[:2]} == {1, 8}


class TestRuns:
    """Whole runs on the CPU: the backend reference, a clock that is told what it measures."""

    PROBLEMS = (Problem(SMALL[1], 2, 0.5), Problem(SMALL[2], 1, 0.3))

    def bench(self, sink, done=(), forms=("bf16", "accumulate", "int_mm"), **changes):
        def timer(call):
            call()
            return [1.0, 2.0, 3.0]

        return Bench(list(forms), ["reference"], 8, CPU, "NVIDIA H200", timer, sink, set(done), **changes)

    def test_rows_are_handed_over_one_by_one(self):
        batches = []
        bench = self.bench(batches.append)
        assert bench.run(self.PROBLEMS, Budget(None)) == 0
        assert [(rows[0]["op"], rows[0]["backend"]) for rows in batches] == [
            ("bf16", "torch"), ("accumulate", "reference"), ("int_mm", "torch"),
        ] * 2  # fmt: skip
        assert (bench.timed, bench.failed) == (6, 0)

    def test_a_budget_leaves_the_tail(self):
        batches, now = [], [0.0]

        def sink(rows):
            batches.append(rows)
            now[0] += 10

        bench = self.bench(sink)
        assert bench.run(self.PROBLEMS, Budget(35, lambda: now[0])) == 2
        assert [rows[0]["problem"] for rows in batches] == ["linear-32-24@18-b2-w16"] + [
            "linear-32-24@18-b2-w8"] * 2 + ["conv1x1-16-24@5x5-s1-b1-w16"]  # fmt: skip

    def test_what_is_recorded_is_skipped(self, tmp_path):
        path = tmp_path / "gpu.csv"
        self.bench(lambda rows: record.append(rows, path)).run(self.PROBLEMS[:1], Budget(None))
        rows = record.read(path)
        commit = rows[0]["git_commit"]
        done = bench_products.recorded(rows, commit)
        batches = []
        bench = self.bench(batches.append, done)
        assert bench.run(self.PROBLEMS, Budget(None)) == 0
        assert {rows[0]["problem"].rpartition("-w")[0] for rows in batches} == {"conv1x1-16-24@5x5-s1-b1"}
        assert bench_products.recorded(rows, "another commit") == set()

    def test_the_kernel_of_a_rival_does_not_matter_for_skipping(self):
        row = {"op": RIVAL_FORM, "problem": "p", "backend": "cutlass-gemm_sm90-128", "metric": "time", "git_commit": ""}
        assert bench_products.recorded([row], "") == {(RIVAL_FORM, "p", "cutlass")}

    def test_failures_are_left_out_and_counted(self, monkeypatch, capsys):
        def broken(self, backend):
            raise RuntimeError("illegal instruction")

        def unsolved(self, backend):
            raise dispatch.BackendUnavailable("no kernel for this")

        monkeypatch.setattr(Case, "_bf16", broken)
        monkeypatch.setattr(Case, "_accumulate", unsolved)
        batches = []
        bench = self.bench(batches.append)
        assert bench.run(self.PROBLEMS[:1], Budget(None)) == 0
        assert [rows[0]["op"] for rows in batches] == ["int_mm"]
        assert bench.failed == 1
        errors = capsys.readouterr().err
        assert "FAILED bf16, torch, linear-32-24@18-b2-w16: illegal instruction" in errors
        assert "no kernel for this" in errors

    def test_the_fastest_kernel_of_the_rival_counts(self):
        class Found:
            def __len__(self):
                return 1

            def best(self, case, timer, quick):
                return "gemm-fast", timer(lambda: None), 60.0

        batches = []
        bench = self.bench(batches.append, forms=(RIVAL_FORM,), rival=Found())
        bench.run(self.PROBLEMS[:1], Budget(None))
        assert [rows[0]["backend"] for rows in batches] == ["cutlass-gemm-fast"]


def test_the_program_from_its_arguments_to_its_rows(monkeypatch, tmp_path, capsys):
    """On the CPU in the place of a GPU, torch's own forms alone."""
    path = tmp_path / "gpu.csv"
    monkeypatch.setattr(dispatch, "why_unavailable", lambda name: None)
    monkeypatch.setattr(bench_products, "current_gpu", lambda: (CPU, "NVIDIA H200"))
    monkeypatch.setattr(bench_products, "ColdTimer", lambda rounds: lambda call: [float(rounds)])
    monkeypatch.setattr(record, "results_file", lambda device: path)
    monkeypatch.setattr(
        bench_products, "problems_by_share", lambda *arguments: [*TestRuns.PROBLEMS, *TestRuns.PROBLEMS]
    )
    benchmark = torch.backends.cudnn.benchmark
    arguments = ["--network", "sd15", "sdxl", "--batch", "1", "--form", "bf16", "int_mm", "--most", "2", "--record"]
    assert bench_products.main([*arguments, "--budget", "0"]) == 3
    assert "0 measurements" in capsys.readouterr().out
    assert not path.exists()
    assert bench_products.main([*arguments, "--rounds", "9"]) == 0
    rows = record.read(path)
    assert {row["p50"] for row in rows if row["metric"] == "time"} == {"9"}
    assert len({row["problem"] for row in rows if row["op"] == "bf16"}) == 2
    assert bench_products.main([*arguments, "--skip-recorded"]) == 0
    assert "0 measurements" in capsys.readouterr().out
    assert record.read(path) == rows
    torch.backends.cudnn.benchmark = benchmark


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
        total = sum(n * product_cases.operations(layer, 1) for layer, n in table.items() if layer.kind == "conv")
        assert total / 1e9 == pytest.approx(gflop, abs=0.1)
