"""The update of a Linear in one launch, against `quantize` and `product` of the reference."""

import pytest
import torch

from modiff_kernels.backends import reference
from modiff_kernels.backends import triton as backend
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.affine import quantize_weight
from modiff_kernels.quant.operands import IDENTITY, PackedWeight
from modiff_kernels.quant.packing import KPACK_V1, pack


class Update:
    """Operands of an update; a call gets copies of the state."""

    def __init__(self, x_shape, n, dtype=torch.float16, state_dtype=torch.float16, bits=8, group_size=-1):
        codes, scale = quantize_weight(torch.randn(n, x_shape[-1]) / x_shape[-1] ** 0.5, bits, group_size)
        self.weight = PackedWeight(pack(codes, bits), scale, bits, group_size)
        self.h, self.skip = torch.randn(x_shape, dtype=dtype), torch.randn(*x_shape[:-1], n, dtype=dtype)
        self.x_hat = torch.randn(x_shape).to(state_dtype)
        self.y_hat = torch.randn(*x_shape[:-1], n).to(state_dtype)

    def results(self, modulate, device, scale, bits, granularity):
        """out, the scales used, absmax, x_hat, y_hat."""
        h, x_hat, y_hat, skip = (t.to(device, copy=True) for t in (self.h, self.x_hat, self.y_hat, self.skip))
        weight = self.weight._replace(packed=self.weight.packed.to(device), scale=self.weight.scale.to(device))
        scale = None if scale is None else scale.to(device)
        rest = (None, self.h.dtype, bits, granularity, 0.9, True)
        return [t.cpu() for t in (*modulate(h, IDENTITY, x_hat, scale, weight, y_hat, skip, *rest), x_hat, y_hat)]

    def check(self, device, bits):
        *exact, x_hat, y_hat = self.results(backend.modulate, device, None, bits, "per_token")
        out, used, absmax, *states = self.results(composed, "cpu", None, bits, "per_token")
        assert torch.equal(exact[1], used)
        assert torch.equal(exact[2], absmax)
        for got, wanted, through in ((x_hat, states[0], None), (y_hat, states[1], None), (exact[0], out, y_hat)):
            eps = max(torch.finfo(t.dtype).eps for t in (got, through) if t is not None)
            assert got.dtype == wanted.dtype
            assert ((got.float() - wanted.float()).abs() <= 4 * eps * (1 + wanted.float().abs())).all()


def composed(h, prologue, x_hat, scale, weight, y_hat, skip, window, out_dtype, bits, granularity, clip_ratio, write):
    codes, used, absmax = reference.quantize(h, prologue, x_hat, scale, bits, granularity, clip_ratio, True)
    return reference.product(codes, used, None, weight, y_hat, None, skip, window, out_dtype, write), used, absmax


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, 64), (3, -1)])
@pytest.mark.parametrize("act_bits", [8, 3])
def test_formats(device, act_bits, bits, group_size, dtypes, poisoned_empty):
    """Rests of a tile in rows, columns and along K; the contract gives scales."""
    Update((2, 33, 130), 70, *dtypes, bits, group_size).check(device, act_bits)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # the interpreter, of the code of a NaN
def test_nan_reaches_absmax_and_scale(device):
    """No value is read on the host: NaN is not refused but shows in what later steps are checked by."""
    update = Update((65, 64), 64, torch.float32, torch.float32)
    update.h[3, 5] = torch.nan
    _, used, absmax, _, _ = update.results(backend.modulate, device, None, 8, "per_token")
    assert absmax.isnan().nonzero().flatten().tolist() == [3]
    assert used.isnan().nonzero().flatten().tolist() == [3]
    assert update.results(backend.modulate, device, torch.ones(1), 8, "per_tensor")[2].isnan().all()


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
