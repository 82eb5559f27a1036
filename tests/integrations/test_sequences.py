"""Any sequence of what users do to an accelerated pipeline: the picture of a fresh `accelerate`, or an error; and after
`remove()` everything is as it was. SEQUENCES says how many sequences are drawn (default: few)."""

import contextlib
import copy
import os

import hypothesis
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from hypothesis import strategies as st

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr
from modiff_kernels.integrations.hooks import set_attribute
from tests.unets import noise, text, unet2d_condition

STEPS = 4
ENOUGH_DB = 34.0  # what 8-bit weights and activations reach in this network, unless something has changed
SLACK_DB = 6.0
"""Below the fresh network. Its own distance to float varies by as much between weights and inputs of this size."""


class Own(AttnProcessor2_0):
    """A processor of a user's own."""

    def __call__(self, *args, **keywords):
        return 0.5 * super().__call__(*args, **keywords)


class Pipe:
    """A UNet, a scheduler and how pictures are made. The same is done to one in float and to one in low bits."""

    def __init__(self, accelerated, config=None):
        self.unet, self.scheduler = unet2d_condition(), DDIMScheduler(clip_sample=False)
        self.batch, self.size, self.prompt, self.steps = 2, 8, 2, STEPS
        self.passes, self.mode, self.undo = 1, contextlib.nullcontext, contextlib.ExitStack()
        self.handle = mk.accelerate(self, config) if accelerated else None

    def picture(self, stop=None, within=lambda pipe, step: None):
        """Of a whole run; with `stop`, of one that is interrupted after so many steps."""
        self.scheduler.set_timesteps(self.steps)
        x = noise(self.batch, 4, self.size)
        with self.mode():
            for step, t in enumerate(self.scheduler.timesteps[:stop]):
                within(self, step)
                prompts = [text(len(x), self.prompt + i).to(self.unet.dtype) for i in range(self.passes)]
                found = [self.unet(x.to(self.unet.dtype), t, prompt).sample.float() for prompt in prompts]
                x = self.scheduler.step(sum(found) / len(found), t, x).prev_sample
        return x.clone()

    def part(self, name):
        return self.unet.get_submodule(name)


CONV, ATTENTION, BLOCK = "down_blocks.0.resnets.0.conv1", "mid_block.attentions.0", "mid_block.resnets.0"
TO_V = f"{ATTENTION}.transformer_blocks.0.attn1.to_v"
SELF = f"{ATTENTION}.transformer_blocks.0.attn1"


def assign(name):
    module = lambda pipe: pipe.part(name)  # noqa: E731
    return lambda pipe: setattr(module(pipe), "weight", torch.nn.Parameter(module(pipe).weight * -1, False))


def swap(pipe):
    other = unet2d_condition(seed=3)
    for mine, theirs in zip(pipe.unet.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)


def load(pipe, assign):
    pipe.unet.load_state_dict(unet2d_condition(seed=4).state_dict(), assign=assign)


def halved(out):
    return (halved(out[0]), *out[1:]) if isinstance(out, tuple) else out * 0.5


def hook(name):
    def act(pipe):
        pipe.undo.callback(pipe.part(name).register_forward_hook(lambda module, args, out: halved(out)).remove)

    return act


def patch(name):
    def act(pipe):
        module = pipe.part(name)
        original = module.forward
        set_attribute(module, "forward", lambda *args, **keywords: halved(original(*args, **keywords)), pipe.undo)

    return act


def other_format(dtype):
    return lambda pipe: pipe.unet.to(dtype)


def put(**values):
    return lambda pipe: [setattr(pipe, name, value) for name, value in values.items()]


def interrupted(pipe):
    pipe.picture(stop=2)


def failing(pipe):
    def fail(pipe, step):
        if step == 2:
            raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        pipe.picture(within=fail)


def refresh(pipe):
    if pipe.handle is not None:
        pipe.handle.refresh()


ACTIONS = {
    "weight in place": lambda pipe: pipe.part(CONV).weight.mul_(-1),
    "weight.data in place": lambda pipe: pipe.part(CONV).weight.data.mul_(-1),
    "weight.data in attention": lambda pipe: pipe.part(TO_V).weight.data.mul_(2),
    "bias.data": lambda pipe: pipe.part(CONV).bias.data.add_(0.5),
    "norm.data": lambda pipe: pipe.part(f"{BLOCK}.norm1").weight.data.mul_(1.5),
    "time embedding.data": lambda pipe: pipe.part("time_embedding.linear_2").weight.data.mul_(-1),
    "time projection.data": lambda pipe: pipe.part(f"{BLOCK}.time_emb_proj").weight.data.mul_(-2),
    "new parameter": assign(CONV),
    "new parameter in attention": assign(TO_V),
    "weights of an EMA": swap,
    "load_state_dict": lambda pipe: load(pipe, assign=False),
    "load_state_dict(assign)": lambda pipe: load(pipe, assign=True),
    "hook on a convolution": hook(CONV),
    "hook on attention": hook(SELF),
    "hook on a block": hook(BLOCK),
    "hook on a transformer": hook(ATTENTION),
    "hook on conv_in": hook("conv_in"),
    "hooks and forwards removed": lambda pipe: pipe.undo.close(),
    "forward of a convolution": patch(CONV),
    "forward of a block": patch(BLOCK),
    "processor": lambda pipe: pipe.unet.set_attn_processor(Own()),
    "older processor": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    "processor of one": lambda pipe: setattr(pipe.part(SELF), "processor", Own()),
    "train()": lambda pipe: pipe.unet.train(),
    "eval()": lambda pipe: pipe.unet.eval(),
    "bfloat16": other_format(torch.bfloat16),
    "float32": other_format(torch.float32),
    "channels_last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "requires_grad_": lambda pipe: pipe.unet.requires_grad_(),
    "freeu": lambda pipe: pipe.unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "no freeu": lambda pipe: pipe.unet.disable_freeu(),
    "other batch": put(batch=3),
    "other size": put(size=16),
    "other prompt": put(prompt=9),
    "more steps": put(steps=6),
    "two passes": put(passes=2),
    "one pass": put(passes=1),
    "autocast": put(mode=lambda: torch.autocast("cpu", torch.bfloat16)),
    "inference_mode": put(mode=torch.inference_mode),
    "no mode": put(mode=contextlib.nullcontext),
    "a picture": lambda pipe: pipe.picture(),
    "interrupted": interrupted,
    "failing": failing,
    "refresh": refresh,
    "another scheduler": lambda pipe: setattr(pipe, "scheduler", DDIMScheduler(clip_sample=False)),
}


def fresh(pipe, config):
    """dB to float of a network that is accelerated as it is now."""
    twin = copy.copy(pipe)
    twin.unet = copy.deepcopy(pipe.unet)
    expected = twin.picture()
    mk.accelerate(twin, config)
    return sqnr(twin.picture(), expected)


@hypothesis.settings(
    max_examples=int(os.environ.get("SEQUENCES", 12)),
    deadline=None,
    derandomize="SEQUENCES" not in os.environ,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=6), st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_a_sequence_is_right_or_refused(names, scheduled):
    schedule = mk.StepSchedule("forecast", every=2, first=3, last=0) if scheduled else None
    config = mk.ModiffConfig(schedule=schedule)
    ours, plain = Pipe(True, config), Pipe(False)
    for name in names:
        try:
            ACTIONS[name](ours)
        except (RuntimeError, ValueError, TypeError):
            continue  # refused, so nothing was done
        ACTIONS[name](plain)
    try:
        got = ours.picture()
    except (RuntimeError, ValueError, TypeError) as error:
        hypothesis.event(f"refused: {str(error)[:60]}")
    else:
        expected = plain.picture()
        found = sqnr(got, expected)
        assert found > ENOUGH_DB or found > fresh(plain, config) - SLACK_DB
    for pipe in (ours, plain):
        pipe.undo.close()  # what a user puts on modules goes with them
    ours.handle.remove()
    assert torch.equal(ours.picture(), plain.picture())
