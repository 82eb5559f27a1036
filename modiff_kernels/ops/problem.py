"""`Problem`, the one key by which ops are checked, chosen, tuned and reported, and `check`, which makes it from
arguments.

`check(op, arguments)` raises ValueError or TypeError saying what was given and what is allowed, before anything is
mutated. It looks at shapes, strides, dtypes and devices only, never at values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isfinite
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..quant.packing import KPACK_V1, packed_dtype, packed_width
from ..quant.spec import BITS, check_bits, check_granularity, check_group_size, granule_count, group_count, row_count

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """What an op is asked to do, without the data.

    m: rows (Linear), pixels of the output (conv) or of the image (quantising ops). n: output features (0: the op has
        none).
    k: elements summed per output (r * s * c_in / groups for a conv), or channels of a quantising op. attention: m
    queries of all samples, n keys of a sample, k values of a head. dtype: activations
    or output. state_dtype: x_hat and/or y_hat, None for ops without state. act_bits of an initialize op is its
    first_step_bits. granularity of an op that is given scales is read from their number. packed: of the codes returned.
    """

    op: str
    device_type: str
    capability: tuple[int, int] | None = None
    dtype: torch.dtype | None = None
    state_dtype: torch.dtype | None = None
    m: int = 0
    n: int = 0
    k: int = 0
    kernel_size: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act_bits: int | None = None
    weight_bits: int | None = None
    group_size: int = -1
    granularity: str | None = None
    packed: bool = False
    layout: str | None = None

    def __str__(self) -> str:
        parts = [self.op, self.device_type, f"m{self.m}"]
        if self.n:
            parts.append(f"n{self.n}")
        parts.append(f"k{self.k}")
        if self.kernel_size is not None:
            names = ("kernel", "stride", "padding", "dilation")
            values = (self.kernel_size, self.stride, self.padding, self.dilation)
            parts += [f"{name}{a}x{b}" for name, (a, b) in zip(names, values, strict=True)]
            parts.append(f"groups{self.groups}")
        weight = "" if self.weight_bits is None else f"w{self.weight_bits}"
        act = "" if self.act_bits is None else f"a{self.act_bits}"
        parts += [weight + act] if weight + act else []
        if self.group_size != -1:
            parts.append(f"group{self.group_size}")
        dtypes = [str(d).removeprefix("torch.") for d in (self.dtype, self.state_dtype) if d is not None]
        parts += [text for text in ("/".join(dtypes), self.granularity, "packed" * self.packed, self.layout) if text]
        return "-".join(parts)


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability of `device`, None for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _problem(op: str, x: Tensor, **fields: Any) -> Problem:
    return Problem(op=op, device_type=x.device.type, capability=capability(x.device), **fields)


def _text(t: Tensor) -> str:
    return f"shape {tuple(t.shape)}, {t.dtype}, strides {t.stride()}"


def _require_float(op: str, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{op}: {name} is {t.dtype}; allowed are float32, float16 and bfloat16; convert it with .to(...)"
            )


def _require_dtype(op: str, name: str, t: Tensor, dtype: torch.dtype) -> None:
    if t.dtype != dtype:
        raise TypeError(f"{op}: {name} is {t.dtype}; it must be {dtype}")


def _require_device(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, the first argument on {x.device}; move all to one device")


def _require_image(op: str, name: str, t: Tensor) -> None:
    if t.ndim != 4:
        raise ValueError(f"{op}: {name} has {t.ndim} dimensions ({_text(t)}); expected an image [N, C, H, W]")
    _, c, h, w = t.shape
    # The strides as well: while it compiles for any size, torch 2.11 does not know the format of what was computed.
    if not t.is_contiguous(memory_format=torch.channels_last) and t.stride() != (c * h * w, 1, c * w, c):
        raise ValueError(
            f"{op}: {name} is not channels_last ({_text(t)}); convert it with .to(memory_format=torch.channels_last). "
            "4-D tensors are images; flatten the input of a Linear to [N, L, K]"
        )
    _require_elements(op, name, t)


def _require_rows(op: str, name: str, t: Tensor) -> None:
    if t.ndim not in (2, 3):
        raise ValueError(
            f"{op}: {name} has {t.ndim} dimensions ({_text(t)}); expected [M, K] or [N, L, K]: flatten it first (4-D "
            f"tensors are images)"
        )
    if not t.is_contiguous():
        raise ValueError(f"{op}: {name} is not contiguous ({_text(t)}); call .contiguous() first")
    _require_elements(op, name, t)


def _require_elements(op: str, name: str, t: Tensor) -> None:
    if t.numel() == 0:
        raise ValueError(f"{op}: {name} is empty ({_text(t)}); every size must be at least 1")


def _require_activation(op: str, name: str, t: Tensor, image: bool) -> None:
    if image:
        _require_image(op, name, t)
    else:
        _require_rows(op, name, t)


def _require_shape(op: str, name: str, t: Tensor, shape: Sequence[int], image: bool) -> None:
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; it must be {tuple(shape)}")
    _require_activation(op, name, t, image)


def _require_vector(op: str, name: str, t: Tensor | None, length: int) -> None:
    if t is not None and (tuple(t.shape) != (length,) or not t.is_contiguous()):
        raise ValueError(f"{op}: {name} has {_text(t)}; it must be a contiguous vector of length {length}")


def _require_scale(op: str, scale: Tensor, lengths: Sequence[int], meaning: str) -> None:
    _require_dtype(op, "scale", scale, torch.float32)
    if scale.ndim != 1 or not scale.is_contiguous() or scale.shape[0] not in lengths:
        wanted = " or ".join(str(length) for length in dict.fromkeys(lengths))
        raise ValueError(f"{op}: scale has {_text(scale)}; it must be 1-D of length {wanted} ({meaning})")


def _require_pair(op: str, name: str, pair: Sequence[int], least: int) -> tuple[int, int]:
    if len(pair) != 2 or any(value < least for value in pair):
        raise ValueError(f"{op}: {name}={list(pair)} is not allowed; give two integers of at least {least}")
    return pair[0], pair[1]


def _require_clip_ratio(op: str, clip_ratio: float) -> None:
    if not (isfinite(clip_ratio) and clip_ratio > 0):
        raise ValueError(
            f"{op}: clip_ratio={clip_ratio!r} is not allowed; give a finite number above 0 (1 clips nothing)"
        )


def _require_kpack_v1(op: str, weight_packed: Tensor, weight_bits: int, n: int, k: int) -> None:
    shape, dtype = (n, packed_width(weight_bits, k)), packed_dtype(weight_bits)
    if tuple(weight_packed.shape) != shape or weight_packed.dtype != dtype or not weight_packed.is_contiguous():
        raise ValueError(
            f"{op}: weight_packed has {_text(weight_packed)}; {KPACK_V1} with weight_bits={weight_bits}, n={n}, k={k} "
            "needs a "
            f"contiguous {dtype} {shape}; make it with pack_weight (k: input features, for a conv r * s * c_in / "
            "groups)"
        )


def _check_weight(
    op: str, weight_packed: Tensor, weight_scale: Tensor, weight_bits: int, group_size: int, layout: str, k: int
) -> int:
    """Output channels of a packed weight whose rows hold `k` codes."""
    check_bits(op, "weight_bits", weight_bits)
    check_group_size(op, group_size)
    _require_dtype(op, "weight_scale", weight_scale, torch.float32)
    columns = [] if group_size == -1 else [group_count(k, group_size)]
    if (
        weight_scale.ndim != 1 + len(columns)
        or list(weight_scale.shape[1:]) != columns
        or not weight_scale.is_contiguous()
    ):
        raise ValueError(
            f"{op}: weight_scale has {_text(weight_scale)}; group_size={group_size} with k={k} needs a contiguous "
            f"[{', '.join(['N', *map(str, columns)])}]"
        )
    n = weight_scale.shape[0]
    if layout == KPACK_V1:
        _require_kpack_v1(op, weight_packed, weight_bits, n, k)
    return n


def _granularity_of(count: int, samples: int, rows: int) -> str:
    if count == 1:
        return "per_tensor"
    return "per_token" if count == rows and count != samples else "per_sample"


def _check_codes_from(op: str, a: SimpleNamespace, x: Tensor, shape: Sequence[int], image: bool) -> Problem:
    """Checks of an op that makes codes of `shape` from the activation `x`."""
    _require_float(op, x=x)
    check_bits(op, "act_bits", a.act_bits)
    check_granularity(op, a.granularity)
    if a.granularity == "per_block" and not hasattr(a, "x_hat"):
        raise ValueError(f"{op}: granularity='per_block' is for residuals only; choose 'per_sample'")
    return _problem(
        op,
        x,
        dtype=x.dtype,
        m=row_count(shape, image),
        k=shape[1] if image else shape[-1],
        act_bits=a.act_bits,
        granularity=a.granularity,
    )


def _check_residual_from(op: str, a: SimpleNamespace, x: Tensor, shape: Sequence[int], image: bool) -> Problem:
    """Checks of an op that makes residual codes of `shape` from the activation `x` and mutates x_hat."""
    problem = _check_codes_from(op, a, x, shape, image)
    _require_float(op, x_hat=a.x_hat)
    _require_device(op, x, x_hat=a.x_hat, scale=a.scale)
    _require_shape(op, "x_hat", a.x_hat, shape, image)
    if a.scale is not None:
        if a.granularity == "per_block":
            raise ValueError(f"{op}: granularity='per_block' finds its scales itself; leave scale None (dynamic)")
        count = granule_count(shape, a.granularity, image)
        _require_scale(op, a.scale, (count, 1), f"granularity {a.granularity}, or one scale for all")
    _require_clip_ratio(op, a.clip_ratio)
    return replace(problem, state_dtype=a.x_hat.dtype)


def _quantize(op: str, a: SimpleNamespace) -> Problem:
    image = a.x.ndim == 4
    _require_activation(op, "x", a.x, image)
    return _codes_check(a)(op, a, a.x, a.x.shape, image)


def _quantize_residual(op: str, a: SimpleNamespace) -> Problem:
    problem = _quantize(op, a)
    if not isinstance(a.packed, bool):
        raise TypeError(f"{op}: packed={a.packed!r} is not allowed; give True or False, and backend after it")
    if a.packed and (a.act_bits == 8 or a.granularity == "per_block"):
        raise ValueError(
            f"{op}: packed=True with act_bits={a.act_bits} and granularity={a.granularity!r}, whose codes have 8 bits: "
            "there is nothing to pack; choose act_bits 3 or 4 and 'per_tensor', 'per_sample' or 'per_token'"
        )
    return replace(problem, packed=a.packed)


def _codes_check(a: SimpleNamespace) -> Callable[..., Problem]:
    return _check_residual_from if hasattr(a, "x_hat") else _check_codes_from


def _group_norm_silu_quantize(op: str, a: SimpleNamespace) -> Problem:
    h = a.h
    if h.ndim not in (3, 4):
        raise ValueError(f"{op}: h has {_text(h)}; expected an image [N, C, H, W] or tokens [N, L, C]")
    image = h.ndim == 4
    _require_activation(op, "h", h, image)
    channels = h.shape[1] if image else h.shape[-1]
    if a.num_groups < 1 or channels % a.num_groups != 0:
        raise ValueError(f"{op}: num_groups={a.num_groups} does not divide the {channels} channels of h")
    if a.shift is not None and (tuple(a.shift.shape) != (h.shape[0], channels) or not a.shift.is_contiguous()):
        raise ValueError(f"{op}: shift has {_text(a.shift)}; it must be contiguous {(h.shape[0], channels)}")
    _require_float(op, shift=a.shift)
    _require_device(op, h, shift=a.shift)
    _require_norm(op, a, channels)
    return _codes_check(a)(op, a, h, h.shape, image)


def _layer_norm_quantize(op: str, a: SimpleNamespace) -> Problem:
    _require_rows(op, "h", a.h)
    _require_norm(op, a, a.h.shape[-1])
    return _codes_check(a)(op, a, a.h, a.h.shape, False)


def _require_norm(op: str, a: SimpleNamespace, channels: int) -> None:
    _require_vector(op, "gamma", a.gamma, channels)
    _require_vector(op, "beta", a.beta, channels)
    _require_float(op, gamma=a.gamma, beta=a.beta)
    _require_device(op, a.h, gamma=a.gamma, beta=a.beta)
    if not (isfinite(a.eps) and a.eps >= 0):
        raise ValueError(f"{op}: eps={a.eps!r} is not allowed; give a finite number of at least 0")


def _geglu_quantize(op: str, a: SimpleNamespace) -> Problem:
    h = a.h
    _require_rows(op, "h", h)
    if h.shape[-1] % 2 != 0:
        raise ValueError(f"{op}: h has {_text(h)}; expected [..., 2K]: values first, gates second")
    return _codes_check(a)(op, a, h, (*h.shape[:-1], h.shape[-1] // 2), False)


def conv2d_output_shape(
    x_shape: Sequence[int],
    n: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """[N, c_out, P, Q] of a conv with `n` output channels over an image [N, C, H, W]."""
    p, q = ((x_shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    return x_shape[0], n, p, q


def _check_product(op: str, a: SimpleNamespace, x: Tensor, x_name: str) -> tuple[Problem, Sequence[int], bool]:
    """Checks of input and weight of a Linear or Conv2d: the problem, the shape of the output, and whether it is an
    image.
    """
    image = hasattr(a, "kernel_size")
    _require_activation(op, x_name, x, image)
    _require_device(op, x, weight_packed=a.weight_packed, weight_scale=a.weight_scale)
    conv: dict[str, Any] = {}
    if image:
        conv["kernel_size"] = _require_pair(op, "kernel_size", a.kernel_size, 1)
        conv["stride"] = _require_pair(op, "stride", a.stride, 1)
        conv["padding"] = _require_pair(op, "padding", a.padding, 0)
        conv["dilation"] = _require_pair(op, "dilation", a.dilation, 1)
        if a.groups < 1 or x.shape[1] % a.groups != 0:
            raise ValueError(f"{op}: groups={a.groups} does not divide the {x.shape[1]} input channels")
        k = a.kernel_size[0] * a.kernel_size[1] * (x.shape[1] // a.groups)
    else:
        k = x.shape[-1]
    n = _check_weight(op, a.weight_packed, a.weight_scale, a.weight_bits, a.group_size, a.layout, k)
    shape: Sequence[int] = (*x.shape[:-1], n)
    if image:
        shape = conv2d_output_shape(x.shape, n, **conv)
        if shape[2] < 1 or shape[3] < 1:
            raise ValueError(f"{op}: an input of {tuple(x.shape[2:])} is too small for {conv}; pad it")
        if n % a.groups != 0:
            raise ValueError(f"{op}: groups={a.groups} does not divide the {n} output channels")
        conv["groups"] = a.groups
    weight = {"weight_bits": a.weight_bits, "group_size": a.group_size, "layout": a.layout}
    return _problem(op, x, m=row_count(shape, image), n=n, k=k, **weight, **conv), shape, image


def _check_output(
    op: str, a: SimpleNamespace, problem: Problem, shape: Sequence[int], image: bool, out_dtype: torch.dtype
) -> Problem:
    """Checks of y_hat, skip and bias, as far as the op has them; completes the problem."""
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: out_dtype={out_dtype} is not allowed; choose torch.float32, torch.float16 or torch.bfloat16"
        )
    y_hat, bias = getattr(a, "y_hat", None), getattr(a, "bias", None)
    _require_float(op, y_hat=y_hat, bias=bias)
    _require_vector(op, "bias", bias, problem.n)
    if a.skip is not None:
        _require_dtype(op, "skip", a.skip, out_dtype)
        _require_shape(op, "skip", a.skip, shape, image)
    if y_hat is not None:
        _require_shape(op, "y_hat", y_hat, shape, image)
        problem = replace(problem, state_dtype=y_hat.dtype)
    _require_device(op, a.weight_scale, y_hat=y_hat, bias=bias, skip=a.skip)
    return replace(problem, dtype=out_dtype)


def _check_codes(op: str, name: str, codes: Tensor, scale: Tensor, image: bool) -> str:
    """Checks of int8 codes and their scales; the granularity that the number of scales means."""
    _require_dtype(op, name, codes, torch.int8)
    _require_device(op, codes, scale=scale)
    rows = row_count(codes.shape, image)
    if image:
        _require_scale(op, scale, (1, codes.shape[0], rows), "one for all, one per image, one per pixel")
    else:
        _require_dtype(op, "scale", scale, torch.float32)
        if scale.ndim != 1 or scale.shape[0] < 1 or rows % scale.shape[0] != 0 or not scale.is_contiguous():
            raise ValueError(
                f"{op}: scale has {_text(scale)}; it must be 1-D and its length divide the {rows} rows of {name} (one "
                "for all, "
                f"one per sample, one per row)"
            )
    return _granularity_of(scale.shape[0], codes.shape[0], rows)


def _accumulate(op: str, a: SimpleNamespace) -> Problem:
    problem, shape, image = _check_product(op, a, a.residual_q, "residual_q")
    problem = replace(problem, granularity=_check_codes(op, "residual_q", a.residual_q, a.scale, image))
    return _check_output(op, a, problem, shape, image, a.out_dtype)


def _initialize(op: str, a: SimpleNamespace) -> Problem:
    problem, shape, image = _check_product(op, a, a.x, "x")
    check_bits(op, "first_step_bits", a.first_step_bits, (0, *BITS))
    _require_float(op, x=a.x, x_hat=a.x_hat)
    _require_device(op, a.x, x_hat=a.x_hat)
    _require_shape(op, "x_hat", a.x_hat, a.x.shape, image)
    _require_one_state_dtype(op, a)
    problem = replace(problem, act_bits=a.first_step_bits, granularity="per_sample")
    return _check_output(op, a, problem, shape, image, a.x.dtype)


def _modulated(op: str, a: SimpleNamespace) -> Problem:
    problem, shape, image = _check_product(op, a, a.x, "x")
    _check_residual_from(op, a, a.x, a.x.shape, image)
    _require_one_state_dtype(op, a)
    problem = replace(problem, act_bits=a.act_bits, granularity=a.granularity)
    return _check_output(op, a, problem, shape, image, a.x.dtype)


def _require_one_state_dtype(op: str, a: SimpleNamespace) -> None:
    if a.x_hat.dtype != a.y_hat.dtype:
        raise TypeError(f"{op}: x_hat is {a.x_hat.dtype} and y_hat {a.y_hat.dtype}; both must have one state dtype")


def _quantized(op: str, a: SimpleNamespace) -> Problem:
    problem, shape, image = _check_product(op, a, a.x_q, "x_q")
    problem = replace(problem, granularity=_check_codes(op, "x_q", a.x_q, a.scale, image))
    _require_dtype(op, "zero_point", a.zero_point, torch.int32)
    _require_vector(op, "zero_point", a.zero_point, a.scale.shape[0])
    _require_device(op, a.x_q, zero_point=a.zero_point)
    return _check_output(op, a, problem, shape, image, a.out_dtype)


def _attention(op: str, a: SimpleNamespace) -> Problem:
    _require_float(op, q=a.q)
    _require_device(op, a.q, k=a.k, v=a.v)
    for name, t in (("q", a.q), ("k", a.k), ("v", a.v)):
        if t.ndim != 3 or t.stride(-1) != 1:
            raise ValueError(f"{op}: {name} has {_text(t)}; expected [N, tokens, heads * width] with contiguous rows")
        _require_elements(op, name, t)
        _require_dtype(op, name, t, a.q.dtype)
    samples, tokens, channels = a.q.shape
    if a.k.shape != a.v.shape or (a.k.shape[0], a.k.shape[2]) != (samples, channels):
        raise ValueError(
            f"{op}: k has {_text(a.k)} and v {_text(a.v)}; for q {tuple(a.q.shape)} both must be "
            f"[{samples}, tokens, {channels}]"
        )
    if a.heads < 1 or channels % a.heads != 0:
        raise ValueError(f"{op}: heads={a.heads} does not divide the {channels} columns of q")
    if not isfinite(a.score_scale):
        raise ValueError(
            f"{op}: score_scale={a.score_scale!r} is not allowed; give a finite number, usually width ** -0.5"
        )
    return _problem(op, a.q, dtype=a.q.dtype, m=samples * tokens, n=a.k.shape[1], k=channels // a.heads)


def _pack_weight(op: str, a: SimpleNamespace) -> Problem:
    check_bits(op, "weight_bits", a.weight_bits)
    _require_dtype(op, "weight_q", a.weight_q, torch.int8)
    if a.weight_q.ndim != 2:
        raise ValueError(f"{op}: weight_q has {_text(a.weight_q)}; expected [N, K], for a conv K in (r, s, c) order")
    n, k = a.weight_q.shape
    return _problem(op, a.weight_q, n=n, k=k, weight_bits=a.weight_bits, layout=a.layout)


def _unpack_weight(op: str, a: SimpleNamespace) -> Problem:
    check_bits(op, "weight_bits", a.weight_bits)
    if a.layout == KPACK_V1:
        _require_kpack_v1(op, a.weight_packed, a.weight_bits, a.n, a.k)
    return _problem(op, a.weight_packed, n=a.n, k=a.k, weight_bits=a.weight_bits, layout=a.layout)


CHECKS: dict[str, Callable[[str, SimpleNamespace], Problem]] = {
    "quantize_residual": _quantize_residual,
    "group_norm_silu_quantize_residual": _group_norm_silu_quantize,
    "layer_norm_quantize_residual": _layer_norm_quantize,
    "geglu_quantize_residual": _geglu_quantize,
    "quantize_activation": _quantize,
    "group_norm_silu_quantize_activation": _group_norm_silu_quantize,
    "layer_norm_quantize_activation": _layer_norm_quantize,
    "geglu_quantize_activation": _geglu_quantize,
    "accumulate_linear": _accumulate,
    "accumulate_conv2d": _accumulate,
    "initialize_linear": _initialize,
    "initialize_conv2d": _initialize,
    "modulated_linear": _modulated,
    "modulated_conv2d": _modulated,
    "quantized_linear": _quantized,
    "quantized_conv2d": _quantized,
    "attention": _attention,
    "pack_weight": _pack_weight,
    "unpack_weight": _unpack_weight,
}


def check(op: str, arguments: Mapping[str, Any]) -> Problem:
    """The Problem of `op` with `arguments` (by name, without `backend`); raises ValueError or TypeError if they do not
    fit.
    """
    return CHECKS[op](op, SimpleNamespace(**arguments))
