"""Reconstruction: learn rounding, scales and biases so that a block, or the whole network, gives its float output.

BRECQ (Li et al., ICLR 2021) as Q-Diffusion uses it: block after block in the order of computation, from inputs that the
blocks before give with their codes in place, towards the outputs of the float network.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modiff_kernels.calibration.data import CalibrationData
from modiff_kernels.calibration.fake import FakeLayer, fake_quantized, rounding, rounding_penalty
from modiff_kernels.calibration.job import Job, Layers

BLOCKS = ("ResnetBlock2D", "Attention", "BasicTransformerBlock")  # classes of diffusers that are reconstructed as one
RELATIVE_RATE = 0.1


def blocks_of(unet: nn.Module, paths: Iterable[str], data: CalibrationData) -> dict[str, list[str]]:
    """The layers `paths` by the block they are in, blocks in the order of computation.

    A block is the outermost module of a class in BLOCKS around a layer, or the layer itself.
    """
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
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for path in paths:
            hook = unet.get_submodule(path).register_forward_pre_hook(
                lambda module, args, path=path: seen.append((path, args))
            )
            hooks.callback(hook.remove)
        args, kwargs = data.arguments(torch.arange(1))
        unet(*args, **kwargs)
    return seen


class Recording:
    """Inputs or the output of one block at all points of the data, in files that are mapped into memory.

    Tensors with one row per point are kept; other arguments are those of the first call.
    """

    def __init__(self, folder: Path, points: int) -> None:
        self.folder, self.points = folder, points
        self.rows: dict[Any, Tensor] = {}
        self.fixed: dict[Any, Any] = {}

    def write(self, points: Tensor, items: Mapping[Any, Any]) -> None:
        """Keep `items` of these points (int64)."""
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
        """The items of these points."""
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
    try:
        with torch.no_grad():
            for points in batches:
                args, kwargs = data.arguments(points, previous=what == "previous")
                try:
                    unet(*args, **kwargs)
                except _Reached:
                    continue
    finally:
        hook.remove()
    return recording


def call(module: nn.Module, items: Mapping[Any, Any]) -> Any:
    """module(*args, **kwargs) with what a Recording of its inputs gave."""
    args = [items[key] for key in sorted(key for key in items if isinstance(key, int))]
    return module(*args, **{key: value for key, value in items.items() if isinstance(key, str)})


def learn(
    job: Job,
    part: str,
    fakes: Iterable[FakeLayer],
    names: Iterable[str],
    loss_of: Callable[[Tensor], Tensor],
    points: int,
    *,
    iterations: int,
    lr: float,
    rounding_weight: float = 0.0,
    show: bool = True,
) -> None:
    """Adam, its rate falling to 0 as a cosine, on the parameters `names` of `fakes`.

    part: names the random numbers and the progress bar (with `show`). loss_of(points): of a random batch, learn_batch
    of so many points (int64). lr: of "variable"; scales and biases, which differ in size from layer to layer, take
    RELATIVE_RATE * lr of their mean size. Where AdaRound's variables are learnt, its penalty, times rounding_weight and
    the first loss, draws h to 0 or 1; afterwards the codes are hard.
    """
    fakes, names, generator = list(fakes), list(names), job.workspace.generator(part)
    parameters: dict[int, dict[str, Any]] = {}
    for fake in fakes:
        fake.hard = "variable" not in names
        for name in names:
            parameter = getattr(fake, name)
            if parameter is not None and id(parameter) not in parameters:
                size = 1.0 if name == "variable" else RELATIVE_RATE * parameter.abs().mean().item()
                parameters[id(parameter)] = {"params": [parameter.requires_grad_(True)], "lr": lr * size}
    optimiser = torch.optim.Adam(parameters.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    soft = [fake for fake in fakes if fake.rounding == "adaround" and "variable" in names]
    batch = min(job.options.learn_batch, points)
    unit = None
    with torch.enable_grad():
        for step in job.bar(range(iterations), part) if show else range(iterations):
            loss = loss_of(torch.randint(points, (batch,), generator=generator))
            unit = loss.item() if unit is None else unit
            if soft:
                penalty = sum(rounding_penalty(rounding(fake.variable), step / iterations) for fake in soft)
                loss = loss + rounding_weight * unit * penalty
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    for group in parameters.values():
        group["params"][0].requires_grad_(False)
    for fake in fakes:
        fake.hard = True


def learn_network(job: Job, data: CalibrationData, layers: Layers) -> Layers:
    """The layers after `network_iterations` steps on codes, scales and biases of all of them, activations float.

    Distillation on the float sampler's own states, as in quantisation-aware training without data (EfficientDM, He et
    al., ICLR 2024): straight-through rounding, the mean squared error of the UNet's output as the loss. Unlike
    layer-wise objectives it lets layers make up for each other's errors.
    """

    def compute() -> Layers:
        with torch.no_grad():
            target = torch.cat([output_at(job.unet, data, points) for points in job.batches(data, "targets")])
        with fake_quantized(job.unet, layers, job.config.mode, None, "straight_through") as fakes:
            learn(
                job,
                "network",
                fakes.values(),
                ("variable", "weight_scale", "bias"),
                lambda points: (output_at(job.unet, data, points) - target[points]).square().mean(),
                len(data),
                iterations=job.options.network_iterations,
                lr=job.options.network_lr,
            )
            return {path: fake.result() for path, fake in fakes.items()}

    return job.layers_once("network", layers, compute)


def output_at(unet: nn.Module, data: CalibrationData, points: Tensor) -> Tensor:
    """The UNet's output at `points` (int64) of the data."""
    args, kwargs = data.arguments(points)
    return unet(*args, **kwargs, return_dict=False)[0]
