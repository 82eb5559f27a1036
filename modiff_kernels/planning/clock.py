"""Where the calls of a run lie on the axis of a schedule, read from the scheduler once a run, as host numbers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from modiff_kernels.config.schedule import StepSchedule

LEAST_ALPHA = 2.0**-24  # of schedules that end in pure noise; diffusers' DPM-Solver takes the same
STOCHASTIC = ("DDPM", "Ancestral", "SDE", "LCM", "TCD", "CMStochastic", "RePaint", "UnCLIP", "SdeVe", "SASolver")
MANY_CALLS = 40  # from here on DDIM moves so little per call that most calls can be forecast
FEW_CALLS = 12  # with fewer, a skipped call costs more fidelity than a step less

# `modiff calibrate --schedule --budget-db 41 --images 32 --batch 32 --seed 1000`, on the shipped model.
# It holds for what it was searched on, 50 calls of DDIM that clips its pictures: without clipping, or stretched to 100
# calls, it loses 8 dB and more (docs/schedules.md).
SEARCHED_CALLS = 50
CLIPPED_DDIM = "U3F3UFUF2UF4UF3UF5UF2UF6UF3UF4UF2UF order=3 axis=sigma"
DDIM = StepSchedule("forecast", every=3, first=3, last=1)
MULTISTEP = StepSchedule("forecast", every=2, first=3, last=1)


def host_timestep(timestep: Any) -> float | None:
    """A timestep as the UNet gets it, a number or a tensor of one or of equal elements, as a number; else None."""
    if not hasattr(timestep, "reshape"):
        return float(timestep) if isinstance(timestep, (int, float)) else None
    values = timestep.reshape(-1).tolist() if timestep.ndim < 2 or timestep.numel() == 1 else []
    return float(values[0]) if values and values.count(values[0]) == len(values) else None


def host_timesteps(scheduler: Any) -> list[float]:
    """`scheduler.timesteps`, one per call of the UNet: schedulers that call it twice a step list each call."""
    return [float(t) for t in scheduler.timesteps]


def positions(axis: str, timesteps: Sequence[float], scheduler: Any) -> list[float]:
    """The places of `timesteps` on `axis`. ValueError where the scheduler does not tell its noise levels."""
    if axis == "timestep":
        return list(timesteps)
    alphas, sigmas = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "sigmas", None)
    if alphas is not None:
        table = [max(float(alpha), LEAST_ALPHA) for alpha in alphas]
        noise = np.interp(timesteps, range(len(table)), [math.log((1 - alpha) / alpha) for alpha in table])
    elif sigmas is not None and len(sigmas) >= len(timesteps):
        noise = 2 * np.log([float(sigma) for sigma in sigmas[: len(timesteps)]])
    else:
        raise ValueError(f"schedule: {type(scheduler).__name__} has no alphas_cumprod or sigmas; give axis=timestep")
    if axis == "log_snr":
        return (-noise).tolist()
    return np.exp(noise / {"sigma": 2, "root_sigma": 4}[axis]).tolist()


def is_stochastic(scheduler: Any) -> bool:
    """Whether the sampler adds noise at its steps, whatever its step() is given."""
    kind = type(scheduler).__name__
    algorithm = str(getattr(getattr(scheduler, "config", None), "algorithm_type", ""))
    return any(name in kind for name in STOCHASTIC) or algorithm.startswith("sde")


def automatic(scheduler: Any, calls: int) -> StepSchedule | None:
    """What "auto" stands for with this sampler, or None where no skipping pays: few calls, or a stochastic sampler."""
    if calls < FEW_CALLS or is_stochastic(scheduler):
        return None
    if type(scheduler).__name__.startswith("DDIM") and calls >= MANY_CALLS:
        searched = calls == SEARCHED_CALLS and scheduler.config.clip_sample
        return StepSchedule.parse(CLIPPED_DDIM) if searched else DDIM
    return MULTISTEP
