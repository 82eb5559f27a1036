"""Readings of sampling-aware quantisation (MOTA) for the study of calibration, and few steps of second-order samplers
on Karras' noise levels, the terms of the paper. The table of them in docs/calibration.md has the command.

A reading says where the quantised network and where the float one is ("middle-first": quantised at the intermediate
point of DPM-Solver-2, float at the point of DPM-Solver-1), then, after commas:

    cos       1 minus the cosine is added to the loss
    shared    both solvers begin every interval at one point, that of DPM-Solver-2
    lora      not by blocks: weights + B A of rank 4 are learnt ahead of rounding, and the scales, by the error of
              the network's output
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.tables import loaded
from modiff_kernels.calibration import METHODS, Method, sampling_aware
from modiff_kernels.calibration.data import CalibrationData
from modiff_kernels.calibration.fake import fake_quantized
from modiff_kernels.calibration.job import Job, Layers, choice
from modiff_kernels.calibration.qdiffusion import cosine_distance, reconstruct_blocks
from modiff_kernels.calibration.static import layers_with_codes
from modiff_kernels.evaluation import SCHEDULERS, markdown_table
from modiff_kernels.evaluation.networks import OWN_OPTIONS

SCHEDULERS |= {"2S": "DPMSolverSinglestepScheduler", "2M": "DPMSolverMultistepScheduler"}
KARRAS = {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
OWN_OPTIONS |= {"2S": {**KARRAS, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "2M": KARRAS}
FEW = {
    f"{name}-{n}": (own, n) for name, own in (("DPM-Solver-2", "2S"), ("DPM-Solver++(2M)", "2M")) for n in (6, 8, 10)
}
CALIBRATED_ON = ("2M", 8)  # for all of FEW
BLOCK, NETWORK, RANK, RATE = 150, 450, 4, 0.003  # iterations of a block, and of the network; of LoRA
PLACES = ("first", "middle")
READINGS = [f"{a}-{b}{more}" for a, b in (PLACES, PLACES[::-1]) for more in ("", ", cos", ", shared", ", cos, lora")]
READINGS += ["middle-middle", "first-middle, cos, shared, lora"]


@dataclasses.dataclass(frozen=True)
class ReadingOptions(sampling_aware.SamplingAwareOptions):
    """seen, wanted: of PLACES, in the place of `direction`."""

    seen: str = choice("middle", PLACES)
    wanted: str = choice("first", PLACES)
    shared: bool = False
    lora: bool = False


class SharedSolver(sampling_aware.Solver):
    """Both solvers are at the second-order one's point when an interval begins."""

    def run(self, network: Any, noise: Tensor) -> tuple[list[Any], list[Any]]:
        first, middle = super().run(network, noise)
        high = noise
        for call, (start, stop) in enumerate(zip(self.timesteps, self.timesteps[1:])):
            first[call], (between, half) = (high, start), middle[call]
            with torch.no_grad():
                high = self.move(high, self.direction(network(between, half), between, half), start, stop)
        return first, middle


class LoRA(nn.Module):
    """A weight (in code steps) plus B A."""

    def __init__(self, n: int, k: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(RANK, k, generator=generator) / k**0.5)
        self.b = nn.Parameter(torch.zeros(n, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def reading(job: Job) -> Layers:
    options, data = job.options, job.data()
    with mock.patch.object(sampling_aware, "Solver", SharedSolver if options.shared else sampling_aware.Solver):
        whole = sampling_aware._run(job)
    seen, wanted = (
        CalibrationData.from_tensors({k.partition("/")[2]: v for k, v in whole.items() if k.startswith(at)})
        for at in (options.seen, options.wanted)
    )
    if not options.lora:
        return reconstruct_blocks(job, data, seen, wanted, options.cosine_weight)
    layers, generator = layers_with_codes(job, data), job.generator("lora")
    learnt: list[dict[str, Any]] = []
    with torch.no_grad():
        target = torch.cat([wanted.run(job.unet, part)[0] for part in torch.arange(len(wanted)).split(job.batch)])
    with fake_quantized(job.unet, layers, job.config.mode, None, "straight_through") as fakes:
        for fake in fakes.values():
            adapter, scale = LoRA(*fake.variable.shape, generator), fake.weight_scale.requires_grad_()
            parametrize.register_parametrization(fake, "variable", adapter)
            learnt += [{"params": adapter.parameters(), "lr": RATE * 3}]
            learnt += [{"params": [scale], "lr": RATE * 0.1 * float(scale.detach().mean())}]
        optimiser = torch.optim.Adam(learnt)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, NETWORK)
        for _ in range(NETWORK):
            drawn = torch.randint(len(seen), (options.learn_batch,), generator=generator)
            with torch.enable_grad():
                output, goal = seen.run(job.unet, drawn)[0], target[drawn]
                loss = (output - goal).square().mean() + options.cosine_weight * cosine_distance(output, goal)
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            schedule.step()
        return {path: fake.result() for path, fake in fakes.items()}


METHODS["reading"] = Method(reading, ReadingOptions)


def method_of(name: str) -> tuple[str, dict[str, Any]]:
    """A method by name, or one of READINGS: a method and its options."""
    if name in METHODS:
        return name, {}
    places, *more = name.split(", ")
    options = dict(zip(("seen", "wanted"), places.split("-"))) | {"weight_iterations": BLOCK}
    weight = next((float(word.removesuffix("cos") or 1) for word in more if word.endswith("cos")), 0.0)
    return "reading", options | {"cosine_weight": weight, "shared": "shared" in more, "lora": "lora" in more}


def table(results: Path, bits: str) -> str | None:
    """A row per method: Fréchet distance to test images and PSNR with every one of FEW."""
    report = loaded(results / "few_steps.json")
    if report is None:
        return None
    rows = {(row["method"], row["sampler"]): row for row in report["rows"] if row["bits"] in (bits, "float")}
    cells = []
    for name in dict.fromkeys(method for method, _ in rows):
        own = [rows[name, sampler] for sampler in FEW]
        decibels = (f", {row['psnr_db']:.1f} dB" if "psnr_db" in row else "" for row in own)
        cells.append([name, *(f"{row['frechet_test']:.2f}{more}" for row, more in zip(own, decibels))])
    commands = "; ".join(f"`{command}`" for command in report["commands"])
    text = f"{bits}, {report['images']} images, calibrated on {report['samples']} trajectories; torch {report['torch']}"
    return f"{markdown_table(('calibration', *FEW), cells)}\n\n{text}. {commands}"
