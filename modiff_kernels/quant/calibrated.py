"""What calibration knows about a layer: `QuantizedWeight` and `CalibratedLayer`, as layers take them."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .affine import dequantize_weight, quantize_weight, weight_rows
from .packing import misfit
from .spec import check_bits, check_group_size, group_count

# Relative distance (Frobenius) from a weight at which codes are said to be those of another weight; three bits of a
# normal distribution are at 0.2, independent weights of the same size at 1.4.
MAX_WEIGHT_ERROR = 0.9


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """Codes of a weight [N, K] (K in (r, s, c) order for a convolution), with codes * scale close to the weight. codes:
    int8 [N, K]. scale: float32 [N] (group_size -1) or [N, ceil(K / group_size)]. bits: 3, 4 or 8."""

    codes: Tensor
    scale: Tensor
    bits: int
    group_size: int = -1

    @classmethod
    def rounded(cls, weight: Tensor, bits: int, group_size: int = -1) -> "QuantizedWeight":
        """Round to nearest: `quantize_weight` of weight [N, K] or [N, C, R, S]."""
        return cls(*quantize_weight(weight, bits, group_size), bits, group_size)

    def dequantized(self, shape: Sequence[int] | None = None) -> Tensor:
        """float32 [N, K], or in the `shape` of the weight it came from."""
        return dequantize_weight(self.codes, self.scale, self.group_size, None if shape is None else tuple(shape))

    def to(self, device: torch.device) -> "QuantizedWeight":
        return dataclasses.replace(self, codes=self.codes.to(device), scale=self.scale.to(device))

    def check(self, shape: Sequence[int]) -> None:
        where = "calibrated weight"
        check_bits(where, "bits", self.bits)
        check_group_size(where, self.group_size)
        n, k = shape[0], math.prod(shape[1:])
        codes, scale = tuple(self.codes.shape), tuple(self.scale.shape)
        scales = (n,) if self.group_size == -1 else (n, group_count(k, self.group_size))
        if self.codes.dtype != torch.int8 or codes != (n, k):
            wrong = f"codes are {self.codes.dtype} {codes}, the layer needs int8 {(n, k)}; calibrate this model"
            raise ValueError(f"{where}: {wrong}")
        if self.scale.dtype != torch.float32 or scale != scales:
            wrong = f"scale is {self.scale.dtype} {scale}, but group_size {self.group_size} needs float32 {scales}"
            raise ValueError(f"{where}: {wrong}; calibrate again")
        if not _usable(self.scale):
            raise ValueError(f"{where}: a scale is not positive and finite; calibrate again")
        if (found := misfit(self.codes, self.bits)) is not None:
            low, high = found
            raise ValueError(f"{where}: codes from {low} to {high} do not fit {self.bits} bits; calibrate again")

    def check_belongs(self, weight: Tensor) -> None:
        """Raise ValueError unless the codes are those of `weight`, by their distance from it."""
        rows = weight_rows(weight.detach()).to(torch.float32)
        distance = (self.dequantized() - rows).norm() / rows.norm().clamp_min(torch.finfo(torch.float32).tiny)
        if float(distance) > MAX_WEIGHT_ERROR:
            away = f"{float(distance):.2f} (relative) away from the weight of the layer"
            raise ValueError(f"calibrated weight: its codes are {away}; calibrate this checkpoint")


@dataclasses.dataclass(frozen=True)
class CalibratedLayer:
    """What calibration gives a layer; None everywhere is what an uncalibrated layer has.

    weight: codes; of weight / input_scale where there is one. None: round to nearest.
    act_scale: float32 [1], or [calls of a run]; of the residual (mode "modulated") or of the input ("quantized").
    act_zero_point: int32, as many; mode "quantized" only. None: 0.
    input_scale: float32 [C]: the layer's input channels are multiplied by it before they are quantised.
    bias: float32 [N], in place of the layer's own.
    weight_sample: some values of the float weight that the codes are for, see `nn.cache.sample_of`.
    is_optional: where the weight changes, codes and bias are given up instead of refusing it: nobody asked for them."""

    weight: QuantizedWeight | None = None
    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    input_scale: Tensor | None = None
    bias: Tensor | None = None
    weight_sample: Tensor | None = None
    is_optional: bool = False

    def check(self, shape: Sequence[int], has_bias: bool) -> None:
        if self.weight is not None:
            self.weight.check(shape)
        scale, zero_point = self.act_scale, self.act_zero_point
        if scale is not None and not (scale.ndim == 1 and scale.numel() > 0 and _usable(scale)):
            raise ValueError(f"static scale {scale!r} is not allowed; give one positive finite number, or one a call")
        if zero_point is not None and (scale is None or zero_point.shape != scale.shape):
            raise ValueError("a static zero point needs a static scale of the same shape; calibrate again")
        scale = self.input_scale
        if scale is not None and not (tuple(scale.shape) == (shape[1],) and _usable(scale)):
            wrong = f"does not fit {shape[1]} input channels, or is not positive and finite"
            raise ValueError(f"input_scale {tuple(scale.shape)} {wrong}; calibrate again")
        if self.bias is not None and (not has_bias or tuple(self.bias.shape) != (shape[0],)):
            wrong = f"does not fit a layer of {shape[0]} outputs {'with' if has_bias else 'without'} bias"
            raise ValueError(f"a calibrated bias {tuple(self.bias.shape)} {wrong}; calibrate this model")


def _usable(scale: Tensor) -> bool:
    return bool((torch.isfinite(scale) & (scale > 0)).all())


NOT_CALIBRATED = CalibratedLayer()
