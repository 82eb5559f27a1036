"""Reconstruction: learn rounding, scales and biases so that a block, or the whole network, gives its float output.

BRECQ (Li et al., ICLR 2021) as Q-Diffusion uses it: block after block in the order of computation, from inputs that the
blocks before give with their codes in place, towards the outputs of the float network."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modiff_kernels.calibration.data import CalibrationData, watched
from modiff_kernels.calibration.fake import FakeLayer, fake_quantized, rounding, rounding_penalty
from modiff_kernels.calibration.job import Job, Layers

BLOCKS = ("ResnetBlock2D", "Attention", "BasicTransformerBlock")  # classes of diffusers that are reconstructed as one
RELATIVE_RATE = 0.1
WEIGHTS = ("variable", "weight_scale", "bias")  # what FakeLayers may learn of a layer's weight


def blocks_of(unet: nn.Module, paths: Iterable[str], data: CalibrationData) -> dict[str, list[str]]:
    """The layers `paths` by block (outermost of BLOCKS around it, or the layer itself), in the order of computation."""
    classes = {name: type(module).__name__ for name, module in unet.named_modules()}
    blocks: dict[str, list[str]] = {}
    for path in paths:
        names = path.split(".")
        above = [".".join(names[:end]) for end in range(1, len(names) + 1)]
        block = next((name for name in above if classes[name] in BLOCKS), path)
        blocks.setdefault(block, []).append(path)
    order = [path for path, _ in inputs_in_order(unet, blocks, data)]
    return {name: blocks[name] for name in dict.fromkeys(order)}


def shared_inputs(unet: nn.Module, paths: Iterable[str], data: CalibrationData) -> dict[str, str]:
    """For each of the layers `paths`, the first one that reads the very same tensor (to_q for to_k and to_v)."""
    first: dict[int, str] = {}
    return {path: first.setdefault(id(args[0]), path) for path, args in inputs_in_order(unet, paths, data)}


def inputs_in_order(unet: nn.Module, paths: Iterable[str], data: CalibrationData) -> list[tuple[str, tuple[Any, ...]]]:
    """Path and arguments of every call of the modules `paths` in one call of the UNet."""
    seen: list[tuple[str, tuple[Any, ...]]] = []
    with watched({path: unet.get_submodule(path) for path in paths}, lambda *call: seen.append(call)):
        data.run(unet, torch.arange(1))
    return seen


class Recording:
    """Inputs or the output of one block at all points of the data, in files that are mapped into memory. Tensors with
    one row per point are kept; other arguments are those of the first call."""

    def __init__(self, folder: Path, points: int) -> None:
        self.folder, self.points = folder, points
        self.rows: dict[Any, Tensor] = {}
        self.fixed: dict[Any, Any] = {}

    def write(self, points: Tensor, items: Mapping[Any, Any]) -> None:
        for key, value in items.items():
            if not (isinstance(value, Tensor) and value.ndim and value.shape[0] == len(points)):
                self.fixed.setdefault(key, value)
                continue
            if key not in self.rows:
                size = self.points * value[0].numel()
                path = self.folder / f"{len(self.rows)}.bin"
                mapped = torch.from_file(str(path), shared=True, size=size, dtype=value.dtype)
                self.rows[key] = mapped.view(self.points, *value.shape[1:])
            self.rows[key][points] = value.detach().cpu()

    def read(self, points: Tensor) -> dict[Any, Any]:
        return {**self.fixed, **{key: value[points] for key, value in self.rows.items()}}


class _Reached(Exception):
    """The recorded block has run; the rest of the network is not needed."""


def record(
    unet: nn.Module, block: str, data: CalibrationData, batches: Iterable[Tensor], folder: Path, what: str
) -> Recording:
    """what "input" or "previous": arguments of the block at each point, or at the call before; "output": its output."""
    folder.mkdir()
    recording = Recording(folder, len(data))
    points = torch.empty(0)

    def keep(items: Mapping[Any, Any]) -> None:
        recording.write(points, items)
        raise _Reached

    module = unet.get_submodule(block)
    if what == "output":
        hook = module.register_forward_hook(lambda module, args, output: keep({0: output}))
    else:
        hook = module.register_forward_pre_hook(
            lambda module, args, kwargs: keep({**dict(enumerate(args)), **kwargs}), with_kwargs=True
        )
    with hook, torch.no_grad():
        for points in batches:
            with contextlib.suppress(_Reached):
                data.run(unet, points, previous=what == "previous")
    return recording


def call(module: nn.Module, items: Mapping[Any, Any]) -> Any:
    args = [items[key] for key in sorted(key for key in items if isinstance(key, int))]
    return module(*args, **{key: value for key, value in items.items() if isinstance(key, str)})


def learn(
    job: Job, part: str, layers: Layers, names: Sequence[str],
    loss_of: Callable[[Tensor, Mapping[str, FakeLayer]], Tensor], data: CalibrationData, points: int, iterations: int,
    lr: float, rounding_weight: float | None = None,
) -> Layers:  # fmt: skip
    """`layers` after Adam, its rate falling to 0 as a cosine, on the parameters `names` of their FakeLayers.

    part: names the random numbers. loss_of(drawn, fakes): of learn_batch of so many points (int64), with the FakeLayers
    in the network; those that read one tensor of a call at `data` have one act_scale. lr: of "variable"; scales and
    biases, which differ in size from layer to layer, take RELATIVE_RATE * lr of their mean size. rounding_weight: of
    AdaRound's penalty on variables, in parts of the first loss; None: straight-through rounding."""
    kind = "straight_through" if rounding_weight is None else "adaround"
    same = shared_inputs(job.unet, layers, data) if "act_scale" in names else {}
    with fake_quantized(job.unet, layers, job.config.mode, job.config.act_bits, kind) as fakes:
        parameters: dict[int, dict[str, Any]] = {}
        for path, fake in fakes.items():
            fake.act_scale = fakes[same.get(path, path)].act_scale
            fake.hard = "variable" not in names
            for name in names:
                parameter = getattr(fake, name)
                if parameter is not None and id(parameter) not in parameters:
                    size = 1.0 if name == "variable" else RELATIVE_RATE * parameter.abs().mean().item()
                    parameters[id(parameter)] = {"params": [parameter.requires_grad_(True)], "lr": lr * size}
        optimiser = torch.optim.Adam(parameters.values(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
        soft = list(fakes.values()) if kind == "adaround" and "variable" in names else []
        generator, batch, unit = job.generator(part), min(job.options.learn_batch, points), None
        with torch.enable_grad():
            for step in range(iterations) if kind == "adaround" else job.bar(range(iterations), part):
                loss = loss_of(torch.randint(points, (batch,), generator=generator), fakes)
                unit = loss.item() if unit is None else unit
                if soft:
                    penalty = sum(rounding_penalty(rounding(fake.variable), step / iterations) for fake in soft)
                    loss = loss + rounding_weight * unit * penalty
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        return {path: fake.result() for path, fake in fakes.items()}


def learn_network(job: Job, data: CalibrationData, layers: Layers) -> Layers:
    """The layers after `network_iterations` steps on codes, scales and biases of all of them, activations float.
    Distillation on the float sampler's own states, as in quantisation-aware training without data (EfficientDM, He et
    al., ICLR 2024): straight-through rounding, the mean squared error of the UNet's output as the loss. Unlike
    layer-wise objectives it lets layers make up for each other's errors."""
    options = job.options

    def compute() -> Layers:
        with torch.no_grad():
            target = torch.cat([data.run(job.unet, points)[0] for points in job.batches(data, "targets")])

        def loss_of(drawn: Tensor, fakes: Mapping[str, FakeLayer]) -> Tensor:
            return (data.run(job.unet, drawn)[0] - target[drawn]).square().mean()

        settings = (data, len(data), options.network_iterations, options.network_lr)
        return learn(job, "network", layers, WEIGHTS, loss_of, *settings)

    return job.layers_once("network", compute)
