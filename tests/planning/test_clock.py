import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from modiff_kernels.planning import clock


def timesteps_of(scheduler, steps=5):
    scheduler.set_timesteps(steps)
    return clock.host_timesteps(scheduler)


def test_noise_is_that_of_the_scheduler():
    heun = diffusers.HeunDiscreteScheduler()
    timesteps = timesteps_of(heun)
    assert len(timesteps) == 9  # two calls a step, one at the last
    sigmas = heun.sigmas[:9].tolist()
    assert clock.log_snr(timesteps, heun) == pytest.approx([-2 * math.log(sigma) for sigma in sigmas])
    assert clock.positions(timesteps, heun) == pytest.approx([math.sqrt(sigma) for sigma in sigmas])
    ddim = DDIMScheduler()
    sigma = [(1 / float(ddim.alphas_cumprod[int(t)]) - 1) ** 0.5 for t in timesteps_of(ddim)]
    assert clock.positions(timesteps_of(ddim), ddim) == pytest.approx([math.sqrt(value) for value in sigma])
    assert clock.log_snr(timesteps, object()) is None
    assert clock.positions(timesteps, object()) == timesteps


def test_pure_noise_has_a_place():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    timesteps = timesteps_of(scheduler)
    assert scheduler.alphas_cumprod[int(timesteps[0])] == 0
    assert math.isfinite(clock.positions(timesteps, scheduler)[0])


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
        (DDIMScheduler(), 100, 36),
        (DDIMScheduler(clip_sample=False), 50, 19),
        (DDIMScheduler(), 20, 12),
        (DPMSolverMultistepScheduler(), 20, 12),
    ],
)
def test_automatic_choice(scheduler, steps, computed):
    assert clock.automatic(scheduler, steps).actions(steps).count("U") == computed
    assert clock.automatic(DDPMScheduler(), steps) is clock.automatic(scheduler, 6) is None
