"""Method "qdiffusion" (Li et al., ICCV 2023): shortcut split, then block-wise reconstruction.

1. *Shortcut split.* The 1x1 shortcut of an up block reads concat(hidden, skip), whose parts differ in range. Each part
   of the weight gets scales of its own (as groups along K), and the skip part of the input is multiplied by the ratio
   of the two activation scales before it is quantised: that is the same as two quantisers.
2. *Weights*: AdaRound, block after block, from inputs that the blocks before give with their codes, towards the output
   of the float network. It starts at the codes of `weight_method`. `network_iterations` may learn on, beyond the paper.
3. *Activations* (scale_mode "static"): step sizes by gradient (LSQ), block after block, the codes fixed."""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from modiff_kernels.calibration import reconstruction
from modiff_kernels.calibration.data import CalibrationData
from modiff_kernels.calibration.job import Job, Layers, Split, Tensors, number
from modiff_kernels.calibration.reconstruction import FakeLayer, fake_quantized, remember
from modiff_kernels.calibration.static import StaticOptions, find_scale, histograms, with_scales
from modiff_kernels.calibration.weights import layers_with_codes


@dataclasses.dataclass(frozen=True)
class QDiffusionOptions(StaticOptions):
    """Options of "qdiffusion".

    split: shortcut split. weight_iterations, act_iterations: of a block (the paper: 20000 and 5000).
    weight_lr, act_lr: first rates of Adam (the released code, with its numbers of iterations: 1e-3 and 4e-4, the latter
    absolute; see `reconstruction.learn`). rounding_weight: of AdaRound's penalty, in parts of the first loss."""

    split: bool = True
    weight_iterations: int = number(400)
    act_iterations: int = number(100)
    weight_lr: float = number(0.1)
    act_lr: float = number(0.1)
    rounding_weight: float = number(0.5)


def qdiffusion(job: Job) -> Layers:
    data = job.data()
    return reconstruct_blocks(job, data, data)


def reconstruct_blocks(job: Job, data: CalibrationData, points: CalibrationData) -> Layers:
    """Codes and step sizes by reconstruction at `points`, started from those of layer-wise methods on `data`."""
    blocks = reconstruction.blocks_of(job.unet, job.layers, data)

    def block_by_block(layers: Layers, part: str, name: str) -> Layers:
        above: Layers = {}
        for index, (block, paths) in enumerate(job.bar(list(blocks.items()), part, unit="block")):
            own = {path: layers[path] for path in paths}
            compute = functools.partial(_reconstruct, job, points, block, above, own, name)
            above = above | job.layers_once(f"{part}-{index}", compute)
        return above

    if job.weights is not None:
        layers = dict(job.weights)
    else:
        if job.options.split:
            job.splits = shortcut_splits(job, data)
        layers = layers_with_codes(job, data)
        layers |= block_by_block(layers, "block", "variable")
        if job.options.network_iterations:
            layers = reconstruction.learn_network(job, data, layers)
    if job.needs_scales:
        layers = with_scales(job, data, layers)
        layers |= block_by_block(layers, "steps", "act_scale")
    return layers


def _reconstruct(job: Job, data: CalibrationData, block: str, above: Layers, own: Layers, name: str) -> Layers:
    """The layers `own` of `block` after learning `name` of them, behind the layers `above` with their codes."""
    options, mode, weights = job.options, job.config.mode, name == "variable"
    batches = torch.arange(len(data)).split(job.batch)
    before = {path: dataclasses.replace(layer, act_scale=None) for path, layer in above.items()}
    with tempfile.TemporaryDirectory(prefix="modiff-calibration-") as folder:

        def record(what: str) -> reconstruction.Recording:
            return reconstruction.record(job.unet, block, data, batches, Path(folder, what), what)

        target = record("output")
        with fake_quantized(job.unet, before, mode, None) as fakes:
            for fake in fakes.values():
                fake.hard = True
            inputs = record("input")
            previous = inputs if weights or mode == "quantized" else record("previous")

        def loss_of(drawn: Tensor, fakes: Mapping[str, FakeLayer]) -> Tensor:
            module = job.unet.get_submodule(block)  # one of the fakes, where the block is a layer
            remember(fakes, lambda: reconstruction.call(module, previous.read(drawn)))
            output, goal = reconstruction.call(module, inputs.read(drawn)), target.read(drawn)[0]
            return (output - goal).abs().pow(2.0 if weights else options.p).mean()

        rate = (options.weight_iterations, options.weight_lr) if weights else (options.act_iterations, options.act_lr)
        settings = (loss_of, data, len(data), *rate, options.rounding_weight)
        return reconstruction.learn(job, f"{block}-{name}", own, (name,), *settings)


def split_sites(unet: nn.Module) -> dict[str, int]:
    """Path of every 1x1 shortcut that reads concat(hidden, skip), and how many channels `hidden` has."""
    sites: dict[str, int] = {}
    above = getattr(unet, "mid_block", None) or unet.down_blocks[-1]
    source = above.resnets[-1]
    for place, block in enumerate(unet.up_blocks):
        for index, resnet in enumerate(block.resnets):
            hidden = source.out_channels
            if isinstance(resnet.conv_shortcut, nn.Conv2d) and hidden < resnet.in_channels:
                sites[f"up_blocks.{place}.resnets.{index}.conv_shortcut"] = hidden
            source = resnet
    return sites


def shortcut_splits(job: Job, data: CalibrationData) -> dict[str, Split]:
    """The split of every shortcut to calibrate. The ratio of the activation scales is that of `scale_search`."""
    sites = {path: hidden for path, hidden in split_sites(job.unet).items() if path in job.layers}
    layers = {path: job.layers[path] for path in sites}
    bits = job.config.act_bits

    def parts(path: str, values: Tensor, points: Tensor) -> list[tuple[tuple[str, int], Tensor]]:
        return [((path, part), half) for part, half in enumerate(values.tensor_split([sites[path]], 1))]

    def compute() -> Tensors:
        counts = histograms(job, data, layers, parts)
        tensors: Tensors = {}
        for path, hidden in sites.items():
            first, second = (find_scale(counts[path, part], job.options, bits, affine=False)[0] for part in range(2))
            tensors[path] = torch.ones(layers[path].weight.shape[1])
            tensors[path][hidden:] = first / second
        return tensors

    tensors = job.once("splits", compute) if sites and bits is not None else {}
    inputs = {path: layer.weight.shape[1] for path, layer in layers.items()}
    return {path: Split(math.gcd(hidden, inputs[path]), tensors.get(path)) for path, hidden in sites.items()}
