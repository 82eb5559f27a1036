import contextlib
import time
import types

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
        ("void modiff::cuda::stream_kernel<modiff::cuda::TilePass<float, 8> >(Args)", "codes"),
        ("void modiff::cuda::sm90::product_kernel<modiff::cuda::sm90::Product<128> >(Args)", "integer products"),
        ("triton_red_fused_native_group_norm_silu_4", "norms and activations"),
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

    parts = step_profile.profiled(contextlib.nullcontext, [first, later, later], torch.device("cpu")).parts()
    assert tuple(parts) == step_profile.PARTS
    assert parts["norms and activations"] == 0, "of the first call"
    assert parts["float layers"] > 0
    assert parts[step_profile.REST] > 1.5, "it sleeps 2 ms"


def test_others_are_named_from_two_percent_on():
    names = {"modiff_cpu::convolve": 60.0, "product_kernel": 5.0, "aten::cat": 2.0, "aten::add": 1.9, "x" * 200: 3.0}
    others = step_profile.StepProfile(100.0, names).others()
    assert others == {"x" * step_profile.NAME_LENGTH: 3.0, "aten::cat": 2.0}
    assert list(others) == ["x" * step_profile.NAME_LENGTH, "aten::cat"], "the longest first"


class Event:
    """One of kineto's."""

    def __init__(self, name, start, end, device=DeviceType.CUDA, annotation=False):
        self.name = lambda: name
        self.start_ns = lambda: start
        self.duration_ns = lambda: end - start
        self.device_type = lambda: device
        self.is_user_annotation = lambda: annotation


def fake_profile(monkeypatch, events):
    trace = types.SimpleNamespace(
        profiler=types.SimpleNamespace(kineto_results=types.SimpleNamespace(events=lambda: events))
    )
    monkeypatch.setattr(step_profile, "profile", lambda activities: contextlib.nullcontext(trace))


def test_a_kernel_on_the_device_counts_once(monkeypatch):
    """Neither the op that launched it nor a marked region around it is more work."""
    events = [
        Event("gemm", 0, 4_000_000),
        Event("aten::mm", 0, 9_000_000, DeviceType.CPU),
        Event("ProfilerStep", 0, 9_000_000, annotation=True),
    ]
    fake_profile(monkeypatch, events)
    calls = [lambda: 0.01] * 3
    found = step_profile.profiled(contextlib.nullcontext, calls, types.SimpleNamespace(type="cuda"))
    assert found.names_ms == {"gemm": pytest.approx(2.0)}, "4 ms in two calls"
    assert found.parts()["float layers"] == pytest.approx(2.0)
    assert found.parts()[step_profile.REST] == pytest.approx(8.0)


def test_host_time_and_idle_share(monkeypatch):
    ms = 1_000_000
    events = [
        Event("a", 0, 10 * ms),
        Event("b", 5 * ms, 20 * ms),  # at the same time as a
        Event("c", 30 * ms, 40 * ms),
        Event("cudaLaunchKernel", 0, 5 * ms, DeviceType.CPU),
        Event("cudaStreamSynchronize", 50 * ms, 60 * ms, DeviceType.CPU),
        Event("marked", 0, 100 * ms, annotation=True),
    ]
    fake_profile(monkeypatch, events)
    found = step_profile.host_and_device(lambda: 0.110, whole_s=0.060, steps=10)
    assert found["host_time"] == ("ms", pytest.approx(10.0)), "110 ms less 10 of waiting, in 10 steps"
    assert found["device_idle"] == ("%", pytest.approx(50.0)), "busy for 30 of 60 ms"


def test_what_is_read_of_the_profiler_is_there():
    """`device_events` reads kineto's own list, which torch does not document."""
    with step_profile.profile(activities=[step_profile.ProfilerActivity.CPU]) as trace:
        torch.ones(4) + 1
    added = [event for event in step_profile._events(trace) if event.name() == "aten::add"]
    assert len(added) == 1
    assert added[0].device_type() == DeviceType.CPU
    assert not added[0].is_user_annotation()
    name, begin, end = step_profile._event(added[0])
    assert name == "aten::add"
    assert 0 < begin < end < begin + 1e9
    assert step_profile.device_events(trace) == []


def test_profile_of_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_profile, "REPEATS", 1)
    threads = torch.get_num_threads()
    options = "--network cifar10_small16 --batch 1 --calls 4 --threads 1 --rows float-channels_last,modulated-w8a8"
    try:
        assert (
            bench_unet_step.main(
                [*options.split(), "--no-compile", "--quiet", "--profile", "--record", "--results", str(tmp_path)]
            )
            == 0
        )
    finally:
        torch.set_num_threads(threads)
    recorded = record.read(record.results_file(tmp_path))
    rows = {(row["problem"], row["metric"]): float(row["p50"]) for row in recorded if row["op"] == "unet_step_profile"}
    assert len(rows) == 2 * len(step_profile.PARTS)
    quantised, plain = "cifar10_small16-b1-modulated-w8a8", "cifar10_small16-b1-float-channels_last"
    assert rows[quantised, "codes"] > 0
    assert rows[quantised, "integer products"] > 0
    assert rows[plain, "codes"] == rows[plain, "integer products"] == 0
    assert rows[plain, "float layers"] > rows[quantised, "float layers"]
    others = {(row["problem"], row["metric"]): float(row["p50"]) for row in recorded if row["op"] == "unet_step_others"}
    assert others[plain, "aten::mkldnn_convolution"] > 0.02 * others[plain, "whole"]
    assert not any(name.startswith("modiff") for _, name in others)
    assert "ms of a call" in capsys.readouterr().out
