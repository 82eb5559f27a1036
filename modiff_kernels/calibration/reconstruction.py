"""Learning by gradient: rounding, scales and biases, so that a block, or the whole network, gives its float output.

`FakeLayer` computes in float32 what a low-bit layer computes in integers: the same codes, multiplied out. Rounding
passes the gradient on (straight-through); with it the gradient of a scale is that of LSQ (Esser et al., ICLR 2020)::

    Q(x) = s * clamp(rne(x / s) + z, qmin, qmax) - s * z
    dQ/ds = rne(x / s) - x / s  inside the range, qmin - z or qmax - z outside;    dQ/dx = 1 inside, 0 outside

Reconstruction is that of BRECQ (Li et al., ICLR 2021) as Q-Diffusion uses it: block after block in the order of
computation, from inputs that the blocks before give with their codes, towards the outputs of the float network."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modiff_kernels.calibration.data import CalibrationData, watched
from modiff_kernels.calibration.job import Job, Layers
from modiff_kernels.quant.affine import MIN_SCALE, expand_weight_scale, rows_to_weight, weight_rows
from modiff_kernels.quant.calibrated import CalibratedLayer
from modiff_kernels.quant.spec import quant_max, quant_min

ROUNDINGS = ("adaround", "straight_through")
START = 0.2  # how far h(V) starts from the code that it is given: undecided enough to be moved, sure enough to be close
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # AdaRound's gamma and zeta
LEAN = 0.4  # how far a code's position may lean from it towards the weight at the start, below a half
BLOCKS = ("ResnetBlock2D", "Attention", "BasicTransformerBlock")  # classes of diffusers that are reconstructed as one
RELATIVE_RATE = 0.1
WEIGHTS = ("variable", "weight_scale", "bias")  # what FakeLayers may learn of a layer's weight


def fake_quantize(x: Tensor, scale: Tensor, bits: int, zero_point: Tensor | float = 0.0) -> Tensor:
    """Q(x) of this module; scale and zero_point broadcast to x. Differentiable in x and scale."""
    scale = scale.clamp_min(MIN_SCALE)
    position = x / scale
    rounded = position + (position.round() - position).detach()
    return scale * ((rounded + zero_point).clamp(quant_min(bits), quant_max(bits)) - zero_point)


def rounding(logits: Tensor) -> Tensor:
    """The rectified sigmoid h(V) of AdaRound (Nagel et al., ICML 2020), in 0..1."""
    return (torch.sigmoid(logits) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def rounding_penalty(up: Tensor, progress: float) -> Tensor:
    """sum(1 - |2 h - 1|^beta), which draws h to 0 or 1: 0 in the first fifth, then beta falls from 20 to 2."""
    if progress < 0.2:
        return up.new_zeros(())
    beta = 20 - 18 * (progress - 0.2) / 0.8
    return (1 - (2 * up - 1).abs() ** beta).sum()


class FakeLayer(nn.Module):
    """What a low-bit layer with `calibrated` codes and scales computes; the parameters are for an optimiser.

    mode "quantized" quantises the input, "modulated" its change: x_hat = previous + Q(x - previous), with the input
    that was seen last while `remember` was set (there is no previous error). Without act_scale activations are float;
    of a table of them the first entry counts.

    Parameters (requires_grad False until a method sets it): `variable` [N, K], of the codes; `weight_scale`;
    `act_scale`; `bias`. rounding says what a code is: "adaround": low + h(variable), with `low` and low + 1 the given
    code and its neighbour towards the weight, and a step at 0 instead of h once `hard` is set; "straight_through": the
    integer nearest to `variable`, any of the range."""

    def __init__(
        self, original: nn.Module, known: CalibratedLayer, mode: str, act_bits: int | None, rounding: str = "adaround"
    ) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a submodule: its parameters are not learnt
        self.known, self.mode, self.act_bits, self.rounding = known, mode, act_bits, rounding
        self.remember = self.hard = False
        self.previous: Tensor | None = None
        weight = known.weight
        if weight is None:
            raise ValueError("FakeLayer: the layer has no codes; give a CalibratedLayer with a weight")
        float_weight, self.input_scale = original.weight.detach().float(), known.input_scale
        if self.input_scale is not None:
            self.input_scale = self.input_scale.view((1, -1, 1, 1) if float_weight.ndim == 4 else (-1,))
            float_weight = float_weight / self.input_scale
        self.weight_scale = _parameter(weight.scale)
        codes = weight.codes.float()
        self.low, self.high = float(quant_min(weight.bits)), float(quant_max(weight.bits))
        distance = weight_rows(float_weight) / self._steps() - codes
        if rounding == "adaround":
            self.low = torch.where(distance > 0, codes, codes - 1).clamp(self.low, self.high - 1)
            part = (codes - self.low).clamp(START, 1 - START)  # which h of the variable is at the start
            self.variable = _parameter(-torch.log((STRETCH_HIGH - STRETCH_LOW) / (part - STRETCH_LOW) - 1))
        else:
            self.variable = _parameter(codes + distance.clamp(-LEAN, LEAN))
        self.act_scale = _parameter(known.act_scale)
        self.bias = _parameter(original.bias if known.bias is None else known.bias)

    def forward(self, x: Tensor, *unused: Any) -> Tensor:
        if self.input_scale is not None:
            x = x * self.input_scale
        if self.act_scale is not None:
            x = self._activation(x)
        own = {"weight": rows_to_weight(self.codes() * self._steps(), self.original.weight.shape), "bias": self.bias}
        own = {name: value for name, value in own.items() if value is not None}
        return torch.func.functional_call(self.original, own, (x,))

    def codes(self) -> Tensor:
        """float32 [N, K], differentiable in `variable` unless `hard`."""
        if self.rounding == "straight_through":
            inside = self.variable.clamp(self.low, self.high)
            return inside + (inside.round() - inside).detach()
        return self.low + ((self.variable >= 0) if self.hard else rounding(self.variable))

    def result(self) -> CalibratedLayer:
        self.hard = True
        codes, scale = self.codes().detach().round().to(torch.int8), self.weight_scale.detach().clone()
        act_scale = None if self.act_scale is None else self.act_scale.detach().clamp_min(MIN_SCALE)
        bias = None if self.bias is None else self.bias.detach().clone()
        weight = dataclasses.replace(self.known.weight, codes=codes, scale=scale)
        return dataclasses.replace(self.known, weight=weight, act_scale=act_scale, bias=bias)

    def _activation(self, x: Tensor) -> Tensor:
        scale, zero_points = self.act_scale[0], self.known.act_zero_point
        if self.mode == "quantized":
            return fake_quantize(x, scale, self.act_bits, 0.0 if zero_points is None else zero_points[0].item())
        if self.remember:
            self.previous = x.detach()
            return x
        if self.previous is None or self.previous.shape != x.shape:
            raise RuntimeError("FakeLayer: no previous input of this shape; call the network with `remember` before")
        return self.previous + fake_quantize(x - self.previous, scale, self.act_bits)

    def _steps(self) -> Tensor:
        return expand_weight_scale(self.weight_scale, self.known.weight.codes.shape[1], self.known.weight.group_size)


def _parameter(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.detach().float().clone(), requires_grad=False)


@contextlib.contextmanager
def fake_quantized(
    unet: nn.Module, layers: Mapping[str, CalibratedLayer], mode: str, act_bits: int | None, rounding: str = "adaround"
) -> Iterator[dict[str, FakeLayer]]:
    """Put a FakeLayer in the place of every one of `layers` and give them by path; the originals come back after. mode,
    act_bits: of a ModiffConfig. rounding: of ROUNDINGS."""
    fakes = {path: FakeLayer(unet.get_submodule(path), own, mode, act_bits, rounding) for path, own in layers.items()}
    try:
        for path, fake in fakes.items():
            unet.set_submodule(path, fake)
        yield fakes
    finally:
        for path, fake in fakes.items():
            unet.set_submodule(path, fake.original)


def remember(fakes: Mapping[str, FakeLayer], run: Callable[[], Any]) -> None:
    """Let run() show the FakeLayers the inputs of the call before, where they quantise the change since."""
    if not any(fake.mode == "modulated" and fake.act_scale is not None for fake in fakes.values()):
        return
    for fake in fakes.values():
        fake.remember = True
    with torch.no_grad():
        run()
    for fake in fakes.values():
        fake.remember = False


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
