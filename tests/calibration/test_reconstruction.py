"""Differentiable layers: values against the real low-bit layers, gradients against LSQ's formula."""

import pytest
import torch
from torch import nn

from modiff_kernels.calibration.reconstruction import ROUNDINGS, FakeLayer, fake_quantize, fake_quantized
from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn import ModulatedConv2d, ModulatedLinear, ModulationState
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight


def calibrated(module, zero_point=None):
    inputs = module.weight.shape[1]
    scale = torch.linspace(0.5, 2.0, inputs)
    shape = (1, -1, 1, 1) if module.weight.ndim == 4 else (-1,)
    weight = QuantizedWeight.rounded(module.weight.detach() / scale.view(shape), 4)
    points = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int32)
    return CalibratedLayer(weight, torch.tensor([0.3]), points, scale, torch.randn(len(module.bias)))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("mode", ["quantized", "modulated"])
def test_hard_codes_compute_what_the_low_bit_layer_computes(kind, mode):
    if kind == "linear":
        module, make, shape = nn.Linear(24, 6), ModulatedLinear.from_linear, (3, 5, 24)
    else:
        module, make, shape = nn.Conv2d(8, 6, 3, padding=1), ModulatedConv2d.from_conv2d, (2, 8, 5, 6)
    known = calibrated(module.requires_grad_(False), zero_point=2 if mode == "quantized" else None)
    state = ModulationState()
    config = ModiffConfig(4, 4, mode=mode, scale_mode="static", backend="reference")
    layer = make(module, config, state, "l", calibrated=known)
    fake = FakeLayer(module, known, mode, 4)
    fake.hard = True
    before, x = torch.randn(2, *shape)
    if mode == "quantized":
        torch.testing.assert_close(fake(x), layer(x), rtol=1e-4, atol=1e-4)
        return
    with state.sampling_run():
        for value in (before, x):
            fake.remember = value is before
            with state.call():
                expected = layer(value)
            # x_hat of the first call is its input but for the rounding of two updates of 8 bits
            torch.testing.assert_close(fake(value), expected, rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_lsq():
    x = torch.tensor([0.07, 0.34, -0.52, 5.0, -5.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    out = fake_quantize(x, scale, 4, 1.0)
    torch.testing.assert_close(out.detach(), torch.tensor([0.1, 0.3, -0.5, 0.6, -0.9], dtype=torch.float64))
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    out.backward(upstream)
    assert x.grad.tolist() == pytest.approx([1, 2, 3, 0, 0])
    by_hand = [1 - 0.7, 3 - 3.4, -5 + 5.2, 7 - 1, -8 - 1]
    assert scale.grad.item() == pytest.approx(sum(g * d for g, d in zip(upstream.tolist(), by_hand)))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_result_gives_the_start_back(rounding):
    module = nn.Linear(24, 6).requires_grad_(False)
    known = calibrated(module)
    result = FakeLayer(module, known, "quantized", 4, rounding).result()
    assert torch.equal(result.weight.codes, known.weight.codes)
    assert torch.equal(result.weight.scale, known.weight.scale)
    assert torch.equal(result.bias, known.bias)


def test_straight_through_rounds_and_passes_the_gradient_on():
    module = nn.Linear(24, 6).requires_grad_(False)
    fake = FakeLayer(module, calibrated(module), "quantized", 4, "straight_through")
    fake.variable.copy_(torch.linspace(-12, 12, 144).view(6, 24)).requires_grad_(True)
    fake.codes().sum().backward()
    assert torch.equal(fake.variable.grad, ((fake.variable >= -8) & (fake.variable <= 7)).float())
    assert torch.equal(fake.result().weight.codes, fake.variable.detach().clamp(-8, 7).round().to(torch.int8))


def test_adaround_moves_codes_to_the_neighbour_towards_the_weight():
    module = nn.Linear(24, 6).requires_grad_(False)
    known = calibrated(module)
    fake = FakeLayer(module, known, "quantized", 4)
    rows = module.weight / known.input_scale
    soft = (fake.codes() * fake.weight_scale[:, None] - rows).abs()
    assert soft.max() < 1.01 * fake.weight_scale.max()
    fake.variable.neg_()
    moved = fake.result().weight.codes - known.weight.codes
    assert moved.abs().max() == 1
    inside = (known.weight.codes > -8) & (known.weight.codes < 7)
    assert moved[inside].ne(0).all()
    towards = (rows - known.weight.dequantized()).sign()
    assert torch.equal(moved[inside].float(), torch.where(towards == 0, -1.0, towards)[inside])


def test_the_network_gets_its_layers_back():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
    linear, inner = net[0], net[2][0]
    layers = {"0": calibrated(linear), "2.0": calibrated(inner)}
    with fake_quantized(net, layers, "modulated", 4) as fakes:
        assert (net[0], net[2][0]) == (fakes["0"], fakes["2.0"])
        with pytest.raises(RuntimeError, match="no previous input"):
            net(torch.randn(1, 4))
    assert (net[0], net[2][0]) == (linear, inner)
    with pytest.raises(ValueError, match="has no codes"):
        FakeLayer(linear, CalibratedLayer(), "quantized", 4)
