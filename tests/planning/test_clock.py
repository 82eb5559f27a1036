import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from modiff_kernels.planning import clock


def timesteps_of(scheduler, steps=5):
    scheduler.set_timesteps(steps)
    return clock.host_timesteps(scheduler)


def test_axes_are_the_noise_of_the_scheduler():
    scheduler = diffusers.HeunDiscreteScheduler()
    timesteps = timesteps_of(scheduler)
    assert len(timesteps) == 9  # two calls a step, one at the last
    sigma = clock.positions("sigma", timesteps, scheduler)
    assert sigma == pytest.approx(scheduler.sigmas[:9].tolist(), rel=2e-3)
    assert clock.positions("root_sigma", timesteps, scheduler) == pytest.approx([math.sqrt(value) for value in sigma])
    assert clock.positions("log_snr", timesteps, scheduler) == pytest.approx([-2 * math.log(value) for value in sigma])
    assert clock.positions("timestep", timesteps, object()) == timesteps


def test_schedulers_without_alphas_tell_their_sigmas():
    scheduler = diffusers.EDMEulerScheduler()
    timesteps = timesteps_of(scheduler)
    assert clock.positions("sigma", timesteps, scheduler) == pytest.approx(scheduler.sigmas[:5].tolist())
    with pytest.raises(ValueError, match=r"object has no alphas_cumprod .* axis=timestep"):
        clock.positions("sigma", timesteps, object())


def test_pure_noise_has_a_place():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    timesteps = timesteps_of(scheduler)
    assert scheduler.alphas_cumprod[int(timesteps[0])] == 0
    assert math.isfinite(clock.positions("sigma", timesteps, scheduler)[0])


@pytest.mark.parametrize("timestep", [601, 601.0, torch.tensor(601), torch.full((4,), 601)])
def test_timesteps_in_all_forms(timestep):
    assert clock.host_timestep(timestep) == 601
    assert clock.host_timestep(torch.tensor([601, 600])) is clock.host_timestep(torch.zeros(2, 3)) is None


def test_stochastic_samplers():
    sde = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    assert all(map(clock.is_stochastic, (DDPMScheduler(), diffusers.EulerAncestralDiscreteScheduler(), sde)))
    assert not any(map(clock.is_stochastic, (DPMSolverMultistepScheduler(), DDIMScheduler())))


@pytest.mark.parametrize(
    ("scheduler", "steps", "computed"),
    [
        (DDIMScheduler(clip_sample=True), 50, 14),
        (DDIMScheduler(clip_sample=True), 100, 36),
        (DDIMScheduler(clip_sample=False), 50, 19),
        (DDIMScheduler(), 20, 12),
        (DPMSolverMultistepScheduler(), 20, 12),
    ],
)
def test_automatic_choice(scheduler, steps, computed):
    assert clock.automatic(scheduler, steps).actions(steps).count("U") == computed
    assert clock.automatic(DDPMScheduler(), steps) is clock.automatic(scheduler, 6) is None
