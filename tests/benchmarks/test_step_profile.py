import contextlib
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import bench_unet_step, record, step_profile


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("modiff_cpu::quantize", "codes"),
        ("modiff_cpu::convolve", "integer products"),
        ("modiff_cpu::attention", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mkldnn_convolution", "float layers"),
        ("aten::addmm", "float layers"),
        ("aten::native_group_norm", "norms and activations"),
        ("aten::add", "additions and copies"),
        ("aten::as_strided", step_profile.OTHER),
        ("modiff::quantize_residual", "codes"),
        ("modiff::accumulate_conv2d", "integer products"),
        ("product_kernel", "integer products"),
        ("void modiff::kernel<modiff::cuda::TilePass<(modiff::Prologue)0, modiff::Half, modiff::Half> >(...)", "codes"),
        ("void modiff::kernel<modiff::cuda::Coefficients>(modiff::cuda::Coefficients::Args)", "codes"),
        ("void modiff::cuda::sm90::product_kernel<modiff::cuda::sm90::Product<8, 2, 160> >(...)", "integer products"),
        ("void modiff::cuda::sm80::tensor_kernel<modiff::cuda::sm80::Product<...> >(...)", "integer products"),
        ("void pytorch_flash::flash_fwd_kernel<...>(...)", "attention"),
        ("nvjet_tst_128x64_64x8_2x1_v_bz_TNT", "float layers"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "float layers"),
    ],
)
def test_kinds(op, kind):
    assert step_profile.kind_of(op) == kind


def test_parts_are_those_of_later_calls_and_add_up():
    x = torch.randn(256, 256)

    def first():
        torch.nn.functional.silu(x)
        return 1.0

    def later():
        started = time.perf_counter()
        x @ x
        time.sleep(0.002)
        return time.perf_counter() - started

    parts = step_profile.parts(contextlib.nullcontext, [first, later, later], torch.device("cpu"))
    assert tuple(parts) == step_profile.PARTS
    assert parts["norms and activations"] == 0, "of the first call"
    assert parts["float layers"] > 0
    assert parts[step_profile.REST] > 1.5, "it sleeps 2 ms"


def test_on_a_gpu_kernels_count_and_the_ops_that_launch_them_do_not(monkeypatch):
    times = {("quantize_kernel", DeviceType.CUDA): 3e3, ("modiff::quantize_residual", DeviceType.CPU): 3e3}
    events = [
        SimpleNamespace(key=key, device_type=kind, self_device_time_total=us, self_cpu_time_total=9e9)
        for (key, kind), us in times.items()
    ]
    trace = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(step_profile, "profile", lambda activities: contextlib.nullcontext(trace))
    monkeypatch.setattr(step_profile, "REPEATS", 1)
    parts = step_profile.parts(contextlib.nullcontext, [lambda: 0.01] * 2, torch.device("cuda"))
    assert parts["codes"] == 3
    assert parts[step_profile.REST] == pytest.approx(7)


def test_profile_of_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_profile, "REPEATS", 1)
    monkeypatch.setattr(record, "results_file", lambda: tmp_path / "device.csv")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    threads = torch.get_num_threads()
    options = "--network cifar10_small16 --batch 1 --calls 4 --threads 1 --rows float-channels_last,modulated-w8a8"
    try:
        assert bench_unet_step.main([*options.split(), "--no-compile", "--quiet", "--profile", "--record"]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = {(row["problem"], row["metric"]): float(row["p50"]) for row in record.read(tmp_path / "device.csv")}
    assert len(rows) == 2 * len(step_profile.PARTS)
    quantised, plain = "cifar10_small16-b1-modulated-w8a8", "cifar10_small16-b1-float-channels_last"
    assert rows[quantised, "codes"] > 0
    assert rows[quantised, "integer products"] > 0
    assert rows[plain, "codes"] == rows[plain, "integer products"] == 0
    assert rows[plain, "float layers"] > rows[quantised, "float layers"]
    assert "ms of a call" in capsys.readouterr().out
