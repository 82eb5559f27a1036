"""The update of a Linear in one launch: formats and rests that the contract leaves out, NaN, and what it is for."""

import pytest
import torch

from modiff_kernels.backends import triton as backend
from modiff_kernels.ops import dispatch
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.operands import IDENTITY
from modiff_kernels.quant.packing import KPACK_V1
from tests.contract.cases import Case, activation
from tests.contract.test_modulate import Layer, trajectory

OP, PLACES = "modulate", ("triton-interpreted", "triton-gpu")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, 64), (3, -1)])
@pytest.mark.parametrize("act_bits", [8, 3])
def test_formats(place, act_bits, bits, group_size, state_dtype):
    """Rests of a tile in rows, columns and along K."""
    case = Case((2, 33, 130), 70)
    layer = Layer(place, case, bits, group_size, "per_token", state_dtype=state_dtype)
    given = activation(case.x_shape), IDENTITY, layer.x_hat, None, layer.weight.packed, layer.y_hat
    problem = place.problem(OP, *given, bits=act_bits, granularity="per_token")
    assert dispatch.select(problem, "triton").fn is backend.modulate
    layer.run(trajectory(case, 2), act_bits, "per_token")


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # the interpreter, of the code of a NaN
def test_nan_reaches_absmax_and_scale(place):
    """No value is read on the host: NaN is not refused but shows in what later steps are checked by."""
    case = Case((65, 64), 64)
    layer, h = Layer(place, case, granularity="per_token"), activation(case.x_shape)
    h[3, 5] = torch.nan
    for scale, granularity, at in ((None, "per_token", [3]), (torch.ones(1), "per_tensor", [0])):
        given = h, IDENTITY, layer.x_hat.clone(), scale, layer.weight.packed, layer.y_hat.clone()
        _, used, absmax = place.modulate(*given, granularity=granularity)
        assert absmax.isnan().nonzero().flatten().tolist() == at
        assert used.isnan().nonzero().flatten().tolist() == ([] if scale is not None else at)


def test_what_it_is_for():
    sizes = {"m": 64, "n": 128, "k": 320, "weight_bits": 8, "act_bits": 8, "layout": KPACK_V1}
    for fields, words in (
        ({}, None),
        ({"granularity": "per_sample", "scale_given": True}, None),
        ({"granularity": "per_sample"}, "a dynamic scale per_sample needs all rows"),
        ({"granularity": "per_block"}, "a dynamic scale per_block needs all rows"),
        ({"prologue": "layer_norm"}, "needs no prologue"),
        ({"m": 4096, "n": 10240, "k": 1280}, "two launches are estimated to be faster"),
    ):
        problem = {**sizes, "granularity": "per_token", "prologue": "identity", **fields}
        reason = backend.why_not(Problem("modulate", "cpu", **problem))
        assert reason is None if words is None else words in reason
