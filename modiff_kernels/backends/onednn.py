"""Integer products by the oneDNN int8 ops of torch: the portable fall-back where the compiled backend has none.

Needs nothing compiled, but a CPU whose int8 products do not saturate (`unavailable` tries it once). oneDNN takes uint8
activations, so codes are shifted by 128 with zero point 128; unit scales make its float32 output the int32 sums, exact
up to 2^24 and within one rounding beyond. Weights stay in kpack_v1: every call unpacks them and packs them again for
oneDNN. The quantising ops are those of quant/passes.py.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import affine, packing, passes
from ..quant.packing import KPACK_V1
from . import Kernel

NAME = "onednn"

_OPS = ("qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise")
_SHIFT = 128
_MAX_K = 1 << 16  # 255 * 128 * _MAX_K < 2^31: the sum of shifted codes fits int32


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why the integer products cannot run here, or None. Tries them at the first call (a few ms)."""
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN (mkldnn)"
    missing = [name for name in _OPS if not hasattr(torch.ops.onednn, name)]
    if missing:
        return f"this torch has no {', '.join(f'onednn::{name}' for name in missing)}"
    try:
        exact = _is_exact()
    except (RuntimeError, TypeError) as error:
        return f"the int8 ops of oneDNN do not run on this CPU: {str(error).splitlines()[0]}"
    return None if exact else "int8 products saturate on this CPU (no VNNI)"


def _is_exact() -> bool:
    """Whether the largest sums of a Linear and of a padded 3x3 convolution with K = 4608 come out exactly."""
    conv = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    weight = torch.full((16, 4608), 127, dtype=torch.int8)
    weight[1::2] = -127
    sign = weight[:, 0].sign().float()
    codes = torch.full((2, 4608), -128, dtype=torch.int8)
    codes[1] = 127
    if not torch.equal(_sums(codes, 0, weight, None), 127 * 4608 * codes[:, :1].float() * sign):
        return False
    taps = F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), padding=1)  # taps inside the image, per pixel
    kernel = weight.reshape(16, 512, 3, 3)
    for code in (-128, 127):
        image = torch.full((1, 512, 3, 3), code, dtype=torch.int8).to(memory_format=torch.channels_last)
        if not torch.equal(_sums(image, 0, kernel, conv), code * 127 * 512 * taps * sign.reshape(1, -1, 1, 1)):
            return False
    return True


def preferred_layout(problem: Any) -> str:
    """The portable layout is the only one read here."""
    return KPACK_V1


def prepare_weight(
    weight_packed: Tensor,
    weight_bits: int,
    n: int,
    k: int,
    layout_from: str,
    layout_to: str,
    kernel_size: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The identity on kpack_v1; ValueError for other layouts."""
    for layout in (layout_from, layout_to):
        packing.check_layout("prepare_weight (onednn)", layout)
    return weight_packed


def _sums(codes: Tensor, zero_point: int, weight: Tensor, conv: passes.Conv | None) -> Tensor:
    """Sums of (code - zero_point) * weight code as float32 [..., N] or [N, c_out, P, Q]; padding holds zero_point.

    codes int8 [..., K] or [N, C, H, W]; weight int8 [N, K] or [N, C / groups, r, s].
    """
    x = codes.view(torch.uint8) ^ _SHIFT  # code + 128
    zero = _SHIFT + zero_point
    ones = torch.ones(weight.shape[0])
    no_zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
    onednn = torch.ops.onednn
    output: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    if conv is None:
        rows = x.reshape(-1, x.shape[-1])
        packed = onednn.qlinear_prepack(weight, rows.shape)
        total = onednn.qlinear_pointwise(rows, 1.0, zero, packed, ones, no_zeros, None, *output)
        return total.reshape(*codes.shape[:-1], -1)
    window = (*map(list, conv[1:4]), conv[4])  # stride, padding, dilation, groups
    packed = onednn.qconv_prepack(weight, ones, 1.0, zero, *window, x.shape)
    return onednn.qconv2d_pointwise(x, 1.0, zero, packed, ones, no_zeros, None, *window, *output)


def _weight(weight_packed: Tensor, weight_bits: int, k: int, conv: passes.Conv | None) -> Tensor:
    rows = packing.unpack(weight_packed, weight_bits, k)
    if conv is None:
        return rows
    r, s = conv[0]
    return affine.rows_to_weight(rows, (rows.shape[0], k // (r * s), r, s)).contiguous()


def _product(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_bits: int,
    conv: passes.Conv | None,
) -> Tensor:
    """scale * weight_scale * (sums of codes - zero_point times weight codes), float32."""
    weight = _weight(weight_packed, weight_bits, passes.summed(codes, conv), conv)
    if zero_point is None:
        total = _sums(codes, 0, weight, conv)
    elif zero_point.shape[0] == 1:
        total = _sums(codes, int(zero_point), weight, conv)
    elif conv is not None and zero_point.shape[0] == codes.shape[0]:
        samples = zip(codes.split(1), zero_point.tolist())
        total = torch.cat([_sums(sample, zero, weight, conv) for sample, zero in samples])
    else:  # rows and single pixels have no padding: the zero point leaves the sum
        total = _sums(codes, 0, weight, conv)
        weight_sums = passes.per_channel(weight.flatten(1).sum(1, dtype=torch.float64), conv)
        total = (total - passes.per_row(zero_point, total.shape, conv) * weight_sums).to(torch.float32)
    return total * (passes.per_row(scale, total.shape, conv) * passes.per_channel(weight_scale, conv))


def _accumulate(
    codes: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    y_hat: Tensor,
    skip: Tensor | None,
    weight_bits: int,
    conv: passes.Conv | None,
    out_dtype: torch.dtype,
    write_out: bool,
) -> Tensor:
    delta = _product(codes, scale, None, weight_packed, weight_scale, weight_bits, conv)
    return passes.store(y_hat, y_hat.to(torch.float32) + delta, skip, out_dtype, write_out)


@torch.no_grad()
def accumulate_linear(
    residual_q,
    scale,
    weight_packed,
    weight_scale,
    y_hat,
    skip,
    weight_bits,
    group_size,
    layout,
    out_dtype,
    write_out=True,
):
    return _accumulate(
        residual_q, scale, weight_packed, weight_scale, y_hat, skip, weight_bits, None, out_dtype, write_out
    )


@torch.no_grad()
def accumulate_conv2d(
    residual_q,
    scale,
    weight_packed,
    weight_scale,
    y_hat,
    skip,
    weight_bits,
    group_size,
    layout,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    out_dtype,
    write_out=True,
):
    conv = (kernel_size, stride, padding, dilation, groups)
    return _accumulate(
        residual_q, scale, weight_packed, weight_scale, y_hat, skip, weight_bits, conv, out_dtype, write_out
    )


@torch.no_grad()
def modulated_linear(
    x,
    x_hat,
    scale,
    weight_packed,
    weight_scale,
    y_hat,
    skip,
    act_bits,
    granularity,
    clip_ratio,
    weight_bits,
    group_size,
    layout,
    write_out=True,
):
    codes, used, absmax = passes.residual_codes(
        "modulated_linear", x, x_hat, scale, act_bits, granularity, clip_ratio, image=False
    )
    out = _accumulate(codes, used, weight_packed, weight_scale, y_hat, skip, weight_bits, None, x.dtype, write_out)
    return out, used, absmax


@torch.no_grad()
def modulated_conv2d(
    x,
    x_hat,
    scale,
    weight_packed,
    weight_scale,
    y_hat,
    skip,
    act_bits,
    granularity,
    clip_ratio,
    weight_bits,
    group_size,
    layout,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    write_out=True,
):
    codes, used, absmax = passes.residual_codes(
        "modulated_conv2d", x, x_hat, scale, act_bits, granularity, clip_ratio, image=True
    )
    conv = (kernel_size, stride, padding, dilation, groups)
    out = _accumulate(codes, used, weight_packed, weight_scale, y_hat, skip, weight_bits, conv, x.dtype, write_out)
    return out, used, absmax


def _initialize(
    op: str,
    x: Tensor,
    x_hat: Tensor,
    y_hat: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    first_step_bits: int,
    write_out: bool,
    conv: passes.Conv | None,
) -> Tensor:
    passes.require_finite(op, x)
    passes.require_fit(op, x, x_hat.dtype)
    if first_step_bits:
        x_hat.zero_()
        codes, scale, _ = passes.residual_codes(
            op, x, x_hat, None, first_step_bits, "per_sample", 1.0, image=conv is not None
        )
        values = _product(codes, scale, None, weight_packed, weight_scale, weight_bits, conv)
    else:
        x_hat.copy_(x)
        weight = _weight(weight_packed, weight_bits, passes.summed(x, conv), conv).to(torch.float32)
        state = x_hat.to(torch.float32)
        if conv is None:
            values = F.linear(state, weight)
        else:
            _, stride, padding, dilation, groups = conv
            values = F.conv2d(state, weight, None, tuple(stride), tuple(padding), tuple(dilation), groups)
        values = values * passes.per_channel(weight_scale, conv)
    if bias is not None:
        values = values + passes.per_channel(bias.to(torch.float32), conv)
    return passes.store(y_hat, values, skip, x.dtype, write_out)


@torch.no_grad()
def initialize_linear(
    x,
    x_hat,
    y_hat,
    weight_packed,
    weight_scale,
    bias,
    skip,
    weight_bits,
    group_size,
    layout,
    first_step_bits=0,
    write_out=True,
):
    return _initialize(
        "initialize_linear", x, x_hat, y_hat, weight_packed, weight_scale, bias, skip, weight_bits, first_step_bits,
        write_out, None,
    )  # fmt: skip


@torch.no_grad()
def initialize_conv2d(
    x,
    x_hat,
    y_hat,
    weight_packed,
    weight_scale,
    bias,
    skip,
    weight_bits,
    group_size,
    layout,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    first_step_bits=0,
    write_out=True,
):
    conv = (kernel_size, stride, padding, dilation, groups)
    return _initialize(
        "initialize_conv2d", x, x_hat, y_hat, weight_packed, weight_scale, bias, skip, weight_bits, first_step_bits,
        write_out, conv,
    )  # fmt: skip


def _quantized(
    x_q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    weight_bits: int,
    conv: passes.Conv | None,
    out_dtype: torch.dtype,
) -> Tensor:
    values = _product(x_q, scale, zero_point, weight_packed, weight_scale, weight_bits, conv)
    if bias is not None:
        values = values + passes.per_channel(bias.to(torch.float32), conv)
    memory_format = torch.contiguous_format if conv is None else torch.channels_last
    out = torch.empty(values.shape, dtype=out_dtype, memory_format=memory_format)
    return out.copy_(passes.rounded_out(values, skip, out_dtype))


@torch.no_grad()
def quantized_linear(
    x_q, scale, zero_point, weight_packed, weight_scale, bias, skip, weight_bits, group_size, layout, out_dtype
):
    return _quantized(x_q, scale, zero_point, weight_packed, weight_scale, bias, skip, weight_bits, None, out_dtype)


@torch.no_grad()
def quantized_conv2d(
    x_q,
    scale,
    zero_point,
    weight_packed,
    weight_scale,
    bias,
    skip,
    weight_bits,
    group_size,
    layout,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    out_dtype,
):
    conv = (kernel_size, stride, padding, dilation, groups)
    return _quantized(x_q, scale, zero_point, weight_packed, weight_scale, bias, skip, weight_bits, conv, out_dtype)


def _quantize_why_not(problem: Any) -> str | None:
    return None


def _product_why_not(problem: Any) -> str | None:
    if problem.layout != KPACK_V1:
        return f"layout {problem.layout} is not {KPACK_V1}; prepare the weight with ops.prepare_weight"
    if problem.group_size != -1:
        return f"group_size {problem.group_size}: only one weight scale per output channel"
    if problem.k > _MAX_K:
        return f"K = {problem.k}: int32 sums may overflow above {_MAX_K}"
    if problem.kernel_size is not None and problem.granularity == "per_token":
        pointwise = problem.kernel_size == (1, 1) and problem.stride == (1, 1) and problem.padding == (0, 0)
        if not pointwise:
            return "per_token scales do not factor out of a convolution larger than 1x1, stride 1"
    return None


_PRODUCT_OPS: tuple[Callable[..., Any], ...] = (
    accumulate_linear,
    accumulate_conv2d,
    initialize_linear,
    initialize_conv2d,
    modulated_linear,
    modulated_conv2d,
    quantized_linear,
    quantized_conv2d,
)
KERNELS: dict[str, Kernel] = {
    **{fn.__name__: Kernel(fn, _quantize_why_not) for fn in passes.QUANTIZING_OPS},
    **{fn.__name__: Kernel(fn, _product_why_not) for fn in _PRODUCT_OPS},
}
