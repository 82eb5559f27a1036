"""Layers, and oracles that share no code with a backend: numpy for codes, float64 for norms and sums."""

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modiff_kernels.quant.operands import PackedWeight, Prologue, Window
from modiff_kernels.quant.packing import pack

BITS = (3, 4, 8)  # of weights
ACT_BITS = (3, 4, 7, 8)
GRANULARITIES = ("per_tensor", "per_sample", "per_token")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS32 = torch.finfo(torch.float32).eps
MIN_SCALE = 2.0**-100


def memory_format(shape):
    return torch.channels_last if len(shape) == 4 else torch.contiguous_format


def activation(shape, dtype=torch.float32, spread=1.0):
    """Random, in the memory format of the ops; 4-D is an image."""
    return (torch.randn(shape) * spread).to(dtype).contiguous(memory_format=memory_format(shape))


def guarded(values, dtype, margin=131, sentinel=77.0):
    """`values` inside a larger buffer at an odd address, and a function that looks whether all around is as it was."""
    buffer = torch.full((values.numel() + 2 * margin,), sentinel, dtype=dtype)
    inside = buffer[margin : margin + values.numel()]
    n, *rest = values.shape
    tensor = inside.view(n, *rest[1:], rest[0]).movedim(-1, 1) if values.ndim == 4 else inside.view(values.shape)
    tensor.copy_(values)

    def assert_untouched():
        assert (buffer[:margin] == sentinel).all()
        assert (buffer[-margin:] == sentinel).all()

    return tensor, assert_untouched


@dataclass(frozen=True)
class Case:
    """A Linear (window None) or a convolution."""

    x_shape: tuple[int, ...]
    n: int
    window: Window | None = None

    def __str__(self):
        window = "" if self.window is None else "-" + "_".join(map(str, self.window.to_ints()))
        return "x".join(map(str, self.x_shape)) + f"-n{self.n}{window}"

    @property
    def channels(self):
        return self.x_shape[1 if self.window else -1]

    @property
    def weight_shape(self):
        if self.window is None:
            return self.n, self.channels
        return self.n, self.channels // self.window.groups, *self.window.kernel_size

    @property
    def k(self):
        return int(np.prod(self.weight_shape[1:]))

    @property
    def y_shape(self):
        return tuple(self.apply(torch.empty(self.x_shape), torch.empty(self.weight_shape)).shape)

    @property
    def rows(self):
        """Of the input: rows or pixels."""
        return int(np.prod(self.x_shape)) // self.channels

    def apply(self, x, weight, bias=None):
        if self.window is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, *self.window[1:])

    def scales(self, granularity):
        return {"per_tensor": 1, "per_token": self.rows}.get(granularity, self.x_shape[0])

    def over_rows(self, values):
        """Values of consecutive rows or pixels, float64, broadcastable to the input."""
        spread = values.double().repeat_interleave(self.rows // values.numel())
        shape = (*self.x_shape[:1], *self.x_shape[2:], 1) if self.window else (*self.x_shape[:-1], 1)
        return spread.view(shape).movedim(-1, 1) if self.window else spread.view(shape)

    def over_columns(self, values):
        return values.double().view(-1, 1, 1) if self.window else values.double()


def conv(x_shape, n, kernel=3, stride=1, padding=1, dilation=1, groups=1):
    pairs = [(v, v) if isinstance(v, int) else v for v in (kernel, stride, padding, dilation)]
    return Case(x_shape, n, Window(*pairs, groups))


# 1, odd, one below, at and above steps and tiles of 16 and 64; channels that every backend takes, and others.
LINEARS = [Case((1, 1), 1), Case((1, 16), 1), Case((2, 7), 5), Case((2, 3, 63), 65), Case((2, 3, 48), 65)]
LINEARS += [Case((65, 64), 64), Case((63, 160), 63)]
CONVS = [
    conv((1, 1, 1, 1), 1, 1, padding=0),
    conv((1, 3, 8, 8), 5),  # conv_in
    conv((2, 16, 5, 7), 24),  # four taps in a step of 64 along K
    conv((2, 48, 7, 5), 65, stride=2),  # a step begins inside of a tap
    conv((1, 32, 9, 9), 8, stride=2, padding=0),  # diffusers pads by hand before downsampling
    conv((1, 16, 7, 9), 12, padding=2, dilation=2),
    conv((2, 16, 6, 6), 8, groups=2),
    conv((2, 6, 5, 5), 6, groups=6),
    conv((2, 63, 4, 4), 65, 1, padding=0),
    conv((2, 64, 4, 4), 65, 1, padding=0),
    conv((1, 16, 8, 8), 8, 1, stride=2, padding=0),
    conv((1, 16, 3, 3), 8, 1, padding=1),
    conv((2, 16, 6, 7), 8, (3, 1), padding=(1, 0)),
    conv((1, 32, 8, 8), 7, 5, (2, 1), 2),
    conv((3, 16, 2, 2), 8, padding=3),  # whole windows lie outside
]
# Of SD 1.5, SDXL and DDPM, in few rows: sums along K do not depend on them.
LAYERS = [conv((1, 320, 4, 16), 64), conv((1, 128, 16, 16), 128), conv((2, 640, 3, 3), 96)]
LAYERS += [conv((1, 960, 2, 4), 320, 1, padding=0), Case((64, 320), 320), Case((2, 77, 768), 320)]
SMALL = [Case((2, 5, 64), 33), conv((2, 32, 5, 7), 24), conv((2, 64, 4, 4), 65, 1, padding=0)]


def random_conv(seed):
    """A random convolution that has at least one output pixel."""
    choose = random.Random(seed).choice
    while True:
        groups = choose([1, 1, 1, 2, 3])
        c_in, n = (choose([1, 3, 17, 33, 64, 130]) * groups for _ in range(2))
        x_shape = choose([1, 2, 3, 8]), c_in, choose([1, 2, 5, 8, 13]), choose([1, 3, 7, 16, 33])
        kernel, stride = ((choose([1, 2, 3, 3, 4, 5]), choose([1, 2, 3, 3])) for _ in range(2))
        padding, dilation = (choose([0, 1, 2, 4]), choose([0, 1, 2, 5])), (choose([1, 1, 2, 3]), choose([1, 1, 2, 3]))
        case = conv(x_shape, n, kernel, stride, padding, dilation, groups)
        if min(case.window.output_shape(x_shape, n)[2:]) >= 1:
            return case


class Weight(NamedTuple):
    """A random weight in the layout of a place, and what it means, float64."""

    packed: PackedWeight
    dense: Tensor


def weight_of(place, case, bits, group_size=-1, granularity="per_sample", unit=False, codes=None):
    """unit: scales of one, which show the integer sums; codes: random by default. None where it is not solved there."""
    if codes is None:
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), case.weight_shape, dtype=torch.int8)
    rows = (codes.permute(0, 2, 3, 1).reshape(case.n, -1) if case.window else codes).contiguous()
    groups = 1 if group_size == -1 else -(-case.k // group_size)
    scale = torch.ones(case.n, groups) if unit else (torch.rand(case.n, groups) + 0.5) / 2 ** (bits - 1) / case.k**0.5
    spread = scale.double().repeat_interleave(case.k if group_size == -1 else group_size, 1)[:, : case.k]
    dense = rows.double() * spread
    if case.window:
        n, c, r, s = case.weight_shape
        dense = dense.view(n, r, s, c).permute(0, 3, 1, 2)
    scale = scale[:, 0].contiguous() if group_size == -1 else scale
    weight = PackedWeight(pack(rows, bits), scale, bits, group_size)
    like, ones = activation(case.x_shape).to(torch.int8), torch.ones(case.scales(granularity))
    prepared = place.prepared(weight, place.problem("product", like, ones, None, weight, window=case.window))
    return None if prepared is None else Weight(prepared, dense)


def granules(x, granularity):
    """float32 [granules, elements] of `x` in memory order, written without the package's own view."""
    array = x.to(torch.float32).numpy()
    array = np.moveaxis(array, 1, 3) if x.ndim == 4 else array
    count = {"per_tensor": 1, "per_token": array.size // array.shape[-1]}.get(granularity, x.shape[0])
    return np.ascontiguousarray(array).reshape(count, -1)


def like(values, x):
    """What `granules` gave, in the shape of `x`."""
    shape = [x.shape[i] for i in (0, 2, 3, 1)] if x.ndim == 4 else x.shape
    tensor = torch.from_numpy(np.ascontiguousarray(values)).view(*shape)
    return tensor.movedim(-1, 1) if x.ndim == 4 else tensor


def over_granules(values, x):
    """One value per granule, float64, broadcast to the shape of `x`."""
    spread = values.double().numpy().repeat(x.numel() // values.numel())
    return like(spread, x)


def oracle_scale(absmax, bits, clip_ratio=1.0):
    scale = np.float32(clip_ratio) * absmax / np.float32(2 ** (bits - 1) - 0.5)
    return np.maximum(scale, np.float32(MIN_SCALE))


def oracle_codes(values, scale, bits, zero_point=0):
    """Round half to even on value * (1 / scale) in float32, add the zero point, clamp."""
    codes = np.rint(values * (np.float32(1) / scale)[:, None]) + np.reshape(zero_point, (-1, 1))
    return np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int8)


def oracle_blocks(x, x_hat, bits, clip_ratio):
    """per_block in the contract's steps: codes times multipliers, scale [samples], multipliers (as the codes)."""
    channels = x.shape[1 if x.ndim == 4 else -1]
    residual = granules(x, "per_sample") - granules(x_hat, "per_sample")
    residual = residual.reshape(x.shape[0], -1, channels)
    rows = residual.shape[1]
    blocked = bits < 8 and rows >= 16
    reach = np.float32(2 ** (bits - 1) - (13 / 16 if blocked else 0.5))
    most = np.float32(2 ** (8 - bits) if blocked else 1)
    magnitude = np.abs(residual) * np.float32(clip_ratio)
    starts = list(range(0, 16 * (rows // 16), 16)) if blocked else [0]
    absmax = np.empty_like(magnitude)
    for start in starts:
        end = rows if start == starts[-1] else start + 16
        absmax[:, start:end] = magnitude[:, start:end].max(1, keepdims=True)
    scale = np.maximum(magnitude.max((1, 2)) / (reach * most), np.float32(MIN_SCALE))
    multiplier = np.clip(np.ceil(absmax / (reach * scale)[:, None, None]), 1, most)
    inverse = np.float32(1) / (scale[:, None, None] * multiplier)
    codes = np.clip(np.rint(residual * inverse), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * multiplier).reshape(len(scale), -1), scale, multiplier.reshape(len(scale), -1)


class Prologued(NamedTuple):
    """What an op reads, x = prologue(h) in float64, and how far float32 arithmetic may lie from it."""

    h: Tensor
    prologue: Prologue
    x: Tensor
    error: Tensor


def group_norm(shape, groups, dtype=torch.float32, silu=True, shift=True, affine=True, mean=0.5, spread=1.0, eps=1e-5):
    h = (activation(shape, spread=spread) + mean).to(dtype).contiguous(memory_format=memory_format(shape))
    channels = shape[1 if len(shape) == 4 else -1]
    offset = torch.randn(shape[0], channels).to(dtype) if shift else None
    if shift == "one row":
        offset = offset[:1].expand(shape[0], -1)
    elif shift == "columns of more":
        offset = torch.cat([offset, offset], 1)[:, channels:]
    gamma, beta = ((torch.rand(channels) + 0.5).to(dtype), torch.randn(channels).to(dtype)) if affine else (None, None)
    if affine == "by sample":
        gamma, beta = torch.rand(shape[0], 2 * channels).to(dtype).add(0.5).chunk(2, 1)
    first = (lambda t: t) if len(shape) == 4 else (lambda t: t.transpose(1, 2))  # channels second
    shifted = first(h.double())
    if shift:
        shifted = shifted + offset.double().view(*offset.shape, *[1] * (len(shape) - 2))
    grouped = shifted.unflatten(1, (groups, -1)).flatten(2)
    rstd = (grouped.var(2, correction=0, keepdim=True) + eps).rsqrt()
    z = ((grouped - grouped.mean(2, keepdim=True)) * rstd).view(shifted.shape)
    # Terms of this size cancel: h + shift, the mean, and a * h + b of a kernel that folds both into two numbers.
    large = ((grouped.abs() + grouped.mean(2, keepdim=True).abs()) * rstd).view(shifted.shape)
    by_channel = rstd.repeat_interleave(channels // groups, 1).view(shape[0], channels, *[1] * (len(shape) - 2))
    large = large + first(h.double().abs()) * by_channel
    # The sums of a group are in any order: roundings at random.
    error = EPS32 * (4 * large + (16 + grouped.shape[2] ** 0.5) * (1 + z.abs()))
    if affine:
        factor, term = (t.double().reshape(-1, channels, *[1] * (len(shape) - 2)) for t in (gamma, beta))
        error, z = error * factor + 2 * EPS32 * term.abs(), z * factor + term
    if silu:  # its slope stays below 1.1; exp and the reciprocal add 3e-7 of the value each
        error, z = 1.1 * error + 6e-7 * z.abs(), z * z.sigmoid()
    return Prologued(h, Prologue("group_norm", gamma, beta, offset, groups, eps, silu), first(z), first(error))


def layer_norm(shape, dtype=torch.float32, affine=True, mean=0.5, eps=1e-5):
    h = (activation(shape) + mean).to(dtype)
    gamma, beta, exact = None, None, h.double()
    rstd = (exact.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    x = (exact - exact.mean(-1, keepdim=True)) * rstd
    # The mean is rounded to float32, and so is the row; the sums add up sqrt(channels) roundings at random.
    error = EPS32 * (2 * exact.abs() * rstd + (8 + shape[-1] ** 0.5) * (1 + x.abs()))
    if affine:
        gamma, beta = (torch.rand(shape[-1]) + 0.5).to(dtype), torch.randn(shape[-1]).to(dtype)
        error, x = error * gamma.double() + 2 * EPS32 * beta.double().abs(), x * gamma.double() + beta.double()
    return Prologued(h, Prologue("layer_norm", gamma, beta, eps=eps), x, error)


def geglu(shape, dtype=torch.float32, spread=1.0):
    h = activation((*shape[:-1], 2 * shape[-1]), dtype, spread)
    value, gate = h.double().chunk(2, dim=-1)
    x = value * F.gelu(gate)
    # erf is good to 1.5e-7, so gelu to half of |gate| times that, plus a few roundings.
    error = value.abs() * gate.abs() * (0.75e-7 + 4 * EPS32) + EPS32 * x.abs()
    return Prologued(h, Prologue("geglu"), x, error)


def assert_updated(x_hat, before, change):
    """x_hat == before + change, change float64: at most two roundings in float32, then one to the state's dtype."""
    exact, finfo = before.double() + change, torch.finfo(x_hat.dtype)
    allowed = EPS32 * (before.double().abs() + change.abs()) + finfo.eps / 2 * exact.abs() * (1 + 1e-6)
    assert ((x_hat.double() - exact).abs() <= allowed + finfo.smallest_normal * finfo.eps).all()


def assert_close(got, expected, magnitude, extra=0.0):
    """Within the roundings of an epilogue in float32 on terms of `magnitude`, and one to `got`'s dtype."""
    finfo = torch.finfo(got.dtype)
    allowed = (2.5 * EPS32 + extra) * magnitude + finfo.eps / 2 * (1 + 1e-6) * expected.abs()
    excess = ((got.double() - expected).abs() - allowed - finfo.smallest_normal * finfo.eps).max().item()
    assert excess <= 0, f"{excess:.3g} above the bound"  # fails on NaN, too


def assert_invariant(case, x_hat, y_hat, dense, bias, updates):
    """y_hat == A(x_hat) + bias, as well as `updates` roundings to the states' dtype allow."""
    expected = case.apply(x_hat.double(), dense, bias.double())
    spread = case.apply(x_hat.double().square(), dense.square()).clamp_min(0).sqrt()
    rounding = 6 * torch.finfo(y_hat.dtype).eps * (updates + 1) ** 0.5 + 4 * EPS32 * case.k**0.5
    excess = ((y_hat.double() - expected).abs() - rounding * (expected.abs() + spread + 1e-3)).max().item()
    assert excess <= 0, f"y_hat is off by more than rounding ({excess:.3g} above the bound)"
