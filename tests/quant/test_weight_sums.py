"""The sums of a weight's codes: right for every width, kept with the weight, made again when it changes."""

import pytest
import torch

from modiff_kernels.quant import weight_sums as module
from modiff_kernels.quant.operands import PackedWeight
from modiff_kernels.quant.packing import pack
from modiff_kernels.quant.weight_sums import weight_sums


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_sums_of_taps_and_groups(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 72), dtype=torch.int8)
    weight = PackedWeight(pack(codes, bits), torch.ones(5), bits)
    for taps in (1, 9):
        assert torch.equal(weight_sums(weight, 72, taps), codes.view(5, taps, -1).sum(-1).int())
    grouped = weight._replace(scale=torch.tensor([0.5, 2.0]).repeat(5, 1), group_size=40)
    halves = codes[:, :40].sum(1) * 0.5 + codes[:, 40:].sum(1) * 2.0
    assert torch.equal(weight_sums(grouped, 72, 1), halves[:, None])


def test_sums_live_as_long_as_the_weight(monkeypatch):
    before = len(module._kept)
    weight = PackedWeight(torch.ones(3, 8, dtype=torch.int8), torch.ones(3), 8)
    sums = weight_sums(weight, 8, 1)
    assert weight_sums(weight, 8, 1) is sums
    weight.packed[1] = 2
    assert weight_sums(weight, 8, 1).flatten().tolist() == [8, 16, 8]
    assert len(module._kept) == before + 1
    del weight
    assert len(module._kept) == before
    with torch.inference_mode():
        weight_sums(PackedWeight(torch.ones(3, 8, dtype=torch.int8), torch.ones(3), 8), 8, 1)
