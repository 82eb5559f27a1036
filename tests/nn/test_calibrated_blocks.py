"""Calibrated layers inside fused blocks: codes, biases, scales and split inputs, against their definition."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

import modiff_kernels as mk
from modiff_kernels.config.plan import LayerPlan
from modiff_kernels.nn.blocks import FusedBasicTransformerBlock, FusedResnetBlock2D
from modiff_kernels.nn.stack import LinearStack
from modiff_kernels.quant.affine import quantize_weight
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight

CALLS = 3
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
CONFIG = mk.ModiffConfig(weight_bits=4, act_bits=8, scale_mode="static")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tiny_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def calibration(unet, config=CONFIG, bits=lambda path: 4, scaled=lambda path: False):
    """Codes that are not the nearest, another bias, a scale per call, and where `scaled` a scale per input channel."""
    layers = {}
    for path, module in unet.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or config.skips(path):
            continue
        weight, input_scale = module.weight, None
        if scaled(path):
            input_scale = torch.linspace(0.5, 2.0, weight.shape[1])
            weight = weight / input_scale.view((1, -1, 1, 1) if weight.ndim == 4 else (-1,))
        layers[path] = CalibratedLayer(
            QuantizedWeight(*quantize_weight(weight, bits(path), method="mse"), bits(path)),
            act_scale=torch.linspace(0.03, 0.01, CALLS),
            input_scale=input_scale,
            bias=None if module.bias is None else module.bias + 0.05,
        )
    return mk.CalibrationResult("test", config, layers)


def outputs(unet, handle):
    generator = torch.Generator().manual_seed(1)
    x, change = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    text = torch.randn(2, 5, 24, generator=generator)
    with handle.sampling_run():
        return [unet(x + 0.1 * i * change, 500 - i, encoder_hidden_states=text).sample for i in range(CALLS)], text


def definition(path, known, x_hat, module):
    """The layer on x_hat from its calibrated codes and bias alone."""
    weight = known.weight.dequantized(module.weight.shape).double()
    bias = None if known.bias is None else known.bias.double()
    if x_hat.ndim == 3:
        return F.linear(x_hat.double(), weight, bias)
    return F.conv2d(x_hat.double(), weight, bias, module.stride, module.padding)


def x_hat_of(layer):
    return layer.edge.slots["default"].tensor


def y_hat_of(layer):
    return layer.output.slots["default"].tensor.double()


@pytest.mark.parametrize("bits", [lambda path: 4, lambda path: 3 if "to_q" in path else 4], ids=["alike", "to_q in 3"])
def test_transformer_block(bits):
    """y_hat = A(x_hat) + bias with A and bias of the calibration; layers whose bits differ are not stacked."""
    unet = tiny_unet()
    result = calibration(unet, bits=bits)
    handle = mk.accelerate(unet, calibration=result)
    block = unet.get_submodule(BLOCK)
    assert isinstance(block, FusedBasicTransformerBlock)
    names = [f"{BLOCK}.attn1.{name}" for name in ("to_q", "to_k", "to_v")]
    assert isinstance(block.attn1.stacked, LinearStack) == (bits(names[0]) == 4)
    _, text = outputs(unet, handle)
    known = result.layers
    expected = [definition(path, known[path], x_hat_of(block.attn1.to_q), block.attn1.to_q) for path in names]
    if isinstance(block.attn1.stacked, LinearStack):
        got = y_hat_of(block.attn1.stacked).split(block.attn1.stacked.widths, dim=-1)
    else:
        got = [y_hat_of(layer) for layer in block.attn1.stacked]
    for path, layer in (("attn1.to_out.0", block.attn1.to_out[0]), ("ff.net.2", block.ff.net[2])):
        expected.append(definition(path, known[f"{BLOCK}.{path}"], x_hat_of(layer), layer))
        got = [*got, y_hat_of(layer)]
    for name in ("to_k", "to_v"):  # constant: from float encoder states
        layer = handle.layers[f"{BLOCK}.attn2.{name}"]
        assert layer.mode == "constant"
        expected.append(definition(name, known[f"{BLOCK}.attn2.{name}"], text, layer))
        got.append(layer(text).double())
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


def test_split_shortcut_stays_fused():
    """The residual of a shortcut is taken after its channels were scaled: conv2(x_hat2) + conv_shortcut(x_hat)."""
    unet = tiny_unet()
    result = calibration(unet, scaled=lambda path: path.endswith("conv_shortcut"))
    handle = mk.accelerate(unet, calibration=result)
    outputs(unet, handle)
    blocks = {path: block for path, block in handle.replaced.fused.items() if isinstance(block, FusedResnetBlock2D)}
    with_shortcut = [path for path, block in blocks.items() if block.conv_shortcut is not None]
    assert len(with_shortcut) >= 3
    for path in with_shortcut:
        block = blocks[path]
        expected = sum(
            definition(name, result.layers[f"{path}.{name}"], x_hat_of(layer), layer)
            for name, layer in (("conv2", block.conv2), ("conv_shortcut", block.conv_shortcut))
        )
        torch.testing.assert_close(y_hat_of(block.conv2), expected, rtol=1e-4, atol=1e-4)


def test_scaled_inputs_of_other_layers_are_not_fused():
    """Projections that scale one tensor each in their way do not share its x_hat either."""
    unet = tiny_unet()
    result = calibration(unet, scaled=lambda path: path == f"{BLOCK}.attn1.to_q")
    handle = mk.accelerate(unet, calibration=result)
    fused = handle.replaced.fused
    assert BLOCK not in fused
    assert f"{BLOCK}.ff" in fused
    assert any(isinstance(block, FusedBasicTransformerBlock) for block in fused.values())
    layers = [handle.layers[f"{BLOCK}.attn1.{name}"] for name in ("to_q", "to_k", "to_v")]
    assert len({layer.edge.key for layer in layers}) == 3
    outputs(unet, handle)
    for layer in layers:
        expected = definition(layer.name, result.layers[layer.name], x_hat_of(layer), layer)
        torch.testing.assert_close(y_hat_of(layer), expected, rtol=1e-4, atol=1e-4)
    q, k = (x_hat_of(layer) for layer in layers[:2])
    scale = result.layers[layers[0].name].input_scale
    assert ((q - k * scale).abs() <= 0.01 * 0.51 * (1 + scale)).all()  # both within half a step of the last scale


def test_layer_plan():
    """Codes serve every low-bit unit of a plan, static scales those in the mode they were calibrated for."""
    unet = tiny_unet()
    plan = LayerPlan.of({"down_blocks.1": "float", BLOCK: "quantized 8", "up_blocks": "modulated 8"})
    result = calibration(unet)
    handle = mk.accelerate(unet, mk.ModiffConfig(4, 8, scale_mode="static", plan=plan), calibration=result)
    assert not any(path.startswith("down_blocks.1") for path in handle.layers)
    scale_modes = {(layer.mode, layer.edge.scale_mode) for layer in handle.layers.values() if layer.edge is not None}
    assert scale_modes == {("quantized", "dynamic"), ("modulated", "static")}
    for path, layer in handle.layers.items():
        assert torch.equal(layer.stored().weight.codes, result.layers[path].weight.codes)
        if layer.bias is not None:
            assert torch.equal(layer.bias_data, result.layers[path].bias)
    got, _ = outputs(unet, handle)
    handle.remove()
    exact, _ = outputs(unet, mk.accelerate(unet, mk.ModiffConfig(4, None), calibration=result))
    for ours, truth in zip(got, exact, strict=True):
        assert (ours - truth).norm() < 0.3 * truth.norm()
