"""Fused blocks of all kinds against the same UNet with single layers, and against their equations."""

import functools
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import nn

import modiff_kernels as mk
from modiff_kernels import ops
from modiff_kernels.backends import cpu
from modiff_kernels.nn import weight
from modiff_kernels.nn.blocks import (
    FusedAttention,
    FusedBasicTransformerBlock,
    FusedDownsample2D,
    FusedResnetBlock2D,
    FusedUpsample2D,
    concatenation,
)
from modiff_kernels.nn.layer import LinearStack, ModulatedLayer
from modiff_kernels.ops import dispatch
from tests import unets
from tests.unets import assert_invariant, assert_same_run, fused_blocks, outputs, relative_error, text, unet2d

WITH_SHORTCUT, WITHOUT_SHORTCUT = "up_blocks.0.resnets.0", "mid_block.resnets.0"
ATTENTION, UPSAMPLE = "mid_block.attentions.0", "up_blocks.0.upsamplers.0"
MODEL = "down_blocks.0.attentions.0"
BLOCK = f"{MODEL}.transformer_blocks.0"
NETWORKS = {**unets.NETWORKS, "scale-shift": functools.partial(unet2d, resnet_time_scale_shift="scale_shift")}


def run(network, change=None, dtype=torch.float32, keywords=None, unet_options=None, **config):
    """A UNet, its handle and the outputs of a run."""
    unet = NETWORKS[network](**(unet_options or {})).to(dtype)
    if change is not None:
        change(unet)
    config = mk.ModiffConfig(**config)
    handle = mk.accelerate(unet, config, calibration=unets.static_scales(unet, config))
    return unet, handle, outputs(unet, handle, **(keywords or {}))


@functools.cache
def exact(network, dtype=torch.float32):
    """The run with float activations and the same weights."""
    return run(network, dtype=dtype, act_bits=None)[2]


class TestFusedEqualsLayers:
    @pytest.fixture(autouse=True)
    def torch_attention(self, fresh_dispatch, monkeypatch):
        """Single layers leave attention to torch; the kernel of the CPU has 8-bit values."""
        why_not = cpu.why_not
        monkeypatch.setattr(cpu, "why_not", lambda p: "of a test" if p.op == "attention" else why_not(p))

    @pytest.mark.parametrize(
        ("network", "options"),
        [
            ("unet2d", {"scale_mode": "delayed"}),
            ("unet2d", {"mode": "quantized", "granularity": "per_token"}),
            ("sd15", {"scale_mode": "static"}),
            ("sd15", {"mode": "quantized", "granularity": "per_token", "backend": "reference"}),
            ("sd15", {"state_dtype": "float16", "granularity": "per_tensor"}),
            ("sd15", {"granularity": "per_token", "scale_mode": "delayed"}),
            ("sdxl", {}),
            ("scale-shift", {}),
            ("scale-shift", {"mode": "quantized"}),
        ],
        ids=str,
    )
    def test_configurations(self, network, options):
        unet, _, fused = run(network, **options)
        assert fused_blocks(unet, FusedResnetBlock2D)
        unet, _, single = run(network, fuse=False, **options)
        assert not fused_blocks(unet)
        assert_same_run(fused, single, exact(network))

    def test_padded_downsampling(self):
        results = []
        for options in ({}, {"fuse": False}, {"act_bits": None}):
            unet, handle, found = run("unet2d", unet_options={"downsample_padding": 0}, **options)
            assert bool(fused_blocks(unet, FusedDownsample2D)) == (not options)
            assert_invariant(handle.layers.values(), 6)
            results.append(found)
        assert_same_run(*results)


def test_geglu_in_the_epilogue_of_its_projection():
    """Where mode and backend allow it; parameters, refreshed and moved weights, and the layer alone are as ever."""
    unet, handle, fused = run("sd15", mode="quantized", granularity="per_token", backend="reference")
    layer, original = handle.layers[f"{BLOCK}.ff.net.0.proj"], NETWORKS["sd15"]()
    problem, packed = layer.problem("product", 16), layer.packed
    assert packed.geglu
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in original.state_dict().items())
    apart = weight.moved(packed, problem, "reference", torch.device("cpu"))
    assert torch.equal(apart.packed, layer.stored().weight.codes)
    assert not weight.with_geglu(apart, replace(problem, layout=cpu.VNNI_V1), "cpu").geglu
    for sign in (-1, 1):
        unet.load_state_dict({name: sign * value for name, value in original.state_dict().items()})
    layer._move_weight(torch.float32, torch.device("cpu"))
    assert torch.equal(layer.packed.packed, packed.packed)
    assert all(torch.equal(a, b) for a, b in zip(outputs(unet, handle), fused))
    x, linear = torch.randn(2, 3, problem.k), original.get_submodule(layer.name)
    assert relative_error(layer(x), linear(x)) < 0.02
    assert not layer.packed.geglu
    assert_same_run(outputs(unet, handle), fused, exact("sd15"))


@pytest.mark.parametrize(
    ("network", "scale_mode", "state_dtype"),
    [("unet2d", "dynamic", "float16"), ("sd15", "delayed", "float32"), ("sdxl", "dynamic", "float32")],
)
def test_the_invariant_of_all_layers(network, scale_mode, state_dtype):
    """y_hat == A(x_hat) + bias after many updates: also of conv2 and shortcut together, of stacks, of upsampling."""
    unet = NETWORKS[network]()
    handle = mk.accelerate(unet, mk.ModiffConfig(act_bits=4, scale_mode=scale_mode, state_dtype=state_dtype))
    outputs(unet, handle, calls=12)
    constant = [layer for layer in handle.layers.values() if layer.mode == "constant"]
    assert all(layer.output is None and layer.input is None for layer in constant)
    shared = [block for block in fused_blocks(unet, FusedResnetBlock2D).values() if block.conv_shortcut is not None]
    assert len(shared) >= 3
    for block in shared:
        assert block.conv_shortcut.output is block.conv2.output
        assert block.conv_shortcut.name not in handle.state.outputs
    checked = assert_invariant(handle.layers.values(), 13)
    assert checked == len(handle.layers) - len(shared) - len(constant)
    conv = unet.get_submodule(UPSAMPLE).conv
    assert unets.x_hat_of(conv).shape == (2, 32, 4, 4)  # kept at the low resolution
    assert unets.y_hat_of(conv).shape == (2, 32, 8, 8)


def with_attention(**options):
    arguments = {"heads": 4, "dim_head": 8, "bias": True, "residual_connection": True, "norm_num_groups": 4, **options}
    return lambda unet: unet.mid_block.attentions.__setitem__(0, Attention(32, **arguments).eval())


NOT_FUSED = {"norm_num_groups": None, "rescale_output_factor": 2.0, "qk_norm": "layer_norm"}  # of attention


class TestWhichBlocksAreFused:
    def test_all_of_a_plain_unet(self):
        unet = unet2d()
        mk.accelerate(unet)
        kinds = [type(block) for block in fused_blocks(unet).values()]
        # 1 down, 2 middle, 2 up blocks per size; attention in down, middle and up; one upsampling.
        assert kinds.count(FusedResnetBlock2D) == 2 + 2 + 4
        assert kinds.count(FusedAttention) == 1 + 1 + 2
        assert kinds.count(FusedUpsample2D) == 1
        single = fused_blocks(unet, ModulatedLayer)
        outside = [path for path in single if not any(path.startswith(f"{block}.") for block in fused_blocks(unet))]
        assert outside == ["down_blocks.0.downsamplers.0.conv"]  # which pads itself: nothing to fuse

    @pytest.mark.parametrize("option", NOT_FUSED)
    def test_other_forms_are_left_to_single_layers(self, option):
        """Hooks, processors and forwards of users: tests/integrations/test_features.py."""
        unet = unet2d()
        with_attention(**{option: NOT_FUSED[option]})(unet)
        handle = mk.accelerate(unet)
        blocks = fused_blocks(unet)
        assert ATTENTION not in blocks
        assert blocks
        got = outputs(unet, handle, calls=2)
        handle.remove()
        assert relative_error(got[-1], outputs(unet, calls=2)[-1]) < 0.1  # weights rounded to 8 bits: about 0.02

    def test_a_block_with_a_skipped_layer_and_float_activations_are_not_fused(self):
        unet = unet2d()
        skipped = (*mk.ModiffConfig().skip_modules, f"{WITHOUT_SHORTCUT}.conv2", f"{ATTENTION}.to_v")
        handle = mk.accelerate(unet, mk.ModiffConfig(skip_modules=skipped))
        assert not {WITHOUT_SHORTCUT, ATTENTION} & fused_blocks(unet).keys()
        handle.remove()
        mk.accelerate(unet, mk.ModiffConfig(act_bits=None))
        assert not fused_blocks(unet)


@pytest.mark.parametrize("mode", ["modulated", "quantized"])
def test_no_float_product_runs_in_the_layers_of_fused_blocks(mode):
    """Neither in the first call nor later; where the attention kernel is missing, torch's own runs."""
    unet = unet2d()
    handle = mk.accelerate(unet, mk.ModiffConfig(mode=mode))
    has_attention = dispatch.why_unavailable("cpu") is None and "avx512" in cpu.isa()
    with handle.sampling_run():
        for x, t in zip(unets.trajectory((2, 3, 8, 8), 3), (900, 800, 700)):
            with unets.FloatProducts() as products:
                unet(x, t)
            names = [name for name in products.seen if "attention" not in name]
            # conv_in, conv_out; time embedding, and its projections for all blocks at once
            assert sorted(names) == ["addmm"] * 3 + ["convolution"] * 2
            assert len(products.seen) - len(names) == (0 if has_attention else 4)


def doubled(module, inputs):
    return inputs[0] * 2, *inputs[1:]


IN_PARTS = {  # network, what is done to it before, whether a residual block needs the whole
    "unet2d": ("unet2d", None, False),
    "sdxl": ("sdxl", None, False),
    "freeu": ("sd15", lambda unet: unet.enable_freeu(0.2, 0.2, 1.5, 1.6), False),
    "hook": ("sd15", lambda unet: unet.get_submodule(WITH_SHORTCUT).register_forward_pre_hook(doubled), True),
    "own-forward": ("sd15", lambda unet: setattr(unet.up_blocks[1], "forward", unet.up_blocks[1].forward), False),
}


@pytest.mark.parametrize("case", IN_PARTS)
def test_up_blocks_do_not_concatenate(case, monkeypatch):
    network, change, needs_whole = IN_PARTS[case]
    wanted = run(network, change)[2]
    monkeypatch.setattr(concatenation, "CONCATENATE_ON", ())
    made, whole = [], concatenation.Concatenation.whole
    monkeypatch.setattr(concatenation.Concatenation, "whole", lambda parts: made.append(0) or whole(parts))
    in_parts, joined = [], ops.Prologue.joined
    given = lambda self, h: in_parts.append(self.further is not None) or joined(self, h)  # noqa: E731
    monkeypatch.setattr(ops.Prologue, "joined", given)
    unet, handle, found = run(network, change)
    assert any(in_parts)
    assert all(map(torch.equal, found, wanted))
    assert bool(made) == needs_whole
    handle.remove()
    assert "forward" not in unet.up_blocks[0].__dict__


class TestAround:
    def test_attention_takes_other_inputs_in_float(self):
        unet, mask = unet2d(), torch.zeros(2, 16, 16)
        mask[..., :8] = -torch.inf
        x, block = torch.randn(2, 32, 4, 4), unet.get_submodule(ATTENTION)
        expected = block(x, attention_mask=mask)
        mk.accelerate(unet)
        assert torch.equal(unet.get_submodule(ATTENTION)(x, attention_mask=mask), expected)
        assert not torch.equal(block(x), expected)


def test_projections_of_one_input_are_one_product():
    """With one y_hat, and nothing stored twice where the layout allows it."""
    net = unets.lone(BasicTransformerBlock(32, 2, 16, cross_attention_dim=unets.WIDTH))
    net.block.attn1.to_k.bias = nn.Parameter(torch.ones(32))
    handle = mk.accelerate(net, mk.ModiffConfig(backend="reference", plan="modulated"))
    with handle.sampling_run():
        net(torch.randn(2, 9, 32), text())
    stack = net.block.attn1.stacked
    assert stack.output.contexts["default"].tensor.shape == (2, 9, 96)
    assert {name for name in handle.state.outputs if "attn1.to_" in name} == {stack.name, "block.attn1.to_out.0"}
    whole = stack.packed.packed
    for layer in stack.layers:
        assert whole.data_ptr() <= layer.packed.packed.data_ptr() < whole.data_ptr() + whole.nbytes
    assert torch.equal(stack.bias_data, torch.cat([torch.zeros(32), torch.ones(32), torch.zeros(32)]))
    assert torch.equal(stack.packed.scale, torch.cat([layer.packed.scale for layer in stack.layers]))


class TestCalibrated:
    """Codes that are not the nearest, other biases, a scale per call, scaled input channels, inside fused blocks."""

    CALLS = 3
    CONFIG = mk.ModiffConfig(weight_bits=4, act_bits=8, scale_mode="static")

    def calibration(self, unet, bits=lambda path: 4, scaled=lambda path: False):
        layers, scales = {}, (0.09, 0.03, self.CALLS)
        for path in unets.low_bit_paths(unet):
            layers[path] = unets.calibrated_layer(unet.get_submodule(path), bits(path), scales, scaled(path), 0.05)
        return mk.CalibrationResult("test", self.CONFIG, layers)

    def accelerated(self, **options):
        unet = unets.unet2d_condition()
        result = self.calibration(unet, **options)
        handle = mk.accelerate(unet, calibration=result)
        outputs(unet, handle, calls=self.CALLS)
        for path, layer in handle.layers.items():
            assert torch.equal(layer.stored().weight.codes, result.layers[path].weight.codes)
        assert_invariant(handle.layers.values(), self.CALLS + 1)
        return unet, handle, result

    @pytest.mark.parametrize("q_bits", [4, 3])
    def test_transformer_block(self, q_bits):
        """Layers whose bits differ are not stacked; constants are computed from the calibrated codes too."""
        unet, handle, _ = self.accelerated(bits=lambda path: q_bits if "to_q" in path else 4)
        block = unet.get_submodule(BLOCK)
        assert isinstance(block, FusedBasicTransformerBlock)
        assert isinstance(block.attn1.stacked, LinearStack) == (q_bits == 4)
        for name in ("to_k", "to_v"):
            layer = handle.layers[f"{BLOCK}.attn2.{name}"]
            assert layer.mode == "constant"
            # two updates of 8 bits leave 1/255^2 of the encoder states
            torch.testing.assert_close(layer(text()).double(), unets.operator(layer, text())[0], rtol=1e-3, atol=1e-3)

    def test_split_shortcut_stays_fused(self):
        """The residual of a shortcut is taken after its channels were scaled: conv2(x_hat2) + conv_shortcut(x_hat)."""
        unet, *_ = self.accelerated(scaled=lambda path: path.endswith("conv_shortcut"))
        blocks = fused_blocks(unet, FusedResnetBlock2D).values()
        assert len([block for block in blocks if block.conv_shortcut is not None]) >= 3

    def test_scaled_inputs_of_other_layers_are_not_fused(self):
        """Projections that scale one tensor each in their way do not share its x_hat either."""
        _, handle, result = self.accelerated(scaled=lambda path: path == f"{BLOCK}.attn1.to_q")
        fused = handle.replaced.fused
        assert BLOCK not in fused
        assert f"{BLOCK}.ff" in fused
        assert any(isinstance(block, FusedBasicTransformerBlock) for block in fused.values())
        layers = [handle.layers[f"{BLOCK}.attn1.{name}"] for name in ("to_q", "to_k", "to_v")]
        assert len({layer.input.key for layer in layers}) == 3
        q, k = (unets.x_hat_of(layer) for layer in layers[:2])
        scale = result.layers[layers[0].name].input_scale
        assert ((q - k * scale).abs() <= 0.03 * 0.51 * (1 + scale)).all()  # both within half a step of the last scale
