"""The table of ops and backends: priority, reasons, no silent fallback, MODIFF_BACKEND, layouts, private fusions."""

import logging
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.backends import int8_products, reference
from modiff_kernels.ops import Problem, Window, dispatch
from tests.ops.arguments import call, weight

WINDOW = Window((3, 3), padding=(1, 1))
PROBLEM = Problem("product", "cpu", dtype=torch.float32, state_dtype=torch.float16, m=128, n=24, k=144, window=WINDOW,
                  weight_bits=8, granularity="per_sample", layout="kpack_v1")  # fmt: skip


def stand_in(reason=None, unavailable=None, layout="tiled_v1", without=(), **more):
    """A stand-in for backends/cpu.py that answers every op with its own name."""
    functions = {op: lambda *args, op=op: op for op in ("quantize", "product", "attention") if op not in without}
    return SimpleNamespace(
        why_not=lambda problem: reason,
        unavailable=lambda: unavailable,
        preferred_layout=lambda problem: layout,
        prepare_weight=lambda weight, k, window, layout: weight._replace(layout=layout),
        **{**functions, **more},
    )


@pytest.fixture
def with_cpu(monkeypatch, fresh_dispatch):
    """Put a stand-in, or the reason why there is none, in the place of the compiled backend."""
    monkeypatch.delenv("MODIFF_BACKEND", raising=False)

    def install(module):
        monkeypatch.setattr(dispatch, "BACKENDS", {"cpu": "cpu", "triton": "cuda", "reference": None})
        load = lambda name: {"reference": reference, "cpu": module}.get(name, "not here")  # noqa: E731
        monkeypatch.setattr(dispatch, "load", load)
        fresh_dispatch.reset()

    monkeypatch.setattr(dispatch, "forgetters", [f for f in dispatch.forgetters if f != dispatch.load.cache_clear])
    return install


def test_auto_takes_the_first_that_fits(with_cpu):
    with_cpu(stand_in())
    assert dispatch.select(PROBLEM) == ("cpu", dispatch.load("cpu").product, (), False)
    with_cpu(stand_in(TRACEABLE=True))
    assert dispatch.select(PROBLEM).traceable


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (stand_in(reason="c_in=3 is too small"), "c_in=3 is too small"),
        (stand_in(unavailable="this CPU is too old"), "this CPU is too old"),
        (stand_in(without=("product",)), "it has no product"),
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
    what = "layers run" if reason in ("this CPU is too old", "it failed to load: libfoo.so") else "product runs"
    assert f"{what} on the slower backend 'reference', not on 'cpu': {reason}" in caplog.text


def test_a_forced_backend_leaves_attention_to_the_reference(with_cpu, monkeypatch):
    with_cpu(stand_in(without=("attention",)))
    monkeypatch.setenv("MODIFF_BACKEND", "cpu")
    dispatch.reset()
    q = torch.zeros(1, 2, 4)
    assert ops.attention(q, q, q, 1, 0.5).shape == (1, 2, 4)
    with pytest.raises(ops.BackendUnavailable, match="it has no attention"):
        ops.attention(q, q, q, 1, 0.5, backend="cpu")


def test_a_named_backend_never_falls_back_and_every_reason_is_listed(with_cpu):
    with_cpu(stand_in(reason="c_in=3 is too small"))
    with pytest.raises(ops.BackendUnavailable, match=r"no backend for product-.*cpu: c_in=3 is too small"):
        dispatch.select(PROBLEM, "cpu")
    assert dispatch.select(PROBLEM, "reference").backend == "reference"
    with pytest.raises(ops.BackendUnavailable) as raised:
        dispatch.select(replace(PROBLEM, layout="tiled_v1"))
    assert "cpu: c_in=3 is too small" in str(raised.value)
    assert "reference: it reads weights in layout 'kpack_v1', not 'tiled_v1'" in str(raised.value)


def test_devices(with_cpu):
    with_cpu(stand_in())
    assert dispatch.select(replace(PROBLEM, device_type="mps"), "reference").backend == "reference"
    assert dispatch.candidates("cuda") == ("triton", "reference")
    with pytest.raises(ops.BackendUnavailable, match="cpu: it does not run on cuda"):
        dispatch.select(replace(PROBLEM, device_type="cuda"), "cpu")
    assert dispatch.select(replace(PROBLEM, device_type="cuda")).rejected == (("triton", "not here"),)


def test_environment_variable_forces_one_backend(with_cpu, monkeypatch):
    with_cpu(stand_in())
    x = torch.randn(2, 8)
    assert ops.quantize(x) == "quantize"
    monkeypatch.setenv("MODIFF_BACKEND", "reference")
    assert ops.quantize(x) == "quantize", "the variable is read once"
    dispatch.reset()
    assert isinstance(ops.quantize(x)[0], torch.Tensor)
    with pytest.raises(ops.BackendUnavailable, match="MODIFF_BACKEND=reference forces another"):
        ops.quantize(x, backend="cpu")
    monkeypatch.setenv("MODIFF_BACKEND", "cpu")
    with_cpu(stand_in(unavailable="this CPU is too old"))
    with pytest.raises(ops.BackendUnavailable, match="this CPU is too old"):
        ops.quantize(x)


def test_a_backend_that_fails_to_load_is_a_reason(fresh_dispatch, monkeypatch):
    for error, reason in (
        (ImportError("libfoo.so: undefined symbol"), "it failed to load: libfoo.so: undefined symbol"),
        (OSError("no space"), "it failed to load: no space"),
        (ModuleNotFoundError("no foo", name="foo"), "it failed to load: no foo"),
        (ModuleNotFoundError("no cpu", name="modiff_kernels.backends.cpu"), "it is not part of this installation"),
    ):
        monkeypatch.setattr(dispatch.importlib, "import_module", Mock(side_effect=error))
        fresh_dispatch.reset()
        assert dispatch.why_unavailable("cpu") == reason


def test_table_has_every_op_on_every_backend(with_cpu):
    with_cpu(stand_in(without=("attention",)))
    reasons = {op: dispatch.table(op) for op in dispatch.OPS}
    assert all(list(of_op) == list(dispatch.BACKENDS) and of_op["reference"] is None for of_op in reasons.values())
    assert (reasons["quantize"]["cpu"], reasons["quantize"]["triton"]) == (None, "not here")
    assert reasons["attention"]["cpu"] == "this backend does not have the op"


def test_layouts(with_cpu):
    with_cpu(stand_in())
    assert ops.preferred_layout(PROBLEM) == "tiled_v1"
    assert ops.preferred_layout(PROBLEM, "reference") == "kpack_v1"
    given = weight(144)
    assert ops.prepare_weight(given, 144, WINDOW, "kpack_v1") is given
    assert ops.prepare_weight(given, 144, WINDOW, "tiled_v1").layout == "tiled_v1"
    with pytest.raises(ValueError, match=r"no backend makes the weight layout 'tiled_v9'.*reference: it reads"):
        ops.prepare_weight(given, 144, WINDOW, "tiled_v9", "reference")
    with_cpu(stand_in(reason="c_in=3 is too small"))
    assert ops.preferred_layout(PROBLEM) == "kpack_v1"
    with pytest.raises(ops.BackendUnavailable, match="cpu: c_in=3 is too small"):
        ops.preferred_layout(PROBLEM, "cpu")
    with_cpu("it failed to load: libfoo.so")
    with pytest.raises(ValueError, match=r"cpu: it failed to load: libfoo\.so; reference: it reads weights in layout"):
        ops.prepare_weight(given, 144, WINDOW, "tiled_v1")


def update(**changes):
    """The problem of an update of a 3x3 convolution."""
    return replace(PROBLEM, op="modulate", act_bits=4, prologue="identity", **changes)


def test_an_update_is_a_composition_or_a_fusion(with_cpu):
    """A backend is asked for both parts; a reason against its fusion only means that the parts are called."""
    asked = []

    def why_not(problem):
        asked.append((problem.op, problem.k, problem.granularity, problem.layout))
        return "not fused for 3 bits" if problem.op == "modulate" and problem.act_bits == 3 else None

    module = stand_in(modulate=lambda *args: "modulate", quantize=lambda *args: ("codes", "scale", "absmax"))
    module.why_not = why_not
    with_cpu(module)
    assert dispatch.select(update(granularity="per_block")).fn is module.modulate
    assert asked == [("quantize", 16, "per_block", None), ("product", 144, "per_sample", "kpack_v1"),
                     ("modulate", 144, "per_block", "kpack_v1")]  # fmt: skip
    composed = dispatch.select(replace(update(), act_bits=3))
    assert composed.backend == "cpu"
    assert composed.fn(*range(13)) == ("product", "scale", "absmax")
    for part in ("quantize", "product"):
        module.why_not = lambda problem, part=part: f"no {part}" if problem.op == part else None
        dispatch.reset()
        assert dispatch.select(update()).rejected == (("cpu", f"no {part}"),)


ORDER = [("product", (8, 0), {}, "triton"), ("product", (9, 0), {}, "cuda"), ("product", (10, 0), {}, "triton"),
         ("product", (9, 0), {"group_size": 64}, "triton"), ("quantize", (9, 0), {}, "triton"),
         ("modulate", (8, 6), {}, "cuda"), ("modulate", (8, 6), {"granularity": "per_block"}, "triton"),
         ("modulate", (9, 0), {}, "cuda"), ("modulate", (12, 0), {}, "triton")]  # fmt: skip


@pytest.mark.parametrize(("op", "capability", "more", "first"), ORDER)
def test_the_order_of_backends_on_gpus(monkeypatch, fresh_dispatch, op, capability, more, first):
    for name in ("triton", "cuda"):
        monkeypatch.setattr(dispatch.load(name), "unavailable", lambda: None)
    fresh_dispatch.reset()
    fields = {"device_type": "cuda", "capability": capability, "k": 9 * 64, "act_bits": 4, "weight_bits": 4} | more
    selection = dispatch.select(replace(PROBLEM, op=op, prologue="identity", **fields))
    assert selection.backend == first
    assert op != "product" or more or int8_products(capability).startswith(first)
    if op == "modulate":  # fused on 4-bit tensor cores; on sm_90 quantised by one backend and multiplied by the other
        fused = dispatch.load("cuda").modulate
        parts = dispatch.load("triton").quantize, dispatch.load(first).product
        assert selection.fn is (fused if capability == (8, 6) and not more else dispatch.composed(*parts))


def test_a_new_backend_is_two_functions_a_reason_and_a_name(monkeypatch, fresh_dispatch):
    """`modiff_kernels/backends/tiny.py` and its name in BACKENDS: the ops find it, and nothing else is touched."""
    module = ModuleType("modiff_kernels.backends.tiny")
    module.quantize, module.product = reference.quantize, lambda *args: reference.product(*args).mul_(1)
    module.why_not = lambda problem: "only Linears" if problem.window is not None else None
    monkeypatch.delenv("MODIFF_BACKEND", raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dispatch, "BACKENDS", {"tiny": "cpu", **dispatch.BACKENDS})
    fresh_dispatch.reset()
    reasons = dispatch.table("quantize")
    assert reasons["tiny"] is reasons["reference"] is None
    for form in ("residual", "output", "accumulate", "update"):
        results, wanted = call(form, "tiny"), call(form, "reference")
        assert [r.shape for r in results] == [w.shape for w in wanted]
    assert dispatch.select(replace(PROBLEM, window=None)).backend == "tiny"
    assert ("tiny", "only Linears") in dispatch.select(PROBLEM).rejected
    with pytest.raises(ops.BackendUnavailable, match="tiny: only Linears"):
        call("output-image", "tiny")
