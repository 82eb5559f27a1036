"""kpack_v1: exact round trip, the bit layout itself, and refusal of what does not fit."""

import weakref

import pytest
import torch

from modiff_kernels.quant.operands import PackedWeight, weight_sums
from modiff_kernels.quant.packing import pack, packed_dtype, packed_width, unpack, unpack_weight

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BITS = (3, 4, 8)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1152])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("bits", BITS)
def test_round_trip(bits, n, k):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), dtype=torch.int8)
    packed = pack(codes, bits)
    assert (packed.dtype, packed.shape) == (packed_dtype(bits), (n, packed_width(bits, k)))
    assert packed.is_contiguous()
    assert packed.data_ptr() != codes.data_ptr()
    again = unpack(packed, bits, k)
    assert again.dtype == torch.int8
    assert again.is_contiguous()
    assert torch.equal(again, codes)


def test_known_bytes():
    codes = torch.tensor([[-4, 3, 0, -1, 2]], dtype=torch.int8)  # code + 4: 0, 7, 4, 3, 6
    assert pack(codes, 3).tolist() == [[0b11001100, 0b00000010, 0b11110110]]
    assert pack(codes, 4).tolist() == [[0x3C, 0xF0, 0x02]]
    assert pack(codes, 8).tolist() == codes.tolist()


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        *[(pack, (torch.zeros(6, 10, dtype=torch.int8), bits), f"weight_bits={bits} ") for bits in (0, 5, True)],
        (pack, (torch.zeros(6, 10), 4), r"weight_q is torch\.float32 \(6, 10\); expected int8 \[N, K\]"),
        (pack, (torch.zeros(6, 2, 5, dtype=torch.int8), 4), r"expected int8 \[N, K\]"),
        (pack, (torch.full((1, 2), 8, dtype=torch.int8), 4), "codes from 8 to 8, but 4 bits hold -8 to 7"),
        (
            unpack_weight,
            (torch.zeros(6, 5, dtype=torch.uint8), 4, 6, 13),
            r"k=13 needs a contiguous torch\.uint8 \(6, 7\)",
        ),
        (unpack_weight, (torch.zeros(6, 5, dtype=torch.uint8), 2, 6, 10), "weight_bits=2 "),
    ],
)
def test_what_does_not_fit_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=f"(un)?pack_weight: .*{message}"):
        function(*arguments)


def test_sums_live_as_long_as_the_weight():
    """And are made again when it was written to; tests/contract has the products that need them."""
    weight = PackedWeight(torch.ones(3, 8, dtype=torch.int8), torch.ones(3), 8)
    sums = weight_sums(weight, 8, 1)
    assert weight_sums(weight, 8, 1) is sums
    weight.packed[1] = 2
    assert weight_sums(weight, 8, 1).tolist() == [[8], [16], [8]]
    held = weakref.ref(weight_sums(weight, 8, 1))
    assert held() is not None
    del weight
    assert held() is None
