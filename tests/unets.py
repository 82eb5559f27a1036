"""Small UNets and pipelines for tests, with the loops that call them and the equations that hold for them."""

import contextlib
import copy
import functools
import inspect
import math
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modiff_kernels.backends import BACKENDS, reference
from modiff_kernels.calibration.result import CalibrationResult
from modiff_kernels.nn.blocks import FusedBlock
from modiff_kernels.ops import dispatch
from modiff_kernels.quant.affine import quantize_weight
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight

WIDTH, TOKENS = 24, 5  # of encoder states
SKIPPED = ("conv_in", "conv_out", "time_emb")  # what stays float if nothing else is said
FLOAT = {"weight_bits": None, "act_bits": None}

USABLE = [name for name in BACKENDS if dispatch.runs_on(name, "cpu") and dispatch.why_unavailable(name) is None]
each_backend = pytest.mark.parametrize("backend", [n for n in USABLE if dispatch.forced_backend() in (None, n)])
both_ways = pytest.mark.parametrize("fuse", [True, False], ids=["fused", "layers"])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def reference_calls(fresh_dispatch, monkeypatch):
    """Grows by "quantize" or "product" with every such call of the backend reference."""
    calls = []

    def counted(name, original, *args):
        calls.append(name)
        return original(*args)

    for name in ("quantize", "product"):
        monkeypatch.setattr(reference, name, functools.partial(counted, name, getattr(reference, name)))
    return calls


class FloatProducts(TorchDispatchMode):
    """Names of the float products and attentions that torch runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        words = ("conv", "mm", "matmul", "linear", "attention", "rnn")
        if func.namespace == "aten" and any(word in name for word in words):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


COMMON = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4}
SDXL = {
    "transformer_layers_per_block": (2, 1),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


def unet2d(levels=2, seed=0, **options):
    """Attention at the highest level and in the middle; shortcuts in the up blocks, whose inputs hold skips."""
    return copy.deepcopy(_built(UNet2DModel, "Attn", levels, seed, **{"attention_head_dim": 8, **options}))


def unet2d_condition(levels=2, seed=0, **options):
    """As of Stable Diffusion 1.5: cross-attention with two heads at the highest level and in the middle."""
    options = {"cross_attention_dim": WIDTH, "attention_head_dim": 2, **options}
    return copy.deepcopy(_built(UNet2DConditionModel, "CrossAttn", levels, seed, **options))


NETWORKS = {"unet2d": unet2d, "sd15": unet2d_condition, "sdxl": functools.partial(unet2d_condition, **SDXL)}


@functools.cache
def _built(kind, attention, levels, seed, **options):
    """With random norms and biases: those that do nothing would hide mistakes."""
    defaults = {
        "block_out_channels": (16, 32, 32)[:levels],
        "down_block_types": (f"{attention}DownBlock2D", *["DownBlock2D"] * (levels - 1)),
        "up_block_types": (*["UpBlock2D"] * (levels - 1), f"{attention}UpBlock2D"),
    }
    torch.manual_seed(seed)
    unet = kind(**{**COMMON, **defaults, **options}).eval()
    for name, parameter in unet.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += torch.randn_like(parameter) * 0.1
    return unet


def noise(batch=2, channels=3, size=8, seed=1):
    """Noise to begin with."""
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def text(batch=2, seed=2, width=WIDTH):
    """Encoder states."""
    return torch.randn(batch, TOKENS, width, generator=torch.Generator().manual_seed(seed))


def trajectory(shape, calls, angle=0.5):
    """Inputs that turn slowly by `angle` in all, as along a sampling trajectory."""
    generator = torch.Generator().manual_seed(3)
    start, end = (torch.randn(shape, generator=generator) for _ in range(2))
    turns = [angle * call / calls for call in range(calls)]
    return [math.cos(turn) * start + math.sin(turn) * end for turn in turns]


def conditions_of(unet, batch=2):
    """What a conditional UNet is called with beside sample and timestep: the same tensors at every call."""
    if not hasattr(unet, "config") or "cross_attention_dim" not in unet.config:
        return {}
    conditions = {"encoder_hidden_states": text(batch).to(unet.dtype)}
    if unet.config.addition_embed_type is not None:
        embeds = torch.randn(batch, 16, generator=torch.Generator().manual_seed(4)).to(unet.dtype)
        conditions["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": torch.ones(batch, 6)}
    return conditions


def outputs(unet, handle=None, calls=5, batch=2, **keywords):
    """Outputs of all calls along a trajectory: of one run of `handle`, or of the UNet as it is."""
    conditions = {**conditions_of(unet, batch), **keywords}
    xs = trajectory((batch, unet.config.in_channels, 8, 8), calls)
    with contextlib.nullcontext() if handle is None else handle.sampling_run(calls):
        found = []
        for call, x in enumerate(xs):
            own = {name: [*value] if isinstance(value, list) else value for name, value in conditions.items()}
            found.append(unet(x.to(unet.dtype), 500 - 10 * call, **own).sample)
        return found


def lone(block):
    """A network of one block."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x, encoder):
            return self.block(x, encoder_hidden_states=encoder)

    return Net().eval()


def pipeline(scheduler=None, unet=None):
    """What `accelerate` needs of a pipeline."""
    return types.SimpleNamespace(unet=unet or unet2d(), scheduler=scheduler or DDIMScheduler())


def stable_diffusion(scheduler):
    """A pipeline of Stable Diffusion that takes embeddings of prompts."""
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4).eval()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    parts |= {"vae": vae, "unet": unet2d_condition(), "scheduler": scheduler}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, steps=6, batch=2, start=0, stop_after=None, on_call=lambda: None, **options):
    """A sampling loop as pipelines have it; start: calls that image-to-image leaves out; options: of each step."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    x = noise(batch) * scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options |= {"generator": torch.Generator().manual_seed(2)} if takes_generator else {}
    for t in scheduler.timesteps[start:stop_after]:
        prediction = pipe.unet(scheduler.scale_model_input(x, t), t).sample
        on_call()
        x = scheduler.step(prediction, t, x, **options).prev_sample
    return x


def low_bit_paths(module):
    """Paths of the layers that are replaced if nothing else is said."""
    paths = [path for path, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return [path for path in paths if not any(name in path for name in SKIPPED)]


def calibrated_layer(layer, bits, scales, is_scaled=True, bias_change=0.01):
    """All that can be calibrated of a layer: codes that are not the nearest, a scale per call, scaled input channels
    and another bias."""
    weight, input_scale = layer.weight, None
    if is_scaled:
        input_scale = torch.linspace(0.5, 2, weight.shape[1])
        weight = weight / input_scale.view((1, -1, 1, 1) if weight.ndim == 4 else (-1,))
    codes = QuantizedWeight(*quantize_weight(weight, bits, method="mse"), bits)
    bias = None if layer.bias is None else layer.bias.detach() + bias_change
    return CalibratedLayer(codes, act_scale=torch.linspace(*scales), input_scale=input_scale, bias=bias)


def static_scales(module, config, scale=0.02):
    """A calibration with one scale for every layer, about that of a residual along `trajectory`; None for others."""
    known = CalibratedLayer(act_scale=torch.as_tensor(scale, dtype=torch.float32).reshape(-1))
    layers = dict.fromkeys(low_bit_paths(module), known)
    return CalibrationResult("given", config, layers) if config.scale_mode == "static" else None


def fused_blocks(module, kind=FusedBlock):
    """By path."""
    return {path: block for path, block in module.named_modules() if isinstance(block, kind)}


def snapshot(unet):
    """Everything that accelerate may touch, for comparison."""
    modules = {path: id(module) for path, module in unet.named_modules(remove_duplicate=False)}
    own_forwards = [path for path, module in unet.named_modules() if "forward" in module.__dict__]
    return modules, own_forwards, len(unet._forward_pre_hooks), len(unet._forward_hooks), sorted(unet.__dict__)


def relative_error(got, expected):
    """Of the norm."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_equal(got, expected):
    """Two lists of outputs, bit by bit."""
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def assert_close(got, expected, tolerance=1e-4):
    """Two lists of outputs up to float rounding: sums in another order, through a few layers."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_same_run(got, expected, exact):
    """Two low-bit runs that differ by rounding; exact: the run with the same weights and float activations.

    Values at the edge between two codes may fall either way. At worst the two runs are as far apart as two independent
    roundings of all activations: twice the distance between one of them and the exact run."""
    for ours, theirs, truth in zip(got, expected, exact, strict=True):
        distance = relative_error(theirs, truth)
        assert distance < 0.1
        assert relative_error(ours, theirs) < 2 * distance + 8 * torch.finfo(truth.dtype).eps


def x_hat_of(layer, context="default"):
    """What the layer has been fed in this run."""
    return layer.input.contexts[context].tensor


def y_hat_of(layer, context="default"):
    """Its output state; with a stack, its own columns."""
    y_hat, stack = layer.output.contexts[context].tensor, layer.stack
    return y_hat if stack is None else stack.split(y_hat)[stack.layers.index(layer)]


def operator(layer, x):
    """The layer on x by its definition in float64, and the sum of the terms' absolute values, for its rounding."""
    known = layer.stored()
    weight, x = known.weight.dequantized(layer.weight.shape).double(), x.double()
    bias = layer.bias if known.bias is None else known.bias
    bias = torch.zeros(len(weight)).double() if bias is None else bias.double()
    if weight.ndim == 2:
        return F.linear(x, weight, bias), F.linear(x.abs(), weight.abs(), bias.abs())
    options = layer.window[1:]
    return F.conv2d(x, weight, bias, *options), F.conv2d(x.abs(), weight.abs(), bias.abs(), *options)


def assert_invariant(layers, updates, context="default"):
    """y_hat == A(x_hat) + bias for all `layers`, as a sum where several add onto one y_hat. Returns how many it saw.

    Both are rounded once per update and layer: a random walk, whose largest of some thousand values is at 4 deviations.
    """
    groups = {}
    for layer in layers:
        if layer.output is not None and context in layer.output.contexts:
            groups.setdefault((layer.output.key, layer.stack and layer.name), []).append(layer)
    for (key, _), group in groups.items():
        y_hat = y_hat_of(group[0], context)
        pairs = [operator(layer, _spread(x_hat_of(layer, context), layer, y_hat.shape)) for layer in group]
        expected, terms = (sum(part) for part in zip(*pairs))
        bound = torch.finfo(y_hat.dtype).eps * max(2 * math.sqrt(len(group) * updates), 6.0) * terms
        assert ((y_hat.double() - expected).abs() <= bound).all(), key
    return len(groups)


def _spread(x_hat, layer, shape):
    """x_hat as the convolution of a fused resampling block reads it: repeated, or padded."""
    forms = [lambda x: x, lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3), lambda x: F.pad(x, (0, 1, 0, 1))]
    return next(x for form in forms if layer.output_shape((x := form(x_hat)).shape) == shape)
