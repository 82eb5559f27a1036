"""The integer product in all its forms, emulated under sanitizers and on a GPU, against oracles in int64 and float64
that share no code with it.
"""

import pytest
import torch
import torch.nn.functional as F

from modiff_kernels.backends.cuda import library, products
from modiff_kernels.quant.packing import pack
from tests.backends.product_cases import (
    POINTWISE,
    assert_close,
    by_column,
    by_sample,
    codes_like,
    conv_of,
    float_case,
    integer_sums,
    state_like,
    weight_like,
)
from tests.ops.op_cases import ConvCase, LinearCase

ACCUMULATE, INITIALIZE, OUTPUT = range(3)
LARGE, NARROW, SMALL = range(3)  # csrc/cuda/sm80/tile_config.h kTiles

LINEARS = [
    LinearCase((1, 16), 1),
    LinearCase((2, 3, 48), 65),  # less than a step along K, one above a tile
    LinearCase((65, 64), 64),
    LinearCase((63, 144), 63),
    LinearCase((64, 320), 320),  # SD 1.5, first level
]
CONVS = [
    ConvCase((2, 16, 5, 7), 24),  # four taps in a step along K
    ConvCase((1, 32, 9, 9), 8, stride=(2, 2), padding=(0, 0)),  # diffusers pads by hand before downsampling
    ConvCase((2, 48, 7, 5), 65, stride=(2, 2)),  # a step begins inside of a tap
    ConvCase((1, 16, 7, 9), 12, padding=(2, 2), dilation=(2, 2)),
    ConvCase((2, 64, 4, 4), 65, **POINTWISE),
    ConvCase((1, 16, 8, 8), 8, (1, 1), (2, 2), (0, 0)),
    ConvCase((1, 16, 3, 3), 8, (1, 1), (1, 1), (1, 1)),
    ConvCase((2, 16, 6, 7), 8, (3, 1), padding=(1, 0)),
    ConvCase((1, 32, 8, 8), 7, (5, 5), (2, 1), (2, 2)),
    ConvCase((3, 16, 2, 2), 8, (3, 3), padding=(3, 3)),  # whole windows lie outside
]


class Kernels:
    """`product` with tensors of the CPU, where the kernels run. The tile can be chosen in the emulation alone."""

    def __init__(self, device, emulator=None):
        self.device, self.emulator = device, emulator

    def product(self, codes, scale, packed, weight_scale, *, zero_point=None, bias=None, epilogue=OUTPUT, y_hat=None,
                skip=None, write_out=True, out_dtype=torch.float32, bits=8, conv=None, tile=SMALL, splits=1,
                falling=False):  # fmt: skip
        if self.emulator is not None:
            self.emulator.tile, self.emulator.splits, self.emulator.falling = tile, splits, falling
        elif (tile, splits, falling) != (SMALL, 1, False):
            pytest.skip("a GPU gets the tile that is chosen for it")
        tensors = (codes, scale, zero_point, packed, weight_scale, bias)
        moved = [None if t is None else t.to(self.device) for t in tensors]
        state = None if y_hat is None else y_hat.to(self.device)
        skip = None if skip is None else skip.to(self.device)
        out = products._product(*moved, epilogue, state, skip, write_out, out_dtype, bits, conv)
        if state is not y_hat:
            y_hat.copy_(state)
        return out.cpu()

    def sums(self, case, codes, rows, bits, **more):
        """With scales of 1 the product is the integer sums, exactly as long as they are below 2^24."""
        packed = pack(rows, bits)
        return self.product(
            codes, torch.ones(1), packed, torch.ones(case.n), bits=bits, conv=conv_of(case), **more
        ).double()  # fmt: skip


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request, monkeypatch):
    if request.param == "cuda":
        if (reason := library.unavailable()) is not None:
            pytest.skip(reason)
        return Kernels(torch.device("cuda"))
    emulator = request.getfixturevalue("product_emulator")
    monkeypatch.setattr(library, "product_op", lambda: emulator.product)
    return Kernels(torch.device("cpu"), emulator)


def fits(case, bits):
    """Whether packed rows are whole pieces of 32 codes; `why_not` refuses the others."""
    return bits == 8 or case.weight_shape[1:].numel() % 32 == 0


def operands(case, bits):
    codes = codes_like(case)
    rows, dense = weight_like(case, bits)
    expected = integer_sums(case, codes, dense)
    assert expected.abs().max() < 2**24
    return codes, rows, expected


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("case", LINEARS + CONVS, ids=str)
def test_sums_are_exact(kernels, case, bits):
    if torch.Size(case.weight_shape[1:]).numel() % 32 != 0 and bits != 8:
        pytest.skip("packed rows are whole pieces of 32 codes")
    codes, rows, expected = operands(case, bits)
    y_hat = state_like(case, torch.float32)
    out = kernels.sums(case, codes, rows, bits, epilogue=ACCUMULATE, y_hat=y_hat)
    assert torch.equal(out, expected)
    assert torch.equal(y_hat.double(), expected)
