"""Calibration from full-precision activations: methods "minmax", "mse", "percentile", "ndtc" (PTQ4DM) and "distill".

Weight codes come from `weights`, activation scales from `scales`: of the layer's input in mode "quantized", of its
change since the call before (MoDiff's residual) in mode "modulated".
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from modiff_kernels.calibration import scales
from modiff_kernels.calibration.data import CalibrationData, stream
from modiff_kernels.calibration.job import Job, Layers, Options, choice, number
from modiff_kernels.calibration.reconstruction import learn_network
from modiff_kernels.calibration.weights import WEIGHT_METHODS, calibrated_weights
from modiff_kernels.quant.calibrated import CalibratedLayer

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class StaticOptions(Options):
    """Options of the layer-wise methods.

    weight_method: a name of WEIGHT_METHODS; "auto" is "rtn" at 8 bits, "gptq" below. scale_search: "minmax", "mse" (the
    scale with the least L_p error) or "percentile". p: of "mse". percentile: per cent of the values that are not
    clipped. table: one scale per call of the run instead of one per layer; between the calls that gave data it is
    interpolated. network_iterations: steps of learning the codes of the whole network at once (`learn_network`), 0 for
    none. network_lr: first rate of Adam, in code steps. learn_batch: points of an iteration.
    """

    weight_method: str = choice("auto", ("auto", *WEIGHT_METHODS))
    scale_search: str = choice("mse", scales.SEARCHES)
    p: float = number(2.4)
    percentile: float = number(99.9, above=50, most=100)
    table: bool = choice(False, (True, False))
    network_iterations: int = number(0, least=0)
    network_lr: float = number(0.003)
    learn_batch: int = number(16)


def static(job: Job) -> Layers:
    """Weight codes and activation scales of every layer, from full-precision activations."""
    data = job.data()
    layers = layers_with_codes(job, data)
    activations = activation_scales(job, data) if job.needs_scales else {}
    return {path: dataclasses.replace(layer, **activations.get(path, {})) for path, layer in layers.items()}


def layers_with_codes(job: Job, data: CalibrationData) -> Layers:
    """The layers with the codes that are to be kept, or those of weight_method, learnt on where the options say so."""
    if job.weights is not None:
        return dict(job.weights)
    layers = {path: CalibratedLayer(weight) for path, weight in calibrated_weights(job, data).items()}
    return learn_network(job, data, layers) if job.options.network_iterations else layers


def activation_scales(job: Job, data: CalibrationData) -> dict[str, dict[str, Tensor]]:
    """act_scale, float32 [1] or [calls], and in mode "quantized" act_zero_point, of every layer by path."""
    options, bits = job.options, job.config.act_bits
    pairs = job.config.mode == "modulated"
    names = ("act_scale",) if pairs else ("act_scale", "act_zero_point")
    search = (options.scale_search, options.p, options.percentile)

    def parts(path: str, values: Tensor, points: Tensor) -> Iterator[tuple[tuple[str, int], Tensor]]:
        """(path, call), or (path, 0) without table, and values of a batch."""
        if (scale := job.input_scale(path)) is not None:
            values = values * scale.view(1, -1, *[1] * (values.ndim - 2))
        if not options.table:
            yield (path, 0), values
            return
        calls = data.call[points].repeat_interleave(len(values) // len(points))
        for call in calls.unique().tolist():
            yield (path, call), values[calls == call]

    def found(histogram: scales.Histogram) -> tuple[Tensor, ...]:
        if pairs:
            return (scales.symmetric_scale(histogram, bits, *search),)
        return scales.affine_scale(histogram, bits, *search)

    def compute() -> dict[str, Tensor]:
        by_call: dict[str, dict[int, tuple[Tensor, ...]]] = {}
        for (path, call), histogram in sorted(histograms(job, data, job.layers, parts).items()):
            by_call.setdefault(path, {})[call] = found(histogram)
        tensors: dict[str, Tensor] = {}
        for path, scales_of in by_call.items():
            for name, *values in zip(names, *scales_of.values()):
                tensors[f"{path}/{name}"] = values[0]
                if options.table:  # linear between the calls that gave data, constant outside
                    table = np.interp(range(len(data.timesteps)), list(scales_of), torch.cat(values).double())
                    table = table.round() if name == "act_zero_point" else table
                    tensors[f"{path}/{name}"] = torch.from_numpy(table).to(values[0].dtype)
        return tensors

    tensors = job.workspace.once("activations", compute)
    return {
        path: {name: tensors[f"{path}/{name}"] for name in names if f"{path}/{name}" in tensors} for path in job.layers
    }


def histograms(
    job: Job,
    data: CalibrationData,
    layers: Mapping[str, nn.Module],
    parts: Callable[[str, Tensor, Tensor], Iterable[tuple[Key, Tensor]]],
) -> dict[Key, scales.Histogram]:
    """Of the inputs of `layers`, or of their changes in mode "modulated", in two passes over the data.

    parts(path, values, points): the values of a batch (float32, at `points` of the data) by the key they count for.
    """
    ranges: dict[Key, scales.Range] = {}

    def each(use: Callable[[Key, Tensor], None]) -> None:
        def on_input(path: str, x: Tensor, previous: Tensor | None, points: Tensor) -> None:
            for key, values in parts(path, (x if previous is None else x - previous).float(), points):
                use(key, values)

        stream(job.unet, data, layers, on_input, job.batches(data, "ranges"), job.config.mode == "modulated")

    each(lambda key, values: ranges.setdefault(key, scales.Range()).add(values))
    counts = {key: scales.Histogram(bounds) for key, bounds in ranges.items()}
    each(lambda key, values: counts[key].add(values))
    return counts
