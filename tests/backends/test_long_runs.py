"""1000 updates of a layer: its state stays y_hat == A(x_hat) + bias, on every backend as well as on the reference."""

import math

import pytest
import torch

from modiff_kernels import ops
from tests.ops.op_cases import ConvCase, LinearCase, activation, assert_invariant, make_weight, poisoned

STEPS = 1000
PERIOD = 125  # inputs go around in a circle: as large after 1000 steps as before
CONV, LINEAR = ConvCase((2, 32, 6, 7), 32), LinearCase((2, 20, 64), 48)
RUNS = [
    (CONV, "per_tensor", 8, torch.float16),
    (CONV, "per_sample", 8, torch.float32),
    (CONV, "per_sample", 4, torch.float16),
    (CONV, "per_sample", 4, torch.bfloat16),
    (CONV, "per_block", 4, torch.float16),
    (LINEAR, "per_token", 3, torch.float16),
]
"""Case, granularity, act_bits, dtype of the state."""


def inputs(case):
    """One turn of a circle, every input near the one before."""
    a, b = (activation(case.x_shape) for _ in range(2))
    turns = (2 * math.pi * step / PERIOD for step in range(PERIOD))
    return [a * math.cos(turn) + b * math.sin(turn) for turn in turns]


def state_after(case, granularity, act_bits, state_dtype, backend, device):
    """x_hat, y_hat, weight and bias after STEPS updates."""
    torch.manual_seed(0)
    formats = {"act_bits": act_bits, "granularity": granularity, "state_dtype": state_dtype}
    weight = make_weight(case, 8, -1, backend if device == "cpu" else "reference", "modulated", **formats)
    bias, xs = torch.randn(case.n), [x.to(device) for x in inputs(case)]
    image = case.kind == "conv2d"
    x_hat, y_hat = (poisoned(shape, state_dtype, image).to(device) for shape in (case.x_shape, case.y_shape))
    tensors = [t.to(device) for t in weight.tensors]
    initialize, modulated = (getattr(ops, f"{stem}_{case.kind}") for stem in ("initialize", "modulated"))
    last = (*weight.format, *case.conv_args)
    with torch.backends.cudnn.flags(allow_tf32=False):  # the first call is torch's own on a GPU
        initialize(xs[0], x_hat, y_hat, *tensors, bias.to(device), None, *last, backend=backend)
    arguments = (x_hat, None, *tensors, y_hat, None, act_bits, granularity, 1.0, *last, True, backend)
    update = modulated.plan(xs[0], *arguments)
    for step in range(1, STEPS + 1):
        update(xs[step % PERIOD], *arguments[:-1])
    return x_hat.cpu(), y_hat.cpu(), weight, bias


def drift(case, x_hat, y_hat, weight, bias):
    """RMS of y_hat - (A(x_hat) + bias), in float64."""
    exact = case.apply(x_hat.double(), weight.dense, bias.double())
    return (y_hat.double() - exact).square().mean().sqrt().item()


@pytest.mark.parametrize(("case", "granularity", "act_bits", "state_dtype"), RUNS, ids=str)
def test_the_state_does_not_drift(at, case, granularity, act_bits, state_dtype):
    run = (case, granularity, act_bits, state_dtype)
    state = state_after(*run, *at)
    assert_invariant(case, *state, STEPS)
    # Roundings are a random walk: no two backends have the same one, but the same length.
    assert drift(case, *state) <= 2 * drift(case, *state_after(*run, "reference", "cpu"))
