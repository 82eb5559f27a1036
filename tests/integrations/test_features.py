"""What diffusers and torch do to a UNet before accelerate(), after it, and within a run: right, or refused.

docs/features.md is the table of it. Make it anew with `python -m tests.integrations.test_features` from the checkout.
"""

import contextlib
import copy
import functools
import pickle
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import EMAModel
from torch import nn

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr
from tests.unets import NETWORKS, WIDTH, conditions_of, text, trajectory

TABLE = Path(__file__).resolve().parents[2] / "docs" / "features.md"
WHEN = ("before accelerate()", "after it", "within a run")
CALLS, AT = 4, 2  # calls of a run; the one before which something changes within it
SLACK_DB = 3.0
"""How far below the ceiling "works" may be: 8-bit activations cost 1 to 2 dB beside 8-bit weights in these networks."""


class Net:
    """A UNet with what its calls are made of, which features change."""

    def __init__(self, kind):
        self.kind, self.unet, self.handle = kind, NETWORKS[kind](), None
        self.keywords = conditions_of(self.unet)
        self.first = {type(module).__name__: path for path, module in [*self.unet.named_modules()][::-1]}
        self.around = contextlib.nullcontext
        self.sample = lambda x: x
        self.time = lambda t: t
        self.call = lambda x, t, **keywords: self.unet(x, t, **keywords).sample
        self.undo = contextlib.ExitStack()

    def run(self, change=None):
        """The output of the last call; change: what happens within the run."""
        size = self.unet.config.sample_size
        xs = trajectory((2, self.unet.config.in_channels, size, size), CALLS)
        with contextlib.nullcontext() if self.handle is None else self.handle.sampling_run():
            for i, x in enumerate(xs):
                if i == AT and change is not None:
                    change(self)
                with self.around():
                    out = self.call(self.sample(x).to(self.unet.dtype), self.time(500 - 10 * i), **self.given())
        return out.float().clone()

    def given(self):
        """The conditions in the dtype of the UNet: the same objects at every call."""
        dtype = self.unet.dtype
        for name, value in self.keywords.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != dtype:
                self.keywords[name] = value.to(dtype)
        return self.keywords


def part(net, kind):
    """The first module that was of this class in the float UNet, as a user finds it, by its path."""
    return net.unet.get_submodule(net.first[kind])


def layer(net, name):
    return next(module for path, module in net.unet.named_modules() if path.endswith(name))


FEATURES = {}


def one(name, change, *kinds):
    FEATURES[name] = change, kinds or ("unet2d", "sd15")


class Half(AttnProcessor2_0):
    """A processor of a user's own."""

    def __call__(self, *args, **keywords):
        return 0.5 * super().__call__(*args, **keywords)


class HalfBlock:
    """As token merging swaps the class of blocks."""

    def forward(self, *args, **keywords):
        return 0.5 * super().forward(*args, **keywords)


def patched(module):
    original = module.forward
    module.forward = lambda *args, **keywords: 0.5 * original(*args, **keywords)


def swapped(module):
    module.__class__ = type(f"Own{type(module).__name__}", (HalfBlock, type(module)), {})


def halved(module):
    module.register_forward_hook(lambda module, args, out: 0.5 * out)


def quiet(module):
    module.register_forward_pre_hook(lambda module, args: (0.5 * args[0], *args[1:]) if args else None)


def set_all(net, processor):
    net.unet.set_attn_processor(processor)


CONDITIONAL = ("sd15", "sdxl")
# Attention
one("set_attention_slice", lambda net: net.unet.set_attention_slice(1), "sd15")
one("set_attn_processor(AttnProcessor)", lambda net: set_all(net, AttnProcessor()), "sd15")
one("set_attn_processor(AttnProcessor2_0)", lambda net: set_all(net, AttnProcessor2_0()), "sd15")
one("set_attn_processor(SlicedAttnProcessor)", lambda net: set_all(net, SlicedAttnProcessor(1)), "sd15")
one("set_attn_processor(of one's own)", lambda net: set_all(net, Half()), "sd15")
one("set_default_attn_processor", lambda net: net.unet.set_default_attn_processor(), "sd15")
one("attention.processor = of one's own", lambda net: setattr(part(net, "Attention"), "processor", Half()))
one("attention.forward = (HyperTile)", lambda net: patched(part(net, "Attention")))
one("hook on attention (SAG)", lambda net: halved(part(net, "Attention")))
one("fuse_qkv_projections", lambda net: net.unet.fuse_qkv_projections(), "sd15")
one("__class__ of a block (token merging)", lambda net: swapped(part(net, "BasicTransformerBlock")), *CONDITIONAL)
one("hook on a transformer block", lambda net: halved(part(net, "BasicTransformerBlock")), *CONDITIONAL)
one("forward of a transformer block", lambda net: patched(part(net, "BasicTransformerBlock")), *CONDITIONAL)
one("set_chunk_feed_forward", lambda net: part(net, "BasicTransformerBlock").set_chunk_feed_forward(16, 1), "sd15")
one("encoder_attention_mask", lambda net: net.keywords.update(encoder_attention_mask=mask()), "sd15")


def mask():
    kept = torch.ones(2, 5)
    kept[:, 3:] = 0
    return kept


# Hooks and forwards elsewhere
one("hook on a ResnetBlock2D", lambda net: halved(part(net, "ResnetBlock2D")))
one("hook on a norm", lambda net: halved(part(net, "GroupNorm")))
one("hook on a convolution", lambda net: halved(layer(net, "resnets.0.conv1")))
one("pre-hook on a convolution", lambda net: quiet(layer(net, "resnets.0.conv1")))
one("forward of a convolution", lambda net: patched(layer(net, "resnets.0.conv1")))
one("hook on conv_in", lambda net: halved(net.unet.conv_in))
one("hook on the time embedding", lambda net: halved(net.unet.time_embedding))
one("hook on the UNet", lambda net: quiet(net.unet))
one("hook on a down block", lambda net: net.unet.down_blocks[0].register_forward_hook(lambda *_: None))
one("dropout, train()", lambda net: net.unet.train())
one("requires_grad_()", lambda net: net.unet.requires_grad_())
one("enable_gradient_checkpointing", lambda net: net.unet.enable_gradient_checkpointing())


def exchanged(path, name, value):
    return lambda net: setattr(net.unet.get_submodule(path), name, value())


def tiled(net):
    for module in net.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


def repatched(net, kind):
    original = kind.forward
    net.undo.callback(setattr, kind, "forward", original)
    kind.forward = lambda *args, **keywords: 0.5 * original(*args, **keywords)


RESNET = "mid_block.resnets.0"
one("nonlinearity of a block", exchanged(RESNET, "nonlinearity", nn.ReLU))
one("output_scale_factor of a block", exchanged(RESNET, "output_scale_factor", lambda: 2.0))
one("conv1 of a block", exchanged(RESNET, "conv1", nn.Identity))
one("to_q of an attention", lambda net: setattr(part(net, "Attention"), "to_q", nn.Identity()))
one("downscale_freq_shift", exchanged("time_proj", "downscale_freq_shift", lambda: 4))
one("padding_mode (seamless tiling)", tiled)
one("padding_mode of a convolution", lambda net: setattr(layer(net, "resnets.0.conv1"), "padding_mode", "circular"))
one("forward of the class of blocks", lambda net: repatched(net, ResnetBlock2D))
one("forward of the class of norms", lambda net: repatched(net, nn.GroupNorm))


# Weights
def other(net):
    return NETWORKS[net.kind](seed=5)


def averaged(net):
    average = EMAModel(other(net).parameters())
    average.store(net.unet.parameters())
    average.copy_to(net.unet.parameters())


def data_of(net, name):
    return layer(net, name).weight.data


def renewed(module, name="weight"):
    setattr(module, name, nn.Parameter(-getattr(module, name).detach(), requires_grad=False))


def replaced(net, name):
    layer(net, name).weight.data = -data_of(net, name)


one("load_state_dict", lambda net: net.unet.load_state_dict(other(net).state_dict()))
one("load_state_dict(assign=True)", lambda net: net.unet.load_state_dict(other(net).state_dict(), assign=True))
one("weights of an EMA", averaged)
one("weight.mul_()", lambda net: layer(net, "resnets.0.conv1").weight.mul_(-1))
one("weight.data.mul_()", lambda net: data_of(net, "resnets.0.conv1").mul_(-1))
one("weight.data =", lambda net: replaced(net, "resnets.0.conv1"))
one("weight = nn.Parameter()", lambda net: renewed(layer(net, "resnets.0.conv1")))
one("bias.mul_()", lambda net: layer(net, "resnets.0.conv2").bias.mul_(9))
one("bias.data.mul_()", lambda net: layer(net, "resnets.0.conv2").bias.data.mul_(9))
one("weight.data of a projection in attention", lambda net: data_of(net, "to_v").mul_(-1))
one("weight of a norm, in place", lambda net: part(net, "GroupNorm").weight.mul_(2))
one("weight.data of a norm", lambda net: part(net, "GroupNorm").weight.data.mul_(2))
one("weight of the time embedding, in place", lambda net: layer(net, "time_embedding.linear_1").weight.mul_(-1))
one("weight.data of the time embedding", lambda net: data_of(net, "time_embedding.linear_1").mul_(-1))
one("weight.data of a time projection", lambda net: data_of(net, "resnets.0.time_emb_proj").mul_(-4))
one("spectral_norm", lambda net: nn.utils.parametrizations.spectral_norm(layer(net, "resnets.0.conv1")))
one("add_adapter (LoRA)", lambda net: net.unet.add_adapter(lora()), "sd15")


def lora():
    from peft import LoraConfig

    torch.manual_seed(3)
    return LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)


# Number formats and torch's modes
def within(net, make):
    net.around = make


one("to(bfloat16)", lambda net: net.unet.to(torch.bfloat16))
one("half()", lambda net: net.unet.half())
one("channels_last", lambda net: net.unet.to(memory_format=torch.channels_last))
one("autocast", lambda net: within(net, lambda: torch.autocast("cpu", torch.bfloat16)))
one("inference_mode", lambda net: within(net, torch.inference_mode))
one("enable_grad", lambda net: within(net, torch.enable_grad))
one(
    "enable_layerwise_casting",
    lambda net: net.unet.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32),
)
one("use_deterministic_algorithms", lambda net: deterministic(net))


def deterministic(net):
    torch.use_deterministic_algorithms(True)
    net.undo.callback(torch.use_deterministic_algorithms, False)


# Calls
def sampled(net, change):
    net.sample = change


def batched(net, change):
    """Of sample and conditions."""
    net.sample = change
    for name, value in net.keywords.items():
        net.keywords[name] = {k: change(v) for k, v in value.items()} if isinstance(value, dict) else change(value)


one("half the batch", lambda net: batched(net, lambda t: t[1:]))
one("batch doubled", lambda net: batched(net, lambda t: torch.cat([t, t])))
one("another size", lambda net: sampled(net, lambda x: x.repeat(1, 1, 2, 2)))
one("not square", lambda net: sampled(net, lambda x: x.repeat(1, 1, 1, 2)))
one("not contiguous", lambda net: sampled(net, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)))
one("timestep float", lambda net: setattr(net, "time", float))
one("timestep tensor", lambda net: setattr(net, "time", torch.tensor))
one("timestep tensor [1]", lambda net: setattr(net, "time", lambda t: torch.tensor([t])))
one("timestep per sample", lambda net: setattr(net, "time", lambda t: torch.tensor([t, t])))
one("timesteps that differ", lambda net: setattr(net, "time", lambda t: torch.tensor([t, t - 300])))
one("return_dict=False", lambda net: setattr(net, "call", lambda x, t, **k: net.unet(x, t, return_dict=False, **k)[0]))
one("keywords", lambda net: setattr(net, "call", lambda x, t, **k: net.unet(sample=x, timestep=t, **k).sample))
one("another prompt", lambda net: net.keywords.update(encoder_hidden_states=text(seed=7)), *CONDITIONAL)
one("prompt in place", lambda net: net.keywords["encoder_hidden_states"].neg_(), *CONDITIONAL)
one("prompt in place, .data", lambda net: net.keywords["encoder_hidden_states"].data.neg_(), *CONDITIONAL)
one("longer prompt", lambda net: net.keywords.update(encoder_hidden_states=text(seed=7).repeat(1, 3, 1)), *CONDITIONAL)
one("ControlNet residuals", lambda net: net.keywords.update(control()), "sd15")
one("T2I-Adapter features", lambda net: setattr(net, "call", adapted(net)), "sd15")
one("IP-Adapter", lambda net: ip_adapter(net), "sd15")
one("enable_freeu", lambda net: net.unet.enable_freeu(s1=0.2, s2=0.2, b1=1.5, b2=1.6), "sd15")


def control():
    generator = torch.Generator().manual_seed(9)
    shapes = [(2, 16, 8, 8), (2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 4, 4)]
    down = tuple(0.3 * torch.randn(shape, generator=generator) for shape in shapes)
    middle = 0.3 * torch.randn(2, 32, 4, 4, generator=generator)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def adapted(net):
    """The UNet takes the features out of their list and adds them in place."""
    generator = torch.Generator().manual_seed(9)
    found = [0.3 * torch.randn(shape, generator=generator) for shape in [(2, 16, 8, 8), (2, 32, 4, 4)]]
    return lambda x, t, **k: net.unet(x, t, down_intrablock_additional_residuals=[*found], **k).sample


def ip_adapter(net):
    """As `load_ip_adapter` does it."""
    torch.manual_seed(5)
    processors = {}
    for name in net.unet.attn_processors:
        width = net.unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        of_image = IPAdapterAttnProcessor2_0(width, WIDTH, num_tokens=(4,))
        processors[name] = of_image if "attn2" in name else AttnProcessor2_0()
    net.unet.set_attn_processor(processors)
    net.unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(16, WIDTH, 4)])
    net.unet.config.encoder_hid_dim_type = "ip_image_proj"
    image = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(8))
    net.keywords["added_cond_kwargs"] = {"image_embeds": [image]}


# What makes another thing of the UNet
one("copy.deepcopy", lambda net: setattr(net, "unet", copy.deepcopy(net.unet)))
one("pickle", lambda net: setattr(net, "unet", pickle.loads(pickle.dumps(net.unet))), "unet2d")
one(
    "torch.jit.trace",
    lambda net: torch.jit.trace(net.unet, (trajectory((2, 3, 8, 8), 1)[0], torch.tensor(1)), strict=False),
    "unet2d",
)
one(
    "torch.export",
    lambda net: torch.export.export(net.unet, (trajectory((2, 3, 8, 8), 1)[0], torch.tensor(1))),
    "unet2d",
)


class Row(NamedTuple):
    """loss: dB below the ceiling where it works. words: of a refusal. late: from the next run on, none in this one."""

    loss: float | None
    words: str = ""
    late: bool = False

    def __str__(self):
        said = f"works, {self.loss:.1f} dB" if self.loss is not None else f"refused: {self.words}"
        return f"from the next run on: {said}" if self.late else said


@functools.cache
def truth(name, kind, when):
    """Of the float UNet; raises what the feature itself raises there."""
    return observed(name, kind, when, None)[0]


@functools.cache
def ceiling(name, kind):
    """dB to it of the same 8-bit weights with float activations, in the number format that the feature sets."""
    if name in SAME_PICTURE:
        return sqnr(truth(name, kind, WHEN[0]), truth("nothing", kind, WHEN[0]))
    name = name if name in FORMATS else "nothing"
    return sqnr(observed(name, kind, WHEN[0], mk.ModiffConfig(act_bits=None))[0], truth(name, kind, WHEN[0]))


def observed(name, kind, when, config, runs=1):
    """The last outputs of this run, and of further ones."""
    change = FEATURES[name][0]
    net = Net(kind)
    if when == WHEN[0]:
        change(net)
    if config is not None:
        net.handle = mk.accelerate(net.unet, config)
    with net.undo:
        if when == WHEN[1]:
            net.run()  # a picture before
            change(net)
        return [net.run(change if when == WHEN[2] and run == 0 else None) for run in range(runs)]


FORMATS = ("to(bfloat16)", "half()", "autocast")
SAME_PICTURE = ("enable_layerwise_casting",)  # judged by the picture without it, and by what float loses by it
one("nothing", lambda net: None)


def outcome(name, kind, when, **options):
    """options: of the ModiffConfig. What the float UNet cannot do is no feature, and fails."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = truth("nothing" if name in SAME_PICTURE else name, kind, when)
        late = False
        for run in range(2):
            try:
                got = observed(name, kind, when, mk.ModiffConfig(**options), run + 1)[-1]
            except (RuntimeError, ValueError, TypeError) as error:
                return Row(None, re.sub(r"\s+", " ", str(error)).replace("|", "/"), late)
            loss = ceiling(name, kind) - sqnr(got, expected)
            if loss < SLACK_DB or when != WHEN[2] or run:
                return Row(loss, "", late)
            late, expected = True, observed(name, kind, when, None, 2)[-1]
        raise AssertionError


CASES = [(name, kind, when) for name, (_, kinds) in FEATURES.items() for kind in kinds for when in WHEN]


def cells():
    """Of the table in the documentation."""
    found = {}
    for line in TABLE.read_text().splitlines():
        if line.startswith("| `"):
            name, kind, *outcomes = (cell.strip() for cell in line.strip("|").split(" | "))
            found.update({(name.strip("`"), kind, when): text for when, text in zip(WHEN, outcomes, strict=True)})
    return found


def test_the_table_has_every_feature():
    assert list(cells()) == CASES
    assert len(FEATURES) >= 60


@pytest.mark.parametrize(("name", "kind"), list(dict.fromkeys((name, kind) for name, kind, _ in CASES)))
def test_works_or_is_refused_as_the_table_says(name, kind):
    for when in WHEN:
        told, row = cells()[name, kind, when], outcome(name, kind, when)
        if row.loss is None:
            assert told == shortened(row), when
            if "fuse=False" in row.words:  # the remedy
                assert (outcome(name, kind, when, fuse=False).loss or 0) < SLACK_DB, when
        else:
            assert row.loss < SLACK_DB, f"{when}: {row.loss:.1f} dB below the ceiling, and nothing was said"
            assert told.split(",")[0] == str(row).split(",")[0], f"{when}: {told}"


def shortened(row):
    text = str(row)
    return text if len(text) <= 240 else f"{text[:240].rpartition(' ')[0]} ..."


HEAD = """\
# Table of features

What becomes of changes that diffusers, torch or you make to a UNet, at one of three times: before `accelerate()`,
after it and a first picture, or in the middle of a run. [Supported models and features](diffusers.md) is the summary.

- "works, 1.0 dB": the last output of the run is 1.0 dB further from the float UNet with the same change than it is with
  8-bit weights and float activations. A negative number means nearer.
- "refused": this error is raised.

The networks are small and have random weights. `python -m tests.integrations.test_features` makes the table, and tests
check it.

"""


def write():
    rows = [("feature", "network", *WHEN), ("---",) * (2 + len(WHEN))]
    for name, kind in dict.fromkeys((name, kind) for name, kind, _ in CASES):
        rows.append((f"`{name}`", kind, *(shortened(outcome(name, kind, when)) for when in WHEN)))
    TABLE.write_text(HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    write()
    sys.exit()
