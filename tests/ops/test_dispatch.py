"""The table of ops and backends: priority, reasons, no silent fallback, MODIFF_BACKEND, layouts."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.backends import Kernel, reference
from modiff_kernels.ops import dispatch
from modiff_kernels.ops.problem import CHECKS, Problem

PROBLEM = Problem(
    op="modulated_conv2d",
    device_type="cpu",
    dtype=torch.float32,
    state_dtype=torch.float16,
    m=128,
    n=24,
    k=144,
    kernel_size=(3, 3),
    padding=(1, 1),
    act_bits=4,
    weight_bits=8,
    granularity="per_sample",
    layout="kpack_v1",
)


def compiled_backend(reason=None, unavailable=None, layout="tiled_v1", op_names=tuple(CHECKS)):
    """A stand-in for backends/cpu.py that answers every op with its own name."""
    return SimpleNamespace(
        NAME="cpu",
        KERNELS={name: Kernel(lambda *args, name=name: name, lambda problem: reason) for name in op_names},
        unavailable=lambda: unavailable,
        preferred_layout=lambda problem: layout,
        prepare_weight=lambda weight, bits, n, k, layout_from, layout_to, kernel_size, groups: (layout_to, kernel_size),
    )


@pytest.fixture
def with_cpu(monkeypatch, fresh_dispatch):
    """Put a stand-in, or the reason why there is none, in the place of the compiled backend."""
    monkeypatch.delenv("MODIFF_BACKEND", raising=False)
    fresh_dispatch.reset()

    def install(module):
        monkeypatch.setattr(dispatch, "PRIORITY", {**dispatch.PRIORITY, "cpu": ("cpu", "reference")})
        monkeypatch.setattr(dispatch, "load", lambda name: reference if name == "reference" else module)

    return install


def test_auto_takes_the_first_that_fits(with_cpu):
    with_cpu(compiled_backend())
    assert dispatch.select(PROBLEM) == ("cpu", dispatch.load("cpu").KERNELS["modulated_conv2d"].fn, (), False)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (compiled_backend(reason="c_in=3 is too small"), "c_in=3 is too small"),
        (compiled_backend(unavailable="this CPU is too old"), "this CPU is too old"),
        (compiled_backend(op_names=()), "it has no modulated_conv2d"),
        ("it failed to load: libfoo.so", "it failed to load: libfoo.so"),
    ],
)
def test_auto_falls_back_with_a_reason_and_one_warning(with_cpu, caplog, module, reason):
    with_cpu(module)
    with caplog.at_level(logging.WARNING, logger="modiff_kernels"):
        selection = dispatch.select(PROBLEM)
        dispatch.select(PROBLEM)
        dispatch.select(replace(PROBLEM, m=4096))
    assert selection.backend == "reference"
    assert selection.rejected == (("cpu", reason),)
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert "modulated_conv2d runs on the slow backend 'reference', not on 'cpu'" in caplog.text


def test_auto_without_other_backends_warns_too(with_cpu, monkeypatch, caplog):
    with_cpu(compiled_backend())
    monkeypatch.setattr(dispatch, "PRIORITY", {**dispatch.PRIORITY, "cuda": ("reference",)})
    with caplog.at_level(logging.WARNING, logger="modiff_kernels"):
        dispatch.select(replace(PROBLEM, device_type="cuda"), "reference")
        assert not caplog.records
        dispatch.select(replace(PROBLEM, device_type="cuda"))
    assert "not on 'cuda': no other backend runs on this device type" in caplog.text


def test_no_warning_for_conversions(with_cpu, caplog):
    with_cpu(compiled_backend(op_names=()))
    with caplog.at_level(logging.WARNING, logger="modiff_kernels"):
        ops.pack_weight(torch.zeros(2, 4, dtype=torch.int8), 4)
    assert not caplog.records


def test_a_forced_backend_leaves_conversions_to_the_reference(with_cpu, monkeypatch):
    with_cpu(compiled_backend(op_names=("quantize_activation",)))
    monkeypatch.setenv("MODIFF_BACKEND", "cpu")
    dispatch.reset()
    codes = torch.zeros(2, 4, dtype=torch.int8)
    assert ops.pack_weight(codes, 4).shape == (2, 2)
    with pytest.raises(ops.BackendUnavailable, match="it has no pack_weight"):
        ops.pack_weight(codes, 4, backend="cpu")


def test_a_named_backend_never_falls_back(with_cpu):
    with_cpu(compiled_backend(reason="c_in=3 is too small"))
    with pytest.raises(ops.BackendUnavailable, match=r"no backend for modulated_conv2d-.*cpu: c_in=3 is too small"):
        dispatch.select(PROBLEM, "cpu")
    assert dispatch.select(PROBLEM, "reference").backend == "reference"


def test_every_reason_is_listed(with_cpu):
    with_cpu(compiled_backend(reason="c_in=3 is too small"))
    with pytest.raises(ops.BackendUnavailable) as raised:
        dispatch.select(replace(PROBLEM, layout="tiled_v1"))
    assert "cpu: c_in=3 is too small" in str(raised.value)
    assert "reference: it reads weights in layout 'kpack_v1', not 'tiled_v1'" in str(raised.value)


def test_unknown_device_type():
    with pytest.raises(ops.BackendUnavailable, match="no backend runs on this device type"):
        dispatch.select(replace(PROBLEM, device_type="mps"))
    with pytest.raises(ops.BackendUnavailable, match="cpu: it does not run on cuda"):
        dispatch.select(replace(PROBLEM, device_type="cuda"), "cpu")


def test_environment_variable_forces_one_backend(with_cpu, monkeypatch):
    with_cpu(compiled_backend())
    x = torch.randn(2, 8)
    assert ops.quantize_activation(x, 8, "per_tensor") == "quantize_activation"
    monkeypatch.setenv("MODIFF_BACKEND", "reference")
    assert ops.quantize_activation(x, 8, "per_tensor") == "quantize_activation", "the variable is read once"
    dispatch.reset()
    assert isinstance(ops.quantize_activation(x, 8, "per_tensor")[0], torch.Tensor)
    with pytest.raises(ops.BackendUnavailable, match="MODIFF_BACKEND=reference forces another"):
        ops.quantize_activation(x, 8, "per_tensor", backend="cpu")
    monkeypatch.setenv("MODIFF_BACKEND", "cpu")
    dispatch.reset()
    assert ops.quantize_activation(x, 8, "per_tensor") == "quantize_activation"
    with_cpu(compiled_backend(unavailable="this CPU is too old"))
    dispatch.reset()
    with pytest.raises(ops.BackendUnavailable, match="this CPU is too old"):
        ops.quantize_activation(x, 8, "per_tensor")


@pytest.mark.parametrize("name", ["gpu", "", "CPU"])
def test_unknown_environment_variable(fresh_dispatch, monkeypatch, name):
    monkeypatch.setenv("MODIFF_BACKEND", name)
    fresh_dispatch.reset()
    with pytest.raises(
        ValueError,
        match=f"MODIFF_BACKEND='{name}' is not known; choose one of auto, cpu, onednn, triton, cuda, reference",
    ):
        dispatch.select(PROBLEM)


def test_a_backend_that_fails_to_load_is_a_reason(fresh_dispatch, monkeypatch):
    def broken(name):
        raise ImportError("libfoo.so: undefined symbol")

    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    assert dispatch.why_unavailable("cpu") == "it failed to load: libfoo.so: undefined symbol"


def test_a_backend_whose_file_is_missing_is_a_reason(fresh_dispatch, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(dispatch.importlib, "import_module", missing)
    assert dispatch.why_unavailable("cpu") == "it is not part of this installation"


def test_table_has_every_op_on_every_backend(with_cpu):
    with_cpu(compiled_backend(op_names=("quantize_residual",)))
    table = dispatch.table()
    assert [(row.op, row.backend) for row in table] == [(op, name) for op in CHECKS for name in dispatch.BACKENDS]
    reasons = {(row.op, row.backend): row.reason for row in table}
    assert all(reasons[op, "reference"] is None for op in CHECKS)
    assert reasons["quantize_residual", "cpu"] is None
    assert reasons["pack_weight", "cpu"] == "it has no pack_weight"


def test_reference_has_every_op():
    assert set(reference.KERNELS) == set(CHECKS) == {name for name in ops.__all__ if name in CHECKS}
    assert reference.unavailable() is None


def test_preferred_layout(with_cpu):
    sizes = {"n": 24, "k": 144, "weight_bits": 8, "kernel_size": (3, 3), "padding": [1, 1]}
    with_cpu(compiled_backend())
    assert ops.preferred_layout("modulated_conv2d", "cpu", **sizes) == "tiled_v1"
    assert ops.preferred_layout("modulated_conv2d", "cpu", **sizes, backend="reference") == "kpack_v1"
    with_cpu(compiled_backend(reason="c_in=3 is too small"))
    assert ops.preferred_layout("modulated_conv2d", "cpu", **sizes) == "kpack_v1"
    with pytest.raises(ops.BackendUnavailable, match="cpu: c_in=3 is too small"):
        ops.preferred_layout("modulated_conv2d", "cpu", **sizes, backend="cpu")


def test_prepare_weight(with_cpu):
    with_cpu(compiled_backend())
    packed = torch.zeros(4, 8, dtype=torch.int8)
    assert ops.prepare_weight(packed, 8, 4, 8) is packed
    assert ops.prepare_weight(packed, 8, 4, 8, layout_to="tiled_v1", kernel_size=[2, 2]) == ("tiled_v1", (2, 2))
    with pytest.raises(ValueError, match=r"no backend makes the weight layout 'tiled_v9'.*reference.*'tiled_v9'"):
        ops.prepare_weight(packed, 8, 4, 8, layout_to="tiled_v9", backend="reference")
    with_cpu("it failed to load: libfoo.so")
    with pytest.raises(ValueError, match=r"cpu: it failed to load: libfoo\.so; reference: prepare_weight"):
        ops.prepare_weight(packed, 8, 4, 8, layout_to="tiled_v1")


def test_problem_is_a_readable_key():
    assert str(PROBLEM) == (
        "modulated_conv2d-cpu-m128-n24-k144-kernel3x3-stride1x1-padding1x1-dilation1x1-groups1-w8a4-float32/float16-"
        "per_sample-kpack_v1"
    )
    assert hash(PROBLEM) == hash(replace(PROBLEM))
    assert replace(PROBLEM, group_size=64) != PROBLEM


def test_backend_prepared_weights_round_trip(backend):
    """Every layout of a backend leads back to the portable one, so that a checkpoint never depends on a backend."""
    for bits, shape, groups in [(8, (24, 16, 3, 3), 1), (4, (7, 5, 1, 1), 1), (3, (8, 4, 3, 3), 2), (8, (65, 63), 1)]:
        n, k = shape[0], torch.Size(shape[1:]).numel()
        kernel_size = shape[2:] or (1, 1)
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), dtype=torch.int8)
        packed = ops.pack_weight(codes, bits)
        conv = {"kernel_size": kernel_size, "groups": groups} if len(shape) == 4 else {}
        op = "modulated_conv2d" if conv else "modulated_linear"
        sizes = {"n": n, "k": k, "weight_bits": bits}
        layout = ops.preferred_layout(op, "cpu", **sizes, **conv, backend=backend)
        there = ops.prepare_weight(packed, bits, n, k, layout_to=layout, **conv, backend=backend)
        back = ops.prepare_weight(there, bits, n, k, layout_from=layout, **conv, backend=backend)
        assert torch.equal(back, packed)
