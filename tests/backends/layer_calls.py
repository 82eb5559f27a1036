"""Calls of whole layers through the public ops, for the test modules of backends that run on a GPU."""

import torch

from modiff_kernels import ops
from modiff_kernels.quant.affine import quantize_weight
from tests.ops.op_cases import activation

BITS = [(8, -1), (4, -1), (3, -1), (4, 32)]
"""weight_bits, group_size"""


def layer_tensors(case, dtype, bits=8, group_size=-1):
    """x, x_hat, packed weight, weight scale, y_hat on the CPU, and the op's formats."""
    codes, scale = quantize_weight(torch.randn(case.weight_shape) / case.weight_shape[1] ** 0.5, bits, group_size)
    x, x_hat = activation(case.x_shape, dtype), activation(case.x_shape, torch.float16)
    y_hat = activation(case.y_shape, torch.float16, image=case.kind == "conv2d")
    return (x, x_hat, ops.pack_weight(codes, bits), scale, y_hat), (bits, group_size, "kpack_v1", *case.conv_args)


def modulated(case, tensors, formats, device, backend, act_bits=4):
    x, x_hat, packed, scale, y_hat = (t.to(device, copy=True) for t in tensors)
    function = getattr(ops, f"modulated_{case.kind}")
    arguments = (x, x_hat, None, packed, scale, y_hat, None, act_bits, "per_sample", 1.0, *formats)
    return lambda: (*function(*arguments, backend=backend), x_hat, y_hat)


def quantized(case, tensors, formats, device, backend):
    x, packed, scale = (tensors[i].to(device, copy=True) for i in (0, 2, 3))
    function = getattr(ops, f"quantized_{case.kind}")

    def call():
        codes = ops.quantize_activation(x, 8, "per_sample", backend=backend)
        return (function(*codes, packed, scale, None, None, *formats, torch.float16, backend=backend),)

    return call


def assert_agrees(found, expected):
    """Equal but for the order of an addition, in the coarser of the dtype and the state's."""
    for got, wanted in zip(found, expected):
        eps = max(torch.finfo(got.dtype).eps, torch.finfo(torch.float16).eps)
        assert torch.allclose(got.float().cpu(), wanted.float(), rtol=2 * eps, atol=4 * eps)
