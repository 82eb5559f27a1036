"""Step schedules with diffusers' samplers: every scheduler, image to image, guidance in two passes, "auto"."""

import warnings

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import modiff_kernels as mk
from tests.integrations.schedule_cases import FLOAT, letters, noise, pipeline, sample, unet_of

# diffusers' Heun and KDPM2 schedulers hand tensors to NumPy functions, for every train step, and NumPy 2 wants more of
# __array__ and __array_wrap__ than torch's tensors have. Nothing of the package is in between.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


def forecast_by_hand(pipe, handle, steps):
    """The same loop without the package: the line through the last two computed values, in the timestep."""
    actions = letters(handle)
    handle.remove()
    pipe.scheduler.set_timesteps(steps)
    x = noise() * pipe.scheduler.init_noise_sigma
    before = last = None
    for action, t in zip(actions, pipe.scheduler.timesteps, strict=True):
        if action == "U":
            value = (float(t), pipe.unet(pipe.scheduler.scale_model_input(x, t), t).sample)
            before, last = (before, value) if last is None or last[0] == value[0] else (last, value)
            prediction = value[1]
        else:
            share = (float(t) - last[0]) / (last[0] - before[0])
            prediction = last[1] + share * (last[1] - before[1])
        x = pipe.scheduler.step(prediction, t, x).prev_sample
    return x


class TestSchedulers:
    @pytest.mark.parametrize(
        "scheduler",
        [
            DDIMScheduler,
            PNDMScheduler,
            DPMSolverMultistepScheduler,
            UniPCMultistepScheduler,
            EulerDiscreteScheduler,
            HeunDiscreteScheduler,
            KDPM2DiscreteScheduler,
        ],
    )
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_every_scheduler(self, scheduler, prediction_type):
        made = scheduler(prediction_type=prediction_type) if prediction_type != "epsilon" else scheduler()
        pipe = pipeline(made)
        if prediction_type == "sample" and scheduler in (PNDMScheduler, KDPM2DiscreteScheduler):
            pytest.skip(f"{scheduler.__name__} of diffusers has no sample prediction")
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="forecast every=2 order=1 axis=timestep", **FLOAT))
        found = sample(pipe, steps=8)
        assert "F" in letters(handle)
        torch.testing.assert_close(found, forecast_by_hand(pipe, handle, steps=8), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("steps", [4, 12, 30])
    def test_a_pattern_fits_every_number_of_steps(self, steps):
        pipe = pipeline()
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="U2FUF2UF5", **FLOAT))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sample(pipe, steps)
        assert len(letters(handle)) == steps
        assert letters(handle).count("U") == 4

    def test_image_to_image_lays_the_schedule_over_its_part(self):
        pipe = pipeline()
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="forecast every=3 first=2 last=2", **FLOAT))
        sample(pipe, steps=20, start=10)
        assert letters(handle) == "UUFFUFFUUU"

    def test_real_pipeline(self):
        pipe = DDIMPipeline(unet_of(), DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="hold every=2"))
        for _ in range(2):
            pipe(num_inference_steps=6, output_type="np")
        assert letters(handle) == "UUUHUU"

    def test_two_contexts_have_their_own_values(self):
        unet = unet_of()
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(6)
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="UH axis=timestep", **FLOAT))
        with handle.sampling_run(scheduler=scheduler):
            for call, t in enumerate(scheduler.timesteps):
                with handle.context("cond"):
                    cond = unet(noise(), t).sample
                if call < 4:
                    continue
                with handle.context("uncond"):  # guidance that begins late
                    uncond = unet(-noise(), t).sample
        assert letters(handle, "cond") == "UHHHHH"
        assert letters(handle, "uncond") == "UH"
        handle.remove()
        torch.testing.assert_close(cond, unet(noise(), scheduler.timesteps[0]).sample)
        torch.testing.assert_close(uncond, unet(-noise(), scheduler.timesteps[4]).sample)

    def test_a_changed_batch_is_computed(self):
        unet = unet_of()
        handle = mk.accelerate(unet, mk.ModiffConfig(schedule="UH3U axis=timestep", **FLOAT))
        with handle.sampling_run(5):
            sizes = [unet(noise(batch), t).sample.shape[0] for batch, t in zip((4, 4, 2, 2, 2), range(5, 0, -1))]
        assert sizes == [4, 4, 2, 2, 2]
        assert letters(handle) == "UHUHU"


class TestAuto:
    @pytest.mark.parametrize(
        ("scheduler", "steps", "skips"), [(DDIMScheduler, 50, 30), (UniPCMultistepScheduler, 20, 8)]
    )
    def test_it_skips(self, scheduler, steps, skips):
        pipe = pipeline(scheduler())
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="auto", **FLOAT))
        sample(pipe, steps)
        assert letters(handle).count("F") >= skips
        assert "auto, last " in handle.explain()

    @pytest.mark.parametrize(("scheduler", "steps"), [(DDPMScheduler, 20), (DDIMScheduler, 6)])
    def test_it_computes_everything_where_skipping_does_not_pay(self, scheduler, steps):
        pipe = pipeline(scheduler())
        dense = sample(pipe, steps)
        handle = mk.accelerate(pipe, mk.ModiffConfig(schedule="auto", **FLOAT))
        with pytest.warns(UserWarning, match="every call is computed, because"):
            found = sample(pipe, steps)
        if scheduler is DDIMScheduler:
            torch.testing.assert_close(found, dense, rtol=1e-3, atol=1e-3)  # channels_last adds up in another order
        assert letters(handle) == "U" * steps
