"""Layers for the ops that quantise and multiply, and their comparison with the reference backend, for the test modules
of backends.
"""

import torch

from modiff_kernels.quant.affine import quantize_weight
from modiff_kernels.quant.packing import KPACK_V1, pack
from tests.ops.op_cases import activation


class Layer:
    """Weight, input and state of a layer; every call gets copies of the state, on the device it asks for."""

    def __init__(self, case, dtype, state_dtype, bits=8, group_size=-1):
        self.case, self.bits, self.group_size = case, bits, group_size
        weight = torch.randn(case.weight_shape) / case.weight_shape[1] ** 0.5
        codes, self.weight_scale = quantize_weight(weight, bits, group_size)
        self.packed = pack(codes, bits)
        self.bias = torch.randn(case.n)
        self.x = activation(case.x_shape, dtype)
        self.x_hat = activation(case.x_shape, state_dtype)
        self.y_hat = activation(case.y_shape, state_dtype, image=case.kind == "conv2d")
        self.skip = activation(case.y_shape, dtype, image=case.kind == "conv2d")

    @property
    def format(self):
        return self.bits, self.group_size, KPACK_V1, *self.case.conv_args

    def modulated(self, function, device, scale, act_bits, granularity, write_out=True):
        x_hat, y_hat = self.x_hat.to(device, copy=True), self.y_hat.to(device, copy=True)
        tensors = (self.packed.to(device), self.weight_scale.to(device), y_hat, self.skip.to(device))
        given = None if scale is None else scale.to(device)
        result = function(
            self.x.to(device), x_hat, given, *tensors, act_bits, granularity, 0.9, *self.format, write_out
        )
        return [t.cpu() for t in (*result, x_hat, y_hat)]

    def initialize(self, function, device, first_step_bits, write_out=True):
        x_hat = torch.full_like(self.x_hat, torch.nan).to(device)
        y_hat = torch.full_like(self.y_hat, torch.nan).to(device)
        tensors = (self.packed.to(device), self.weight_scale.to(device), self.bias.to(device), self.skip.to(device))
        out = function(self.x.to(device), x_hat, y_hat, *tensors, *self.format, first_step_bits, write_out)
        return [t.cpu() for t in (out, x_hat, y_hat)]


def assert_same(got, expected, roundings=2, through=None):
    """Equal but for `roundings` (the order of an addition, a fused multiplication) in the coarser of got's dtype and
    the dtype `through` which it came.
    """
    eps = max(torch.finfo(got.dtype).eps, 0.0 if through is None else torch.finfo(through).eps)
    assert got.dtype == expected.dtype
    assert got.stride() == expected.stride()
    allowed = roundings * eps * (1 + expected.float().abs())
    assert ((got.float() - expected.float()).abs() <= allowed).all()


def assert_modulated(got, expected):
    out, used, absmax, x_hat, y_hat = got
    assert torch.equal(used, expected[1])
    assert torch.equal(absmax, expected[2])
    assert_same(x_hat, expected[3])
    assert_same(y_hat, expected[4], roundings=4)
    assert_same(out, expected[0], roundings=4, through=y_hat.dtype)
