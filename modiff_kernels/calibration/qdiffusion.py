"""Method "qdiffusion" (Li et al., ICCV 2023): shortcut split, then block-wise reconstruction.

1. *Shortcut split.* The 1x1 shortcut of an up block reads concat(hidden, skip), whose parts differ in range. Each part
   of the weight gets scales of its own (as groups along K), and the skip part of the input is multiplied by the ratio
   of the two activation scales before it is quantised: that is the same as two quantisers.
2. *Weights*: AdaRound, block after block, from inputs that the blocks before give with their codes, towards the output
   of the float network. It starts at the codes of `weight_method`.
3. *Activations* (scale_mode "static"): step sizes by gradient (LSQ), block after block, the codes fixed. In mode
   "modulated" the input is x_hat = previous + Q(x - previous), as MoDiff calibrates.

Beyond the paper, `network_iterations` may learn the whole network between 2 and 3 (`network`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modiff_kernels.calibration import reconstruction
from modiff_kernels.calibration.data import CalibrationData
from modiff_kernels.calibration.fake import fake_quantized
from modiff_kernels.calibration.methods import Job, Split, batches_of, check_positive, register
from modiff_kernels.calibration.network import learn_network
from modiff_kernels.calibration.scales import Histogram, Range, symmetric_scale
from modiff_kernels.calibration.static import (
    StaticOptions,
    activation_scales,
    calibrated_weights,
    needs_scales,
)
from modiff_kernels.calibration.streaming import stream
from modiff_kernels.quant.calibrated import CalibratedLayer

Layers = dict[str, CalibratedLayer]


@dataclasses.dataclass(frozen=True)
class QDiffusionOptions(StaticOptions):
    """Options of "qdiffusion".

    split: shortcut split. weight_iterations, act_iterations: of a block (the paper: 20000 and 5000).
    weight_lr, act_lr: first rates of Adam (the released code, with its numbers of iterations: 1e-3 and 4e-4, the latter
    absolute; see `reconstruction.learn`). rounding_weight: of AdaRound's penalty, in parts of the first loss.
    """

    split: bool = True
    weight_iterations: int = 400
    act_iterations: int = 100
    weight_lr: float = 0.1
    act_lr: float = 0.1
    rounding_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_iterations", "act_iterations", "weight_lr", "act_lr", "rounding_weight"):
            check_positive(name, getattr(self, name))


@register(
    "qdiffusion", QDiffusionOptions, "Q-Diffusion: shortcut split, AdaRound and step sizes by reconstruction of blocks"
)
def qdiffusion(job: Job) -> Layers:
    """Codes and step sizes by reconstruction of blocks."""
    data = job.data()
    return reconstruct_blocks(job, data, Points(data, data))


@dataclasses.dataclass(frozen=True)
class Points:
    """What blocks are reconstructed on: the quantised ones at `seen`, their target the float ones at `wanted`.

    Both have the same number of points. cosine_weight: of 1 - cosine of both outputs, mean over points.
    """

    seen: CalibrationData
    wanted: CalibrationData
    cosine_weight: float = 0.0


def reconstruct_blocks(job: Job, data: CalibrationData, points: Points) -> Layers:
    """Codes and step sizes by reconstruction on `points`, started from those of layer-wise methods on `data`."""
    if job.weights is not None:
        layers = dict(job.weights)
        blocks = reconstruction.blocks_of(job.unet, job.layers, data)
    else:
        layers, blocks = _weights(job, data, points)
    if not needs_scales(job):
        return layers
    for path, found in activation_scales(job, data).items():
        layers[path] = dataclasses.replace(layers[path], **found)
    for number, (block, paths) in enumerate(job.bar(list(blocks.items()), "step sizes", unit="block")):
        floats = {path: dataclasses.replace(layer, act_scale=None) for path, layer in layers.items()}
        before = {path: floats[path] for name, above in list(blocks.items())[:number] for path in above}
        own = {path: layers[path] for path in paths}
        compute = _reconstruct(job, points, block, before, own, ("act_scale",), job.config.act_bits)
        layers |= job.layers_once(f"steps-{number}", own, compute)
    return layers


def _weights(job: Job, data: CalibrationData, points: Points) -> tuple[Layers, dict[str, list[str]]]:
    """The layers with codes, and the blocks that they were reconstructed in."""
    options = job.options
    if options.split:
        job.splits = shortcut_splits(job, data)
    weights = calibrated_weights(job, data, options.weight_method)
    layers = {path: CalibratedLayer(weights[path], input_scale=job.input_scale(path)) for path in job.layers}
    blocks = reconstruction.blocks_of(job.unet, job.layers, data)
    for number, (block, paths) in enumerate(job.bar(list(blocks.items()), "blocks", unit="block")):
        before = {path: layers[path] for name, above in list(blocks.items())[:number] for path in above}
        own = {path: layers[path] for path in paths}
        compute = _reconstruct(job, points, block, before, own, ("variable",), None)
        layers |= job.layers_once(f"block-{number}", own, compute)
    if options.network_iterations:
        layers = learn_network(job, data, layers)
    return layers, blocks


def split_sites(unet: nn.Module) -> dict[str, int]:
    """Path of every 1x1 shortcut that reads concat(hidden, skip), and how many channels `hidden` has."""
    sites: dict[str, int] = {}
    mid = getattr(unet, "mid_block", None)
    downs, ups = getattr(unet, "down_blocks", ()), getattr(unet, "up_blocks", ())
    above = mid if mid is not None else (downs[-1] if len(downs) else None)
    for number, block in enumerate(ups):
        for index, resnet in enumerate(block.resnets):
            source = block.resnets[index - 1] if index else above.resnets[-1]
            hidden = source.out_channels
            if isinstance(resnet.conv_shortcut, nn.Conv2d) and hidden < resnet.in_channels:
                sites[f"up_blocks.{number}.resnets.{index}.conv_shortcut"] = hidden
        above = block
    return sites


def shortcut_splits(job: Job, data: CalibrationData) -> dict[str, Split]:
    """The split of every shortcut to calibrate. The ratio of the activation scales is that of `scale_search`."""
    sites = {path: hidden for path, hidden in split_sites(job.unet).items() if path in job.layers}
    layers = {path: job.layers[path] for path in sites}
    if not sites:
        return {}
    options, bits = job.options, job.config.act_bits
    pairs = job.config.mode == "modulated"
    ranges = {(path, part): Range() for path in sites for part in range(2)}

    def each(use: Callable[[tuple[str, int], Tensor], None]) -> Callable[..., None]:
        def on_input(path: str, x: Tensor, previous: Tensor | None, points: Tensor) -> None:
            values = (x if previous is None else x - previous).float()
            for part, half in enumerate(values.tensor_split([sites[path]], 1)):
                use((path, part), half)

        return on_input

    def compute() -> dict[str, Tensor]:
        stream(job.unet, data, layers, each(lambda key, x: ranges[key].add(x)), batches_of(job, data, "split"), pairs)
        counts = {key: Histogram(bounds.low, bounds.high) for key, bounds in ranges.items()}
        stream(job.unet, data, layers, each(lambda key, x: counts[key].add(x)), batches_of(job, data, "split"), pairs)
        search = (options.scale_search, options.p, options.percentile)
        tensors: dict[str, Tensor] = {}
        for path, hidden in sites.items():
            first, second = (symmetric_scale(counts[path, part], bits, *search) for part in range(2))
            scale = torch.ones(job.layers[path].weight.shape[1])
            scale[hidden:] = first / second
            tensors[path] = scale
        return tensors

    tensors = {} if bits is None else job.workspace.once("splits", compute)
    inputs = {path: layer.weight.shape[1] for path, layer in layers.items()}
    return {path: Split(math.gcd(hidden, inputs[path]), tensors.get(path)) for path, hidden in sites.items()}


def _reconstruct(
    job: Job,
    points: Points,
    block: str,
    before: Mapping[str, CalibratedLayer],
    own: Mapping[str, CalibratedLayer],
    names: Sequence[str],
    act_bits: int | None,
) -> Callable[[], Layers]:
    """Learn `names` of the layers `own` in `block`, behind the layers `before` with their codes."""
    options, mode, data = job.options, job.config.mode, points.seen
    learns_weights = "variable" in names
    total = options.weight_iterations if learns_weights else options.act_iterations
    pairs = act_bits is not None and mode == "modulated"

    def compute() -> Layers:
        batches = list(data.batches(job.batch))
        same = {} if act_bits is None else reconstruction.shared_inputs(job.unet, own, data)
        with reconstruction.scratch() as folder:
            target = reconstruction.record(job.unet, block, points.wanted, batches, Path(folder, "output"), "output")
            with fake_quantized(job.unet, before, mode, None) as fakes:
                for fake in fakes.values():
                    fake.hard = True
                inputs = reconstruction.record(job.unet, block, data, batches, Path(folder, "input"), "input")
                if pairs:
                    previous = reconstruction.record(job.unet, block, data, batches, Path(folder, "before"), "previous")
            with fake_quantized(job.unet, own, mode, act_bits) as fakes:
                for path, fake in fakes.items():
                    fake.act_scale = fakes[same.get(path, path)].act_scale
                module = job.unet.get_submodule(block)

                def loss_of(drawn: Tensor) -> Tensor:
                    if pairs:
                        remember(fakes, lambda: reconstruction.call(module, previous.read(drawn)))
                    output, wanted = reconstruction.call(module, inputs.read(drawn)), target.read(drawn)[0]
                    loss = reconstruction.distance(output, wanted, 2.0 if learns_weights else options.p)
                    if points.cosine_weight:
                        loss = loss + points.cosine_weight * cosine_distance(output, wanted)
                    return loss

                reconstruction.learn(
                    fakes.values(),
                    names,
                    loss_of,
                    len(data),
                    iterations=range(total),
                    total=total,
                    batch=options.learn_batch,
                    lr=options.weight_lr if learns_weights else options.act_lr,
                    rounding_weight=options.rounding_weight,
                    generator=job.workspace.generator(f"{block}-{names[0]}"),
                )
                return {path: fake.result() for path, fake in fakes.items()}

    return compute


def cosine_distance(output: Tensor, target: Tensor) -> Tensor:
    """1 - <output, target> / (|output| |target|), mean over the first dimension."""
    return 1 - nn.functional.cosine_similarity(output.flatten(1), target.flatten(1)).mean()


def remember(fakes: Mapping[str, Any], run: Callable[[], Any]) -> None:
    """Let run() show the FakeLayers `fakes` the inputs of the call before."""
    for fake in fakes.values():
        fake.remember = True
    with torch.no_grad():
        run()
    for fake in fakes.values():
        fake.remember = False
