"""Where the calls of a run lie on the axis of a schedule, read from the scheduler once a run, as host numbers; and what
they return: a linear form of the last computed outputs and of the sample."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from modiff_kernels.config.schedule import StepSchedule

LEAST_ALPHA = 2.0**-24  # of schedules that end in pure noise; diffusers' DPM-Solver takes the same
STOCHASTIC = ("DDPM", "Ancestral", "SDE", "LCM", "TCD", "CMStochastic", "RePaint", "UnCLIP", "SdeVe", "SASolver")
MANY_CALLS = 40  # from here on DDIM moves so little per call that most calls can be forecast
DEGREE = 2  # of the polynomial where nothing is fitted; lower where fewer outputs are known
FEW_CALLS = 12  # with fewer, a skipped call costs more fidelity than a step less

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


def log_snr(timesteps: Sequence[float], scheduler: Any) -> list[float] | None:
    """Logarithm of signal over noise variance at `timesteps`; None where the scheduler does not tell it."""
    least = LEAST_ALPHA**0.5
    if is_flow(scheduler):  # x = (1 - sigma) image + sigma noise
        parts = [min(max(float(sigma), least), 1 - least) for sigma in scheduler.sigmas[: len(timesteps)]]
        return [2 * math.log((1 - sigma) / sigma) for sigma in parts]
    alphas, sigmas = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):  # timesteps of Karras spacing are rounded
        return [-2 * math.log(min(max(float(sigma), least), 1 / least)) for sigma in sigmas[: len(timesteps)]]
    if alphas is None:
        return None
    table = [max(float(alpha), LEAST_ALPHA) for alpha in alphas]
    ratios = [math.log(alpha / max(1 - alpha, LEAST_ALPHA)) for alpha in table]
    return np.asarray(np.interp(timesteps, range(len(table)), ratios)).tolist()


def positions(timesteps: Sequence[float], scheduler: Any) -> list[float]:
    """Where `timesteps` lie on the axis of polynomials: the root of sigma (noise over signal), which is best of what
    was compared; or the timesteps themselves where the scheduler does not tell its noise levels, and of flows, whose
    velocity hardly changes along them."""
    known = None if is_flow(scheduler) else log_snr(timesteps, scheduler)
    return list(timesteps) if known is None else [math.exp(-ratio / 4) for ratio in known]


def is_flow(scheduler: Any) -> bool:
    """Whether the network gives the velocity of a flow, from noise straight to the image."""
    config = getattr(scheduler, "config", None)
    asked = getattr(config, "use_flow_sigmas", False) or getattr(config, "prediction_type", "") == "flow_prediction"
    return bool(asked) or "FlowMatch" in type(scheduler).__name__


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
        return DDIM
    return MULTISTEP


def polynomial(nodes: Sequence[float], position: float) -> list[float]:
    """Weights of the values at `nodes` in the value at `position` of the polynomial through them (Lagrange)."""
    weights = []
    for node in nodes:
        weight = 1.0
        for other in nodes:
            weight *= 1.0 if other == node else (position - other) / (node - other)
        weights.append(weight)
    return weights


def combine(weights: Sequence[float], outputs: Sequence[Tensor], sample: Tensor | None = None) -> Tensor:
    """sum_k weights[k] outputs[k], plus weights[-1] sample where one is given: a new tensor, summed in float32, in the
    dtype of the outputs. Of a sample with more channels, such as those of a mask behind, the first ones count."""
    total = outputs[0].float() * weights[0]
    for weight, output in zip(weights[1:], outputs[1:]):
        total.add_(output.float(), alpha=weight)
    if sample is not None and weights[-1]:
        total.add_(sample[:, : total.shape[1]].float(), alpha=weights[-1])
    return total.to(outputs[0].dtype)
