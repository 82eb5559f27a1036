"""Method "sampling_aware": mixed-order trajectory alignment (MOTA; Zeng et al., Sampling-Aware Quantization, 2026).

A second-order solver (DPM-Solver-2; Lu et al., NeurIPS 2022, Algorithm 1) runs on the time steps t_j of the sampler,
with lambda = log(alpha / sigma)::

    u_j         = alpha_s / alpha_j x_{t_j} - sigma_s (e^{h/2} - 1) eps(x_{t_j}, t_j)
    x_{t_{j+1}} = alpha_{j+1} / alpha_j x_{t_j} - sigma_{j+1} (e^h - 1) eps(u_j, s_j)
    h = lambda_{j+1} - lambda_j, and s_j the time in the middle: lambda_s = (lambda_j + lambda_{j+1}) / 2

A first-order one would take eps(x_{t_j}, t_j) in the second line. Every module f is reconstructed (`qdiffusion`)::

    min sum_j |f'(p_j) - f(q_j)|^2 + cosine_weight (1 - cos(f'(p_j), f(q_j)))

f' is quantised, behind modules that are. The paper's equations have p_j = (u_j, s_j) and q_j = (x_{t_j}, t_j), its text
the opposite, and its solvers have trajectories of their own from one noise, which was worse in all measurements: both
points are those of the second-order solver here. What is best by far is p_j = q_j = (u_j, s_j): option `direction`.
Every row of the UNet's batch is a trajectory of its own, without guidance.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modiff_kernels.calibration.data import CalibrationData, Sampler, uniform_calls
from modiff_kernels.calibration.job import Job, Layers, Tensors, choice, number
from modiff_kernels.calibration.qdiffusion import QDiffusionOptions, reconstruct_blocks

DIRECTIONS = ("midpoint", "midpoint_to_first", "first_to_midpoint")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclasses.dataclass(frozen=True)
class SamplingAwareOptions(QDiffusionOptions):
    """Options of "sampling_aware", besides those of "qdiffusion".

    direction: where the quantised modules and where the float ones are evaluated, of DIRECTIONS: "midpoint" both there,
    "midpoint_to_first" as the paper's equations have it, "first_to_midpoint" as its text says. cosine_weight: of the
    cosine term, 0 for none (the paper: none at 8 bits, 1 at 4).
    """

    split: bool = False
    direction: str = choice("midpoint", DIRECTIONS)
    cosine_weight: float = number(0.0, least=0)


def sampling_aware(job: Job) -> Layers:
    Solver(job.sampler)  # refuses schedulers
    data = job.data()
    whole = job.once("trajectories", lambda: _run(job))
    first, middle = (
        CalibrationData.from_tensors({key[len(at) :]: value for key, value in whole.items() if key.startswith(at)})
        for at in ("first/", "middle/")
    )
    seen = first if job.options.direction == "first_to_midpoint" else middle
    wanted = first if job.options.direction == "midpoint_to_first" else middle
    return reconstruct_blocks(job, data, seen, wanted, job.options.cosine_weight)


class Solver:
    """DPM-Solver-2 on the time steps of a sampler. ValueError for a scheduler without a table of alphas."""

    def __init__(self, sampler: Sampler) -> None:
        scheduler = sampler.scheduler
        prediction = getattr(scheduler.config, "prediction_type", None)
        if not hasattr(scheduler, "alphas_cumprod") or prediction not in PREDICTIONS:
            needs = f"sampling_aware needs alphas_cumprod and a prediction_type of {', '.join(PREDICTIONS)}"
            kind = f"{type(scheduler).__name__} (prediction_type {prediction!r})"
            raise ValueError(f"calibrate: {needs}; {kind} is of another kind; choose another method")
        sampler.check_input("sampling_aware")
        self.prediction = prediction
        self.timesteps = sampler.timesteps()
        alphas = scheduler.alphas_cumprod.double().cpu()
        self.log_alpha = alphas.log() / 2
        self.lambdas = self.log_alpha - (1 - alphas).log() / 2

    def noise(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and lambda at a time (float64 scalars); log alpha is linear between the table's entries."""
        below = timestep.double().floor().long().clamp(0, len(self.log_alpha) - 2)
        log_alpha = torch.lerp(self.log_alpha[below], self.log_alpha[below + 1], timestep.double() - below)
        log_sigma = (-torch.expm1(2 * log_alpha)).log() / 2
        return log_alpha.exp(), log_sigma.exp(), log_alpha - log_sigma

    def middle(self, call: int) -> Tensor:
        """s_j, float32: lambda is half-way between those of two calls; the table is linear in between."""
        wanted = sum(self.noise(self.timesteps[index])[2] for index in (call, call + 1)) / 2
        return torch.tensor(np.interp(-wanted, -self.lambdas, range(len(self.lambdas))), dtype=torch.float32)

    def move(self, sample: Tensor, direction: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        (alpha, _, before), (alpha_stop, sigma_stop, after) = self.noise(start), self.noise(stop)
        return float(alpha_stop / alpha) * sample - float(sigma_stop * torch.expm1(after - before)) * direction

    def direction(self, output: Tensor, sample: Tensor, timestep: Tensor) -> Tensor:
        alpha, sigma, _ = (float(value) for value in self.noise(timestep))
        if self.prediction == "v_prediction":
            return alpha * output + sigma * sample
        return output if self.prediction == "epsilon" else (sample - alpha * output) / sigma

    @torch.no_grad()
    def run(self, network: Callable[[Tensor, Tensor], Tensor], noise: Tensor) -> tuple[list[Any], list[Any]]:
        """(x_{t_j}, t_j) and (u_j, s_j) for every interval of the time steps."""

        def eps(sample: Tensor, timestep: Tensor) -> Tensor:
            return self.direction(network(sample, timestep), sample, timestep)

        first, middle = [], []
        for call, (start, stop) in enumerate(zip(self.timesteps, self.timesteps[1:])):
            half = self.middle(call)
            between = self.move(noise, eps(noise, start), start, half)
            first.append((noise, start))
            middle.append((between, half))
            noise = self.move(noise, eps(between, half), start, stop)
        return first, middle


def _run(job: Job) -> Tensors:
    solver = Solver(job.sampler)
    intervals = len(solver.timesteps) - 1
    if intervals < 2:
        raise ValueError(f"calibrate: sampling_aware needs at least 3 time steps, the sampler has {intervals + 1}")
    noise = job.collected("noise", torch.zeros(job.samples, 1, dtype=torch.int64), "noise")
    calls = uniform_calls(intervals, min(job.options.calls_per_sample, intervals - 1), 1)[0].tolist()
    parts: dict[str, list[Tensors]] = {"first": [], "middle": []}
    for points in job.batches(noise, "trajectories"):
        (sample, _), conditions = noise.arguments(points)

        def network(sample: Tensor, timestep: Tensor, conditions: dict[str, Any] = conditions) -> Tensor:
            return job.unet(sample, timestep.expand(len(sample)), **conditions, return_dict=False)[0]

        for found, states in zip(parts.values(), solver.run(network, sample)):
            for call in calls:
                part = {"call": torch.full((len(points),), call), "row": noise.row[points]}
                for at, (state, timestep) in (("", states[call]), ("previous_", states[call - 1])):
                    part |= {f"{at}sample": state, f"{at}timestep": timestep.expand(len(points))}
                found.append(part)
    whole: Tensors = {}
    for name, found in parts.items():
        joined = {key: torch.cat([part[key] for part in found]) for key in found[0]}
        data = dataclasses.replace(noise, **joined)
        whole |= {f"{name}/{key}": value.clone() for key, value in data.tensors().items()}  # files share nothing
    return whole
