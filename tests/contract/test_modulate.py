"""modulate at every place: whole runs. y_hat == A(x_hat) + bias after every update; the outputs are those of the method
in float64 (ops/naive.py); the composition of quantize and product and a backend's own fusion are one."""

import itertools
import math
import random

import pytest
import torch

from modiff_kernels.backends import reference
from modiff_kernels.ops import naive
from modiff_kernels.quant.affine import residual_scale
from modiff_kernels.quant.operands import IDENTITY
from tests.contract import cases
from tests.contract.cases import ACT_BITS, BITS, EPS32, SMALL, Case, activation, conv, weight_of

OP = "modulate"

LINEAR, CONV, POINTWISE = SMALL
TINY = [Case((2, 3, 64), 5), conv((2, 16, 4, 3), 9), conv((2, 32, 3, 3), 7, 1, padding=0)]


class Layer:
    """A layer and its state at a place."""

    def __init__(self, place, case, bits=8, group_size=-1, granularity="per_sample", dtype=torch.float32,
                 state_dtype=torch.float32):  # fmt: skip
        self.place, self.case, self.dtype, self.updates = place, case, dtype, 0
        self.weight = weight_of(place, case, bits, group_size, granularity)
        self.bias = torch.randn(case.n)
        self.x_hat, self.y_hat = activation(case.x_shape, state_dtype), activation(case.y_shape, state_dtype)

    def begin(self):
        """x_hat = 0, y_hat = bias; what was there before is forgotten."""
        self.x_hat.zero_()
        self.y_hat.copy_(self.case.over_columns(self.bias).expand_as(self.y_hat))
        self.updates = 0

    def update(self, h, scale=None, bits=4, granularity="per_sample", clip_ratio=1.0, prologue=IDENTITY, skip=None,
               write_out=True, last_absmax=None):  # fmt: skip
        """out, scale, absmax, after the state was found consistent."""
        out, used, absmax = self.place.modulate(
            h, prologue, self.x_hat, scale, self.weight.packed, self.y_hat, skip, self.case.window, self.dtype, bits,
            granularity, clip_ratio, write_out, last_absmax,
        )  # fmt: skip
        self.updates += 1
        cases.assert_invariant(self.case, self.x_hat, self.y_hat, self.weight.dense, self.bias, self.updates)
        if write_out:
            assert (out.dtype, out.stride()) == (self.dtype, self.y_hat.stride())
            eps = max(torch.finfo(self.dtype).eps, torch.finfo(self.y_hat.dtype).eps)
            total = self.y_hat.float() + (0 if skip is None else skip.float())
            torch.testing.assert_close(out.float(), total, rtol=eps, atol=eps)
        return out, used, absmax

    def run(self, inputs, bits, granularity="per_sample", scale_mode="dynamic", **more):
        """The outputs of a run: its first call makes two updates of 8 bits."""
        self.begin()
        outputs, last = [], None
        for call, x in enumerate(inputs):
            for update_bits in [8, 8] if call == 0 else [bits]:
                given = torch.full((1,), 0.05) if scale_mode == "static" and call > 0 else None
                before = None if last is None else last.clone()
                out, used, absmax = self.update(x, given, update_bits, granularity, last_absmax=last, **more)
            if last is not None:
                assert torch.equal(used, residual_scale(before, bits))
                assert torch.equal(last, absmax)
            outputs.append(out)
            last = absmax if scale_mode == "delayed" else None
        return outputs


def trajectory(case, calls, dtype=torch.float32):
    """Inputs that change little from call to call, as large in the end as in the beginning."""
    a, b = activation(case.x_shape), activation(case.x_shape)
    turns = (math.pi * call / 25 for call in range(calls))
    return [(a * math.cos(turn) + b * math.sin(turn)).to(dtype) for turn in turns]


def follow(layer, x, bits):
    """One update beside that of the method in float64, from the same state; whether no code was at a tie."""
    x_hat, y_hat = layer.x_hat.double(), layer.y_hat.double()
    residual = x.double() - x_hat
    scale = naive.absmax_scale(residual, bits)
    codes = naive.quantize(x.double(), x_hat, scale, bits)
    wanted = naive.product(codes, scale, y_hat, lambda t: layer.case.apply(t, layer.weight.dense))
    out, *_ = layer.update(x, None, bits)
    # The largest residual is half a step above the largest code: below zero that is a tie.
    at_tie = ((residual / scale % 1 - 0.5).abs() < 1e-4) & (residual / scale < 2 ** (bits - 1) - 1)
    assert ((layer.x_hat - x_hat).abs() <= torch.where(at_tie, 1.001 * scale, 8 * EPS32 * (1 + x_hat.abs()))).all()
    assert at_tie.any() or ((out - wanted).abs() <= 1e-5 * wanted.abs().max()).all()
    return not at_tie.any()


@pytest.mark.parametrize("bits", [8, 4])
def test_runs_follow_the_method(place, bits):
    """Two runs of 20 calls on one state, each update beside the method's."""
    for case in [TINY[0 if bits == 8 else 1]] if place.few else TINY:
        layer, exact = Layer(place, case), 0
        for _ in range(2):
            inputs = trajectory(case, 20)
            layer.begin()
            for call, x in enumerate(inputs):
                exact += sum(follow(layer, x, width) for width in ([8, 8] if call == 0 else [bits]))
            apply = lambda t: case.apply(t, layer.weight.dense)  # noqa: E731, B023 (used in this turn of the loop alone)
            wanted = naive.run([x.double() for x in inputs], apply, case.over_columns(layer.bias), bits)
            # Whole runs part at the first tie, by what a step of the last updates is worth.
            apart = (layer.y_hat - wanted[-1]).abs().max() / wanted[-1].abs().max()
            assert apart < (0.2 if bits == 4 else 0.01)
        assert exact >= 2


FORMS = [("per_tensor", "static"), ("per_sample", "static"), ("per_tensor", "dynamic"), ("per_sample", "dynamic"),
         ("per_token", "dynamic"), ("per_block", "dynamic"), ("per_sample", "delayed"),
         ("per_tensor", "delayed"), ("per_token", "delayed")]  # fmt: skip


def test_forms_of_the_update(place):
    """Granularities and sources of the scale, with dtypes and widths drawn at random: the invariant holds."""
    draw = random.Random(0).choice
    for (granularity, scale_mode), case in itertools.product(FORMS, TINY if place.few else SMALL + TINY):
        if place.few and draw([True, False]):
            continue
        dtype, state_dtype, weight_bits = draw(place.dtypes), draw(place.dtypes), 8 if case.k % 32 else draw(BITS)
        if granularity == "per_token" and case.window and not case.window.is_pointwise:
            continue  # such scales do not leave the sum
        layer = Layer(place, case, weight_bits, -1, granularity, dtype, state_dtype)
        layer.run(trajectory(case, 2 if place.few else 4, dtype), draw(ACT_BITS), granularity, scale_mode)


def test_group_scales_of_weights(place):
    for case in SMALL:
        layer = Layer(place, case, 4, 32)
        if layer.weight is not None:
            layer.run(trajectory(case, 3), 4)


def test_prologues(place):
    """out of the layer behind a norm, 8 bits: that of the float layer within a few steps of the last residual."""
    for case, given, more in [
        (CONV, cases.group_norm(CONV.x_shape, 8), "per_block"),
        (POINTWISE, cases.group_norm(POINTWISE.x_shape, 8, shift=False), "per_token"),
        (LINEAR, cases.layer_norm(LINEAR.x_shape), "per_token"),
        (LINEAR, cases.geglu(LINEAR.x_shape), "per_sample"),
    ]:
        layer = Layer(place, case, granularity=more if more == "per_token" else "per_sample")
        layer.begin()
        for _ in range(2):
            out, used, _ = layer.update(given.h, None, 8, more, prologue=given.prologue)
        expected = case.apply(given.x, layer.weight.dense, layer.bias.double())
        spread = case.apply(torch.ones(case.x_shape, dtype=torch.double), layer.weight.dense.abs())
        step = 0.51 * used.max().item() + given.error.max().item() + 4 * EPS32
        assert ((out - expected).abs() <= step * spread + 1e-4 * expected.abs().max()).all()


def test_it_is_quantize_and_product(place):
    """In one piece or two: scales and absmax bit for bit, states but for the order of an addition."""
    for case, granularity in itertools.product(TINY, ("per_sample", "per_token", "per_tensor")):
        if granularity == "per_token" and case.window and not case.window.is_pointwise:
            continue
        whole = Layer(place, case, granularity=granularity, dtype=torch.float16)
        x, skip = activation(case.x_shape, torch.float16), activation(case.y_shape, torch.float16)
        for scale in (None, torch.rand(case.scales(granularity)) * 0.1 + 0.01):
            whole.begin()
            x_hat, y_hat = whole.x_hat.clone(), whole.y_hat.clone()
            out, used, absmax = whole.update(x, scale, 4, granularity, 0.9, skip=skip)
            codes, *wanted = reference.quantize(x, IDENTITY, x_hat, scale, 4, granularity, 0.9, True)
            assert torch.equal(used, wanted[0])
            assert torch.equal(absmax, wanted[1])
            operands = (codes, used, None, whole.weight.packed, y_hat, None, skip)
            expected = place.product(*operands, case.window, torch.float16)
            torch.testing.assert_close(whole.x_hat, x_hat, rtol=2 * EPS32, atol=2 * EPS32)
            torch.testing.assert_close(whole.y_hat, y_hat, rtol=4 * EPS32, atol=4 * EPS32)
            torch.testing.assert_close(out, expected, rtol=2**-10, atol=2**-12)  # a unit of float16


def test_results_and_state_share_no_memory(place):
    for case in SMALL:
        layer = Layer(place, case)
        layer.begin()
        twin = layer.x_hat.clone(), layer.y_hat.clone()
        x, scale = activation(case.x_shape), torch.full((case.x_shape[0],), 0.05)
        results = layer.update(x, scale)
        state = layer.x_hat.clone(), layer.y_hat.clone()
        for result in results:
            result.fill_(torch.nan)
        assert torch.equal(layer.x_hat, state[0])
        assert torch.equal(layer.y_hat, state[1])
        assert (scale == torch.tensor(0.05)).all()
        for now, then in zip((layer.x_hat, layer.y_hat), twin):
            now.copy_(then)
        assert layer.update(x, scale, write_out=False)[0].shape == (0,)
        assert torch.equal(layer.y_hat, state[1])


@pytest.mark.parametrize(("granularity", "state_dtype"), [("per_sample", torch.float16), ("per_block", torch.float32)])
def test_the_state_does_not_drift(place, granularity, state_dtype):
    """Roundings are a random walk, not the same in two backends, but over 300 updates as long as the reference's."""
    if place.few or place.backend == "reference":
        return
    case, drift = conv((2, 32, 6, 7), 16), []
    inputs = trajectory(case, 50)
    for at in (place, None):
        torch.manual_seed(1)
        layer = Layer(place, case, granularity="per_sample", state_dtype=state_dtype)
        layer.begin()
        dense = layer.weight.dense
        for step in range(300):
            args = (inputs[step % 50], IDENTITY, layer.x_hat, None)
            if at is None:
                codes, used, _ = reference.quantize(*args, 4, granularity, 1.0, True)
                change = case.apply(codes.double() * case.over_rows(used), dense)
                layer.y_hat.copy_((layer.y_hat.double() + change).float())
            else:
                more = (layer.weight.packed, layer.y_hat, None, case.window, torch.float16)
                place.modulate(*args, *more, 4, granularity, 1.0, False)
        exact = case.apply(layer.x_hat.double(), dense, layer.bias.double())
        drift.append((layer.y_hat.double() - exact).square().mean().sqrt().item())
    assert drift[0] <= 2 * drift[1]


def test_nan_is_refused_or_shows(place):
    layer = Layer(place, LINEAR)
    layer.begin()
    layer.update(activation(LINEAR.x_shape))
    bad, x_hat, y_hat = activation(LINEAR.x_shape), layer.x_hat.clone(), layer.y_hat.clone()
    bad[1, 2, 3] = math.nan
    arguments = (bad, IDENTITY, layer.x_hat, None, layer.weight.packed, layer.y_hat)
    if place.raises:
        with pytest.raises(ValueError, match="quantize: x holds NaN or Inf"):
            place.modulate(*arguments)
        assert torch.equal(layer.x_hat[1], x_hat[1])
        assert torch.equal(layer.y_hat, y_hat)
    else:
        assert place.modulate(*arguments)[2].isfinite().tolist() == [True, False]
