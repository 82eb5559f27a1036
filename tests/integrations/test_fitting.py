"""`fit_schedule`: what it gives is what an accelerated run makes of it, with pipelines, guidance and own loops."""

import functools

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

import modiff_kernels as mk
from modiff_kernels.integrations import fitting
from tests.unets import noise, pipeline, stable_diffusion, text, unet2d, unet2d_condition

STEPS, EVALUATIONS = 7, 3
UNCLIPPED = functools.partial(DDIMScheduler, clip_sample=False)
FIT = {"evaluations": EVALUATIONS, "steps": STEPS, "images": 2, "quiet": True}


def loop(unet, scheduler, seeds, steps=STEPS, guidance=False):
    """An own loop with the network called once, or for guidance twice, at every timestep."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.cat([noise(batch=1, channels=4, seed=seed) for seed in seeds]) * scheduler.init_noise_sigma
    prompts = text(len(seeds), seed=5), text(len(seeds), seed=6)
    handle = getattr(unet, "_modiff_handle", None)
    with torch.no_grad(), handle.sampling_run(scheduler=scheduler) if handle else torch.no_grad():
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t)
            first, *other = [unet(given, t, prompt).sample for prompt in prompts[: 1 + guidance]]
            output = first + 0.5 * (other[0] - first) if guidance else first
            x = scheduler.step(output, t, x).prev_sample
    return x


def decibel(found, wanted):
    errors = (found - wanted).double().flatten(1).square().mean(1)
    return float((10 * torch.log10((wanted.max() - wanted.min()) ** 2 / errors)).mean())


@pytest.mark.parametrize(
    ("scheduler", "guidance"),
    [(UNCLIPPED, True), (DPMSolverMultistepScheduler, False), (EulerDiscreteScheduler, False)],
)
def test_an_accelerated_run_is_as_good_as_the_fit_says(scheduler, guidance):
    """In float32 and with low bits; several calls at a timestep are passes, whose weights are the same."""
    unet, scheduler = unet2d_condition(levels=1), scheduler()
    sample = functools.partial(loop, unet, scheduler, guidance=guidance)
    found = mk.fit_schedule(unet, **FIT, scheduler=scheduler, sample=sample)
    assert found.evaluations == found.notes["evaluations"] == EVALUATIONS
    assert found.notes["held_out_db"] > found.notes["polynomial_db"] + 3
    held_out = range(3, 5)  # behind two of the fit and one that stops it
    wanted = sample(held_out)
    handle = mk.accelerate(unet, mk.ModiffConfig(weight_bits=None, act_bits=None, schedule=found.schedule))
    assert decibel(sample(held_out), wanted) == pytest.approx(found.notes["held_out_db"], abs=0.05)
    handle.remove()
    handle = mk.accelerate(unet, mk.ModiffConfig(schedule=found.schedule))
    low_bit = sample(held_out)
    handle.set_schedule(None)
    assert decibel(low_bit, sample(held_out)) > 40, "a fit holds at any bits"


def test_a_pipeline_with_guidance_in_one_batch():
    pipe = stable_diffusion(UNCLIPPED())
    prompts = {"prompt_embeds": text(1, seed=5), "negative_prompt_embeds": text(1, seed=6)}
    options = {**prompts, "guidance_scale": 3.0, "height": 16, "width": 16}
    found = mk.fit_schedule(pipe, **FIT, call_kwargs=options)
    assert found.notes["held_out_db"] > found.notes["polynomial_db"]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    handle = mk.accelerate(pipe, mk.ModiffConfig(schedule=found.schedule))
    pipe(**options, num_inference_steps=STEPS, num_images_per_prompt=2, generator=generators)
    assert handle.skipped_calls() == STEPS - EVALUATIONS


def test_towards_the_converged_picture(monkeypatch):
    monkeypatch.setattr(fitting, "CONVERGED", 80)
    unet, scheduler = unet2d_condition(levels=1), DPMSolverMultistepScheduler(use_karras_sigmas=True)
    sample = functools.partial(loop, unet, scheduler)
    found = mk.fit_schedule(unet, **FIT, towards="converged", scheduler=scheduler, sample=sample)
    wanted = sample(range(3, 5), 80)
    handle = mk.accelerate(unet, mk.ModiffConfig(weight_bits=None, act_bits=None, schedule=found.schedule))
    assert decibel(sample(range(3, 5)), wanted) == pytest.approx(found.notes["held_out_db"], abs=0.05)
    handle.set_schedule(None)
    assert found.notes["held_out_db"] > decibel(sample(range(3, 5), EVALUATIONS), wanted) + 3


def test_a_sampler_that_calls_twice_a_step_has_twice_as_many_calls():
    unet, scheduler = unet2d_condition(levels=1), diffusers.HeunDiscreteScheduler()
    sample = functools.partial(loop, unet, scheduler)
    found = mk.fit_schedule(unet, **FIT | {"steps": 6}, scheduler=scheduler, sample=sample)
    assert len(found.schedule.weights) == 11
    assert found.notes["held_out_db"] > found.notes["polynomial_db"]


def test_what_is_refused():
    unet, pipe = unet2d(), pipeline()
    given = {"scheduler": DDIMScheduler(), "sample": lambda seeds, steps: noise()}
    for target, options, message in (
        (unet, {}, "a bare UNet does not sample"),
        (object(), {}, "got object, which has no denoiser"),
        (pipe, {"towards": "best"}, "towards='best' is not allowed; give one of own, converged"),
        (pipe, {"budget_db": 30.0}, "exactly one of evaluations and budget_db"),
        (unet, given, "called 0 times in a run of 7 timesteps"),
        (unet, {**given, "scheduler": DDPMScheduler()}, "DDPMScheduler adds noise"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            mk.fit_schedule(target, **{**FIT, **options})
    mk.accelerate(pipe)
    with pytest.raises(ValueError, match=r"accelerated; call remove\(\)"):
        mk.fit_schedule(pipe, **FIT)
