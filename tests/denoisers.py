"""Denoisers of many architectures, small and with random weights, and what their calls are made of.

Those of diffusers are in data/denoisers.json: class, options, and the keyword arguments of a call, the sample first; an
argument "maker sizes" is made by `MAKERS`. Those of research code are those of the example."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel

from examples.research_networks import RESEARCH, DiT, ResearchUNet
from tests.unets import trajectory

CALLS, ANGLE, STEP = 6, 0.2, 20
"""Calls, and how far the sample turns and the timestep goes in them: as at the beginning of a run of 50 steps."""
RANDOM = torch.Generator()
MAKERS = {
    "randn": lambda *sizes: torch.randn(sizes, generator=RANDOM),
    "full": lambda value, *sizes: torch.full(sizes, float(value)),
    "long": lambda value, *sizes: torch.full(sizes, value),
    "true": lambda *sizes: torch.ones(sizes, dtype=torch.bool),
    "ids": lambda *sizes: torch.arange(math.prod(sizes)).view(sizes) % 32,
    "grid": lambda axes: F.pad(torch.cartesian_prod(*[torch.arange(n) for n in (1, 4, 4)]).float(), (0, axes - 3)),
    "phases": lambda *sizes: torch.polar(torch.ones(sizes), torch.randn(sizes, generator=RANDOM)),
}


class Denoiser(NamedTuple):
    kind: Any
    options: dict[str, Any]
    inputs: dict[str, Any]

    def build(self):
        """With random norms, biases and gates: those that do nothing would hide mistakes."""
        torch.manual_seed(0)
        model = self.kind(**self.options).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter += torch.randn_like(parameter) * 0.1
        return model

    def calls(self, count=CALLS):
        """The keyword arguments of the calls of a run: conditions are the same objects at each."""
        RANDOM.manual_seed(2)
        (name, sample), *others = self.inputs.items()
        whole = sample if isinstance(sample, str) else sample[0]
        shape = [int(size) for size in whole.split()[1:]]
        xs = trajectory(shape, count, ANGLE) if "randn" in whole else [_turned(made(whole), i) for i in range(count)]
        conditions = {key: made(value) for key, value in others if "time " not in str(value)}
        for i, x in enumerate(xs):
            times = {key: _time(value, 500 - STEP * i) for key, value in others if "time " in str(value)}
            yield {name: x if whole is sample else [*x], **conditions, **times}


def made(value):
    if isinstance(value, dict):
        return {key: made(each) for key, each in value.items()}
    if isinstance(value, list):
        return [made(each) for each in value]
    maker, *sizes = value.split() if isinstance(value, str) else (None,)
    return MAKERS[maker](*map(int, sizes)) if maker in MAKERS else value


def _turned(ids, i):
    return torch.where(torch.arange(ids.numel()).view(ids.shape) % 64 < i, 31 - ids, ids)


def _time(text, value):
    batch, scale = map(float, text.split()[1:])
    return torch.full((int(batch),), value * scale) if batch else value * scale


def output_of(output):
    """The sample that a denoiser has returned, in one tensor."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


CALL = {"x": "randn 2 4 8 8", "t": "time 2 1"}


def _kind(name):
    found = diffusers.UNet3DConditionModel if name == "UNet3DConditionModel" else getattr(diffusers, name, None)
    return found or AudioLDM2UNet2DConditionModel


DENOISERS = {
    name: Denoiser(_kind(kind), options, inputs)
    for name, (kind, options, inputs) in json.loads((Path(__file__).parent / "data/denoisers.json").read_text()).items()
}
DENOISERS |= {f"{name} (research)": Denoiser(ResearchUNet, {"names": names}, CALL) for name, names in RESEARCH.items()}
DENOISERS["DiT (research)"] = Denoiser(DiT, {}, {**CALL, "y": "ids 2"})
