"""The ops as torch ops: schemas, fakes, opcheck, compilation, and the eager shortcut around torch.ops."""

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from modiff_kernels import ops
from modiff_kernels.ops import problem
from modiff_kernels.ops.problem import CHECKS
from tests.ops.op_cases import ConvCase, LinearCase, activation, make_weight, poisoned
from tests.ops.test_errors import conv_arguments, linear_arguments

ARGUMENTS = [f"{op}-linear" for op in linear_arguments()] + [f"{op}-conv" for op in conv_arguments()]
ARGUMENTS += ["quantize_residual-linear-packed", "quantize_residual-conv-packed"]


def positional(op, arguments):
    """Arguments by name, in the order of the op, with the defaults of those that are not given."""
    parameters = inspect.signature(getattr(ops, op)).parameters
    return tuple(arguments.get(name, parameter.default) for name, parameter in parameters.items())


def arguments_of(case):
    op, kind, *switches = case.split("-")
    given = linear_arguments() if kind == "linear" else conv_arguments()
    return op, positional(op, {**given[op], **dict.fromkeys(switches, True), "backend": "reference"})


@pytest.mark.parametrize("op", CHECKS)
def test_schema_and_signature_agree(op):
    schema = getattr(torch.ops.modiff, op).default._schema
    parameters = inspect.signature(getattr(ops, op)).parameters
    assert [argument.name for argument in schema.arguments] == list(parameters)
    for argument, parameter in zip(schema.arguments, parameters.values(), strict=True):
        default = argument.default_value if argument.has_default_value() else parameter.empty
        assert default == parameter.default
    mutated = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
    expected = {"x_hat", "y_hat"} & set(parameters)
    assert mutated == expected
    assert all(result.alias_info is None for result in schema.returns)
    assert getattr(ops, op).__doc__


@pytest.mark.parametrize("case", ARGUMENTS)
def test_opcheck(case):
    op, arguments = arguments_of(case)
    opcheck(getattr(torch.ops.modiff, op).default, arguments)


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_opcheck_low_precision(case, dtype):
    op, arguments = arguments_of(case)
    keep = ("scale", "weight_scale")
    names = list(inspect.signature(getattr(ops, op)).parameters)

    def convert(name, value):
        if value is torch.float32:
            return dtype
        convertible = isinstance(value, torch.Tensor) and value.is_floating_point() and name not in keep
        return value.to(dtype) if convertible else value

    converted = tuple(convert(name, value) for name, value in zip(names, arguments, strict=True))
    opcheck(getattr(torch.ops.modiff, op).default, converted, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("write_out", [True, False])
@pytest.mark.parametrize("op", ["accumulate_conv2d", "initialize_conv2d", "modulated_conv2d"])
def test_opcheck_write_out(op, write_out):
    arguments = positional(op, {**conv_arguments()[op], "write_out": write_out, "backend": "reference"})
    opcheck(getattr(torch.ops.modiff, op).default, arguments)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_fake_and_meta_results_are_like_real_ones(case):
    op, arguments = arguments_of(case)
    _, again = arguments_of(case)

    def formats(results):
        results = results if isinstance(results, tuple) else (results,)
        return [(r.shape, r.stride(), r.dtype) for r in results]

    def moved(move):
        return tuple(move(a) if isinstance(a, torch.Tensor) else a for a in again)

    real = formats(getattr(ops, op)(*arguments))
    with FakeTensorMode() as mode:
        fake = formats(getattr(ops, op)(*moved(mode.from_tensor)))
    meta = formats(getattr(ops, op)(*moved(lambda t: t.to("meta"))))
    assert real == fake == meta


@pytest.mark.parametrize("case", ARGUMENTS)
def test_fake_results_are_on_the_device_of_the_arguments(case, monkeypatch):
    monkeypatch.setattr(problem, "capability", lambda device: (9, 0))
    op, arguments = arguments_of(case)
    with FakeTensorMode() as mode:
        moved = [mode.from_tensor(a).to("cuda:1") if isinstance(a, torch.Tensor) else a for a in arguments]
        results = getattr(ops, op)(*moved)
    for result in results if isinstance(results, tuple) else (results,):
        assert result.device == torch.device("cuda:1")


@pytest.mark.parametrize("case", ARGUMENTS)
def test_function_and_torch_op_agree(case):
    op, arguments = arguments_of(case)
    copies = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.manual_seed(1)
    direct = getattr(ops, op)(*arguments)
    dispatched = getattr(torch.ops.modiff, op)(*copies)
    torch.testing.assert_close(direct, dispatched, rtol=0, atol=0)
    for one, other in zip(arguments, copies, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)


def test_defaults_and_keywords():
    x = torch.randn(2, 8)
    expected = ops.quantize_activation(x, 8, "per_tensor", True, "auto")
    for result in (
        ops.quantize_activation(x, 8, "per_tensor"),
        ops.quantize_activation(x, granularity="per_tensor", act_bits=8),
        torch.ops.modiff.quantize_activation(x, 8, "per_tensor"),
        torch.ops.modiff.quantize_activation(x, 8, granularity="per_tensor", backend="auto"),
    ):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_lists_and_tuples_of_integers():
    arguments = conv_arguments()["quantized_conv2d"]
    as_lists = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    assert torch.equal(ops.quantized_conv2d(**arguments), ops.quantized_conv2d(**as_lists))


def test_torch_sees_the_op_in_dispatch_modes():
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        ops.quantize_activation(torch.randn(2, 8), 8, "per_tensor", backend="reference")
    assert "modiff.quantize_activation.default" in seen


def test_no_gradients():
    x = torch.randn(2, 8, requires_grad=True)
    x_hat = torch.zeros(2, 8)
    _, scale, _ = ops.quantize_residual(x, x_hat, None, 8, "per_tensor", backend="reference")
    assert not scale.requires_grad
    assert not x_hat.requires_grad


def test_in_inference_mode():
    x, x_hat = torch.randn(2, 8), torch.zeros(2, 8)
    with torch.inference_mode():
        ops.quantize_residual(x, x_hat, None, 8, "per_tensor", backend="reference")
    assert x_hat.any()


def test_a_call_with_other_shapes_is_checked_again():
    for shape in [(2, 8), (4, 8), (2, 3, 8), (2, 8)]:
        ops.quantize_residual(torch.randn(shape), torch.zeros(shape), None, 8, "per_tensor", backend="reference")
    with pytest.raises(ValueError, match="x_hat has shape"):
        ops.quantize_residual(torch.randn(2, 8), torch.zeros(4, 8), None, 8, "per_tensor", backend="reference")
    with pytest.raises(ValueError, match="not contiguous"):
        ops.quantize_residual(torch.randn(8, 2).T, torch.zeros(2, 8), None, 8, "per_tensor", backend="reference")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", [LinearCase((2, 5, 64), 63), ConvCase((2, 16, 8, 8), 24)], ids=str)
def test_compiled_steps_equal_eager_ones(backend, case, dynamic):
    """fullgraph, with state that is mutated inside the graph, over three steps."""
    torch._dynamo.reset()
    image = case.kind == "conv2d"
    weight = make_weight(case, 8, -1, backend, "modulated", act_bits=4)
    bias = torch.randn(case.n)
    initialize, modulated = getattr(ops, f"initialize_{case.kind}"), getattr(ops, f"modulated_{case.kind}")

    def first(x, x_hat, y_hat):
        out = initialize(x, x_hat, y_hat, *weight.tensors, bias, None, *weight.format, *case.conv_args, backend=backend)
        return torch.relu(out)

    def update(x, x_hat, y_hat):
        arguments = (*weight.tensors, y_hat, None, 4, "per_sample", 1.0, *weight.format, *case.conv_args)
        out, scale, _ = modulated(x * 1.0, x_hat, None, *arguments, backend=backend)
        return torch.relu(out), scale

    def run(first, update):
        torch.manual_seed(3)
        state = poisoned(case.x_shape, torch.float32, image), poisoned(case.y_shape, torch.float32, image)
        x = activation(case.x_shape, image=image)
        results = [first(x, *state)]
        for _ in range(3):
            x = x + 0.1 * activation(case.x_shape, image=image)
            results += update(x, *state)
        return [*results, *state]

    options = {"fullgraph": True, "backend": "aot_eager", "dynamic": dynamic}
    compiled = run(torch.compile(first, **options), torch.compile(update, **options))
    for got, expected in zip(compiled, run(first, update), strict=True):
        assert got.stride() == expected.stride()
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("shape", [(2, 9, 4, 4), (2, 5, 9)], ids=["image", "rows"])
def test_compiled_packed_codes_equal_eager_ones(shape, bits, dynamic):
    torch._dynamo.reset()
    x, states = activation(shape), [torch.zeros_like(activation(shape)) for _ in range(2)]

    def step(x, x_hat):
        codes, *rest = ops.quantize_residual(x * 1.0, x_hat, None, bits, "per_token", packed=True, backend="reference")
        return codes ^ 1, *rest

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for got, expected in zip((*compiled(x, states[0]), states[0]), (*step(x, states[1]), states[1]), strict=True):
        assert got.dtype == expected.dtype
        assert got.stride() == expected.stride()
        assert torch.equal(got, expected)
