"""What the tests of the CPU kernels share: instruction sets of this machine, shapes, weights, and exact comparison."""

import itertools

import pytest
import torch

from modiff_kernels.backends import cpu

UNAVAILABLE = cpu.unavailable()

BEST_ISA = 0 if UNAVAILABLE else torch.ops.modiff_cpu.isa()
HAS_VNNI = BEST_ISA >= 3
needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="the integer products need AVX-512 VNNI")
ISAS = {name: isa for isa, name in enumerate(("plain", "avx2", "avx512")) if isa <= BEST_ISA}

GRANULARITIES = ("per_tensor", "per_sample", "per_token")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
CHANNELS = (1, 3, 63, 64, 65, 1030)
SAMPLES = (1, 2, 3, 8)
THREAD_SHAPES = [*itertools.product(SAMPLES, (1, 35), (65,)), *itertools.product(SAMPLES, (35,), (1030,))]
SHAPES = [
    *itertools.product(SAMPLES, (1, 5, 35), CHANNELS[:-1]),
    (1, 35, 1030),
    (2, 1, 1030),
    (3, 5, 1030),
    (8, 1, 1030),
]
EPS32 = torch.finfo(torch.float32).eps
IDENTITY, GROUP_NORM, LAYER_NORM, GEGLU = range(4)
ACCUMULATE, INITIALIZE, OUTPUT = range(3)
SMALLEST_SCALE = 2.0**-100


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def equal(got, expected, name, where):
    """Bit-exact; `where` tells the shape and the instruction set."""
    assert got.dtype == expected.dtype, (name, where)
    assert torch.equal(got, expected), (name, where, (got != expected).sum().item())


def weight_codes(shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def pack_vnni(weight_q, groups):
    return torch.ops.modiff_cpu.pack_vnni(weight_q.permute(0, 2, 3, 1).contiguous(), groups)
