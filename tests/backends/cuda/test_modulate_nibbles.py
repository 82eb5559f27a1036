"""`modulate` of the backend cuda: what it is for, and that it is `quantize` and `product` in fewer bytes."""

import pytest
import torch

from modiff_kernels.backends import cuda
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.operands import IDENTITY, Prologue
from tests.backends.cuda.emulation import stand_ins
from tests.backends.exact_product import THREE, ExactProduct


def test_what_it_is_for():
    problem = {"capability": (8, 0), "k": 64, "act_bits": 4, "weight_bits": 4, "granularity": "per_sample"}
    for fields, words in (
        ({}, None),
        ({"capability": (8, 9), "granularity": "per_tensor", "prologue": "group_norm"}, None),
        ({"capability": (9, 0)}, "only GPUs from sm_80 to sm_89"),  # s4 is emulated there
        ({"capability": None}, "only GPUs from sm_80 to sm_89"),
        ({"granularity": "per_block"}, "have 8 bits"),
        ({"act_bits": 3}, "must have 4 bits"),
        ({"weight_bits": 8}, "must have 4 bits"),
        ({"k": 48}, "48 input channels: nibbles are read 32 at a time"),
    ):
        reason = cuda.why_not(Problem("modulate", "cuda", **{**problem, **fields}))
        assert reason is None if words is None else words in reason


@pytest.mark.parametrize("prologue", [IDENTITY, Prologue("group_norm", num_groups=8, eps=1e-5, silu=True)], ids=str)
@pytest.mark.parametrize("case", [ExactProduct((2, 3, 64), 65), ExactProduct((2, 32, 5, 7), 24, THREE)], ids=str)
def test_it_is_the_composition(emulators, monkeypatch, case, prologue, poisoned_empty):
    for (module, name), value in stand_ins(emulators("quantize"), emulators("product")).items():
        monkeypatch.setattr(module, name, value)
    case.bits = 4
    codes, weight = case.draw()
    h, x_hat = (codes.float() * factor for factor in (0.1, 0.07))
    y_hat = torch.zeros_like(cuda.product(codes, torch.ones(1), None, weight, None, None, None, case.window,
                                          torch.float32, True))  # fmt: skip
    states = x_hat.clone(), y_hat.clone()
    quantized = cuda.quantize(h, prologue, x_hat, None, 4, "per_sample", 0.9, True)
    out = cuda.product(*quantized[:2], None, weight, y_hat, None, None, case.window, torch.float16, True)
    tail = (None, case.window, torch.float16, 4, "per_sample", 0.9, True)
    found = cuda.modulate(h, prologue, states[0], None, weight, states[1], *tail)
    for got, wanted in zip((*found, *states), (out, *quantized[1:], x_hat, y_hat), strict=True):
        assert torch.equal(got, wanted)
