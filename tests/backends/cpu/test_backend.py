"""The backend cpu through the ops: what it was built with, what it refuses, and its errors."""

import math
import re

import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.backends import cpu
from modiff_kernels.ops import dispatch
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.packing import pack
from tests.backends.cpu.cases import UNAVAILABLE, needs_vnni, pack_vnni, weight_codes

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


def test_build_info():
    info = cpu.build_info()
    assert set(info) == {"sources", "compiler", "oldest_torch"}
    assert re.fullmatch(r"[A-Za-z]+ \d+(\.\d+)+", info["compiler"])
    assert re.fullmatch(r"\d+\.\d+", info["oldest_torch"])


QUANTISING_OPS = {
    "quantize_residual": lambda x, x_hat: (x, x_hat, None, 8, "per_sample"),
    "group_norm_silu_quantize_residual": lambda x, x_hat: (
        x, None, None, None, 4, 1e-5, True, x_hat, None, 8, "per_sample"
    ),
    "layer_norm_quantize_residual": lambda x, x_hat: (x, None, None, 1e-5, x_hat, None, 8, "per_sample"),
    "geglu_quantize_residual": lambda x, x_hat: (x, x_hat[..., :8].contiguous(), None, 8, "per_sample"),
    "quantize_activation": lambda x, x_hat: (x, 8, "per_sample"),
    "group_norm_silu_quantize_activation": lambda x, x_hat: (x, None, None, None, 4, 1e-5, True, 8, "per_sample"),
    "layer_norm_quantize_activation": lambda x, x_hat: (x, None, None, 1e-5, 8, "per_sample"),
    "geglu_quantize_activation": lambda x, x_hat: (x, 8, "per_sample"),
}  # fmt: skip


PRODUCTS = ("accumulate", "initialize", "modulated", "quantized")
REFUSED = {
    "taps": ({"kernel_size": (5, 10)}, r"kernel_size \(5, 10\) has more than 49 taps"),
    "overflow": ({"k": 65537}, "k=65537 products can overflow int32; at most 65536"),
    "group-size": ({"group_size": 32}, "group_size 32: only one weight scale per output channel"),
    "kpack": ({"layout": "kpack_v1"}, "layout kpack_v1 is not vnni_v1"),
    "per-token": ({"granularity": "per_token"}, "per_token scales do not factor out"),
}


class TestBackendErrors:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("op", QUANTISING_OPS)
    def test_nan_and_inf_are_reported_with_the_name_of_the_op(self, op, value, threads):
        for position in (0, 7, -1):
            x, x_hat = torch.randn(1, 35, 16), torch.randn(1, 35, 16)
            x.view(-1)[position] = value
            before = x_hat.clone()
            with pytest.raises(ValueError, match=rf"^{op}: .* holds NaN or Inf"):
                getattr(ops, op)(*QUANTISING_OPS[op](x, x_hat), backend="cpu")
            assert torch.equal(x_hat, before)

    @needs_vnni
    @pytest.mark.parametrize("first_step_bits", [0, 8])
    @pytest.mark.parametrize("op", ["modulated_linear", "initialize_linear"])
    def test_nan_and_inf_are_reported_by_products(self, op, first_step_bits):
        x, x_hat, y_hat = torch.randn(2, 8), torch.zeros(2, 8), torch.zeros(2, 4)
        x[1, 3] = math.nan
        weight = pack_vnni(weight_codes((4, 8, 1, 1)), 1), torch.ones(4)
        arguments = {
            "modulated_linear": (x, x_hat, None, *weight, y_hat, None, 8, "per_tensor", 1.0, 8, -1, cpu.VNNI_V1),
            "initialize_linear": (x, x_hat, y_hat, *weight, None, None, 8, -1, cpu.VNNI_V1, first_step_bits),
        }[op]
        with pytest.raises(ValueError, match=rf"^{op}: .* holds NaN or Inf"):
            getattr(ops, op)(*arguments, backend="cpu")

    @needs_vnni
    @pytest.mark.parametrize("product", PRODUCTS)
    @pytest.mark.parametrize("why", REFUSED)
    def test_a_named_backend_refuses_with_the_reason(self, why, product, fresh_dispatch):
        sizes = {
            "m": 64,
            "n": 16,
            "k": 64 * 9,
            "weight_bits": 8,
            "group_size": -1,
            "granularity": "per_sample",
            "layout": cpu.VNNI_V1,
        }
        conv = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        changes, reason = REFUSED[why]
        common = {
            "op": f"{product}_conv2d",
            "device_type": "cpu",
            "capability": None,
            "dtype": torch.float32,
            "state_dtype": torch.float32,
        }
        assert dispatch.select(Problem(**common, **{**sizes, **conv}), "cpu").backend == "cpu"
        with pytest.raises(ops.BackendUnavailable, match=reason):
            dispatch.select(Problem(**common, **{**sizes, **conv, **changes}), "cpu")

    @needs_vnni
    def test_an_op_refuses_the_portable_layout_before_it_changes_anything(self):
        weight_q = weight_codes((4, 8))
        x, x_hat, y_hat = torch.randn(2, 8), torch.zeros(2, 8), torch.zeros(2, 4)
        with pytest.raises(ops.BackendUnavailable, match="layout kpack_v1 is not vnni_v1; prepare the weight"):
            ops.modulated_linear(
                x, x_hat, None, pack(weight_q, 8), torch.ones(4), y_hat, None, 8, "per_sample", 1.0, 8, -1, "kpack_v1",
                backend="cpu",
            )  # fmt: skip
        assert not x_hat.any()
        assert not y_hat.any()
