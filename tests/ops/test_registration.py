"""The ops as torch ops: schemas, fakes, opcheck, compilation, and the eager shortcut around torch.ops."""

import contextlib
import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from modiff_kernels import ops
from modiff_kernels.ops import Window, check, dispatch
from modiff_kernels.quant.affine import quantize_weight
from tests.ops.arguments import FORMS, call, calls, image, tensors, zeros

OPS_OF_TORCH = ("quantize", "product", "attention")
TORCH_FORMS = [form for form in FORMS if calls()[form][0] in OPS_OF_TORCH]


def flat(form):
    """The torch op of a form and its arguments as the schema has them."""
    op, arguments = calls()[form]
    bound = inspect.signature(getattr(ops, op)).bind(**arguments, backend="reference")
    bound.apply_defaults()
    values = []
    for name, value in bound.arguments.items():
        if name == "window":
            values.append([] if value is None else value.to_ints())
        elif hasattr(value, "_fields"):
            values += list(value)
        else:
            values.append(value)
    return getattr(torch.ops.modiff, op).default, tuple(values)


def test_schemas():
    """Named tuples are spread, a window is a list of integers, and only states are mutated."""
    for op in OPS_OF_TORCH:
        schema = getattr(torch.ops.modiff, op).default._schema
        written = {given.name for given in schema.arguments if given.alias_info and given.alias_info.is_write}
        assert written == {"quantize": {"x_hat", "last_absmax"}, "product": {"y_hat"}}.get(op, set())
        assert all(result.alias_info is None for result in schema.returns)
        assert getattr(ops, op).__doc__
        assert list(inspect.signature(getattr(ops, op)).parameters)[-1] == "backend"
    names = [argument.name for argument in torch.ops.modiff.product.default._schema.arguments]
    weight = [f"weight_{field}" for field in ops.PackedWeight._fields]
    rest = ["y_hat", "bias", "skip", "window", "out_dtype", "write_out", "backend"]
    assert names == ["codes", "scale", "zero_point", *weight, *rest]
    names = [argument.name for argument in torch.ops.modiff.quantize.default._schema.arguments]
    assert names[:10] == ["h", *(f"prologue_{field}" for field in ops.Prologue._fields), "x_hat"]
    for fields in ((3, 3, 1, 2, 0, 1, 2, 1, 4), ()):
        window = Window.from_ints(fields)
        assert window is None if not fields else tuple(window.to_ints()) == fields


@pytest.mark.parametrize("form", TORCH_FORMS)
def test_opcheck(form):
    opcheck(*flat(form))


def formats(results):
    return [(r.shape, r.stride(), r.dtype) for r in (results if isinstance(results, tuple) else (results,))]


def moved(arguments, move):
    return tuple(move(a) if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.parametrize("form", TORCH_FORMS)
def test_function_torch_op_and_fakes_agree(form, monkeypatch):
    op, arguments = flat(form)
    copies = moved(arguments, torch.clone)
    torch.manual_seed(0)
    results = op(*arguments)
    torch.manual_seed(0)
    torch.testing.assert_close(op(*copies), results, rtol=0, atol=0)
    assert formats(call(form)) == formats(results)
    monkeypatch.setattr(check, "capability", lambda device: (9, 0))
    with FakeTensorMode() as mode:
        fake = op(*moved(copies, mode.from_tensor))
        there = op(*moved(copies, lambda t: mode.from_tensor(t).to("cuda:1")))
    meta = op(*moved(copies, lambda t: t.to("meta")))
    assert formats(results) == formats(fake) == formats(meta)
    for result in there if isinstance(there, tuple) else (there,):
        assert result.device == torch.device("cuda:1")


@pytest.mark.parametrize("form", FORMS)
def test_the_eager_function_is_the_torch_op(form):
    """Seen in dispatch modes through torch's dispatcher, and the same in results and states."""
    seen, outcomes = [], []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    op, arguments = calls()[form]
    before = {name: t.clone() for name, t in tensors(arguments).items()}
    for recorded in (False, True):
        for name, t in tensors(arguments).items():
            t.copy_(before[name])
        with Record() if recorded else contextlib.nullcontext():
            results = getattr(ops, op)(**arguments, backend="reference")
        results = results if isinstance(results, tuple) else (results,)
        outcomes.append([t.clone() for t in (*results, *tensors(arguments).values())])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))
    assert {f"modiff.{name}.default" for name in (("quantize", "product") if op == "modulate" else (op,))} <= set(seen)


def test_no_gradients_and_inference_mode():
    x, x_hat = torch.randn(2, 8, requires_grad=True), torch.zeros(2, 8)
    assert not ops.quantize(x, x_hat=x_hat, backend="reference")[1].requires_grad
    assert not x_hat.requires_grad
    with torch.inference_mode():
        ops.quantize(torch.randn(2, 8), x_hat=x_hat, backend="reference")


def test_a_call_with_other_formats_is_checked_again():
    for shape in [(2, 8), (4, 8), (2, 3, 8), (2, 8)]:
        ops.quantize(torch.randn(shape), x_hat=torch.zeros(shape), backend="reference")
    with pytest.raises(ValueError, match="x_hat has shape"):
        ops.quantize(torch.randn(2, 8), x_hat=torch.zeros(4, 8), backend="reference")
    with pytest.raises(ValueError, match="not contiguous"):
        ops.quantize(torch.randn(8, 2).T, x_hat=torch.zeros(2, 8), backend="reference")


@pytest.mark.parametrize(("backend", "dynamic"), [("reference", True), ("cpu", False)])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_compiled_steps_equal_eager_ones(backend, dynamic, conv):
    """quantize, product and modulate in one full graph, with state that is mutated inside of it, over three steps."""
    if (reason := dispatch.why_unavailable(backend)) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    torch._dynamo.reset()
    window = Window((3, 3), padding=(1, 1)) if conv else None
    x_shape, y_shape = ((2, 16, 4, 4), (2, 8, 4, 4)) if conv else ((2, 5, 64), (2, 5, 33))
    k = 144 if conv else 64
    codes, scale = quantize_weight(torch.randn(y_shape[1 if conv else -1], k), 8)
    weight = ops.PackedWeight(ops.pack_weight(codes, 8), scale, 8)
    problem = check.product(
        zeros(*x_shape, dtype=torch.int8), torch.ones(2), None, weight, None, None, None, window, torch.float32, True
    )
    weight = ops.prepare_weight(weight, k, window, ops.preferred_layout(problem, backend), backend)

    def step(x, x_hat, y_hat):
        codes, scale, zero_point = ops.quantize(x * 1.0, bits=8, backend=backend)
        plain = ops.product(codes, scale, zero_point, weight, window=window, backend=backend)
        more = {"window": window, "bits": 4, "backend": backend}
        out, scale, absmax = ops.modulate(torch.relu(x), ops.IDENTITY, x_hat, None, weight, y_hat, **more)
        return torch.relu(out), plain + 1, scale, absmax

    def run(step):
        torch.manual_seed(3)
        state, results = (zeros(*x_shape), zeros(*y_shape)), []
        for _ in range(3):
            results += step(image(*x_shape) if conv else torch.randn(x_shape), *state)
        return [*results, *state]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for got, expected in zip(run(compiled), run(step)):
        assert got.stride() == expected.stride()
        assert torch.equal(got, expected)
