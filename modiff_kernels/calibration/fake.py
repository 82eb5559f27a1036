"""Differentiable stand-ins of low-bit layers, for methods that learn codes, scales and biases by gradient.

`FakeLayer` computes in float32 what a low-bit layer computes in integers: the same codes, multiplied out. Rounding
passes the gradient on (straight-through); with it the gradient of a scale is that of LSQ (Esser et al., ICLR 2020)::

    Q(x) = s * clamp(rne(x / s) + z, qmin, qmax) - s * z
    dQ/ds = rne(x / s) - x / s  inside the range, qmin - z or qmax - z outside;    dQ/dx = 1 inside, 0 outside
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels.calibration.methods import check_choice
from modiff_kernels.calibration.weights import rounding, rounding_logits
from modiff_kernels.quant.affine import MIN_SCALE, expand_weight_scale, rows_to_weight, weight_rows
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight
from modiff_kernels.quant.spec import quant_max, quant_min

ROUNDINGS = ("adaround", "straight_through")
START = 0.2  # how far h(V) starts from the code that it is given: undecided enough to be moved, sure enough to be close
LEAN = 0.4  # how far a code's position may lean from it towards the weight at the start, below a half


def fake_quantize(x: Tensor, scale: Tensor, bits: int, zero_point: Tensor | float = 0.0) -> Tensor:
    """Q(x) of this module; scale and zero_point broadcast to x. Differentiable in x and scale."""
    scale = scale.clamp_min(MIN_SCALE)
    position = x / scale
    rounded = position + (position.round() - position).detach()
    return scale * ((rounded + zero_point).clamp(quant_min(bits), quant_max(bits)) - zero_point)


class FakeLayer(nn.Module):
    """What a low-bit layer with `calibrated` codes and scales computes; the parameters are for an optimiser.

    mode "quantized" quantises the input, "modulated" its change: x_hat = previous + Q(x - previous), with the input
    that was seen last while `remember` was set (there is no previous error). Without act_scale activations are float.

    Parameters (requires_grad False until a method sets it): `variable` [N, K], of the codes; `weight_scale`;
    `act_scale` (may be a table: `call` chooses); `bias`. rounding says what a code is: "adaround": low + h(variable),
    with `low` and low + 1 the given code and its neighbour towards the weight, and a step at 0 instead of h once `hard`
    is set; "straight_through": the integer nearest to `variable`, any of the range.
    """

    def __init__(
        self,
        original: nn.Module,
        calibrated: CalibratedLayer,
        mode: str,
        act_bits: int | None,
        rounding: str = "adaround",
    ) -> None:
        super().__init__()
        check_choice("rounding", rounding, ROUNDINGS)
        self.rounding = rounding
        self.__dict__["original"] = original
        self.known = calibrated
        self.mode = mode
        self.act_bits = act_bits
        self.remember = False
        self.hard = False
        self.call = 0
        self.previous: Tensor | None = None
        weight = calibrated.weight
        if weight is None:
            raise ValueError("FakeLayer: the layer has no codes; give a CalibratedLayer with a weight")
        inputs = calibrated.input_scale
        shape = (1, -1, 1, 1) if original.weight.ndim == 4 else (-1,)
        self.input_scale = None if inputs is None else inputs.view(shape)
        scaled = original.weight.detach().float()
        rows = weight_rows(scaled if self.input_scale is None else scaled / self.input_scale)
        self.weight_scale = _parameter(weight.scale)
        codes = weight.codes.float()
        self.low, self.high = float(quant_min(weight.bits)), float(quant_max(weight.bits))
        distance = rows / self._steps() - codes
        if rounding == "adaround":
            self.low = torch.where(distance > 0, codes, codes - 1).clamp(self.low, self.high - 1)
            self.variable = _parameter(rounding_logits((codes - self.low).clamp(START, 1 - START)))
        else:
            self.variable = _parameter(codes + distance.clamp(-LEAN, LEAN))
        self.act_scale = None if calibrated.act_scale is None else _parameter(calibrated.act_scale)
        bias = original.bias if calibrated.bias is None else calibrated.bias
        self.bias = None if bias is None else _parameter(bias)

    def forward(self, x: Tensor, *unused: Any) -> Tensor:
        """Output for x, in its dtype float32."""
        if self.input_scale is not None:
            x = x * self.input_scale
        if self.act_scale is not None:
            x = self._activation(x)
        weight = rows_to_weight((self.codes() * self._steps()), self.original.weight.shape)
        if isinstance(self.original, nn.Linear):
            return F.linear(x, weight, self.bias)
        conv = self.original
        return F.conv2d(x, weight, self.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def codes(self) -> Tensor:
        """float32 [N, K], differentiable in `variable` unless `hard`."""
        if self.rounding == "straight_through":
            inside = self.variable.clamp(self.low, self.high)
            return inside + (inside.round() - inside).detach()
        if self.hard:
            return self.low + (self.variable >= 0)
        return self.low + rounding(self.variable)

    def result(self) -> CalibratedLayer:
        """What has been learnt, as layers take it."""
        known = self.known
        self.hard = True
        codes = self.codes().detach().round().to(torch.int8)
        weight = QuantizedWeight(codes, self.weight_scale.detach().clone(), known.weight.bits, known.weight.group_size)
        act_scale = None if self.act_scale is None else self.act_scale.detach().clamp_min(MIN_SCALE).clone()
        bias = None if self.bias is None else self.bias.detach().clone()
        return dataclasses.replace(known, weight=weight, act_scale=act_scale, bias=bias)

    def _activation(self, x: Tensor) -> Tensor:
        entry = min(self.call, self.act_scale.numel() - 1)
        scale = self.act_scale[entry]
        if self.mode == "quantized":
            zero_points = self.known.act_zero_point
            return fake_quantize(x, scale, self.act_bits, 0.0 if zero_points is None else zero_points[entry].item())
        if self.remember:
            self.previous = x.detach()
            return x
        if self.previous is None or self.previous.shape != x.shape:
            raise RuntimeError("FakeLayer: no previous input of this shape; call the network with `remember` before")
        return self.previous + fake_quantize(x - self.previous, scale, self.act_bits)

    def _steps(self) -> Tensor:
        return expand_weight_scale(self.weight_scale, self.known.weight.codes.shape[1], self.known.weight.group_size)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().float().clone(), requires_grad=False)


@contextlib.contextmanager
def fake_quantized(
    unet: nn.Module,
    calibrated: Mapping[str, CalibratedLayer],
    mode: str,
    act_bits: int | None,
    rounding: str = "adaround",
) -> Iterator[dict[str, FakeLayer]]:
    """Put a FakeLayer in the place of every layer of `calibrated` and give them by path; the originals come back after.

    mode, act_bits: of a ModiffConfig. rounding: of ROUNDINGS.
    """
    fakes = {
        path: FakeLayer(unet.get_submodule(path), layer, mode, act_bits, rounding) for path, layer in calibrated.items()
    }
    try:
        for path, fake in fakes.items():
            set_module(unet, path, fake)
        yield fakes
    finally:
        for path, fake in fakes.items():
            set_module(unet, path, fake.original)


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module
