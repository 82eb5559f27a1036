"""Fused blocks against the same UNet with single layers, and against their equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import modiff_kernels as mk
from modiff_kernels.nn.blocks import FusedAttention, FusedBlock, FusedResnetBlock2D, FusedUpsample2D
from modiff_kernels.nn.layer import ModulatedLayer
from modiff_kernels.ops import dispatch
from modiff_kernels.quant.affine import dequantize_weight, quantize_weight

CALLS = 6
SAME = 0.01  # allowed between two modulated runs that differ by rounding: some 0.003 is usual, see assert_same_run
DEFAULT = "default"
WITH_SHORTCUT = "up_blocks.0.resnets.0"
WITHOUT_SHORTCUT = "mid_block.resnets.0"
ATTENTION = "mid_block.attentions.0"
UPSAMPLE = "up_blocks.0.upsamplers.0"


@pytest.fixture(autouse=True)
def no_grad_and_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def tiny_unet(**options):
    """Attention at both sizes, 1x1 shortcuts in the up blocks (their inputs are joined with skips), one up-sampling."""
    torch.manual_seed(0)
    sizes = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 16,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    }
    unet = UNet2DModel(**{**sizes, **options}).eval()
    for name, parameter in unet.named_parameters():  # norms and biases that do nothing would hide mistakes
        if "norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return unet


def trajectory(calls=CALLS, dtype=torch.float32, batch=2):
    """Inputs and timesteps that change slowly, as along a sampling trajectory."""
    generator = torch.Generator().manual_seed(1)
    start, end = (torch.randn(batch, 3, 8, 8, generator=generator) for _ in range(2))
    for call in range(calls):
        angle = 0.5 * call / calls
        yield (math.cos(angle) * start + math.sin(angle) * end).to(dtype), 500 - 10 * call


def outputs(unet, handle, **options):
    """Outputs of all calls of one run."""
    with handle.sampling_run():
        return [unet(x, t).sample for x, t in trajectory(**options)]


def run(unet, calls=CALLS, static_scales=None, dtype=torch.float32, **config):
    handle = mk.accelerate(unet, mk.ModiffConfig(**config), static_scales=static_scales)
    return handle, outputs(unet, handle, calls=calls, dtype=dtype)


def fused_blocks(unet):
    return {path: module for path, module in unet.named_modules() if isinstance(module, FusedBlock)}


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same_run(got, expected, dtype=torch.float32):
    """Two runs of `tiny_unet` that differ by rounding.

    Float rounding moves a value over the edge between two codes now and then; later layers then round differently
    too. At worst the two runs are as far apart as two independent roundings of all activations: twice the distance
    between one of them and the run with float activations. A mistake in a fused form is far above that.
    """
    unet = tiny_unet().to(dtype)
    _, exact = run(unet, act_bits=None, dtype=dtype)
    for ours, theirs, truth in zip(got, expected, exact):
        noise = relative_error(theirs, truth)
        assert noise < 0.1
        assert relative_error(ours, theirs) < 2 * noise + 8 * torch.finfo(dtype).eps


def static_scales(unet):
    """One scale for every layer: a typical residual of this trajectory."""
    kinds = nn.Linear, nn.Conv2d
    layers = {path for path, module in unet.named_modules() if isinstance(module, kinds)}
    skipped = "conv_in", "conv_out", "time_emb"
    return {path: 0.01 for path in layers if not any(name in path for name in skipped)}


def x_hat_of(layer):
    return layer.edge.slots[DEFAULT].tensor


def y_hat_of(layer):
    y_hat, stack = layer.output.slots[DEFAULT].tensor, layer.stack
    return y_hat if stack is None else stack.split(y_hat)[stack.layers.index(layer)]


def dense_weight(layer):
    weight_q, scale = quantize_weight(layer.weight, layer.weight_bits, -1)
    return dequantize_weight(weight_q, scale, -1, layer.weight.shape).double()


def product(layer, x, magnitudes=False):
    """A(x) + bias in float64; `magnitudes`: the sum of the terms' absolute values instead."""
    weight, bias = dense_weight(layer), layer.bias.double()
    x = x.double()
    if magnitudes:
        weight, bias, x = weight.abs(), bias.abs(), x.abs()
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    _, *arguments = layer.conv_arguments()
    return F.conv2d(x, weight, bias, *arguments)


def assert_invariant(y_hat, x_hat, terms, expected, updates):
    """y_hat == expected up to one rounding of y_hat and of every x_hat per update, which add up like a random walk."""
    bound = torch.finfo(x_hat.dtype).eps * max(math.sqrt(updates), 4.0) * terms
    assert ((y_hat.double() - expected).abs() <= bound).all()


MODULATED = [
    {"scale_mode": scale_mode, "state_dtype": state_dtype, "first_step_bits": bits}
    for scale_mode in ("dynamic", "delayed", "static")
    for state_dtype in ("float32", "float16")
    for bits in ((None, 8) if scale_mode == "dynamic" else (None,))
]


class TestFusedEqualsLayers:
    @pytest.mark.parametrize("options", MODULATED, ids=lambda options: "-".join(map(str, options.values())))
    def test_modulated(self, options, backend):
        scales = static_scales(tiny_unet()) if options["scale_mode"] == "static" else None
        results = {}
        for fuse in (True, False):
            unet = tiny_unet()
            _, results[fuse] = run(unet, static_scales=scales, fuse=fuse, backend=backend, **options)
            assert bool(fused_blocks(unet)) == fuse
        assert_same_run(results[True], results[False])
        if options["first_step_bits"] is None and options["state_dtype"] == "float32":
            assert relative_error(results[True][0], results[False][0]) < 1e-5  # no codes yet: float rounding alone

    @pytest.mark.parametrize("granularity", ["per_tensor", "per_sample", "per_token"])
    @pytest.mark.parametrize("mode", ["modulated", "quantized"])
    def test_granularities(self, mode, granularity, backend):
        results = {}
        for fuse in (True, False):
            _, results[fuse] = run(tiny_unet(), fuse=fuse, mode=mode, granularity=granularity, backend=backend)
        assert_same_run(results[True], results[False])

    @pytest.mark.parametrize("mode", ["modulated", "quantized"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_models(self, dtype, mode, backend):
        results = {}
        for fuse in (True, False):
            _, results[fuse] = run(tiny_unet().to(dtype), dtype=dtype, fuse=fuse, mode=mode, backend=backend)
        assert results[True][-1].dtype == dtype
        assert_same_run(results[True], results[False], dtype)

    @pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
    def test_both_plain_attention_processors(self, processor):
        results = {}
        for fuse in (True, False):
            unet = tiny_unet()
            for module in unet.modules():
                if isinstance(module, Attention):
                    module.set_processor(processor())
            _, results[fuse] = run(unet, fuse=fuse)
            assert isinstance(unet.get_submodule(ATTENTION), FusedAttention) == fuse
        assert_same_run(results[True], results[False])

    @pytest.mark.parametrize("size", [None, (8, 8), (7, 9)], ids=str)
    @pytest.mark.parametrize("mode", ["modulated", "quantized"])
    def test_an_upsampling_to_any_size(self, mode, size, backend):
        results = {}
        for fuse in (True, False):
            unet = tiny_unet()
            handle = mk.accelerate(unet, mk.ModiffConfig(fuse=fuse, mode=mode, backend=backend))
            x = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(0))
            with handle.sampling_run() as state:
                for _ in range(CALLS):
                    x = 1.1 * x
                    with state.call():
                        results[fuse] = unet.get_submodule(UPSAMPLE)(x, size)
        assert results[True].shape[2:] == (size or (8, 8))
        # The same codes of one layer: only float sums differ.
        torch.testing.assert_close(results[True], results[False], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
@pytest.mark.parametrize("scale_mode", ["dynamic", "delayed"])
@pytest.mark.parametrize("first_step_bits", [None, 8])
class TestInvariant:
    """y_hat == A(x_hat) + bias after many updates, for every layer of a fused block."""

    UPDATES = 12

    @pytest.fixture
    def unet(self, state_dtype, scale_mode, first_step_bits, backend):
        unet = tiny_unet()
        run(
            unet,
            calls=1 + self.UPDATES,
            act_bits=4,
            state_dtype=state_dtype,
            scale_mode=scale_mode,
            first_step_bits=first_step_bits,
            backend=backend,
        )
        return unet

    def test_all_layers(self, unet):
        checked = set()
        for path, block in fused_blocks(unet).items():
            for name, layer in block.named_modules():
                if not isinstance(layer, ModulatedLayer) or name == "conv_shortcut":
                    continue
                if name == "conv2" and block.conv_shortcut is not None:
                    continue
                x_hat = x_hat_of(layer)
                source = x_hat.repeat_interleave(2, 2).repeat_interleave(2, 3) if path == UPSAMPLE else x_hat
                terms = product(layer, source, magnitudes=True)
                assert_invariant(y_hat_of(layer), x_hat, terms, product(layer, source), self.UPDATES)
                checked.add(name)
        upsampling = unet.get_submodule(UPSAMPLE).conv
        assert x_hat_of(upsampling).shape == (2, 64, 4, 4)  # the low resolution
        assert y_hat_of(upsampling).shape == (2, 64, 8, 8)
        assert checked == {"conv1", "conv2", "to_q", "to_k", "to_v", "to_out.0", "conv"}

    def test_conv2_and_the_shortcut_share_one_y_hat(self, unet):
        blocks = [b for b in fused_blocks(unet).values() if getattr(b, "conv_shortcut", None) is not None]
        assert len(blocks) >= 3
        for block in blocks:
            conv2, shortcut = block.conv2, block.conv_shortcut
            assert shortcut.output is conv2.output
            assert shortcut.name not in conv2.state.outputs
            pairs = [(layer, x_hat_of(layer)) for layer in (conv2, shortcut)]
            expected = sum(product(layer, x_hat) for layer, x_hat in pairs)
            terms = sum(product(layer, x_hat, magnitudes=True) for layer, x_hat in pairs)
            # Two roundings of y_hat per update: one for either product.
            assert_invariant(y_hat_of(conv2), x_hat_of(conv2), terms, expected, 2 * self.UPDATES)


def with_resnet(unet, **options):
    """`unet` with a new first resnet of the middle block."""
    arguments = {"in_channels": 64, "out_channels": 64, "temb_channels": 128, "groups": 8, "eps": 1e-5}
    unet.mid_block.resnets[0] = ResnetBlock2D(**{**arguments, **options}).eval()


def with_hook(unet):
    unet.mid_block.resnets[0].register_forward_hook(lambda *_: None)


def with_pre_hook(unet):
    unet.mid_block.resnets[0].register_forward_pre_hook(lambda *_: None)


def with_layer_hook(unet):
    unet.mid_block.resnets[0].conv2.register_forward_hook(lambda *_: None)


def with_own_forward(unet):
    block = unet.mid_block.resnets[0]
    block.forward = block.forward


def with_attention(unet, **options):
    arguments = {"heads": 4, "dim_head": 16, "bias": True, "residual_connection": True, "norm_num_groups": 8}
    unet.mid_block.attentions[0] = Attention(64, **{**arguments, **options}).eval()


NOT_FUSED = {
    "resnet-output-scale": (WITHOUT_SHORTCUT, lambda unet: with_resnet(unet, output_scale_factor=2.0)),
    "resnet-gelu": (WITHOUT_SHORTCUT, lambda unet: with_resnet(unet, non_linearity="gelu")),
    "resnet-hook": (WITHOUT_SHORTCUT, with_hook),
    "resnet-pre-hook": (WITHOUT_SHORTCUT, with_pre_hook),
    "resnet-layer-hook": (WITHOUT_SHORTCUT, with_layer_hook),
    "resnet-own-forward": (WITHOUT_SHORTCUT, with_own_forward),
    "attention-without-norm": (ATTENTION, lambda unet: with_attention(unet, norm_num_groups=None)),
    "attention-rescaled": (ATTENTION, lambda unet: with_attention(unet, rescale_output_factor=2.0)),
    "attention-qk-norm": (ATTENTION, lambda unet: with_attention(unet, qk_norm="layer_norm")),
    "attention-processor": (ATTENTION, lambda unet: unet.mid_block.attentions[0].set_processor(SlicedAttnProcessor(2))),
}


class TestWhichBlocksAreFused:
    def test_all_blocks_of_a_plain_unet(self):
        unet = tiny_unet()
        mk.accelerate(unet)
        kinds = [type(block) for block in fused_blocks(unet).values()]
        # 1 down, 2 middle, 2 up blocks per size; attention in down, middle and up; one upsampling.
        assert kinds.count(FusedResnetBlock2D) == 2 + 2 + 4
        assert kinds.count(FusedAttention) == 1 + 1 + 2
        assert kinds.count(FusedUpsample2D) == 1
        single = [path for path, module in unet.named_modules() if isinstance(module, ModulatedLayer)]
        assert all(
            any(path.startswith(f"{block}.") for block in fused_blocks(unet)) or "downsamplers" in path
            for path in single
        )

    @pytest.mark.parametrize("case", NOT_FUSED)
    def test_other_forms_are_left_to_single_layers(self, case):
        path, change = NOT_FUSED[case]
        results = []
        for config in (mk.ModiffConfig(), mk.ModiffConfig(fuse=False), None):
            unet = tiny_unet()
            change(unet)
            if config is None:
                results.append([unet(x, t).sample for x, t in trajectory()][-1])
                continue
            handle = mk.accelerate(unet, config)
            blocks = fused_blocks(unet)
            assert path not in blocks
            assert bool(blocks) == config.fuse
            results.append(outputs(unet, handle)[-1])
        assert relative_error(results[0], results[1]) < SAME
        assert relative_error(results[0], results[2]) < 0.1

    def test_scale_shift_time_embedding_is_not_fused(self):
        results = {}
        for fuse in (True, False):
            unet = tiny_unet(resnet_time_scale_shift="scale_shift")
            _, results[fuse] = run(unet, fuse=fuse)
            assert not any(isinstance(block, FusedResnetBlock2D) for block in fused_blocks(unet).values())
        assert relative_error(results[True][-1], results[False][-1]) < SAME

    def test_a_block_with_a_skipped_layer_is_not_fused(self):
        unet = tiny_unet()
        skipped = (*mk.ModiffConfig().skip_modules, "mid_block.resnets.0.conv2", "mid_block.attentions.0.to_v")
        handle = mk.accelerate(unet, mk.ModiffConfig(skip_modules=skipped))
        assert not {WITHOUT_SHORTCUT, ATTENTION} & fused_blocks(unet).keys()
        assert all(out.isfinite().all() for out in outputs(unet, handle))

    def test_dropout_is_fused_only_in_eval_mode(self):
        for training in (True, False):
            unet = tiny_unet(dropout=0.1).train(training)
            mk.accelerate(unet)
            assert (WITHOUT_SHORTCUT in fused_blocks(unet)) != training

    @pytest.mark.parametrize("options", [{"act_bits": None}, {"fuse": False}], ids=str)
    def test_nothing_is_fused_without_codes_or_when_told(self, options):
        unet = tiny_unet()
        mk.accelerate(unet, mk.ModiffConfig(**options))
        assert not fused_blocks(unet)


class TestAround:
    def test_state_dict_is_unchanged_and_remove_restores_the_same_objects(self):
        unet = tiny_unet()
        modules = dict(unet.named_modules())
        before = {key: value.clone() for key, value in unet.state_dict().items()}
        reference = unet(torch.ones(1, 3, 8, 8), 5).sample
        handle, _ = run(unet)
        after = unet.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert [name for name, _ in unet.named_parameters()] == list(before)
        handle.remove()
        restored = dict(unet.named_modules())
        assert list(restored) == list(modules)
        assert all(restored[path] is module for path, module in modules.items())
        assert torch.equal(unet(torch.ones(1, 3, 8, 8), 5).sample, reference)

    def test_loading_weights_changes_the_fused_layers(self):
        unet, other = tiny_unet(), tiny_unet()
        for parameter in other.parameters():
            parameter.mul_(1.1)
        mk.accelerate(unet).state.begin_run()
        unet.load_state_dict(other.state_dict())
        with pytest.raises(RuntimeError, match="weights were loaded"):
            unet(torch.ones(1, 3, 8, 8), 5)
        expected, handle = run(other)[1][-1], None
        handle = next(m for m in unet.modules() if isinstance(m, ModulatedLayer)).state
        with handle.sampling_run():
            got = [unet(x, t).sample for x, t in trajectory()][-1]
        assert torch.equal(got, expected)

    @pytest.mark.parametrize("mode", ["modulated", "quantized"])
    def test_explain_lists_the_layers_inside(self, mode):
        unet = tiny_unet()
        handle, _ = run(unet, mode=mode)
        rows = {row.name: row for row in handle.rows()}
        inside = [f"{WITH_SHORTCUT}.{name}" for name in ("conv1", "conv2", "conv_shortcut")]
        inside += [f"{ATTENTION}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")] + [f"{UPSAMPLE}.conv"]
        for name in inside:
            assert rows[name].mode == mode
            assert rows[name].bits == "w8a8"
            assert rows[name].backend in dispatch.BACKENDS
            assert name in handle.explain()
        assert rows[f"{WITH_SHORTCUT}.time_emb_proj"].mode == "float"

    def test_the_shared_y_hat_saves_a_tensor(self):
        sizes = {fuse: run(tiny_unet(), calls=1, fuse=fuse)[0].state.nbytes() for fuse in (True, False)}
        blocks = [b for b in tiny_unet().modules() if isinstance(b, ResnetBlock2D) and b.conv_shortcut is not None]
        unet = tiny_unet()
        run(unet, calls=1)
        shared = [b.conv2 for b in fused_blocks(unet).values() if getattr(b, "conv_shortcut", None) is not None]
        assert len(shared) == len(blocks)
        saved = sum(y_hat_of(layer).nbytes for layer in shared)
        saved += 3 * x_hat_of(unet.get_submodule(UPSAMPLE).conv).nbytes  # a quarter of the pixels
        assert sizes[False] - sizes[True] == saved

    @pytest.mark.parametrize("argument", ["encoder_hidden_states", "attention_mask"])
    def test_attention_refuses_other_inputs(self, argument):
        unet = tiny_unet()
        handle = mk.accelerate(unet)
        attention = unet.get_submodule(ATTENTION)
        x = torch.randn(2, 64, 4, 4)
        with (
            pytest.raises(ValueError, match=rf"block '{ATTENTION}': self-attention without a mask .*fuse=False"),
            handle.state.sampling_run(),
            handle.state.call(),
        ):
            attention(x, **{argument: torch.zeros(2, 16, 64)})

    def test_set_processor_refuses_another_kind(self):
        unet = tiny_unet()
        mk.accelerate(unet)
        attention = unet.get_submodule(ATTENTION)
        assert attention.get_processor() is attention.original.processor
        attention.set_processor(AttnProcessor2_0())
        with pytest.raises(RuntimeError, match=rf"'{ATTENTION}' is fused and would not call SlicedAttnProcessor"):
            attention.set_processor(SlicedAttnProcessor(2))

    @pytest.mark.parametrize("path", [WITH_SHORTCUT, ATTENTION, UPSAMPLE])
    def test_an_input_that_needs_a_gradient_is_refused(self, path):
        unet = tiny_unet()
        handle = mk.accelerate(unet)
        with (
            torch.enable_grad(),
            pytest.raises(RuntimeError, match=rf"block '{path}' has no gradient .*torch.no_grad"),
            handle.state.sampling_run(),
            handle.state.call(),
        ):
            unet.get_submodule(path)(torch.randn(2, 64, 4, 4, requires_grad=True))

    def test_contexts_and_runs_do_not_mix(self):
        unet = tiny_unet()
        handle, first = run(unet, scale_mode="delayed")
        assert all(torch.equal(a, b) for a, b in zip(first, outputs(unet, handle)))
        with handle.sampling_run():
            for expected, (x, t) in zip(first, trajectory()):
                with handle.context("other"):
                    unet(-x, t)
                assert torch.equal(unet(x, t).sample, expected)


class FloatProducts(TorchDispatchMode):
    """Names of the float products that torch runs."""

    PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mkldnn_rnn_layer")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and (name in self.PRODUCTS or "conv" in name or "attention" in name):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["modulated", "quantized"])
def test_no_float_product_runs_in_the_layers_of_fused_blocks(mode):
    reason = dispatch.why_unavailable("cpu")
    if reason is not None:
        pytest.skip(f"backend cpu: {reason}")
    unet = tiny_unet()
    handle = mk.accelerate(unet, mk.ModiffConfig(mode=mode, backend="cpu"))
    (x, t), *_ = trajectory()
    with handle.sampling_run():
        unet(x, t)
        with FloatProducts() as products:
            unet(x, t)
    names = [name for name in products.seen if "attention" not in name]
    assert names.count("convolution") == 2  # conv_in, conv_out
    assert names.count("addmm") == 3  # time embedding, and its projections for all blocks at once
    assert len(names) == 2 + 3
    # scaled_dot_product_attention, once per attention, where there is no kernel for it
    assert len(products.seen) - len(names) == (0 if torch.ops.modiff_cpu.isa() >= 2 else 4)


def test_hooks_below_a_block_keep_it_unfused():
    calls = []
    unet = tiny_unet()
    unet.mid_block.resnets[0].norm1.register_forward_hook(lambda *_: calls.append("norm1"))
    handle = mk.accelerate(unet, mk.ModiffConfig())
    assert type(unet.mid_block.resnets[0]).__name__ == "ResnetBlock2D"
    assert type(unet.mid_block.resnets[1]).__name__ == "FusedResnetBlock2D"
    with torch.no_grad(), handle.sampling_run():
        unet(torch.randn(1, 3, 8, 8), 10)
    assert calls == ["norm1"]


@pytest.mark.parametrize("mode", ["modulated", "quantized"])
def test_pointwise_upsampling_with_scales_per_pixel_stays_unfused(mode):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = Upsample2D(16, use_conv=True, kernel_size=1, padding=0)

        def forward(self, x):
            return self.up(x)

    net, x = Net(), torch.randn(1, 16, 4, 4)
    expected = net(x)
    handle = mk.accelerate(net, mk.ModiffConfig(granularity="per_token", mode=mode))
    assert type(net.up) is Upsample2D
    with handle.sampling_run():
        net(x)
        out = net(x)
    # Two roundings to 8 bits, of weight and activation: each about 1 % of the largest value.
    assert relative_error(out, expected) < 0.03
