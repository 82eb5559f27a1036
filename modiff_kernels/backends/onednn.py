"""Integer products by the oneDNN int8 ops of torch: the portable fall-back where the compiled backend has none.

oneDNN takes uint8 activations, so codes are shifted by 128 with zero point 128; unit scales make its float32 output the
int32 sums, exact up to 2^24 and within one rounding beyond. Every call unpacks weights and packs them for oneDNN."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import packing
from ..quant.operands import Window, summed
from ..quant.packing import KPACK_V1
from . import why_no_sums
from .reference import finish, in_shape_of, per_channel, per_row, quantize

__all__ = ["product", "quantize", "unavailable", "why_not"]

_OPS = ("qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise")
_SHIFT = 128


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why the integer products cannot run here, or None. Tries them at the first call (a few ms)."""
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN (mkldnn)"
    missing = [name for name in _OPS if not hasattr(torch.ops.onednn, name)]
    if missing:
        return f"this torch has no {', '.join(f'onednn::{name}' for name in missing)}"
    try:
        return _inexact()
    except (RuntimeError, TypeError) as error:
        return f"the int8 ops of oneDNN do not run on this CPU: {str(error).splitlines()[0]}"


def _inexact() -> str | None:
    """What comes out wrongly here: the largest sums of a Linear or a padded 3x3 convolution, or a small convolution."""
    saturates = "int8 products saturate on this CPU (no VNNI)"
    window = Window((3, 3), padding=(1, 1))
    weight = torch.full((16, 4608), 127, dtype=torch.int8)
    weight[1::2] = -127
    sign = weight[:, 0].sign().float()
    codes = torch.full((2, 4608), -128, dtype=torch.int8)
    codes[1] = 127
    if not torch.equal(_sums(codes, 0, weight, None), 127 * 4608 * codes[:, :1].float() * sign):
        return saturates
    taps = F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), padding=1)  # taps inside the image, per pixel
    kernel = weight.reshape(16, 512, 3, 3)
    for code in (-128, 127):
        image = torch.full((1, 512, 3, 3), code, dtype=torch.int8).to(memory_format=torch.channels_last)
        if not torch.equal(_sums(image, 0, kernel, window), code * 127 * 512 * taps * sign.reshape(1, -1, 1, 1)):
            return saturates
    # torch 2.13 with AMX: wrong in some of the random convolutions of the tests, and a crash in one.
    image = (torch.arange(255) % 251 - 125).to(torch.int8).reshape(3, 17, 5, 1).to(memory_format=torch.channels_last)
    kernel = (torch.arange(153) - 76).to(torch.int8).reshape(1, 17, 3, 3)
    expected = F.conv2d(image.float(), kernel.float(), stride=(1, 3), padding=(2, 1))
    if not torch.equal(_sums(image, 0, kernel, Window((3, 3), (1, 3), (2, 1))), expected):
        return "int8 convolutions of oneDNN are wrong on this CPU (AMX); ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI mends them"
    return None


def why_not(problem: Any) -> str | None:
    """Why `product` cannot solve `problem`, or None; `quantize` solves all."""
    if problem.op == "quantize":
        return None
    if problem.layout != KPACK_V1:
        return f"layout {problem.layout} is not {KPACK_V1}; prepare the weight with ops.prepare_weight"
    if problem.geglu:
        return "its epilogue has no GEGLU; it is a prologue of what reads the product"
    if problem.window is not None:
        kernel_size, _, padding, dilation, _ = problem.window
        if any(p > (k - 1) * d for k, p, d in zip(kernel_size, padding, dilation)):
            return f"padding {padding} exceeds the window: oneDNN sums windows that lie wholly outside wrongly"
    return why_no_sums(problem)


def _sums(codes: Tensor, zero_point: int, weight: Tensor, window: Window | None) -> Tensor:
    """Sums of (code - zero_point) * weight code as float32 [..., N] or [N, c_out, P, Q]; padding holds zero_point."""
    x = codes.view(torch.uint8) ^ _SHIFT  # code + 128
    zero = _SHIFT + zero_point
    ones, no_zeros = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0], dtype=torch.int32)
    onednn = torch.ops.onednn
    output: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    if window is None:
        rows = x.reshape(-1, x.shape[-1])
        packed = onednn.qlinear_prepack(weight, rows.shape)
        total = onednn.qlinear_pointwise(rows, 1.0, zero, packed, ones, no_zeros, None, *output)
        return total.reshape(*codes.shape[:-1], -1)
    rest = (*map(list, window[1:4]), window.groups)  # stride, padding, dilation
    packed = onednn.qconv_prepack(weight, ones, 1.0, zero, *rest, x.shape)
    return onednn.qconv2d_pointwise(x, 1.0, zero, packed, ones, no_zeros, None, *rest, *output)


@torch.no_grad()
def product(codes, scale, zero_point, weight, y_hat, bias, skip, window, out_dtype, write_out) -> Tensor:
    k = summed(codes.shape[-1 if window is None else 1], window)
    dense = in_shape_of(window, packing.unpack(weight.packed, weight.bits, k)).contiguous()
    if zero_point is None or zero_point.shape[0] == 1:
        total = _sums(codes, 0 if zero_point is None else int(zero_point), dense, window)
    elif window is not None and zero_point.shape[0] == codes.shape[0]:
        samples = zip(codes.split(1), zero_point.tolist())
        total = torch.cat([_sums(sample, zero, dense, window) for sample, zero in samples])
    else:  # rows and single pixels have no padding: the zero point leaves the sum
        total = _sums(codes, 0, dense, window)
        weight_sums = per_channel(dense.flatten(1).sum(1, dtype=torch.float64), window)
        total = (total - per_row(zero_point, total.shape, window) * weight_sums).to(torch.float32)
    values = total * (per_row(scale, total.shape, window) * per_channel(weight.scale, window))
    return finish(values, y_hat, bias, skip, window, out_dtype, write_out)
