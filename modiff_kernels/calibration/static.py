"""Calibration from full-precision activations: methods "minmax", "mse", "percentile", "ndtc" (PTQ4DM) and "distill".

Weight codes come from `weights`. Activation scales are searched on histograms of the layer's input, in mode "modulated"
of its change since the call before: min-max, percentile, or the least L_p error (PTQ4DM: p = 2.4)."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from modiff_kernels.calibration.data import CalibrationData, stream
from modiff_kernels.calibration.job import Job, Layers, Options, Tensors, choice, number
from modiff_kernels.calibration.reconstruction import learn_network
from modiff_kernels.calibration.weights import WEIGHT_METHODS, layers_with_codes
from modiff_kernels.quant.affine import affine_range, dequantize, quantize, residual_scale

Key = TypeVar("Key", bound=Hashable)
Parts = Callable[[str, Tensor, Tensor], Iterable[tuple[Key, Tensor]]]
SEARCHES = ("minmax", "mse", "percentile")
BINS = 2048
RATIOS = torch.logspace(0, -1.5, 91, dtype=torch.float64)  # parts of the whole range that a search tries, down to 3 %


@dataclasses.dataclass(frozen=True)
class StaticOptions(Options):
    """Options of the layer-wise methods.

    weight_method: a name of WEIGHT_METHODS; "auto" is "rtn" at 8 bits, "gptq" below. scale_search: "minmax", "mse" (the
    scale with the least L_p error) or "percentile". p: of "mse". percentile: per cent of the values that are not
    clipped. table: one scale per call of the run instead of one per layer; between the calls that gave data it is
    interpolated. network_iterations: steps of learning the codes of the whole network at once (`learn_network`), 0 for
    none. network_lr: first rate of Adam, in code steps. learn_batch: points of an iteration."""

    weight_method: str = choice("auto", ("auto", *WEIGHT_METHODS))
    scale_search: str = choice("mse", SEARCHES)
    p: float = number(2.4)
    percentile: float = number(99.9, above=50, most=100)
    table: bool = choice(False, (True, False))
    network_iterations: int = number(0, least=0)
    network_lr: float = number(0.003)
    learn_batch: int = number(16)


def static(job: Job) -> Layers:
    data = job.data()
    layers = learnt_layers(job, data)
    return with_scales(job, data, layers) if job.needs_scales else layers


def learnt_layers(job: Job, data: CalibrationData) -> Layers:
    """The layers with the codes that are to be kept, or those of weight_method, learnt on where the options say so."""
    if job.weights is not None:
        return dict(job.weights)
    layers = layers_with_codes(job, data)
    return learn_network(job, data, layers) if job.options.network_iterations else layers


def with_scales(job: Job, data: CalibrationData, layers: Layers) -> Layers:
    """The layers with act_scale, float32 [1] or [calls], and in mode "quantized" act_zero_point."""
    affine, table = job.config.mode == "quantized", job.options.table

    def parts(path: str, values: Tensor, points: Tensor) -> Iterator[tuple[tuple[str, int], Tensor]]:
        if (scale := job.input_scale(path)) is not None:
            values = values * scale.view(1, -1, *[1] * (values.ndim - 2))
        if not table:
            yield (path, 0), values
            return
        calls = data.call[points].repeat_interleave(len(values) // len(points))
        for call in calls.unique().tolist():
            yield (path, call), values[calls == call]

    def compute() -> Tensors:
        found: dict[str, dict[int, Tensor]] = {}
        for (path, call), histogram in sorted(histograms(job, data, job.layers, parts).items()):
            scale, zero_point = find_scale(histogram, job.options, job.config.act_bits, affine)
            found.setdefault(f"{path}/act_scale", {})[call] = scale
            if affine:
                found.setdefault(f"{path}/act_zero_point", {})[call] = zero_point
        tensors = {}
        for name, by_call in found.items():
            tensors[name] = values = torch.cat(list(by_call.values()))
            if table:  # linear between the calls that gave data, constant outside
                entries = torch.from_numpy(np.interp(range(len(data.timesteps)), list(by_call), values.double()))
                tensors[name] = (entries if values.is_floating_point() else entries.round()).to(values.dtype)
        return tensors

    tensors = job.once("activations", compute)
    names = ("act_scale", "act_zero_point")
    return {
        path: dataclasses.replace(layer, **{name: tensors.get(f"{path}/{name}") for name in names})
        for path, layer in layers.items()
    }


class Histogram:
    """Counts of the values of a stream of tensors in BINS equal bins from `low` to `high`."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, max(high, low + 2.0**-60)
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count the values of x, float32; values outside count at the ends."""
        values = x.detach().float().flatten().clamp(self.low, self.high)
        self.counts += torch.histc(values, BINS, self.low, self.high).double().cpu()

    def centres(self) -> Tensor:
        """float32 [BINS]: the value that stands for each bin."""
        step = (self.high - self.low) / BINS
        return (self.low + step * (torch.arange(BINS, dtype=torch.float64) + 0.5)).float()

    def inside(self, percentile: float) -> tuple[float, float]:
        """The values between which `percentile` per cent of all lie, as many below as above."""
        below = self.counts.cumsum(0) / self.counts.sum()
        outside = (1 - percentile / 100) / 2
        ends = torch.searchsorted(below, torch.tensor([outside, 1 - outside], dtype=torch.float64)).clamp_max(BINS - 1)
        low, high = self.centres()[ends].tolist()
        return low, high


def histograms(
    job: Job, data: CalibrationData, layers: Mapping[str, nn.Module], parts: Parts[Key]
) -> dict[Key, Histogram]:
    """Of the inputs of `layers`, or of their changes in mode "modulated", in two passes over the data. parts(path,
    values, points): the values of a batch (float32, at `points` of the data) by the key they count for."""
    ranges: dict[Key, tuple[float, float]] = {}

    def widen(key: Key, values: Tensor) -> None:
        low, high = ranges.get(key, (math.inf, -math.inf))
        least, greatest = values.aminmax()
        ranges[key] = min(low, float(least)), max(high, float(greatest))

    def each(use: Callable[[Key, Tensor], None]) -> None:
        def on_input(path: str, x: Tensor, previous: Tensor | None, points: Tensor) -> None:
            for key, values in parts(path, (x if previous is None else x - previous).float(), points):
                use(key, values)

        stream(job.unet, data, layers, on_input, job.batches(data, "ranges"), job.config.mode == "modulated")

    each(widen)
    counts = {key: Histogram(*bounds) for key, bounds in ranges.items()}
    each(lambda key, values: counts[key].add(values))
    return counts


def find_scale(histogram: Histogram, options: StaticOptions, bits: int, affine: bool) -> tuple[Tensor, Tensor]:
    """Scale float32 [1] and zero point int32 [1] for the counted values, by the option `scale_search`.

    affine: all 2^bits codes between both ends (`affine_range`); else they lie around 0 (`residual_scale`) and the
    zero point is 0. "minmax" covers all values, "percentile" so many per cent; "mse" takes the part of the whole range,
    out of RATIOS, with the least sum |x - Q(x)|^p."""
    percentile = options.scale_search == "percentile"
    low, high = histogram.inside(options.percentile) if percentile else (histogram.low, histogram.high)
    ratios = RATIOS.float() if options.scale_search == "mse" else torch.ones(1)
    if affine:
        scales, zero_points = affine_range(min(low, 0.0) * ratios, max(high, 0.0) * ratios, bits)
    else:
        scales = residual_scale(max(abs(low), abs(high)) * ratios, bits)
        zero_points = torch.zeros_like(scales, dtype=torch.int32)
    values = histogram.centres().expand(len(scales), -1)
    rounded = dequantize(quantize(values, scales, bits, zero_points), scales, zero_points)
    best = int((((rounded - values).abs().double() ** options.p) @ histogram.counts).argmin())
    return scales[best : best + 1].clone(), zero_points[best : best + 1].clone()
