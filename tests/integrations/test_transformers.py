"""Pipelines whose denoiser is a transformer, or several: accelerated, scheduled, compiled, saved and loaded."""

from functools import partial

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import modiff_kernels as mk
from modiff_kernels.backends import cpu
from modiff_kernels.evaluation import sqnr
from modiff_kernels.planning import stored
from tests.denoisers import DENOISERS
from tests.unets import trajectory, unet2d

STEPS = 8
PARTS = ("vae", *(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")))
TEXT, POOLED, MASK = torch.linspace(-3, 3, 240).sin().view(2, 1, 5, 24), torch.ones(1, 16), torch.ones(1, 5)
WITHOUT = {"negative_prompt_embeds": TEXT[1]}
PIPELINES = {
    "PixArtAlpha": (
        "PixArtTransformer2DModel (alpha, Sigma)",
        {**WITHOUT, "prompt_attention_mask": MASK, "negative_prompt_attention_mask": MASK, "negative_prompt": None},
    ),
    "StableDiffusion3": (
        "SD3Transformer2DModel",
        {**WITHOUT, "pooled_prompt_embeds": POOLED, "negative_pooled_prompt_embeds": -POOLED},
    ),
    "Flux": ("FluxTransformer2DModel", {"pooled_prompt_embeds": POOLED}),
}


class Pipeline:
    def __init__(self, name):
        kind, (denoiser, self.options) = getattr(diffusers, f"{name}Pipeline"), PIPELINES[name]
        flow = partial(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=name == "Flux")
        flow = partial(DDIMScheduler, clip_sample=False) if name == "PixArtAlpha" else flow
        parts = {part: None for part in PARTS if part in kind.__init__.__annotations__}
        self.pipe = kind(transformer=DENOISERS[denoiser].build(), scheduler=flow(), **parts)
        self.pipe.set_progress_bar_config(disable=True)
        if name == "PixArtAlpha":
            self.options = {**self.options, "use_resolution_binning": False}

        size = {"height": 64, "width": 64, "output_type": "latent"}
        self.options = {"prompt_embeds": TEXT[0], **size, **self.options}

    def sample(self):
        generator = torch.Generator().manual_seed(1)
        return self.pipe(num_inference_steps=STEPS, generator=generator, **self.options).images


@pytest.mark.parametrize("name", PIPELINES)
def test_whole_way(name, tmp_path):
    whole = Pipeline(name)
    pipe, exact = whole.pipe, whole.sample()
    fitted = mk.fit_schedule(pipe, 5, steps=STEPS, images=2, call_kwargs=whole.options, quiet=True)
    handle = mk.accelerate(pipe, mk.ModiffConfig(schedule=fitted.schedule))
    assert "8-bit layers of a transformer are plain" in handle.explain()
    assert {row.mode for row in handle.rows()} == {"float", "quantized"}
    assert all(layer.granularity == "per_token" for layer in handle.layers.values())
    assert sqnr(whole.sample(), exact) > 35
    assert handle.skipped_calls() == 3, handle.explain_schedule()
    handle.set_schedule(None)
    plain = whole.sample()
    assert sqnr(plain, exact) > 35
    handle.compile(backend="eager")
    assert sqnr(whole.sample(), plain) > 60
    handle.save_pretrained(tmp_path / "transformer")
    (tmp_path / stored.FILE_NAME).write_text(stored.add(tmp_path / stored.FILE_NAME, fitted))
    handle.remove()
    assert torch.equal(whole.sample(), exact)
    few_bits = "per_block" if cpu.has_vnni() else "per_sample"  # which is faster there
    for more, granularity in (({"act_bits": 4}, few_bits), ({"plan": "modulated"}, "per_token")):
        handle = mk.accelerate(pipe, mk.ModiffConfig(**more))
        assert {row.mode for row in handle.rows()} == {"float", "modulated"}
        assert {layer.granularity for layer in handle.layers.values()} == {granularity}
        assert sqnr(whole.sample(), exact) > 35
        handle.remove()
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path / "transformer")
    handle = mk.accelerate(pipe)
    handle.set_schedule(None)
    assert sqnr(whole.sample(), plain) > 60
    handle.set_schedule("auto 5")
    assert sqnr(whole.sample(), exact) > 35
    assert handle.skipped_calls() == 3, handle.explain_schedule()


def test_one_handle_for_several_denoisers():
    whole = Pipeline("Flux")
    whole.pipe.transformer_2 = DENOISERS["FluxTransformer2DModel"].build()
    exact = whole.sample()
    handle = mk.accelerate(whole.pipe)
    assert handle.explain().count("layers low-bit") == 2
    assert sqnr(whole.sample(), exact) > 35
    handle.remove()
    assert torch.equal(whole.sample(), exact)
    with pytest.raises(TypeError, match="has transformer and transformer_2; give one of them"):
        mk.make_plan(whole.pipe)
    with pytest.raises(ValueError, match="is of one denoiser; give transformer or transformer_2 alone"):
        mk.accelerate(whole.pipe, calibration="folder")


class OwnNames(torch.nn.Module):
    """A UNet behind a forward of its own names, in another order."""

    def __init__(self):
        super().__init__()
        self.net = unet2d()

    def forward(self, noisy, cond=None, sigma=None):
        return self.net(noisy, sigma).sample


@pytest.mark.parametrize("form", [lambda net, x, t: net(x, None, t), lambda net, x, t: net(noisy=x, sigma=t)])
def test_forward_of_other_names(form):
    """As accurate as the UNet in it, whose steps are found by the timestep: nothing skipped is far from its place."""
    xs, found = trajectory((2, 3, 8, 8), 6), []
    for net, call in ((unet2d(), lambda net, x, t: net(x, t).sample), (OwnNames(), form)):
        skips = ["net.conv_in", "net.conv_out", "conv_in", "conv_out", "time"]
        handle = mk.accelerate(net, mk.ModiffConfig(schedule="forecast every=2", skip_modules=skips))
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(6)
        with handle.sampling_run(scheduler=scheduler):
            found.append([call(net, x, t) for x, t in zip(xs, scheduler.timesteps)])
        assert handle.actions().count("forecast") == 1
    assert all(torch.equal(*pair) for pair in zip(*found))
