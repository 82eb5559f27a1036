"""Operands of products and oracles in int64 and float64 that share no code with any kernel, for the test modules of
backends.
"""

import torch

from modiff_kernels.quant.packing import pack
from tests.ops.op_cases import ConvCase, LinearCase

POINTWISE = {"kernel_size": (1, 1), "padding": (0, 0)}

LINEARS = [
    LinearCase((1, 1), 1),
    LinearCase((2, 3, 63), 65),  # one below a step of 64, one above a tile
    LinearCase((65, 64), 64),
    LinearCase((63, 129), 63),
    LinearCase((64, 320), 320),  # SD 1.5, first level
]
CONVS = [
    ConvCase((2, 16, 5, 7), 24),
    ConvCase((1, 3, 8, 8), 5),  # conv_in
    ConvCase((2, 40, 7, 5), 65, stride=(2, 2)),
    ConvCase((1, 32, 9, 9), 8, stride=(2, 2), padding=(0, 0)),  # diffusers pads by hand before downsampling
    ConvCase((1, 8, 7, 9), 12, padding=(2, 2), dilation=(2, 2)),
    ConvCase((2, 16, 6, 6), 8, groups=2),
    ConvCase((2, 6, 5, 5), 6, groups=6),
    ConvCase((2, 63, 4, 4), 65, **POINTWISE),
    ConvCase((1, 8, 8, 8), 8, (1, 1), (2, 2), (0, 0)),
    ConvCase((1, 8, 3, 3), 8, (1, 1), (1, 1), (1, 1)),
    ConvCase((2, 8, 6, 7), 8, (3, 1), padding=(1, 0)),
    ConvCase((1, 5, 8, 8), 7, (5, 5), (2, 1), (2, 2)),
    ConvCase((1, 64, 8, 8), 128),
]


def codes_like(case, bits=8):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), case.x_shape, dtype=torch.int8)
    return codes.to(memory_format=torch.channels_last) if case.kind == "conv2d" else codes


def weight_like(case, bits):
    """Codes [N, K] in (r, s, c) order, and int64 in the shape of the operator."""
    dense = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), case.weight_shape, dtype=torch.int8)
    rows = dense.permute(0, 2, 3, 1).reshape(case.n, -1) if case.kind == "conv2d" else dense
    return rows.contiguous(), dense.long()


def conv_of(case):
    return case.conv_args or None


def integer_sums(case, codes, dense):
    """Exact sums in float64 (below 2^53) of int64 codes and weights."""
    return case.apply(codes.double(), dense.double())


def state_like(case, dtype, value=0.0):
    memory_format = torch.channels_last if case.kind == "conv2d" else torch.contiguous_format
    return torch.full(case.y_shape, value, dtype=dtype).to(memory_format=memory_format)


def by_column(values, case):
    return values.view(1, -1, 1, 1) if case.kind == "conv2d" else values


def by_sample(values, case):
    return values.view(-1, *[1] * (len(case.y_shape) - 1))


def float_case(case, bits, group_size=-1, samples=None):
    """Random operands with a scale per sample; `dense` is the dequantised weight, float64."""
    codes = codes_like(case)
    rows, _ = weight_like(case, bits)
    k = rows.shape[1]
    groups = 1 if group_size == -1 else -(-k // group_size)
    weight_scale = torch.rand(case.n, groups) + 0.5
    spread = weight_scale.double().repeat_interleave(k if group_size == -1 else group_size, dim=1)[:, :k]
    dense = rows.double() * spread
    if case.kind == "conv2d":
        n, c, r, s = case.weight_shape
        dense = dense.view(n, r, s, c).permute(0, 3, 1, 2)
    scale = torch.rand(samples or case.x_shape[0]) + 0.5
    return codes, scale, pack(rows, bits), (weight_scale[:, 0].clone() if group_size == -1 else weight_scale), dense


def assert_close(got, expected, magnitude, extra=0.0):
    """Within the roundings of the epilogue (four in float32) and of `got`'s dtype."""
    eps = torch.finfo(got.dtype).eps
    allowed = (4 * torch.finfo(torch.float32).eps + extra) * magnitude + eps * expected.abs() + 1e-30
    excess = ((got.double() - expected).abs() - allowed).max().item()
    assert excess <= 0, f"{excess:.3g} above the bound"


FLOAT_CASES = [LinearCase((3, 5, 64), 33), ConvCase((2, 16, 5, 7), 24), ConvCase((2, 24, 5, 5), 20, stride=(2, 2))]
