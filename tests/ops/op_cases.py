"""Shapes, weights and the independent oracle (numpy, explicit rounding) that the tests of the ops share."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modiff_kernels import ops
from modiff_kernels.quant.affine import dequantize_weight, quantize_weight

BITS = (3, 4, 8)
GRANULARITIES = ("per_tensor", "per_sample", "per_token")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

IMAGE_SHAPES = [(1, 1, 1, 1), (2, 7, 3, 5), (1, 63, 4, 4), (2, 64, 8, 8), (3, 65, 5, 1), (2, 1, 4, 4), (2, 128, 16, 16)]
ROW_SHAPES = [(1, 1), (2, 7), (3, 5, 63), (2, 64), (65, 65), (2, 64, 320)]
QUANTIZE_SHAPES = IMAGE_SHAPES + ROW_SHAPES


@dataclass(frozen=True)
class LinearCase:
    x_shape: tuple[int, ...]
    n: int

    kind = "linear"

    def __str__(self):
        return "x".join(map(str, self.x_shape)) + f"-n{self.n}"

    @property
    def weight_shape(self):
        return (self.n, self.x_shape[-1])

    @property
    def y_shape(self):
        return (*self.x_shape[:-1], self.n)

    conv_args = ()

    def apply(self, x, weight, bias=None):
        return F.linear(x, weight, bias)


@dataclass(frozen=True)
class ConvCase:
    x_shape: tuple[int, int, int, int]
    n: int
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    kind = "conv2d"

    def __str__(self):
        sizes = "".join(
            f"-{name}{a}x{b}"
            for name, (a, b) in zip("kspd", (self.kernel_size, self.stride, self.padding, self.dilation), strict=True)
        )
        return "x".join(map(str, self.x_shape)) + f"-n{self.n}{sizes}-g{self.groups}"

    @property
    def weight_shape(self):
        return (self.n, self.x_shape[1] // self.groups, *self.kernel_size)

    @property
    def y_shape(self):
        return tuple(self.apply(torch.empty(self.x_shape), torch.empty(self.weight_shape)).shape)

    @property
    def conv_args(self):
        return self.kernel_size, self.stride, self.padding, self.dilation, self.groups

    @property
    def one_pixel(self):
        return (self.kernel_size, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))

    def apply(self, x, weight, bias=None):
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


LINEAR_CASES = [
    LinearCase((1, 1), 1),
    LinearCase((2, 7), 5),
    LinearCase((63, 64), 65),
    LinearCase((2, 5, 64), 63),
    LinearCase((3, 65), 64),
    LinearCase((2, 16, 320), 320),
]
CONV_CASES = [
    ConvCase((1, 1, 1, 1), 1, (1, 1), padding=(0, 0)),
    ConvCase((2, 16, 8, 8), 24),
    ConvCase((2, 7, 9, 7), 5, stride=(2, 2)),
    ConvCase((1, 8, 7, 9), 12, padding=(2, 2), dilation=(2, 2)),
    ConvCase((2, 8, 6, 6), 8, groups=4),
    ConvCase((2, 6, 5, 5), 6, groups=6),
    ConvCase((2, 63, 4, 4), 65, (1, 1), padding=(0, 0)),
    ConvCase((1, 8, 8, 8), 8, (1, 1), stride=(2, 2), padding=(0, 0)),
    ConvCase((2, 8, 6, 7), 8, (3, 1), padding=(1, 0)),
    ConvCase((1, 5, 8, 8), 7, (5, 5), padding=(2, 2), stride=(2, 1)),
    ConvCase((1, 128, 8, 8), 128),
]
CASES = LINEAR_CASES + CONV_CASES
SMALL_CASES = [
    LinearCase((2, 5, 64), 63),
    ConvCase((2, 16, 8, 8), 24),
    ConvCase((2, 63, 4, 4), 65, (1, 1), padding=(0, 0)),
]


def is_image(shape):
    return len(shape) == 4


def memory_format_of(image):
    return torch.channels_last if image else torch.contiguous_format


def activation(shape, dtype=torch.float32, image=None, spread=1.0):
    """Random activation in the memory format of the ops; 4-D is an image unless `image` says otherwise."""
    image = is_image(shape) if image is None else image
    return (torch.randn(shape) * spread).to(dtype).to(memory_format=memory_format_of(image))


def poisoned(shape, dtype, image):
    """State that was never written: NaN."""
    return torch.full(shape, torch.nan, dtype=dtype).to(memory_format=memory_format_of(image))


def run(op, *args, backend):
    """Call `ops.<op>`; skip where `backend` says that it cannot do this problem. The reference can do everything."""
    try:
        return getattr(ops, op)(*args, backend=backend)
    except ops.BackendUnavailable as error:
        if backend == "reference":
            raise
        pytest.skip(str(error))


@dataclass
class Weight:
    """A quantised weight: what the ops take, and `dense`, what it means, float64."""

    bits: int
    group_size: int
    layout: str
    packed: torch.Tensor
    scale: torch.Tensor
    codes: torch.Tensor
    dense: torch.Tensor

    @property
    def tensors(self):
        return self.packed, self.scale

    @property
    def format(self):
        return self.bits, self.group_size, self.layout


def make_weight(case, bits, group_size, backend, op, **formats):
    """A random weight for `case` in the layout that `backend` wants for `op` ("modulated", ...)."""
    n, k = case.n, int(np.prod(case.weight_shape[1:]))
    dense = torch.randn(case.weight_shape) / k**0.5
    codes, scale = quantize_weight(dense, bits, group_size)
    names = ("kernel_size", "stride", "padding", "dilation", "groups")
    conv = dict(zip(names, case.conv_args, strict=False))
    sizes = {"n": n, "k": k, "weight_bits": bits, "group_size": group_size, "m": int(np.prod(case.y_shape)) // n}
    try:
        layout = ops.preferred_layout(f"{op}_{case.kind}", "cpu", **sizes, **conv, **formats, backend=backend)
    except ops.BackendUnavailable as error:
        if backend == "reference":
            raise
        pytest.skip(str(error))
    window = {"kernel_size": case.kernel_size, "groups": case.groups} if conv else {}
    packed = ops.prepare_weight(ops.pack_weight(codes, bits), bits, n, k, layout_to=layout, **window, backend=backend)
    meaning = dequantize_weight(codes, scale, group_size, case.weight_shape).double()
    return Weight(bits, group_size, layout, packed, scale, codes, meaning)


def granules(x, granularity, image):
    """numpy float32 [granules, elements] of `x` in memory order, written without the package's own view."""
    array = x.float().numpy()
    if image:
        array = np.moveaxis(array, 1, 3)
    count = {"per_tensor": 1, "per_sample": x.shape[0], "per_token": array.size // array.shape[-1]}[granularity]
    return np.ascontiguousarray(array).reshape(count, -1)


def oracle_scale(absmax, bits, clip_ratio=1.0):
    scale = np.float32(clip_ratio) * absmax / np.float32(2 ** (bits - 1) - 0.5)
    return np.maximum(scale, np.float32(2.0**-100))


def oracle_codes(values, scale, bits, zero_point=None):
    """Round half to even on value * inv_scale in float32, add the zero point, clamp."""
    inv_scale = (np.float32(1) / scale)[:, None]
    codes = np.rint(values * inv_scale)
    if zero_point is not None:
        codes = codes + zero_point[:, None]
    return np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int8)


def assert_codes_equal(codes, expected, granularity, image):
    """Bit-exact, with the first difference in the message."""
    got = granules(codes, granularity, image)
    wrong = np.argwhere(got != expected)
    assert len(wrong) == 0, (
        f"{len(wrong)} of {expected.size} codes differ, the first at granule {wrong[0][0]}, element {wrong[0][1]}: "
        f"{got[tuple(wrong[0])]} instead of {expected[tuple(wrong[0])]}"
    )


def per_row(values, shape, image):
    """1-D values over consecutive rows, broadcast to a tensor of `shape`."""
    rows = int(np.prod(shape)) // (shape[1] if image else shape[-1])
    spread = values.repeat_interleave(rows // values.numel())
    return spread.view(shape[0], 1, *shape[2:]) if image else spread.view(*shape[:-1], 1)


def assert_invariant(case, x_hat, y_hat, weight, bias, steps):
    """y_hat == A(x_hat) + bias, as well as `steps` roundings to the state dtype allow."""
    assert torch.isfinite(y_hat).all()
    expected = case.apply(x_hat.double(), weight.dense, None if bias is None else bias.double())
    spread = case.apply(x_hat.double().square(), weight.dense.square()).clamp_min(0).sqrt()
    state_rounding = torch.finfo(y_hat.dtype).eps * (steps + 1) ** 0.5
    float32_sum = torch.finfo(torch.float32).eps * weight.dense[0].numel() ** 0.5  # of the first call
    allowed = (6 * state_rounding + 4 * float32_sum) * (expected.abs() + spread + 1e-3)
    excess = ((y_hat.double() - expected).abs() - allowed).max().item()
    assert excess <= 0, f"y_hat is off by more than rounding ({excess:.3g} above the bound)"
