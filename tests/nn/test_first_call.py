"""The first call of a run: x_hat = 0, y_hat = bias, then two updates of 8 bits, as good as a float call."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr
from modiff_kernels.nn import ModulatedConv2d, ModulatedLinear, ModulationState, step
from modiff_kernels.ops import naive
from tests.unets import NETWORKS, WIDTH, each_backend, lone, outputs, text, trajectory

FIRST_CALL_DB = 70.0
"""SQNR of a first call of a UNet to float activations. Two updates of 8 bits give 95 dB for one layer."""


def layer_of(kind, **options):
    """A low-bit layer, and its operator without bias in float64 as `naive.run` takes it."""
    arguments = mk.ModiffConfig(**options), ModulationState(), "layer"
    if kind == "linear":
        layer = ModulatedLinear.from_linear(nn.Linear(24, 20), *arguments)
    else:
        layer = ModulatedConv2d.from_conv2d(nn.Conv2d(16, 8, 3, padding=1), *arguments)
    weight = layer.stored().weight.dequantized(layer.weight.shape).double()
    return layer, lambda x: F.linear(x, weight) if kind == "linear" else F.conv2d(x, weight, padding=1)


SHAPES = {"linear": (3, 7, 24), "conv3x3": (2, 16, 5, 5)}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("act_bits", [3, 4, 7, 8])
@each_backend
def test_runs_equal_the_method_as_the_papers_write_it(kind, act_bits, backend):
    """Also the second run, whose state is not new. The largest residual of a sample lies at a tie by definition of the
    scale; here it is positive, so that float32 and float64 clamp to the same code."""
    layer, apply = layer_of(kind, act_bits=act_bits, granularity="per_sample", backend=backend)
    inputs = trajectory(SHAPES[kind], 4)
    for call, x in enumerate(inputs):
        x.flatten(1)[:, 0] = 5 + call
    bias = layer.bias.double().view((-1, 1, 1) if kind == "conv3x3" else (-1,))
    expected = naive.run([x.double() for x in inputs], apply, bias, act_bits)
    for _ in range(2):
        with layer.state.sampling_run():
            for call, (x, wanted) in enumerate(zip(inputs, expected)):
                with layer.state.call():
                    assert sqnr(layer(x).double(), wanted) > 100, call  # float32


def test_the_first_call_takes_8_bits_and_dynamic_scales_whatever_later_ones_take(monkeypatch):
    asked = []
    original = step.repeated
    monkeypatch.setattr(step, "repeated", lambda *call: asked.append((call[2], call[3][3:7])) or original(*call))
    layer, _ = layer_of("linear", act_bits=3, scale_mode="delayed", clip_ratio=0.8, granularity="per_token")
    with layer.state.sampling_run(), layer.state.call():
        layer(torch.randn(3, 7, 24))
    assert [form for op, form in asked if op is step.ops.quantize] == [(None, 8, "per_token", 1.0)] * 2


def test_first_calls_are_those_of_float_activations():
    for network, options, decibels in (
        ("unet2d", {}, 55),  # attention on a CPU has weights and values of 8 bits
        ("unet2d", {"fuse": False}, FIRST_CALL_DB),
        ("sd15", {"state_dtype": "float16"}, 45),  # a state in float16 has 11 bits itself: 66 dB for one layer
        ("sdxl", {}, 55),
    ):
        first = []
        for act_bits in (None, 3):
            unet = NETWORKS[network](**({"downsample_padding": 0} if network == "unet2d" else {}))
            first += outputs(unet, mk.accelerate(unet, mk.ModiffConfig(act_bits=act_bits, **options)), calls=1)
        assert sqnr(first[1], first[0]) > decibels


def test_stack_and_shared_y_hat_take_two_products_each_in_the_first_call(reference_calls):
    net = lone(BasicTransformerBlock(32, 2, 16, cross_attention_dim=WIDTH))
    handle = mk.accelerate(net, mk.ModiffConfig(backend="reference", plan="modulated"))
    counts = []
    encoder = text()
    with handle.sampling_run():
        for _ in range(3):
            before = len(reference_calls)
            net(torch.randn(2, 9, 32), encoder)
            counts.append([reference_calls[before:].count(name) for name in ("quantize", "product")])
    # qkv as one, to_out, to_q, to_out, two of the feed-forward; k and v of the encoder states as one, once per run
    assert counts == [[14, 14], [6, 6], [6, 6]]
