"""Search for activation scales on histograms: min-max, percentile, and the L_p error (PTQ4DM: p = 2.4)."""

import dataclasses

import torch
from torch import Tensor

from modiff_kernels.quant.affine import affine_range, dequantize, quantize, residual_scale

SEARCHES = ("minmax", "mse", "percentile")
BINS = 2048
RATIOS = torch.logspace(0, -1.5, 91, dtype=torch.float64)  # parts of the whole range that a search tries, down to 3 %


@dataclasses.dataclass
class Range:
    """Least and greatest value of a stream of tensors."""

    low: float = float("inf")
    high: float = float("-inf")

    def add(self, x: Tensor) -> None:
        """Take in the values of x, not empty."""
        low, high = (float(bound) for bound in x.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)


class Histogram:
    """Counts of the values of a stream of tensors in BINS equal bins over their range."""

    def __init__(self, bounds: Range) -> None:
        self.low, self.high = bounds.low, max(bounds.high, bounds.low + 2.0**-60)
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


def symmetric_scale(histogram: Histogram, bits: int, search: str, p: float, percentile: float) -> Tensor:
    """Scale float32 [1] of codes -2^(bits-1) .. 2^(bits-1)-1 around 0 for the counted values (`residual_scale`).

    search: "minmax" covers the largest absolute value; "percentile" that below which `percentile` per cent lie; "mse"
    the part of the largest one, out of RATIOS, with the least sum |x - Q(x)|^p.
    """
    absmax = torch.tensor([max(abs(histogram.low), abs(histogram.high))])
    if search == "minmax":
        return residual_scale(absmax, bits)
    if search == "percentile":
        return residual_scale(torch.tensor([max(map(abs, histogram.inside(percentile)))]), bits)
    candidates = residual_scale(absmax * RATIOS.float(), bits)
    return _least_error(histogram, bits, p, candidates, torch.zeros_like(candidates, dtype=torch.int32))[0]


def affine_scale(histogram: Histogram, bits: int, search: str, p: float, percentile: float) -> tuple[Tensor, Tensor]:
    """Scale float32 [1] and zero point int32 [1] of all 2^bits codes for the counted values (`affine_range`).

    The searches are those of `symmetric_scale`; "mse" shrinks both ends by the same part.
    """
    low, high = torch.tensor([min(histogram.low, 0.0)]), torch.tensor([max(histogram.high, 0.0)])
    if search == "minmax":
        return affine_range(low, high, bits)
    if search == "percentile":
        low, high = (torch.tensor([end]) for end in histogram.inside(percentile))
        return affine_range(low.clamp_max(0), high.clamp_min(0), bits)
    ratios = RATIOS.float()
    return _least_error(histogram, bits, p, *affine_range(low * ratios, high * ratios, bits))


def _least_error(
    histogram: Histogram, bits: int, p: float, scales: Tensor, zero_points: Tensor
) -> tuple[Tensor, Tensor]:
    values = histogram.centres().expand(len(scales), -1)
    rounded = dequantize(quantize(values, scales, bits, zero_points), scales, zero_points)
    errors = ((rounded - values).abs().double() ** p) @ histogram.counts
    best = int(errors.argmin())
    return scales[best : best + 1].clone(), zero_points[best : best + 1].clone()
