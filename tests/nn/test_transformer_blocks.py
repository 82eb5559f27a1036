"""Fused transformer blocks of small UNets built like those of Stable Diffusion 1.5 and XL, against single layers."""

import functools
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from diffusers.models.downsampling import Downsample2D
from torch import nn

import modiff_kernels as mk
from modiff_kernels.nn.blocks import (
    FusedBasicTransformerBlock,
    FusedBlock,
    FusedDownsample2D,
    FusedFeedForward,
    FusedTransformer2DModel,
)
from modiff_kernels.quant.affine import dequantize_weight, quantize_weight

CALLS = 5
TOKENS, WIDTH = 7, 24
MODEL = "down_blocks.0.attentions.0"
BLOCK = f"{MODEL}.transformer_blocks.0"

COMMON = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
NETWORKS = {
    "sd15": {"attention_head_dim": 2},  # projections are 1x1 convolutions; two heads
    "sdxl": {
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (2, 1),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}


@pytest.fixture(autouse=True)
def no_grad_and_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def tiny_unet(network="sd15", dtype=torch.float32, **options):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**COMMON, **NETWORKS[network], **options}).eval()
    for name, parameter in unet.named_parameters():  # norms and biases that do nothing would hide mistakes
        if "norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return unet.to(dtype)


def text(batch=2, seed=2, dtype=torch.float32):
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conditions(network, batch=2, dtype=torch.float32):
    if network != "sdxl":
        return {}
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(batch, 16, generator=generator).to(dtype)
    return {"added_cond_kwargs": {"text_embeds": embeds, "time_ids": torch.ones(batch, 6)}}


def trajectory(calls=CALLS, batch=2, dtype=torch.float32):
    """Inputs and timesteps that change slowly, as along a sampling trajectory."""
    generator = torch.Generator().manual_seed(1)
    start, end = (torch.randn(batch, 4, 8, 8, generator=generator) for _ in range(2))
    for call in range(calls):
        angle = 0.5 * call / calls
        yield (math.cos(angle) * start + math.sin(angle) * end).to(dtype), 500 - 10 * call


def outputs(unet, handle, network, encoder=None, batch=2, dtype=torch.float32, **keywords):
    """Outputs of all calls of one run."""
    encoder = text(batch, dtype=dtype) if encoder is None else encoder
    keywords = {**conditions(network, batch, dtype), **keywords}
    with handle.sampling_run():
        return [
            unet(x, t, encoder_hidden_states=encoder, **keywords).sample
            for x, t in trajectory(batch=batch, dtype=dtype)
        ]


def static_scales(unet):
    layers = {path for path, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    skipped = "conv_in", "conv_out", "time_emb"
    return {path: 0.02 for path in layers if not any(name in path for name in skipped)}


def run(network, dtype=torch.float32, change=None, **config):
    unet = tiny_unet(network, dtype)
    if change is not None:
        change(unet)
    scales = static_scales(unet) if config.get("scale_mode") == "static" else None
    handle = mk.accelerate(unet, mk.ModiffConfig(**config), static_scales=scales)
    return unet, outputs(unet, handle, network, dtype=dtype)


@functools.cache
def exact(network, dtype=torch.float32):
    """The run with float activations and the same weights."""
    return run(network, dtype, act_bits=None)[1]


def fused_blocks(unet, kind=FusedBlock):
    return {path: module for path, module in unet.named_modules() if isinstance(module, kind)}


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same_run(got, expected, network, dtype=torch.float32):
    """Two runs that differ by rounding: at most as far apart as two independent roundings of all activations."""
    for ours, theirs, truth in zip(got, expected, exact(network, dtype), strict=True):
        noise = relative_error(theirs, truth)
        assert noise < 0.1
        assert relative_error(ours, theirs) < 2 * noise + 8 * torch.finfo(dtype).eps


PROMPTS = {"cond": text(), "uncond": text(seed=4)}  # the same tensors at every call, as in a pipeline
BOTH = torch.cat([*PROMPTS.values()])


def guided(unet, handle, passes, x, t):
    """Prediction with classifier-free guidance of strength 3."""
    if passes == 1:
        cond, uncond = unet(torch.cat([x, x]), t, encoder_hidden_states=BOTH).sample.chunk(2)
        return uncond + 3 * (cond - uncond)
    predictions = {}
    for name, encoder in PROMPTS.items():
        with handle.context(name):
            predictions[name] = unet(x, t, encoder_hidden_states=encoder).sample
    return predictions["uncond"] + 3 * (predictions["cond"] - predictions["uncond"])


CONFIGS = [
    {"scale_mode": "dynamic"},
    {"scale_mode": "delayed"},
    {"scale_mode": "static"},
    {"first_step_bits": 8, "state_dtype": "float16"},
    {"granularity": "per_token"},
    {"mode": "quantized"},
    {"mode": "quantized", "granularity": "per_token"},
]


class TestFusedEqualsLayers:
    @pytest.mark.parametrize("network", NETWORKS)
    @pytest.mark.parametrize("options", CONFIGS, ids=lambda options: "-".join(map(str, options.values())))
    def test_configurations(self, network, options):
        unet, fused = run(network, **options)
        assert {FusedTransformer2DModel, FusedBasicTransformerBlock} <= {*map(type, fused_blocks(unet).values())}
        _, single = run(network, fuse=False, **options)
        assert_same_run(fused, single, network)
        if options == {"scale_mode": "dynamic"}:
            assert relative_error(fused[0], single[0]) < 1e-5  # no codes yet: float rounding alone

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_models(self, dtype):
        _, fused = run("sd15", dtype)
        assert fused[-1].dtype == dtype
        _, single = run("sd15", dtype, fuse=False)
        assert_same_run(fused, single, "sd15", dtype)

    def test_every_backend(self, backend):
        _, fused = run("sdxl", backend=backend, act_bits=8)
        for ours, truth in zip(fused, exact("sdxl"), strict=True):
            assert relative_error(ours, truth) < 0.05

    def test_the_older_processor(self):
        def older(unet):
            unet.set_attn_processor(AttnProcessor())

        unet, fused = run("sd15", change=older)
        assert fused_blocks(unet, FusedBasicTransformerBlock)
        assert_same_run(fused, run("sd15", change=older, fuse=False)[1], "sd15")

    @pytest.mark.parametrize("passes", [1, 2])
    def test_classifier_free_guidance(self, passes):
        """Both prompts in one batch, or in contexts of their own."""
        results = {}
        for key in (True, False, None):
            unet = tiny_unet()
            handle = mk.accelerate(unet, mk.ModiffConfig(**({"act_bits": None} if key is None else {"fuse": key})))
            with handle.sampling_run():
                results[key] = [guided(unet, handle, passes, x, t) for x, t in trajectory()]
        for ours, theirs, truth in zip(results[True], results[False], results[None], strict=True):
            assert relative_error(ours, theirs) < 2 * relative_error(theirs, truth) + 1e-5  # first call: no codes

    def test_attention_masks(self):
        mask = torch.ones(2, TOKENS)
        mask[0, 3:] = 0
        results = {}
        for fuse in (True, False):
            unet = tiny_unet()
            handle = mk.accelerate(unet, mk.ModiffConfig(fuse=fuse))
            results[fuse] = outputs(unet, handle, "sd15", encoder_attention_mask=mask)
        for ours, theirs in zip(results[True], results[False], strict=True):
            assert relative_error(ours, theirs) < 0.02
        assert relative_error(results[True][0], results[False][0]) < 1e-5
        assert relative_error(results[True][0], run("sd15")[1][0]) > 1e-3  # the mask changes something

    @pytest.mark.parametrize("mode", ["modulated", "quantized"])
    def test_padded_downsampling(self, mode):
        results = {}
        for key in (True, False, None):
            unet = tiny_unet(downsample_padding=0)
            options = {"act_bits": None} if key is None else {"fuse": key, "mode": mode}
            handle = mk.accelerate(unet, mk.ModiffConfig(**options))
            assert bool(fused_blocks(unet, FusedDownsample2D)) == bool(key)
            results[key] = outputs(unet, handle, "sd15")
        for ours, theirs, truth in zip(results[True], results[False], results[None], strict=True):
            assert relative_error(ours, theirs) < 2 * relative_error(theirs, truth) + 1e-5  # first call: no codes
        if mode == "modulated":
            assert relative_error(results[True][0], results[False][0]) < 1e-5


def one_block(change=None, width=32, **config):
    """A net of one transformer block, fused."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = BasicTransformerBlock(width, 2, 16, cross_attention_dim=WIDTH)

        def forward(self, x, encoder=None):
            return self.block(x, encoder_hidden_states=encoder)

    torch.manual_seed(0)
    net = Net().eval()
    if change is not None:
        change(net.block)
    return net, mk.accelerate(net, mk.ModiffConfig(**config))


class TestInvariant:
    """y_hat == A(x_hat) + bias after many updates."""

    @pytest.mark.parametrize("state_dtype", ["float32", "float16"])
    def test_all_layers_of_a_block(self, state_dtype, backend):
        net, handle = one_block(act_bits=4, state_dtype=state_dtype, backend=backend)
        x, encoder = torch.randn(2, 9, 32), text()
        with handle.sampling_run():
            for call in range(10):
                net(x * (1 + 0.1 * call), encoder)
        checked = set()
        for name, layer in handle.layers.items():
            if layer.mode == "constant":
                assert layer.output is None
                assert layer.edge is None
                continue
            y_hat = layer.output.slots["default"].tensor
            if layer.stack is not None:
                y_hat = layer.stack.split(y_hat)[layer.stack.layers.index(layer)]
            x_hat = layer.edge.slots["default"].tensor.double()
            codes, scale = quantize_weight(layer.weight, 8, -1)
            weight = dequantize_weight(codes, scale, -1, layer.weight.shape).double()
            bias = 0 if layer.bias is None else layer.bias.double()
            terms = x_hat.abs() @ weight.abs().T + (0 if layer.bias is None else bias.abs())
            eps = torch.finfo(getattr(torch, state_dtype)).eps
            # One rounding of y_hat and of x_hat per update, which add up like a random walk.
            assert ((y_hat.double() - (x_hat @ weight.T + bias)).abs() <= 4 * eps * terms).all()
            checked.add(name.removeprefix("block."))
        attention = {f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
        assert checked == attention | {"attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"}


class TestStackedProjections:
    def test_one_product_and_one_y_hat(self):
        net, handle = one_block()
        attention = net.block.attn1
        with handle.sampling_run():
            net(torch.randn(2, 9, 32), text())
        stack = attention.stacked
        assert stack.output.slots["default"].tensor.shape == (2, 9, 96)
        assert {name for name in handle.state.outputs if "attn1.to_" in name} == {stack.name, "block.attn1.to_out.0"}

    def test_nothing_is_stored_twice_where_the_layout_allows_it(self):
        net, _ = one_block(backend="reference")
        stack = net.block.attn1.stacked
        start, size = stack.weight_packed.data_ptr(), stack.weight_packed.nbytes
        for layer in stack.layers:
            assert start <= layer.weight_packed.data_ptr() < start + size

    def test_the_codes_are_those_of_the_layers(self):
        net, _ = one_block(lambda block: setattr(block.attn1.to_k, "bias", nn.Parameter(torch.ones(32))))
        stack = net.block.attn1.stacked
        assert torch.equal(stack.bias_data, torch.cat([torch.zeros(32), torch.ones(32), torch.zeros(32)]))
        assert torch.equal(stack.weight_scale, torch.cat([layer.weight_scale for layer in stack.layers]))

    def test_loaded_weights_are_stacked_again(self):
        net, handle = one_block()
        other, _ = one_block()
        x, encoder = torch.randn(2, 9, 32), text()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)
        net.load_state_dict(other.state_dict())
        fresh, fresh_handle = one_block()
        fresh_handle.remove()
        fresh.load_state_dict(other.state_dict())
        fresh_handle = mk.accelerate(fresh)
        with handle.sampling_run(), fresh_handle.sampling_run():
            for _ in range(2):
                assert torch.equal(net(x, encoder), fresh(x, encoder))


def with_ip_adapter(unet):
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    processor = IPAdapterAttnProcessor2_0(32, WIDTH, num_tokens=(4,))
    unet.get_submodule(f"{BLOCK}.attn2").set_processor(processor)


def with_hook(unet):
    unet.get_submodule(BLOCK).register_forward_hook(lambda *_: None)


def with_layer_hook(unet):
    unet.get_submodule(f"{BLOCK}.ff.net.2").register_forward_hook(lambda *_: None)


NOT_FUSED = {
    "processor": lambda unet: unet.get_submodule(f"{BLOCK}.attn1").set_processor(SlicedAttnProcessor(2)),
    "ip-adapter": with_ip_adapter,
    "hook": with_hook,
    "layer-hook": with_layer_hook,
    "chunks": lambda unet: unet.get_submodule(BLOCK).set_chunk_feed_forward(1),
}


class TestWhichBlocksAreFused:
    @pytest.mark.parametrize("network", NETWORKS)
    def test_all_of_a_plain_unet(self, network):
        unet = tiny_unet(network)
        plain = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
        mk.accelerate(unet)
        assert len(fused_blocks(unet, FusedBasicTransformerBlock)) == len(plain) >= 4
        assert not any(isinstance(module, BasicTransformerBlock) for module in unet.modules())

    @pytest.mark.parametrize("case", NOT_FUSED)
    def test_others_are_left_to_single_layers(self, case):
        unet = tiny_unet()
        NOT_FUSED[case](unet)
        handle = mk.accelerate(unet)
        block = unet.get_submodule(BLOCK)
        assert type(block) is BasicTransformerBlock
        assert isinstance(unet.get_submodule(MODEL), FusedTransformer2DModel)
        assert type(block.attn2.to_q).__name__ == "ModulatedLinear"
        assert handle.layers[f"{BLOCK}.attn2.to_k"].mode == "modulated"
        if case in ("processor", "hook", "layer-hook"):
            got = outputs(unet, handle, "sd15")
            assert relative_error(got[-1], exact("sd15")[-1]) < 0.05

    def test_a_lone_feed_forward_block(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.ff = FeedForward(32)

            def forward(self, x):
                return self.ff(x)

        net, x = Net(), torch.randn(2, 5, 32)
        expected = [net(x * scale) for scale in (1.0, 1.1, 1.2)]
        handle = mk.accelerate(net)
        assert type(net.ff) is FusedFeedForward
        with handle.sampling_run():
            for scale, truth in zip((1.0, 1.1, 1.2), expected):
                # Weights rounded to 8 bits: about 1 % of the largest.
                assert relative_error(net(x * scale), truth) < 0.02

    def test_downsampling_that_pads_itself_stays_single(self):
        unet = tiny_unet()
        mk.accelerate(unet)
        assert any(isinstance(module, Downsample2D) for module in unet.modules())


class TestAround:
    @pytest.mark.parametrize("network", NETWORKS)
    def test_remove_restores_the_same_objects(self, network):
        unet = tiny_unet(network)
        modules, keys = dict(unet.named_modules()), list(unet.state_dict())
        handle = mk.accelerate(unet)
        outputs(unet, handle, network)
        assert list(unet.state_dict()) == keys
        handle.remove()
        restored = dict(unet.named_modules())
        assert list(restored) == list(modules)
        assert all(restored[path] is module for path, module in modules.items())

    def test_every_layer_is_explained(self):
        unet = tiny_unet()
        handle = mk.accelerate(unet)
        outputs(unet, handle, "sd15")
        rows = {row.name: row for row in handle.rows()}
        for name in ("attn1.to_q", "attn1.to_k", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
            assert rows[f"{BLOCK}.{name}"].mode == "modulated"
        assert rows[f"{MODEL}.proj_in"].mode == rows[f"{MODEL}.proj_out"].mode == "modulated"
        assert rows[f"{BLOCK}.attn2.to_k"].mode == rows[f"{BLOCK}.attn2.to_v"].mode == "constant"
        assert rows[f"{BLOCK}.attn2.to_k"].bits == "w8a-"
        assert len(rows) == sum(isinstance(module, (nn.Linear, nn.Conv2d)) for module in tiny_unet().modules())

    def test_processors_and_chunks_are_refused_afterwards(self):
        unet = tiny_unet()
        mk.accelerate(unet)
        with pytest.raises(RuntimeError, match=r"attn1' is fused and would not call SlicedAttnProcessor"):
            unet.set_attn_processor(SlicedAttnProcessor(2))
        with pytest.raises(RuntimeError, match=r"feeds all tokens forward at once"):
            unet.get_submodule(BLOCK).set_chunk_feed_forward(1)
        unet.get_submodule(BLOCK).set_chunk_feed_forward(None)

    def test_encoder_states_for_self_attention_are_refused(self):
        net, handle = one_block()
        net.block.attn2.is_cross_attention = False
        with (
            handle.sampling_run(),
            pytest.raises(ValueError, match=r"block 'block': .*encoder_hidden_states.*fuse=False"),
        ):
            net(torch.randn(2, 9, 32), text())
