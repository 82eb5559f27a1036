"""initialize_* and modulated_*: y_hat == A(x_hat) + bias after any number of steps, on every backend."""

import itertools

import pytest
import torch

from modiff_kernels.quant.affine import residual_scale
from tests.ops.op_cases import (
    BITS,
    CASES,
    CONV_CASES,
    DTYPES,
    GRANULARITIES,
    LINEAR_CASES,
    SMALL_CASES,
    activation,
    assert_invariant,
    make_weight,
    memory_format_of,
    poisoned,
    run,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

STEPS = 4


class Layer:
    """A layer with its state, driven by the ops."""

    def __init__(self, backend, case, weight, *, dtype=torch.float32, state_dtype=torch.float32, bias=True):
        self.backend, self.case, self.weight = backend, case, weight
        self.image = case.kind == "conv2d"
        self.bias = torch.randn(case.n).to(dtype) if bias else None
        self.x_hat = poisoned(case.x_shape, state_dtype, self.image)
        self.y_hat = poisoned(case.y_shape, state_dtype, self.image)

    def initialize(self, x, skip=None, first_step_bits=0, write_out=True):
        arguments = (x, self.x_hat, self.y_hat, *self.weight.tensors, self.bias, skip, *self.weight.format)
        arguments += (*self.case.conv_args, first_step_bits, write_out)
        return run(f"initialize_{self.case.kind}", *arguments, backend=self.backend)

    def update(self, x, scale=None, bits=4, granularity="per_sample", clip_ratio=1.0, skip=None, write_out=True):
        arguments = (x, self.x_hat, scale, *self.weight.tensors, self.y_hat, skip, bits, granularity, clip_ratio)
        arguments += (*self.weight.format, *self.case.conv_args, write_out)
        return run(f"modulated_{self.case.kind}", *arguments, backend=self.backend)

    def assert_invariant(self, steps):
        assert_invariant(self.case, self.x_hat, self.y_hat, self.weight, self.bias, steps)


def trajectory(case, dtype=torch.float32, steps=STEPS):
    """Inputs that change little from call to call."""
    image = case.kind == "conv2d"
    x = activation(case.x_shape, image=image)
    for step in range(steps + 1):
        yield (x + 0.1 * step * activation(case.x_shape, image=image)).to(dtype)


def drive(backend, case, weight, *, dtype=torch.float32, state_dtype=torch.float32, first_step_bits=0, **update):
    layer = Layer(backend, case, weight, dtype=dtype, state_dtype=state_dtype)
    x, *later = trajectory(case, dtype)
    out = layer.initialize(x, first_step_bits=first_step_bits)
    assert torch.equal(out, layer.y_hat.to(dtype)) or state_dtype != torch.float32
    layer.assert_invariant(0)
    for step, x in enumerate(later, start=1):
        out, scale, absmax = layer.update(x, **update)
        assert out.dtype == dtype
        assert out.shape == layer.y_hat.shape
        assert out.is_contiguous(memory_format=memory_format_of(layer.image))
        assert torch.isfinite(out).all()
        assert scale.shape == absmax.shape
        eps = max(torch.finfo(dtype).eps, torch.finfo(state_dtype).eps)
        torch.testing.assert_close(out.float(), layer.y_hat.float(), rtol=eps, atol=eps)
        layer.assert_invariant(step)
    return layer


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(backend, case, granularity):
    weight = make_weight(case, 8, -1, backend, "modulated", act_bits=4, granularity=granularity)
    drive(backend, case, weight, granularity=granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("weight_bits", "act_bits"), list(itertools.product(BITS, BITS)))
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_bits(backend, case, weight_bits, act_bits, granularity):
    weight = make_weight(case, weight_bits, -1, backend, "modulated", act_bits=act_bits, granularity=granularity)
    drive(backend, case, weight, bits=act_bits, granularity=granularity)


@pytest.mark.parametrize(("dtype", "state_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_dtypes(backend, case, dtype, state_dtype):
    weight = make_weight(case, 8, -1, backend, "modulated", act_bits=4, dtype=dtype, state_dtype=state_dtype)
    drive(backend, case, weight, dtype=dtype, state_dtype=state_dtype)


@pytest.mark.parametrize("group_size", [16, 33])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_group_size(backend, case, group_size):
    drive(backend, case, make_weight(case, 4, group_size, backend, "modulated", act_bits=4))


@pytest.mark.parametrize("given", ["one", "per_sample"])
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_given_scales(backend, case, state_dtype, given):
    weight = make_weight(case, 8, -1, backend, "modulated", act_bits=4, state_dtype=state_dtype)
    scale = torch.tensor([0.02]) if given == "one" else torch.rand(case.x_shape[0]) * 0.02 + 0.01
    drive(backend, case, weight, state_dtype=state_dtype, scale=scale)


@pytest.mark.parametrize("first_step_bits", [0, *BITS])
@pytest.mark.parametrize("case", [*LINEAR_CASES[3:5], *CONV_CASES[1:5], CONV_CASES[6]], ids=str)
def test_first_step_bits(backend, case, first_step_bits):
    weight = make_weight(case, 8, -1, backend, "modulated", act_bits=4)
    layer = drive(backend, case, weight, first_step_bits=first_step_bits)
    x = next(trajectory(case))
    layer.initialize(x, first_step_bits=first_step_bits)
    if first_step_bits == 0:
        assert torch.equal(layer.x_hat, x)
    else:
        absmax = x.abs().flatten(1).amax(1)
        step = residual_scale(absmax, first_step_bits).view(-1, *[1] * (x.ndim - 1))
        assert ((layer.x_hat - x).abs() <= step * 0.5001).all()
        codes = layer.x_hat / step
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_modulated_is_the_pair_of_ops(backend, case):
    weight = make_weight(case, 8, -1, backend, "modulated", act_bits=4)
    fused, pair = (Layer(backend, case, weight, bias=False) for _ in range(2))
    x, *later = trajectory(case)
    fused.initialize(x)
    pair.x_hat.copy_(fused.x_hat)
    pair.y_hat.copy_(fused.y_hat)
    for x in later:
        out, scale, absmax = fused.update(x)
        codes = run("quantize_residual", x, pair.x_hat, None, 4, "per_sample", 1.0, backend=backend)
        assert torch.equal(scale, codes[1])
        assert torch.equal(absmax, codes[2])
        arguments = (
            *codes[:2],
            *weight.tensors,
            pair.y_hat,
            None,
            *weight.format,
            *case.conv_args,
            torch.float32,
            True,
        )
        expected = run(f"accumulate_{case.kind}", *arguments, backend=backend)
        torch.testing.assert_close(pair.x_hat, fused.x_hat, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_zero_residual_gives_y_hat(backend, case):
    layer = Layer(backend, case, make_weight(case, 8, -1, backend, "modulated", act_bits=4))
    x = next(trajectory(case))
    layer.initialize(x)
    before = layer.y_hat.clone()
    skip = activation(case.y_shape, image=layer.image)
    out, _, absmax = layer.update(x, skip=skip)
    assert (absmax == 0).all()
    assert torch.equal(layer.x_hat, x)
    assert torch.equal(layer.y_hat, before)
    torch.testing.assert_close(out, before + skip)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_skip_and_write_out(backend, case):
    layer, twin = (Layer(backend, case, make_weight(case, 8, -1, backend, "modulated", act_bits=4)) for _ in range(2))
    twin.weight, twin.bias = layer.weight, layer.bias
    skip = activation(case.y_shape, image=layer.image)
    x, later, *_ = trajectory(case)
    with_skip = layer.initialize(x, skip=skip)
    assert twin.initialize(x, write_out=False).shape == (0,)
    assert torch.equal(layer.y_hat, twin.y_hat)
    torch.testing.assert_close(with_skip, twin.y_hat + skip)
    with_skip = layer.update(later, skip=skip)[0]
    assert twin.update(later, write_out=False)[0].shape == (0,)
    assert torch.equal(layer.y_hat, twin.y_hat)
    torch.testing.assert_close(with_skip, twin.y_hat + skip)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_results_share_no_memory_with_state(backend, case):
    layer = Layer(backend, case, make_weight(case, 8, -1, backend, "modulated", act_bits=4))
    x, later, *_ = trajectory(case)
    scale = torch.full((case.x_shape[0],), 0.05)
    results = [layer.initialize(x), *layer.update(later, scale=scale)]
    x_hat, y_hat = layer.x_hat.clone(), layer.y_hat.clone()
    for result in results:
        result.fill_(torch.nan)
    assert torch.equal(layer.x_hat, x_hat)
    assert torch.equal(layer.y_hat, y_hat)
    assert torch.equal(scale, torch.full_like(scale, 0.05))
    assert torch.isfinite(later).all()


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_two_runs_are_alike(backend, case):
    """initialize overwrites the state, so a second run on used state gives the same results bit by bit."""
    layer = Layer(backend, case, make_weight(case, 8, -1, backend, "modulated", act_bits=4))
    inputs = list(trajectory(case))
    runs = []
    for _ in range(2):
        outs = [layer.initialize(inputs[0])]
        outs += [layer.update(x)[0] for x in inputs[1:]]
        runs.append(outs)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_update_follows_the_float_layer(backend, case):
    """8-bit residuals of a converging input: the output approaches the layer with float activations."""
    layer = Layer(backend, case, make_weight(case, 8, -1, backend, "modulated", act_bits=8))
    x = next(trajectory(case))
    layer.initialize(x)
    for step in range(STEPS):
        target = x + 0.5 / 2**step * activation(case.x_shape, image=layer.image)
        out = layer.update(target, bits=8)[0]
    expected = case.apply(target.double(), layer.weight.dense, layer.bias.double())
    assert ((out - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_non_finite_input_raises(backend, case, value):
    layer = Layer(backend, case, make_weight(case, 8, -1, backend, "modulated", act_bits=4))
    good, bad, *_ = trajectory(case)
    bad[(0,) * bad.ndim] = value
    for first_step_bits in (0, 8):
        with pytest.raises(ValueError, match=f"initialize_{case.kind}: x holds NaN or Inf"):
            layer.initialize(bad, first_step_bits=first_step_bits)
    layer.initialize(good)
    x_hat, y_hat = layer.x_hat.clone(), layer.y_hat.clone()
    with pytest.raises(ValueError, match=f"modulated_{case.kind}: x holds NaN or Inf"):
        layer.update(bad)
    assert torch.equal(layer.x_hat[0], x_hat[0])
    assert torch.equal(layer.x_hat, x_hat) or backend != "reference"
    assert torch.equal(layer.y_hat, y_hat)


def test_reference_refuses_what_does_not_fit_into_the_state():
    case = LINEAR_CASES[1]
    layer = Layer("reference", case, make_weight(case, 8, -1, "reference", "modulated"), state_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"does not fit into the state dtype torch\.float16"):
        layer.initialize(torch.full(case.x_shape, 1e5))
