"""Method "qdiffusion" (Li et al., ICCV 2023): shortcut split, then block-wise reconstruction.

1. *Shortcut split.* The 1x1 shortcut of an up block reads concat(hidden, skip), whose parts differ in range. Each part
   of the weight gets scales of its own (as groups along K), and the skip part of the input is multiplied by the ratio
   of the two activation scales before it is quantised: that is the same as two quantisers.
2. *Weights*: AdaRound, block after block, from inputs that the blocks before give with their codes, towards the output
   of the float network. It starts at the codes of `weight_method`.
3. *Activations* (scale_mode "static"): step sizes by gradient (LSQ), block after block, the codes fixed. In mode
   "modulated" the input is x_hat = previous + Q(x - previous), as MoDiff calibrates.

Beyond the paper, `network_iterations` may learn the whole network between 2 and 3 (`learn_network`).
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from modiff_kernels.calibration import reconstruction
from modiff_kernels.calibration.data import CalibrationData
from modiff_kernels.calibration.fake import fake_quantized, remember
from modiff_kernels.calibration.job import Job, Layers, Split, number
from modiff_kernels.calibration.scales import symmetric_scale
from modiff_kernels.calibration.static import StaticOptions, activation_scales, histograms
from modiff_kernels.calibration.weights import calibrated_weights
from modiff_kernels.quant.calibrated import CalibratedLayer


@dataclasses.dataclass(frozen=True)
class QDiffusionOptions(StaticOptions):
    """Options of "qdiffusion".

    split: shortcut split. weight_iterations, act_iterations: of a block (the paper: 20000 and 5000).
    weight_lr, act_lr: first rates of Adam (the released code, with its numbers of iterations: 1e-3 and 4e-4, the latter
    absolute; see `reconstruction.learn`). rounding_weight: of AdaRound's penalty, in parts of the first loss.
    """

    split: bool = True
    weight_iterations: int = number(400)
    act_iterations: int = number(100)
    weight_lr: float = number(0.1)
    act_lr: float = number(0.1)
    rounding_weight: float = number(0.5)


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
    blocks = reconstruction.blocks_of(job.unet, job.layers, data)
    if job.weights is not None:
        layers = dict(job.weights)
    else:
        if job.options.split:
            job.splits = shortcut_splits(job, data)
        weights = calibrated_weights(job, data)
        layers = {path: CalibratedLayer(weights[path], input_scale=job.input_scale(path)) for path in job.layers}
        layers |= _block_by_block(job, points, blocks, layers, "block", "variable", None)
        if job.options.network_iterations:
            layers = reconstruction.learn_network(job, data, layers)
    if job.needs_scales:
        for path, found in activation_scales(job, data).items():
            layers[path] = dataclasses.replace(layers[path], **found)
        layers |= _block_by_block(job, points, blocks, layers, "steps", "act_scale", job.config.act_bits)
    return layers


def _block_by_block(
    job: Job,
    points: Points,
    blocks: Mapping[str, Sequence[str]],
    layers: Layers,
    part: str,
    name: str,
    act_bits: int | None,
) -> Layers:
    """The layers after learning `name` in one block after another, behind those above with their codes."""
    layers = dict(layers)
    above: list[str] = []
    for index, (block, paths) in enumerate(job.bar(list(blocks.items()), part, unit="block")):
        before = {path: dataclasses.replace(layers[path], act_scale=None) for path in above}
        own = {path: layers[path] for path in paths}
        compute = _reconstruct(job, points, block, before, own, name, act_bits)
        layers |= job.layers_once(f"{part}-{index}", own, compute)
        above += paths
    return layers


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
    if not sites:
        return {}
    options, bits = job.options, job.config.act_bits

    def compute() -> dict[str, Tensor]:
        counts = histograms(
            job,
            data,
            layers,
            lambda path, values, points: [
                ((path, part), half) for part, half in enumerate(values.tensor_split([sites[path]], 1))
            ],
        )
        search = (options.scale_search, options.p, options.percentile)
        tensors: dict[str, Tensor] = {}
        for path, hidden in sites.items():
            first, second = (symmetric_scale(counts[path, part], bits, *search) for part in range(2))
            tensors[path] = torch.ones(layers[path].weight.shape[1])
            tensors[path][hidden:] = first / second
        return tensors

    tensors = {} if bits is None else job.workspace.once("splits", compute)
    inputs = {path: layer.weight.shape[1] for path, layer in layers.items()}
    return {path: Split(math.gcd(hidden, inputs[path]), tensors.get(path)) for path, hidden in sites.items()}


def _reconstruct(
    job: Job, points: Points, block: str, before: Layers, own: Layers, name: str, act_bits: int | None
) -> Callable[[], Layers]:
    """What learns `name` of the layers `own` in `block`, behind the layers `before` with their codes."""
    options, mode, data = job.options, job.config.mode, points.seen
    learns_weights = name == "variable"
    pairs = act_bits is not None and mode == "modulated"

    def compute() -> Layers:
        batches = list(data.batches(job.batch))
        same = {} if act_bits is None else reconstruction.shared_inputs(job.unet, own, data)
        with tempfile.TemporaryDirectory(prefix="modiff-calibration-") as folder:

            def record(data: CalibrationData, what: str) -> reconstruction.Recording:
                return reconstruction.record(job.unet, block, data, batches, Path(folder, what), what)

            target = record(points.wanted, "output")
            with fake_quantized(job.unet, before, mode, None) as fakes:
                for fake in fakes.values():
                    fake.hard = True
                inputs = record(data, "input")
                previous = record(data, "previous") if pairs else inputs
            with fake_quantized(job.unet, own, mode, act_bits) as fakes:
                for path, fake in fakes.items():
                    fake.act_scale = fakes[same.get(path, path)].act_scale
                module = job.unet.get_submodule(block)  # one of the fakes, where the block is a layer

                def loss_of(drawn: Tensor) -> Tensor:
                    if pairs:
                        remember(fakes, lambda: reconstruction.call(module, previous.read(drawn)))
                    output, wanted = reconstruction.call(module, inputs.read(drawn)), target.read(drawn)[0]
                    loss = (output - wanted).abs().pow(2.0 if learns_weights else options.p).mean()
                    if points.cosine_weight:
                        loss = loss + points.cosine_weight * cosine_distance(output, wanted)
                    return loss

                reconstruction.learn(
                    job,
                    f"{block}-{name}",
                    fakes.values(),
                    (name,),
                    loss_of,
                    len(data),
                    iterations=options.weight_iterations if learns_weights else options.act_iterations,
                    lr=options.weight_lr if learns_weights else options.act_lr,
                    rounding_weight=options.rounding_weight,
                    show=False,
                )
                return {path: fake.result() for path, fake in fakes.items()}

    return compute


def cosine_distance(output: Tensor, target: Tensor) -> Tensor:
    """1 - <output, target> / (|output| |target|), mean over the first dimension."""
    return 1 - nn.functional.cosine_similarity(output.flatten(1), target.flatten(1)).mean()
