"""Checks of the ops' arguments: each gives the `Problem`, or raises ValueError or TypeError saying what was given and
what is allowed, before anything is mutated. They look at shapes, strides, dtypes and devices only, never at values.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ..quant.operands import PROLOGUES, PackedWeight, Prologue, Window, summed
from ..quant.packing import KPACK_V1, packed_dtype, packed_width
from ..quant.spec import check_bits, check_granularity, check_group_size, granule_count, group_count, row_count
from .problem import Problem, capability

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize(
    h: Tensor,
    prologue: Prologue,
    x_hat: Tensor | None,
    scale: Tensor | None,
    bits: int,
    granularity: str,
    clip_ratio: float,
    affine: bool,
) -> Problem:
    """Of `ops.quantize`."""
    op = "quantize"
    shape, image = _quantized_shape(op, h, prologue)
    check_bits(op, "bits", bits)
    check_granularity(op, granularity)
    if not (isfinite(clip_ratio) and clip_ratio > 0):
        raise ValueError(
            f"{op}: clip_ratio={clip_ratio!r} is not allowed; give a finite number above 0 (1 clips nothing)"
        )
    if x_hat is None:
        if granularity == "per_block":
            raise ValueError(f"{op}: granularity='per_block' is for residuals only; choose 'per_sample'")
        if scale is not None:
            raise ValueError(f"{op}: a scale is for residuals only; without x_hat leave it None (dynamic)")
    else:
        _require_float(op, x_hat=x_hat)
        _require_device(op, h, x_hat=x_hat, scale=scale)
        _require_shape(op, "x_hat", x_hat, shape, image)
    if scale is not None:
        if granularity == "per_block":
            raise ValueError(f"{op}: granularity='per_block' finds its scales itself; leave scale None (dynamic)")
        count = granule_count(shape, granularity, image)
        _require_scale(op, scale, (count, 1), f"granularity {granularity}, or one scale for all")
    return _problem(
        op,
        h,
        dtype=h.dtype,
        state_dtype=None if x_hat is None else x_hat.dtype,
        m=row_count(shape, image),
        k=shape[1] if image else shape[-1],
        act_bits=bits,
        granularity=granularity,
        prologue=prologue.kind,
        scale_given=scale is not None,
    )


def _quantized_shape(op: str, h: Tensor, prologue: Prologue) -> tuple[Sequence[int], bool]:
    """Shape of x = prologue(h), and whether it is an image; checks h and the prologue."""
    kind, gamma, beta, shift, num_groups, eps, _ = prologue
    if kind not in PROLOGUES:
        raise ValueError(f"{op}: prologue {kind!r} is not known; choose one of {', '.join(map(repr, PROLOGUES))}")
    _require_float(op, h=h, shift=shift, gamma=gamma, beta=beta)
    _require_device(op, h, shift=shift, gamma=gamma, beta=beta)
    image = h.ndim == 4 and kind in ("identity", "group_norm")
    if kind == "group_norm" and h.ndim not in (3, 4):
        raise ValueError(f"{op}: h has {_text(h)}; expected an image [N, C, H, W] or tokens [N, L, C]")
    _require_activation(op, "h", h, image)
    channels = h.shape[1] if image else h.shape[-1]
    if kind == "geglu":
        if channels % 2 != 0:
            raise ValueError(f"{op}: h has {_text(h)}; expected [..., 2K]: values first, gates second")
        return (*h.shape[:-1], channels // 2), image
    if kind in ("group_norm", "layer_norm"):
        _require_vector(op, "gamma", gamma, channels)
        _require_vector(op, "beta", beta, channels)
        if not (isfinite(eps) and eps >= 0):
            raise ValueError(f"{op}: eps={eps!r} is not allowed; give a finite number of at least 0")
    if kind == "group_norm":
        if num_groups < 1 or channels % num_groups != 0:
            raise ValueError(f"{op}: num_groups={num_groups} does not divide the {channels} channels of h")
        if shift is not None and (tuple(shift.shape) != (h.shape[0], channels) or not shift.is_contiguous()):
            raise ValueError(f"{op}: shift has {_text(shift)}; it must be contiguous {(h.shape[0], channels)}")
    elif shift is not None:
        raise ValueError(f"{op}: prologue {kind!r} takes no shift; only 'group_norm' does")
    return h.shape, image


def product(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: PackedWeight,
    y_hat: Tensor | None,
    bias: Tensor | None,
    skip: Tensor | None,
    window: Window | None,
    out_dtype: torch.dtype,
    write_out: bool,
) -> Problem:
    """Of `ops.product`."""
    op = "product"
    _require_activation(op, "codes", codes, window is not None)
    _require_dtype(op, "codes", codes, torch.int8)
    _require_device(op, codes, scale=scale, zero_point=zero_point, bias=bias)
    problem = _product(op, codes, weight, y_hat, skip, window, out_dtype, write_out)
    if zero_point is not None:
        _require_dtype(op, "zero_point", zero_point, torch.int32)
        _require_vector(op, "zero_point", zero_point, scale.shape[0])
    _require_float(op, bias=bias)
    _require_vector(op, "bias", bias, problem.n)
    if y_hat is not None and (bias is not None or zero_point is not None):
        raise ValueError(
            f"{op}: {'bias' if bias is not None else 'zero_point'} does not go with y_hat, which holds the bias from "
            "the beginning of a run and takes symmetric codes; leave it None"
        )
    return replace(problem, granularity=_granularity_of(op, codes, scale, window is not None))


def modulate(
    h: Tensor,
    prologue: Prologue,
    x_hat: Tensor,
    scale: Tensor | None,
    weight: PackedWeight,
    y_hat: Tensor,
    skip: Tensor | None,
    window: Window | None,
    out_dtype: torch.dtype,
    bits: int,
    granularity: str,
    clip_ratio: float,
    write_out: bool,
) -> Problem:
    """Of `ops.modulate`."""
    op = "modulate"
    quantized = quantize(h, prologue, x_hat, scale, bits, granularity, clip_ratio, True)
    _require_activation(op, "x_hat", x_hat, window is not None)
    problem = _product(op, x_hat, weight, y_hat, skip, window, out_dtype, write_out)
    return replace(
        problem,
        act_bits=bits,
        granularity=granularity,
        prologue=quantized.prologue,
        scale_given=scale is not None,
    )


def _product(
    op: str,
    x: Tensor,
    weight: PackedWeight,
    y_hat: Tensor | None,
    skip: Tensor | None,
    window: Window | None,
    out_dtype: torch.dtype,
    write_out: bool,
) -> Problem:
    """The product of a tensor like `x`, an image where there is a window; checks all but `x` and its scales."""
    image = window is not None
    _require_device(op, x, weight=weight.packed, weight_scale=weight.scale, y_hat=y_hat, skip=skip)
    if window is not None:
        _require_window(op, window, x)
    k = summed(x.shape[1 if image else -1], window)
    n = _checked_weight(op, weight, k)
    shape: Sequence[int] = (*x.shape[:-1], n)
    if window is not None:
        shape = window.output_shape(x.shape, n)
        if shape[2] < 1 or shape[3] < 1:
            raise ValueError(f"{op}: an input of {tuple(x.shape[2:])} is too small for {window}; pad it")
        if n % window.groups != 0:
            raise ValueError(f"{op}: groups={window.groups} does not divide the {n} output channels")
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: out_dtype={out_dtype} is not allowed; choose torch.float32, torch.float16 or torch.bfloat16"
        )
    if y_hat is not None:
        _require_float(op, y_hat=y_hat)
        _require_shape(op, "y_hat", y_hat, shape, image)
    elif not write_out:
        raise ValueError(f"{op}: write_out=False leaves nothing without y_hat; give y_hat, or write_out=True")
    if skip is not None:
        _require_dtype(op, "skip", skip, out_dtype)
        _require_shape(op, "skip", skip, shape, image)
    return _problem(
        op,
        x,
        dtype=out_dtype,
        state_dtype=None if y_hat is None else y_hat.dtype,
        m=row_count(shape, image),
        n=n,
        k=k,
        window=window,
        weight_bits=weight.bits,
        group_size=weight.group_size,
        layout=weight.layout,
    )


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, score_scale: float) -> Problem:
    """Of `ops.attention`."""
    op = "attention"
    _require_float(op, q=q)
    _require_device(op, q, k=k, v=v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 3 or t.stride(-1) != 1:
            raise ValueError(f"{op}: {name} has {_text(t)}; expected [N, tokens, heads * width] with contiguous rows")
        _require_elements(op, name, t)
        _require_dtype(op, name, t, q.dtype)
    samples, tokens, channels = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[2]) != (samples, channels):
        raise ValueError(
            f"{op}: k has {_text(k)} and v {_text(v)}; for q {tuple(q.shape)} both must be "
            f"[{samples}, tokens, {channels}]"
        )
    if heads < 1 or channels % heads != 0:
        raise ValueError(f"{op}: heads={heads} does not divide the {channels} columns of q")
    if not isfinite(score_scale):
        raise ValueError(
            f"{op}: score_scale={score_scale!r} is not allowed; give a finite number, usually width ** -0.5"
        )
    return _problem(op, q, dtype=q.dtype, m=samples * tokens, n=k.shape[1], k=channels // heads)


def pack_weight(weight_q: Tensor, weight_bits: int) -> Problem:
    """Of `ops.pack_weight`."""
    op = "pack_weight"
    check_bits(op, "weight_bits", weight_bits)
    _require_dtype(op, "weight_q", weight_q, torch.int8)
    if weight_q.ndim != 2:
        raise ValueError(
            f"{op}: weight_q has {_text(weight_q)}; expected [N, K], for a convolution K in (r, s, c) order"
        )
    n, k = weight_q.shape
    return _problem(op, weight_q, n=n, k=k, weight_bits=weight_bits, layout=KPACK_V1)


def unpack_weight(weight_packed: Tensor, weight_bits: int, n: int, k: int) -> Problem:
    """Of `ops.unpack_weight`."""
    op = "unpack_weight"
    check_bits(op, "weight_bits", weight_bits)
    _require_kpack_v1(op, weight_packed, weight_bits, n, k)
    return _problem(op, weight_packed, n=n, k=k, weight_bits=weight_bits, layout=KPACK_V1)


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


def _require_elements(op: str, name: str, t: Tensor) -> None:
    if t.numel() == 0:
        raise ValueError(f"{op}: {name} is empty ({_text(t)}); every size must be at least 1")


def _require_activation(op: str, name: str, t: Tensor, image: bool) -> None:
    if not image:
        if t.ndim not in (2, 3):
            raise ValueError(
                f"{op}: {name} has {t.ndim} dimensions ({_text(t)}); expected [M, K] or [N, L, K]: flatten it first "
                "(4-D tensors are images)"
            )
        if not t.is_contiguous():
            raise ValueError(f"{op}: {name} is not contiguous ({_text(t)}); call .contiguous() first")
    else:
        if t.ndim != 4:
            raise ValueError(f"{op}: {name} has {t.ndim} dimensions ({_text(t)}); expected an image [N, C, H, W]")
        _, c, h, w = t.shape
        # The strides as well: while it compiles for any size, torch 2.11 does not know the format of what was computed.
        if not t.is_contiguous(memory_format=torch.channels_last) and t.stride() != (c * h * w, 1, c * w, c):
            raise ValueError(
                f"{op}: {name} is not channels_last ({_text(t)}); convert it with "
                ".to(memory_format=torch.channels_last). 4-D tensors are images; flatten the input of a Linear to "
                "[N, L, K]"
            )
    _require_elements(op, name, t)


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


def _require_window(op: str, window: Window, codes: Tensor) -> None:
    for name, pair, least in zip(window._fields, window[:4], (1, 1, 0, 1)):
        if len(pair) != 2 or any(value < least for value in pair):
            raise ValueError(f"{op}: {name}={list(pair)} is not allowed; give two integers of at least {least}")
    if window.groups < 1 or codes.shape[1] % window.groups != 0:
        raise ValueError(f"{op}: groups={window.groups} does not divide the {codes.shape[1]} input channels")


def _require_kpack_v1(op: str, packed: Tensor, bits: int, n: int, k: int) -> None:
    shape, dtype = (n, packed_width(bits, k)), packed_dtype(bits)
    if tuple(packed.shape) != shape or packed.dtype != dtype or not packed.is_contiguous():
        raise ValueError(
            f"{op}: the packed weight has {_text(packed)}; {KPACK_V1} with {bits} bits, n={n}, k={k} needs a "
            f"contiguous {dtype} {shape}; make it with pack_weight (k: input features, of a convolution "
            "r * s * c_in / groups)"
        )


def _checked_weight(op: str, weight: PackedWeight, k: int) -> int:
    """Output channels of a packed weight whose rows hold `k` codes."""
    check_bits(op, "weight.bits", weight.bits)
    check_group_size(op, weight.group_size)
    _require_dtype(op, "weight.scale", weight.scale, torch.float32)
    columns = [] if weight.group_size == -1 else [group_count(k, weight.group_size)]
    scale = weight.scale
    if scale.ndim != 1 + len(columns) or list(scale.shape[1:]) != columns or not scale.is_contiguous():
        raise ValueError(
            f"{op}: weight.scale has {_text(scale)}; group_size={weight.group_size} with k={k} needs a contiguous "
            f"[{', '.join(['N', *map(str, columns)])}]"
        )
    if weight.layout == KPACK_V1:
        _require_kpack_v1(op, weight.packed, weight.bits, weight.n, k)
    return weight.n


def _granularity_of(op: str, codes: Tensor, scale: Tensor, image: bool) -> str:
    """The granularity that the number of scales means."""
    samples, rows = codes.shape[0], row_count(codes.shape, image)
    if image:
        _require_scale(op, scale, (1, samples, rows), "one for all, one per image, one per pixel")
    else:
        _require_dtype(op, "scale", scale, torch.float32)
        if scale.ndim != 1 or scale.shape[0] < 1 or rows % scale.shape[0] != 0 or not scale.is_contiguous():
            raise ValueError(
                f"{op}: scale has {_text(scale)}; it must be 1-D and its length divide the {rows} rows of codes (one "
                "for all, one per sample, one per row)"
            )
    count = scale.shape[0]
    if count == 1:
        return "per_tensor"
    return "per_token" if count == rows and count != samples else "per_sample"
