"""Compiled CPU kernels (csrc/cpu): fused quantisation passes and integer convolutions on AVX-512 VNNI.

The library holds raw kernels in the private namespace `modiff_cpu`; this file gives them the shape of the ops. The
quantising passes run on any CPU (AVX-512, AVX2 or plain, chosen at run time); the integer products need AVX-512 VNNI.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.packing import KPACK_V1, pack, unpack
from ..quant.passes import all_finite
from . import Kernel, library_build_info

NAME = "cpu"
VNNI_V1 = "vnni_v1"

_PLAIN, _AVX2, _AVX512, _AVX512_VNNI = range(4)
_ISA_NAMES = ("plain", "AVX2", "AVX-512", "AVX-512 VNNI")
_GRANULARITY = {"per_tensor": 0, "per_sample": 1, "per_token": 2, "per_block": 3}
_IDENTITY, _GROUP_NORM, _LAYER_NORM, _GEGLU = range(4)
_ACCUMULATE, _INITIALIZE, _OUTPUT = range(3)
_AUTO_ISA = -1
_MAX_TAPS = 49
_MAX_KEYS = 2048  # csrc/cpu/attention.h kAttentionKeys
_MAX_K = 65536  # 255 * 128 * k, the largest sum of unsigned codes times weights, stays within int32


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why these kernels cannot run here, or None. The library is loaded at the first call."""
    library = Path(__file__).resolve().parent.parent / "_lib" / "libmodiff_cpu.so"
    if not library.exists():
        return f"{library.name} was not built (installed with MODIFF_SKIP_BUILD=1, or without a C++ compiler)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"modiff_cpu::{name}", fake)
    return None


@lru_cache(maxsize=1)
def isa() -> str:
    """The instruction set that the kernels use on this machine."""
    return _ISA_NAMES[torch.ops.modiff_cpu.isa()]


def build_info() -> dict[str, str] | str:
    """What the library was built with, or why that is not known."""
    return unavailable() or library_build_info("modiff_cpu")


def preferred_layout(problem: Any) -> str:
    """The weight layout that the integer products read."""
    return VNNI_V1


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
    """Convert between kpack_v1 and vnni_v1 (csrc/cpu/lowbit_conv2d.h).

    vnni_v1 is int8 whatever weight_bits is: 3 and 4 bits save no memory here.
    """
    allowed = (KPACK_V1, VNNI_V1)
    if layout_from not in allowed or layout_to not in allowed:
        raise ValueError(
            f"prepare_weight (cpu): {layout_from!r} to {layout_to!r}; the layouts known here are {allowed}"
        )
    if layout_from == layout_to:
        return weight_packed
    r, s = kernel_size
    shape = [n, r, s, k // (r * s)]
    if layout_to == VNNI_V1:
        return torch.ops.modiff_cpu.pack_vnni(unpack(weight_packed, weight_bits, k).reshape(shape), groups)
    return pack(torch.ops.modiff_cpu.unpack_vnni(weight_packed, shape, groups).reshape(n, k), weight_bits)


def _float_weight(
    weight_packed: Tensor, weight_scale: Tensor, k: int, kernel_size: Sequence[int] = (1, 1), groups: int = 1
) -> Tensor:
    """The dequantised weight, float32 [N, r, s, c_in / groups]."""
    r, s = kernel_size
    shape = [weight_scale.shape[0], r, s, k // (r * s)]
    return torch.ops.modiff_cpu.dequantize_vnni(weight_packed, weight_scale.contiguous(), shape, groups)


def _extents(x: Tensor, channels: int) -> tuple[int, int, int]:
    """samples, rows of a sample, channels."""
    samples = x.shape[0]
    return samples, (x.shape[2] * x.shape[3] if x.ndim == 4 else x.shape[1:-1].numel()), channels


def _float32(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype == torch.float32 else t.float()


def _quantize(
    op: str,
    x: Tensor,
    x_hat: Tensor | None,
    scale: Tensor | None,
    act_bits: int,
    granularity: str,
    *,
    prologue: int = _IDENTITY,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    shift: Tensor | None = None,
    num_groups: int = 0,
    eps: float = 0.0,
    silu: bool = False,
    affine: bool = False,
    clip_ratio: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.shape[1] if x.ndim == 4 else x.shape[-1] // (2 if prologue == _GEGLU else 1)
    samples, rows, channels = _extents(x, channels)
    try:
        return torch.ops.modiff_cpu.quantize.default(
            x,
            prologue,
            _float32(gamma),
            _float32(beta),
            _float32(shift),
            num_groups,
            eps,
            silu,
            x_hat,
            affine,
            act_bits,
            _GRANULARITY[granularity],
            clip_ratio,
            scale,
            samples,
            rows,
            channels,
            _AUTO_ISA,
        )
    except RuntimeError as error:
        if "holds NaN or Inf" in str(error):
            raise ValueError(
                f"{op}: x holds NaN or Inf; check the model's input and weights, then start a new run"
            ) from None
        raise


def quantize_residual(x, x_hat, scale, act_bits, granularity, clip_ratio=1.0, packed=False):
    return _quantize("quantize_residual", x, x_hat, scale, act_bits, granularity, clip_ratio=clip_ratio)[:3]


def group_norm_silu_quantize_residual(
    h, shift, gamma, beta, num_groups, eps, silu, x_hat, scale, act_bits, granularity, clip_ratio=1.0
):
    return _quantize(
        "group_norm_silu_quantize_residual",
        h,
        x_hat,
        scale,
        act_bits,
        granularity,
        prologue=_GROUP_NORM,
        gamma=gamma,
        beta=beta,
        shift=shift,
        num_groups=num_groups,
        eps=eps,
        silu=silu,
        clip_ratio=clip_ratio,
    )[:3]


def layer_norm_quantize_residual(h, gamma, beta, eps, x_hat, scale, act_bits, granularity, clip_ratio=1.0):
    return _quantize(
        "layer_norm_quantize_residual",
        h,
        x_hat,
        scale,
        act_bits,
        granularity,
        prologue=_LAYER_NORM,
        gamma=gamma,
        beta=beta,
        eps=eps,
        clip_ratio=clip_ratio,
    )[:3]


def geglu_quantize_residual(h, x_hat, scale, act_bits, granularity, clip_ratio=1.0):
    return _quantize(
        "geglu_quantize_residual", h, x_hat, scale, act_bits, granularity, prologue=_GEGLU, clip_ratio=clip_ratio
    )[:3]


def _without_absmax(result: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return result[0], result[1], result[3]


def quantize_activation(x, act_bits, granularity, affine=True):
    return _without_absmax(_quantize("quantize_activation", x, None, None, act_bits, granularity, affine=affine))


def group_norm_silu_quantize_activation(
    h, shift, gamma, beta, num_groups, eps, silu, act_bits, granularity, affine=True
):
    return _without_absmax(
        _quantize(
            "group_norm_silu_quantize_activation",
            h,
            None,
            None,
            act_bits,
            granularity,
            prologue=_GROUP_NORM,
            gamma=gamma,
            beta=beta,
            shift=shift,
            num_groups=num_groups,
            eps=eps,
            silu=silu,
            affine=affine,
        )
    )


def layer_norm_quantize_activation(h, gamma, beta, eps, act_bits, granularity, affine=True):
    return _without_absmax(
        _quantize(
            "layer_norm_quantize_activation",
            h,
            None,
            None,
            act_bits,
            granularity,
            prologue=_LAYER_NORM,
            gamma=gamma,
            beta=beta,
            eps=eps,
            affine=affine,
        )
    )


def geglu_quantize_activation(h, act_bits, granularity, affine=True):
    return _without_absmax(
        _quantize("geglu_quantize_activation", h, None, None, act_bits, granularity, prologue=_GEGLU, affine=affine)
    )


def _convolve(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: int,
    y_hat: Tensor | None,
    skip: Tensor | None,
    write_out: bool,
    out_dtype: torch.dtype,
    conv: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int] | None,
) -> Tensor:
    """The integer product with its epilogue; `conv` None is a Linear, a 1x1 convolution over an image of width 1."""
    c_out = weight_scale.shape[0]
    if conv is None:
        # A Linear's scales may cover any number of rows, so its samples are the granules of the scale.
        rows = codes.numel() // codes.shape[-1]
        granules = scale.shape[0]
        samples = codes.shape[0] if granules == 1 else granules
        granularity = 0 if granules == 1 else 1
        geometry = [samples, rows // samples, 1, codes.shape[-1], c_out, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    else:
        samples, c_in, h, w = codes.shape
        granules = scale.shape[0]
        granularity = 0 if granules == 1 else 1 if granules == samples else 2
        kernel_size, stride, padding, dilation, groups = conv
        geometry = [samples, h, w, c_in, c_out, *kernel_size, *stride, *padding, *dilation, groups]
    return torch.ops.modiff_cpu.convolve.default(
        codes,
        scale,
        granularity,
        zero_point,
        weight_packed,
        weight_scale,
        _float32(bias),
        epilogue,
        y_hat,
        skip,
        write_out,
        out_dtype,
        geometry,
    )


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
    return _convolve(
        residual_q, scale, None, weight_packed, weight_scale, None, _ACCUMULATE, y_hat, skip, write_out, out_dtype, None
    )


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
    return _convolve(
        residual_q, scale, None, weight_packed, weight_scale, None, _ACCUMULATE, y_hat, skip, write_out, out_dtype, conv
    )


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
    codes, scale, absmax, _ = _quantize(
        "modulated_linear", x, x_hat, scale, act_bits, granularity, clip_ratio=clip_ratio
    )
    out = _convolve(
        codes, scale, None, weight_packed, weight_scale, None, _ACCUMULATE, y_hat, skip, write_out, x.dtype, None
    )
    return out, scale, absmax


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
    codes, scale, absmax, _ = _quantize(
        "modulated_conv2d", x, x_hat, scale, act_bits, granularity, clip_ratio=clip_ratio
    )
    conv = (kernel_size, stride, padding, dilation, groups)
    out = _convolve(
        codes, scale, None, weight_packed, weight_scale, None, _ACCUMULATE, y_hat, skip, write_out, x.dtype, conv
    )
    return out, scale, absmax


def _initialize(
    op: str,
    x: Tensor,
    x_hat: Tensor,
    y_hat: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    first_step_bits: int,
    write_out: bool,
    conv: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int] | None,
) -> Tensor:
    if first_step_bits:
        x_hat.zero_()
        codes, scale, _, _ = _quantize(op, x, x_hat, None, first_step_bits, "per_sample")
        return _convolve(
            codes, scale, None, weight_packed, weight_scale, bias, _INITIALIZE, y_hat, skip, write_out, x.dtype, conv
        )
    x_hat.copy_(x)
    if not all_finite(x):
        raise ValueError(f"{op}: x holds NaN or Inf; check the model's input and weights, then start a new run")
    if conv is None:
        weight = _float_weight(weight_packed, weight_scale, x.shape[-1]).flatten(1)
        y = F.linear(x_hat.float(), weight, _float32(bias))
    else:
        kernel_size, stride, padding, dilation, groups = conv
        k = kernel_size[0] * kernel_size[1] * (x.shape[1] // groups)
        weight = _float_weight(weight_packed, weight_scale, k, kernel_size, groups).permute(0, 3, 1, 2)
        y = F.conv2d(x_hat.float(), weight, _float32(bias), stride, padding, dilation, groups)
    y_hat.copy_(y)
    if not write_out:
        return x.new_empty(0)
    return (y if skip is None else y + skip).to(x.dtype)


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
        "initialize_linear", x, x_hat, y_hat, weight_packed, weight_scale, bias, skip, first_step_bits, write_out, None
    )


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
        "initialize_conv2d", x, x_hat, y_hat, weight_packed, weight_scale, bias, skip, first_step_bits, write_out, conv
    )


def quantized_linear(
    x_q, scale, zero_point, weight_packed, weight_scale, bias, skip, weight_bits, group_size, layout, out_dtype
):
    return _convolve(
        x_q, scale, zero_point, weight_packed, weight_scale, bias, _OUTPUT, None, skip, True, out_dtype, None
    )


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
    return _convolve(
        x_q, scale, zero_point, weight_packed, weight_scale, bias, _OUTPUT, None, skip, True, out_dtype, conv
    )


def attention(q, k, v, heads, score_scale):
    return torch.ops.modiff_cpu.attention.default(q, k, v, heads, score_scale)


def _attention_why_not(problem: Any) -> str | None:
    if torch.ops.modiff_cpu.isa() < _AVX512:
        return f"attention needs AVX-512, this CPU has {isa()}"
    if problem.dtype != torch.float32:
        return f"attention is computed in float32 only, got {problem.dtype}"
    if problem.n > _MAX_KEYS:
        return f"attention over {problem.n} keys; at most {_MAX_KEYS} fit into the cache"
    return None


def _quantize_why_not(problem: Any) -> str | None:
    if problem.packed:
        return "packed=True: these passes store a code per byte; pack_weight packs codes afterwards"
    return None


def _product_why_not(problem: Any) -> str | None:
    if torch.ops.modiff_cpu.isa() < _AVX512_VNNI:
        return f"the integer products need AVX-512 VNNI, this CPU has {isa()}"
    if problem.layout != VNNI_V1:
        return f"layout {problem.layout} is not {VNNI_V1}; prepare the weight with ops.prepare_weight"
    if problem.k > _MAX_K:
        return f"k={problem.k} products can overflow int32; at most {_MAX_K} are summed"
    if problem.group_size != -1:
        return f"group_size {problem.group_size}: only one weight scale per output channel"
    if problem.kernel_size is not None:
        if problem.kernel_size[0] * problem.kernel_size[1] > _MAX_TAPS:
            return f"kernel_size {problem.kernel_size} has more than {_MAX_TAPS} taps"
        pointwise = problem.kernel_size == (1, 1) and problem.stride == (1, 1) and problem.padding == (0, 0)
        if problem.granularity == "per_token" and not pointwise:
            return "per_token scales do not factor out of a convolution larger than 1x1, stride 1"
    return None


def _image_format(t: Tensor) -> torch.memory_format:
    return torch.channels_last if t.ndim == 4 else torch.contiguous_format


def _quantize_fake(
    x, prologue, gamma, beta, shift, num_groups, eps, silu, x_hat, affine, act_bits, granularity, clip_ratio, scale,
    samples, rows, channels, isa,
):  # fmt: skip
    shape = (*x.shape[:-1], channels) if prologue == _GEGLU else x.shape
    granules = (1, samples, samples * rows, samples)[granularity]
    codes = torch.empty(shape, dtype=torch.int8, device=x.device, memory_format=_image_format(x))
    scale, absmax = (x.new_empty(granules, dtype=torch.float32) for _ in range(2))
    return codes, scale, absmax, x.new_empty(granules if x_hat is None else 0, dtype=torch.int32)


def _convolve_fake(
    codes, scale, granularity, zero_point, weight_packed, weight_scale, bias, epilogue, y_hat, skip, write_out,
    out_dtype, geometry,
):  # fmt: skip
    if not write_out:
        return codes.new_empty(0, dtype=out_dtype)
    c_out, shape = geometry[4], codes.shape
    if codes.ndim != 4:
        return codes.new_empty((*shape[:-1], c_out), dtype=out_dtype)
    kernel_size, stride, padding, dilation, groups = *(geometry[i : i + 2] for i in (5, 7, 9, 11)), geometry[13]
    weight = torch.empty(c_out, shape[1] // groups, *kernel_size, device="meta")
    out = F.conv2d(torch.empty(shape, device="meta"), weight, None, stride, padding, dilation, groups)
    return torch.empty(out.shape, dtype=out_dtype, device=codes.device, memory_format=torch.channels_last)


def _attention_fake(q, k, v, heads, scale):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


_FAKES = {"quantize": _quantize_fake, "convolve": _convolve_fake, "attention": _attention_fake}
"""Results without values, of the ops of the library that compiled code may call."""


KERNELS: dict[str, Kernel] = {
    "attention": Kernel(attention, _attention_why_not, traceable=True),
    **{
        fn.__name__: Kernel(fn, _quantize_why_not, traceable=True)
        for fn in (
            quantize_residual,
            group_norm_silu_quantize_residual,
            layer_norm_quantize_residual,
            geglu_quantize_residual,
            quantize_activation,
            group_norm_silu_quantize_activation,
            layer_norm_quantize_activation,
            geglu_quantize_activation,
        )
    },
    **{
        fn.__name__: Kernel(fn, _product_why_not, traceable=True)
        for fn in (
            accumulate_linear,
            accumulate_conv2d,
            modulated_linear,
            modulated_conv2d,
            quantized_linear,
            quantized_conv2d,
        )
    },
    **{fn.__name__: Kernel(fn, _product_why_not) for fn in (initialize_linear, initialize_conv2d)},
}
