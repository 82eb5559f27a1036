"""Layers with calibrated codes, bias, input scales and static scales, against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn import ModulatedConv2d, ModulatedLinear, ModulationState
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight

LAYERS = {
    "linear": (lambda: nn.Linear(20, 6), (3, 5, 20)),
    "conv3x3": (lambda: nn.Conv2d(16, 12, 3, padding=1), (2, 16, 5, 7)),
    "conv1x1": (lambda: nn.Conv2d(16, 12, 1), (2, 16, 5, 5)),
}


def build(kind, calibrated, **options):
    module = LAYERS[kind][0]().requires_grad_(False)
    make = ModulatedLinear.from_linear if kind == "linear" else ModulatedConv2d.from_conv2d
    state = ModulationState()
    known = calibrated(module)
    return module, make(module, ModiffConfig(**options), state, "layer", calibrated=known), known, state


def apply(module, x, weight, bias):
    x, weight = x.double(), weight.double()
    if x.ndim == 3:
        return F.linear(x, weight, bias.double())
    return F.conv2d(x, weight, bias.double(), module.stride, module.padding)


def channels(scale, x):
    return scale if x.ndim == 3 else scale[:, None, None]


def everything(module):
    """Codes of the scaled weight, a table of one scale, an input scale and a bias."""
    inputs = module.weight.shape[1]
    input_scale = torch.linspace(0.5, 2.0, inputs)
    shape = (1, -1, 1, 1) if module.weight.ndim == 4 else (-1,)
    weight = QuantizedWeight.rounded(module.weight / input_scale.view(shape), 4)
    return CalibratedLayer(
        weight, torch.tensor([0.02]), torch.tensor([-3], dtype=torch.int32), input_scale, torch.randn(len(module.bias))
    )


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_plain_layer_with_static_scale(kind, backend):
    options = {"weight_bits": 4, "act_bits": 8, "mode": "quantized", "scale_mode": "static", "backend": backend}
    module, layer, known, _ = build(kind, everything, **options)
    x = torch.randn(LAYERS[kind][1])
    scaled = (x * channels(known.input_scale, x)).double()
    codes = torch.clamp(torch.round(scaled.float() * (1 / known.act_scale)).double() - 3, -128, 127)
    expected = apply(module, (codes + 3) * 0.02, known.weight.dequantized(module.weight.shape), known.bias)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_modulated_layer_keeps_the_invariant(kind):
    module, layer, known, state = build(kind, everything, weight_bits=4, act_bits=4, scale_mode="static")
    x = torch.randn(LAYERS[kind][1])
    with state.sampling_run():
        for step in range(4):
            with state.call():
                out = layer(x + 0.02 * step)
            x_hat = layer.edge.slots["default"].tensor
            expected = apply(module, x_hat, known.weight.dequantized(module.weight.shape), known.bias)
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    error = x_hat - (x + 0.06) * channels(known.input_scale, x)
    assert error.abs().max() <= 0.02 * 0.5 + 1e-5


@pytest.mark.parametrize("kind", LAYERS)
def test_float_activations(kind):
    module, layer, known, _ = build(kind, everything, weight_bits=4, act_bits=None)
    x = torch.randn(LAYERS[kind][1])
    scaled = x * channels(known.input_scale, x)
    expected = apply(module, scaled, known.weight.dequantized(module.weight.shape), known.bias)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_bits_and_groups_are_those_of_the_codes():
    calibrated = CalibratedLayer(QuantizedWeight.rounded(torch.randn(6, 20), 3, 10))
    linear = nn.Linear(20, 6).requires_grad_(False)
    linear.weight.copy_(calibrated.weight.dequantized())
    layer = ModulatedLinear.from_linear(linear, ModiffConfig(4, None), ModulationState(), "l", calibrated=calibrated)
    assert (layer.weight_bits, layer.group_size) == (3, 10)
    torch.testing.assert_close(layer.float_weight, linear.weight)


@pytest.mark.parametrize(
    ("calibrated", "message"),
    [
        (lambda: CalibratedLayer(QuantizedWeight.rounded(torch.randn(6, 19), 4)), r"the layer needs int8 \(6, 20\)"),
        (
            lambda: CalibratedLayer(QuantizedWeight(torch.zeros(6, 20, dtype=torch.int8), torch.ones(5), 4)),
            r"group_size -1 needs float32 \(6,\)",
        ),
        (
            lambda: CalibratedLayer(QuantizedWeight(torch.full((6, 20), 9, dtype=torch.int8), torch.ones(6), 4)),
            r"codes from 9 to 9 do not fit 4 bits",
        ),
        (
            lambda: CalibratedLayer(QuantizedWeight(torch.zeros(6, 20, dtype=torch.int8), torch.zeros(6), 4)),
            r"a scale is not positive and finite",
        ),
        (lambda: CalibratedLayer(QuantizedWeight.rounded(torch.randn(6, 20), 4)), r"away from the weight of the layer"),
        (lambda: CalibratedLayer(input_scale=torch.ones(19)), r"input_scale \(19,\) does not fit 20 input channels"),
        (
            lambda: CalibratedLayer(bias=torch.ones(7)),
            r"a calibrated bias \(7,\) does not fit a layer of 6 outputs with",
        ),
        (lambda: CalibratedLayer(act_zero_point=torch.zeros(1, dtype=torch.int32)), r"zero point needs a static scale"),
    ],
)
def test_what_does_not_fit(calibrated, message):
    linear = nn.Linear(20, 6).requires_grad_(False)
    with pytest.raises(ValueError, match=rf"(?s)layer 'l': .*{message}"):
        ModulatedLinear.from_linear(linear, ModiffConfig(4, 8), ModulationState(), "l", calibrated=calibrated())


def test_tables_of_two_lengths():
    config, state = ModiffConfig(8, 8, scale_mode="static"), ModulationState()
    linear = nn.Linear(4, 4)
    for name, calls in (("a", 3), ("b", 5)):
        calibrated = CalibratedLayer(act_scale=torch.rand(calls) + 0.1)
        if calls == 3:
            ModulatedLinear.from_linear(linear, config, state, name, calibrated=calibrated)
            continue
        with pytest.raises(ValueError, match=r"layer 'b': a table of 5 scales.* tables of 3"):
            ModulatedLinear.from_linear(linear, config, state, name, calibrated=calibrated)
