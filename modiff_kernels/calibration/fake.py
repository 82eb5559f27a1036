"""Differentiable stand-ins of low-bit layers, for methods that learn codes, scales and biases by gradient.

`FakeLayer` computes in float32 what a low-bit layer computes in integers: the same codes, multiplied out. Rounding
passes the gradient on (straight-through); with it the gradient of a scale is that of LSQ (Esser et al., ICLR 2020)::

    Q(x) = s * clamp(rne(x / s) + z, qmin, qmax) - s * z
    dQ/ds = rne(x / s) - x / s  inside the range, qmin - z or qmax - z outside;    dQ/dx = 1 inside, 0 outside"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modiff_kernels.quant.affine import MIN_SCALE, expand_weight_scale, rows_to_weight, weight_rows
from modiff_kernels.quant.calibrated import CalibratedLayer
from modiff_kernels.quant.spec import quant_max, quant_min

ROUNDINGS = ("adaround", "straight_through")
START = 0.2  # how far h(V) starts from the code that it is given: undecided enough to be moved, sure enough to be close
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # AdaRound's gamma and zeta
LEAN = 0.4  # how far a code's position may lean from it towards the weight at the start, below a half


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
