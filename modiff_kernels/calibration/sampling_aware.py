"""Method "sampling_aware": reconstruction where a second-order sampler evaluates the network, after mixed-order
trajectory alignment (MOTA; Zeng et al., Sampling-Aware Quantization, 2026).

A second-order solver (DPM-Solver-2; Lu et al., NeurIPS 2022, Algorithm 1) runs on the time steps t_j of the sampler,
with lambda = log(alpha / sigma)::

    u_j         = alpha_s / alpha_j x_{t_j} - sigma_s (e^{h/2} - 1) eps(x_{t_j}, t_j)
    x_{t_{j+1}} = alpha_{j+1} / alpha_j x_{t_j} - sigma_{j+1} (e^h - 1) eps(u_j, s_j)
    h = lambda_{j+1} - lambda_j, and s_j the time in the middle: lambda_s = (lambda_j + lambda_{j+1}) / 2

Blocks are reconstructed as in `qdiffusion`, at (u_j, s_j); the paper's alignment of two points lost its study
(docs/calibration.md). Every row of the UNet's batch is a trajectory of its own, without guidance."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modiff_kernels.calibration.data import CalibrationData, Sampler, uniform_calls
from modiff_kernels.calibration.job import Job, Layers, Tensors
from modiff_kernels.calibration.qdiffusion import reconstruct_blocks

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def sampling_aware(job: Job) -> Layers:
    Solver(job.sampler)  # refuses schedulers
    data = job.data()
    return reconstruct_blocks(job, data, CalibrationData.from_tensors(job.once("trajectories", lambda: _run(job))))


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
    def run(
        self, network: Callable[[Tensor, Tensor], Tensor], sample: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """(u_j, s_j) for every interval of the time steps, and the sample at the end; sample: at their beginning."""

        def eps(sample: Tensor, timestep: Tensor) -> Tensor:
            return self.direction(network(sample, timestep), sample, timestep)

        states = []
        for call, (start, stop) in enumerate(zip(self.timesteps, self.timesteps[1:])):
            half = self.middle(call)
            between = self.move(sample, eps(sample, start), start, half)
            states.append((between, half))
            sample = self.move(sample, eps(between, half), start, stop)
        return states, sample


def _run(job: Job) -> Tensors:
    solver = Solver(job.sampler)
    intervals = len(solver.timesteps) - 1
    if intervals < 2:
        raise ValueError(f"calibrate: sampling_aware needs at least 3 time steps, the sampler has {intervals + 1}")
    noise = job.collected("noise", torch.zeros(job.samples, 1, dtype=torch.int64), "noise")
    calls = uniform_calls(intervals, min(job.options.calls_per_sample, intervals - 1), 1)[0].tolist()
    parts: list[Tensors] = []
    for points in job.batches(noise, "trajectories"):
        (sample, _), conditions = noise.arguments(points)

        def network(sample: Tensor, timestep: Tensor, conditions: dict[str, Any] = conditions) -> Tensor:
            return job.unet(sample, timestep.expand(len(sample)), **conditions, return_dict=False)[0]

        states, _ = solver.run(network, sample)
        for call in calls:
            part = {"call": torch.full((len(points),), call), "row": noise.row[points]}
            for at, (state, timestep) in (("", states[call]), ("previous_", states[call - 1])):
                part |= {f"{at}sample": state, f"{at}timestep": timestep.expand(len(points))}
            parts.append(part)
    return dataclasses.replace(noise, **{key: torch.cat([part[key] for part in parts]) for key in parts[0]}).tensors()
