"""The first call of a run: x_hat = 0, y_hat = bias, then two updates of 8 bits, as good as a float call."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr
from modiff_kernels.nn import ModulatedConv2d, ModulatedLinear, ModulationState, step
from modiff_kernels.nn.blocks import FusedBlock, FusedResnetBlock2D
from modiff_kernels.ops import IDENTITY, naive
from tests.unets import (
    NETWORKS,
    assert_invariant,
    each_backend,
    fused_blocks,
    outputs,
    text,
    trajectory,
    unet2d,
    y_hat_of,
)

FIRST_CALL_DB = 70.0
"""SQNR of a first call to float activations. Two updates of 8 bits leave half a step of 1 / 255^2 of the largest
residual: 95 dB for one layer, and less for the dozens of layers of a UNet."""


def layer_of(kind, state=None, name="layer", **options):
    """A low-bit layer, and its operator without bias in float64 as `naive.run` takes it."""
    config = mk.ModiffConfig(**options)
    state = state or ModulationState()
    if kind == "linear":
        module = nn.Linear(24, 20)
        layer = ModulatedLinear.from_linear(module, config, state, name)
        weight = layer.stored().weight.dequantized(module.weight.shape).double()
        return layer, lambda x: F.linear(x, weight)
    module = nn.Conv2d(16, 8, 3, padding=1)
    layer = ModulatedConv2d.from_conv2d(module, config, state, name)
    weight = layer.stored().weight.dequantized(module.weight.shape).double()
    return layer, lambda x: F.conv2d(x, weight, padding=1)


SHAPES = {"linear": (3, 7, 24), "conv3x3": (2, 16, 5, 5)}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("act_bits", [3, 4, 8])
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


@pytest.mark.parametrize("kind", SHAPES)
def test_the_ops_of_a_call_are_counted(kind, reference_calls):
    """Two quantisations and two products in the first call of every run and context, then one of each."""
    layer, _ = layer_of(kind, backend="reference")
    counts = []
    for _ in range(2):
        with layer.state.sampling_run():
            for context in ("cond", "uncond", "cond", "uncond"):
                before = len(reference_calls)
                with layer.state.context(context), layer.state.call():
                    layer(torch.randn(SHAPES[kind]))
                counts.append(reference_calls[before:])
    first, later = ["quantize", "quantize", "product", "product"], ["quantize", "product"]
    assert counts == [first, first, later, later] * 2


def test_the_first_call_takes_8_bits_and_dynamic_scales_whatever_later_ones_take(monkeypatch):
    asked = []
    original = step.ops.quantize
    monkeypatch.setattr(step.ops, "quantize", lambda *args: asked.append(args[3:7]) or original(*args))
    layer, _ = layer_of("linear", act_bits=3, scale_mode="delayed", clip_ratio=0.8, granularity="per_token")
    with layer.state.sampling_run(), layer.state.call():
        layer(torch.randn(3, 7, 24))
    assert asked == [(None, 8, "per_token", 1.0)] * 2


class Filled:
    """Copies of what states were filled with at the beginning of a run, by key."""

    def __init__(self, handle, monkeypatch):
        self.values = {}
        for holder in (*handle.state.inputs.values(), *handle.state.outputs.values()):
            monkeypatch.setattr(holder, "fill", self.recording(holder))

    def recording(self, holder):
        original = holder.fill

        def fill(tensor):
            tensor.fill_(float("nan"))  # whatever the last run left
            original(tensor)
            self.values[holder] = tensor.clone()

        return fill


@pytest.mark.parametrize("network", ["unet2d", "sd15"])
def test_a_run_begins_with_zero_and_the_bias(network, monkeypatch):
    """With the sum of biases in a y_hat that conv2 and shortcut share, and all of them, in order, in a stack's."""
    unet = NETWORKS[network]()
    handle = mk.accelerate(unet, mk.ModiffConfig(state_dtype="float16"))
    filled = Filled(handle, monkeypatch)
    for _ in range(2):
        filled.values.clear()
        outputs(unet, handle, calls=2)
        for holder in handle.state.inputs.values():
            assert not filled.values[holder].any()
        shared = 0
        for holder in handle.state.outputs.values():
            writers = [layer for layer in handle.layers.values() if layer.output is holder]
            biases = [torch.zeros(len(w.weight)) if w.bias is None else w.bias for w in writers]
            bias = torch.cat(biases) if writers[0].stack is not None else sum(biases)
            value = filled.values[holder]
            bias = bias.half().view((-1, 1, 1) if value.ndim == 4 else (-1,))
            assert torch.equal(value, bias.expand(value.shape))
            shared += len(writers) > 1 and writers[0].stack is None
        assert shared >= 3
    assert assert_invariant(handle.layers.values(), 3) > 10


class Wrapped(nn.Module):
    """One block as the network around it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, **conditions):
        return self.block(x, **conditions)


def block_cases():
    """Blocks with what they are called with: all kinds that have a fused form."""
    resnet = {"temb": torch.randn(2, 64)}
    return {
        "resnet": ("up_blocks.1.resnets.1", unet2d, (2, 32, 8, 8), resnet),
        "resnet-shortcut": ("up_blocks.0.resnets.0", unet2d, (2, 64, 4, 4), resnet),
        "attention": ("mid_block.attentions.0", unet2d, (2, 32, 4, 4), {}),
        "upsample": ("up_blocks.0.upsamplers.0", unet2d, (2, 32, 4, 4), {}),
        "downsample": ("down_blocks.0.downsamplers.0", lambda: unet2d(downsample_padding=0), (2, 16, 8, 8), {}),
        "transformer": ("mid_block.attentions.0", NETWORKS["sd15"], (2, 32, 4, 4), {"encoder_hidden_states": text()}),
        "transformer-linear": (
            "mid_block.attentions.0",
            NETWORKS["sdxl"],
            (2, 32, 4, 4),
            {"encoder_hidden_states": text()},
        ),
    }


@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "layers"])
@pytest.mark.parametrize("case", block_cases())
def test_first_calls_of_blocks_are_those_of_float_activations(case, fuse, state_dtype):
    path, make, shape, conditions = block_cases()[case]
    x = torch.randn(shape)
    results = {}
    for act_bits in (None, 3):
        net = Wrapped(make().get_submodule(path))
        handle = mk.accelerate(net, mk.ModiffConfig(act_bits=act_bits, fuse=fuse, state_dtype=state_dtype))
        assert bool(fused_blocks(net, FusedBlock)) == (fuse and act_bits is not None)
        with handle.sampling_run():
            out = net(x, **conditions)
        results[act_bits] = out if isinstance(out, torch.Tensor) else out.sample
    # a state in float16 has 11 bits itself: 66 dB for one layer
    assert sqnr(results[3], results[None]) > (FIRST_CALL_DB if state_dtype == "float32" else 52)


@pytest.mark.parametrize("network", NETWORKS)
def test_first_calls_of_unets_are_those_of_float_activations(network):
    exact = outputs(unet := NETWORKS[network](), mk.accelerate(unet, mk.ModiffConfig(act_bits=None)), calls=1)
    got = outputs(unet := NETWORKS[network](), mk.accelerate(unet, mk.ModiffConfig(act_bits=3)), calls=1)
    assert sqnr(got[0], exact[0]) > FIRST_CALL_DB


@pytest.mark.parametrize("mode", ["modulated", "quantized"])
@pytest.mark.parametrize("network", ["unet2d", "sd15"])
def test_no_float_copy_of_a_weight_is_made(network, mode):
    """Low-bit layers have their codes and the parameters of the original, and nothing else of that size."""
    unet = NETWORKS[network]()
    handle = mk.accelerate(unet, mk.ModiffConfig(mode=mode))
    outputs(unet, handle, calls=2)
    for layer in handle.layers.values():
        assert layer.float_weight is None
        assert layer.weight is layer.original.weight


@pytest.mark.parametrize("act_bits", [4, 8])
def test_one_state_machine_runs_layers_and_blocks(act_bits):
    """A convolution alone, the same one in a fused block and `step.run` give the same numbers, call by call."""
    unet = unet2d()
    block = unet.mid_block.resnets[0]
    config = mk.ModiffConfig(act_bits=act_bits, granularity="per_sample")
    alone, bare = (
        ModulatedConv2d.from_conv2d(block.conv1, config, state, "alone")
        for state in (ModulationState(), ModulationState())
    )
    handle = mk.accelerate(unet, config)
    fused = unet.mid_block.resnets[0]
    assert isinstance(fused, FusedResnetBlock2D)
    temb = torch.randn(2, 64)
    for state in (alone.state, bare.state, handle.state):
        state.begin_run()
    for h in trajectory((2, 32, 4, 4), 4):
        h = h.contiguous(memory_format=torch.channels_last)
        x = F.silu(block.norm1(h)).contiguous(memory_format=torch.channels_last)
        with handle.state.call():
            fused(h, temb)
        with alone.state.call():
            single = alone(x)
        with bare.state.call():
            direct = step.run(bare, IDENTITY, x, x.dtype)
        assert torch.equal(single, direct)
        # the norm inside a pass may differ from torch's in its last bits, and a code with it by one step
        assert sqnr(y_hat_of(fused.conv1), single) > 40
        assert torch.equal(y_hat_of(alone), single)


def test_stack_and_shared_y_hat_take_two_products_each_in_the_first_call(reference_calls):
    torch.manual_seed(0)
    net = Wrapped(BasicTransformerBlock(32, 2, 16, cross_attention_dim=24)).eval()
    handle = mk.accelerate(net, mk.ModiffConfig(backend="reference"))
    counts = []
    encoder = text()
    with handle.sampling_run():
        for _ in range(3):
            before = len(reference_calls)
            net(torch.randn(2, 9, 32), encoder_hidden_states=encoder)
            counts.append([reference_calls[before:].count(name) for name in ("quantize", "product")])
    # qkv as one, to_out, to_q, to_out, two of the feed-forward; k and v of the encoder states as one, once per run
    assert counts == [[14, 14], [6, 6], [6, 6]]
