"""Checks of the ops' arguments: each gives the `Problem`, or raises ValueError or TypeError saying what was given and
what is allowed, before anything is mutated. They look at shapes, strides, dtypes and devices only, never at values.
What is declared in `schema` has its types there."""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ..quant.operands import PROLOGUES, PackedWeight, Prologue, summed
from ..quant.packing import KPACK_V1, check_packed
from ..quant.spec import ACT_BITS, GRANULARITIES, check_bits, check_group_size, granule_count, group_count, row_count
from .problem import Problem, capability

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize(h, prologue, x_hat, scale, bits, granularity, clip_ratio, affine, last_absmax) -> Problem:
    op = "quantize"
    shape, image = _quantized_shape(op, h, prologue)
    check_bits(op, "bits", bits, ACT_BITS)
    if granularity not in GRANULARITIES:
        known = ", ".join(map(repr, GRANULARITIES))
        raise ValueError(f"{op}: granularity={granularity!r} is not known; choose one of {known}")
    if not (isfinite(clip_ratio) and clip_ratio > 0):
        raise ValueError(f"{op}: clip_ratio={clip_ratio!r} is not allowed; give a finite number above 0 (1 clips none)")
    if x_hat is not None:
        _require_tensors(op, h, None, x_hat=x_hat)
        _require_shape(op, "x_hat", x_hat, shape, image)
    elif scale is not None or last_absmax is not None:
        raise ValueError(f"{op}: a scale is for residuals only; without x_hat leave it None (dynamic)")
    elif granularity == "per_block":
        raise ValueError(f"{op}: granularity='per_block' is for residuals only; choose 'per_sample'")
    given = scale if last_absmax is None else last_absmax
    if given is not None:
        if granularity == "per_block":
            raise ValueError(f"{op}: granularity='per_block' finds its scales itself; leave scale None (dynamic)")
        if scale is not None and last_absmax is not None:
            raise ValueError(f"{op}: scale and last_absmax are given; a delayed scale is made of last_absmax alone")
        count = granule_count(shape, granularity, image)
        must, name = f"of length {count} (granularity {granularity})", "last_absmax"
        if last_absmax is None:
            must, name = f"{must}, or 1 (for all)", "scale"
        _require_scale(op, h, given, given.numel() == count or (name == "scale" and given.numel() == 1), must, name)
    problem = _problem(op, h, h.dtype, x_hat, m=row_count(shape, image), k=shape[1 if image else -1], act_bits=bits)
    return replace(problem, granularity=granularity, prologue=prologue.kind, scale_given=given is not None)


def _quantized_shape(op: str, h: Tensor, prologue: Prologue) -> tuple[Sequence[int], bool]:
    """Shape of x = prologue(h), and whether it is an image; checks h and the prologue."""
    kind, gamma, beta, shift, num_groups, eps, _, further = prologue
    if kind not in PROLOGUES:
        raise ValueError(f"{op}: prologue {kind!r} is not known; choose one of {', '.join(map(repr, PROLOGUES))}")
    _require_tensors(op, h, None, h=h, shift=shift, gamma=gamma, beta=beta)
    image = h.ndim == 4 and kind in ("identity", "group_norm")
    if kind == "group_norm" and h.ndim not in (3, 4):
        raise ValueError(f"{op}: h has {_text(h)}; expected an image [N, C, H, W] or tokens [N, L, C]")
    _require_activation(op, "h", h, image)
    if further is not None:
        if not image:
            raise ValueError(f"{op}: prologue {kind!r} of {h.ndim} dimensions takes no further channels; leave it None")
        _require_tensors(op, h, h.dtype, further=further)
        _require_shape(op, "further", further, (h.shape[0], *further.shape[1:2], *h.shape[2:]), image)
    channels = prologue.shape(h)[1] if image else h.shape[-1]
    if kind == "geglu" and channels % 2 != 0:
        raise ValueError(f"{op}: h has {_text(h)}; expected [..., 2K]: values first, gates second")
    if kind in ("group_norm", "layer_norm"):
        if kind == "group_norm" and gamma is not None and beta is not None and gamma.ndim == 2:
            _require_rows(op, "gamma", gamma, h.shape[0], channels)
            _require_rows(op, "beta", beta, h.shape[0], channels)
            if gamma.stride(0) != beta.stride(0):
                raise ValueError(f"{op}: gamma has {_text(gamma)}, beta {_text(beta)}; give them the same strides")
        else:
            _require_vector(op, "gamma", gamma, channels)
            _require_vector(op, "beta", beta, channels)
        if not (isfinite(eps) and eps >= 0):
            raise ValueError(f"{op}: eps={eps!r} is not allowed; give a finite number of at least 0")
    if kind == "group_norm":
        if num_groups < 1 or channels % num_groups != 0:
            raise ValueError(f"{op}: num_groups={num_groups} does not divide the {channels} channels of h")
        _require_rows(op, "shift", shift, h.shape[0], channels)
    elif shift is not None:
        raise ValueError(f"{op}: prologue {kind!r} takes no shift; only 'group_norm' does")
    return prologue.shape(h), image


def product(codes, scale, zero_point, weight, y_hat, bias, skip, window, out_dtype, write_out) -> Problem:
    op = "product"
    _require_activation(op, "codes", codes, window is not None)
    _require_tensors(op, codes, torch.int8, codes=codes)
    problem = _product(op, codes, weight, y_hat, skip, window, out_dtype, write_out)
    granularity = _granularity_of(op, codes, scale, window is not None)
    _require_tensors(op, codes, torch.int32, zero_point=zero_point)
    _require_vector(op, "zero_point", zero_point, scale.shape[0])
    _require_tensors(op, codes, None, bias=bias)
    _require_vector(op, "bias", bias, problem.n)
    if y_hat is not None and (bias is not None or zero_point is not None):
        text = "which holds the bias from the beginning of a run and takes symmetric codes; leave it None"
        raise ValueError(f"{op}: {'bias' if bias is not None else 'zero_point'} does not go with y_hat, {text}")
    return replace(problem, granularity=granularity)


def modulate(
    h, prologue, x_hat, scale, weight, y_hat, skip, window, out_dtype, bits, granularity, clip_ratio, write_out,
    last_absmax,
) -> Problem:  # fmt: skip
    op = "modulate"
    codes = quantize(h, prologue, x_hat, scale, bits, granularity, clip_ratio, True, last_absmax)
    _require_activation(op, "x_hat", x_hat, window is not None)
    problem = _product(op, x_hat, weight, y_hat, skip, window, out_dtype, write_out)
    fields = {name: getattr(codes, name) for name in ("act_bits", "granularity", "prologue", "scale_given")}
    return replace(problem, **fields)


def _product(op, x, weight, y_hat, skip, window, out_dtype, write_out) -> Problem:
    """The product of a tensor like `x`, an image where there is a window; checks all but `x` and its scales."""
    image = window is not None
    if window is not None:
        for name, pair, least in zip(window._fields, window[:4], (1, 1, 0, 1)):
            if len(pair) != 2 or any(value < least for value in pair):
                raise ValueError(f"{op}: {name}={list(pair)} is not allowed; give two integers of at least {least}")
        if window.groups < 1 or x.shape[1] % window.groups != 0:
            raise ValueError(f"{op}: groups={window.groups} does not divide the {x.shape[1]} input channels")
    k, n = summed(x.shape[1 if image else -1], window), weight.n
    _require_weight(op, x, weight, k)
    shape = (*x.shape[:-1], weight.outputs)
    if weight.geglu and (image or n % 2 == 1 or y_hat is not None or skip is not None):
        given = f"n={n}, {'a window, ' * image}y_hat {y_hat is not None}, skip {skip is not None}"
        text = "is of a Linear, has an even n, and takes neither y_hat nor skip; leave geglu False"
        raise ValueError(f"{op}: a weight with geglu {text} (given: {given})")
    if window is not None:
        shape = window.output_shape(x.shape, n)
        if shape[2] < 1 or shape[3] < 1:
            raise ValueError(f"{op}: an input of {tuple(x.shape[2:])} is too small for {window}; pad it")
        if n % window.groups != 0:
            raise ValueError(f"{op}: groups={window.groups} does not divide the {n} output channels")
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: out_dtype={out_dtype} is not allowed; choose {', '.join(map(str, FLOAT_DTYPES))}")
    if y_hat is not None:
        _require_tensors(op, x, None, y_hat=y_hat)
        _require_shape(op, "y_hat", y_hat, shape, image)
    elif not write_out:
        raise ValueError(f"{op}: write_out=False leaves nothing without y_hat; give y_hat, or write_out=True")
    if skip is not None:
        _require_tensors(op, x, out_dtype, skip=skip)
        _require_shape(op, "skip", skip, shape, image)
    problem = _problem(op, x, out_dtype, y_hat, m=row_count(shape, image), n=n, k=k, window=window)
    _, _, bits, group_size, layout, geglu = weight
    return replace(problem, weight_bits=bits, group_size=group_size, layout=layout, geglu=geglu)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, score_scale: float) -> Problem:
    op = "attention"
    _require_tensors(op, q, None, q=q)
    _require_tensors(op, q, q.dtype, k=k, v=v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 3 or t.stride(-1) != 1:
            raise ValueError(f"{op}: {name} has {_text(t)}; expected [N, tokens, heads * width] with contiguous rows")
        _require_elements(op, name, t)
    samples, tokens, channels = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[2]) != (samples, channels):
        must = f"for q {tuple(q.shape)} both must be [{samples}, tokens, {channels}]"
        raise ValueError(f"{op}: k has {_text(k)} and v {_text(v)}; {must}")
    if heads < 1 or channels % heads != 0:
        raise ValueError(f"{op}: heads={heads} does not divide the {channels} columns of q")
    if not isfinite(score_scale):
        raise ValueError(f"{op}: score_scale={score_scale!r} is not allowed; give a finite number, as width ** -0.5")
    return _problem(op, q, q.dtype, m=samples * tokens, n=k.shape[1], k=channels // heads)


def _problem(op: str, x: Tensor, dtype: torch.dtype | None, state: Tensor | None = None, **fields: Any) -> Problem:
    state_dtype = None if state is None else state.dtype
    return Problem(op, x.device.type, capability(x.device), dtype, state_dtype, **fields)


def _text(t: Tensor) -> str:
    return f"shape {tuple(t.shape)}, {t.dtype}, strides {t.stride()}"


def _require_tensors(op: str, x: Tensor, dtype: torch.dtype | None, **tensors: Tensor | None) -> None:
    """Of this dtype, None: a floating one; on x's device."""
    allowed: tuple[Any, ...] = FLOAT_DTYPES if dtype is None else (dtype,)
    must = "allowed are float32, float16 and bfloat16; convert it" if dtype is None else f"it must be {dtype}"
    for name, t in tensors.items():
        if t is not None and t.dtype not in allowed:
            raise TypeError(f"{op}: {name} is {t.dtype}; {must}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, the first argument on {x.device}; move all to one device")


def _require_elements(op: str, name: str, t: Tensor) -> None:
    if t.numel() == 0:
        raise ValueError(f"{op}: {name} is empty ({_text(t)}); every size must be at least 1")


def _require_activation(op: str, name: str, t: Tensor, image: bool) -> None:
    if image:
        if t.ndim != 4:
            raise ValueError(f"{op}: {name} has {t.ndim} dimensions ({_text(t)}); expected an image [N, C, H, W]")
        _, c, h, w = t.shape
        # The strides as well: while it compiles for any size, torch 2.11 does not know the format of what was computed.
        if not t.is_contiguous(memory_format=torch.channels_last) and t.stride() != (c * h * w, 1, c * w, c):
            text = "convert it with .to(memory_format=torch.channels_last), or flatten inputs of Linears to [N, L, K]"
            raise ValueError(f"{op}: {name} is not channels_last ({_text(t)}); {text}")
    elif t.ndim not in (2, 3):
        expected = "expected [M, K] or [N, L, K]: flatten it first (4-D tensors are images)"
        raise ValueError(f"{op}: {name} has {t.ndim} dimensions ({_text(t)}); {expected}")
    elif not t.is_contiguous():
        raise ValueError(f"{op}: {name} is not contiguous ({_text(t)}); call .contiguous() first")
    _require_elements(op, name, t)


def _require_shape(op: str, name: str, t: Tensor, shape: Sequence[int], image: bool) -> None:
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; it must be {tuple(shape)}")
    _require_activation(op, name, t, image)


def _require_vector(op: str, name: str, t: Tensor | None, length: int) -> None:
    if t is not None and (tuple(t.shape) != (length,) or not t.is_contiguous()):
        raise ValueError(f"{op}: {name} has {_text(t)}; it must be a contiguous vector of length {length}")


def _require_rows(op: str, name: str, t: Tensor | None, rows: int, channels: int) -> None:
    if t is not None and (tuple(t.shape) != (rows, channels) or (t.stride(1) != 1 and channels > 1)):
        raise ValueError(f"{op}: {name} has {_text(t)}; it must be {(rows, channels)} with contiguous rows")


def _require_scale(op: str, x: Tensor, scale: Tensor, fits: bool, must: str, name: str = "scale") -> None:
    _require_tensors(op, x, torch.float32, **{name: scale})
    if scale.ndim != 1 or not scale.is_contiguous() or not fits:
        raise ValueError(f"{op}: {name} has {_text(scale)}; it must be 1-D {must}")


def _granularity_of(op: str, codes: Tensor, scale: Tensor, image: bool) -> str:
    samples, rows, count = codes.shape[0], row_count(codes.shape, image), scale.numel()
    if image:
        must = f"of length 1 or {samples} or {rows} (one for all, one per image, one per pixel)"
        _require_scale(op, codes, scale, count in (1, samples, rows), must)
    else:
        must = f"and its length divide the {rows} rows of codes (one for all, one per sample, one per row)"
        _require_scale(op, codes, scale, count > 0 and rows % count == 0, must)
    if count == 1:
        return "per_tensor"
    return "per_token" if count == rows and count != samples else "per_sample"


def _require_weight(op: str, x: Tensor, weight: PackedWeight, k: int) -> None:
    packed, scale, bits, group_size, layout, _ = weight
    check_bits(op, "weight.bits", bits)
    check_group_size(op, group_size)
    _require_tensors(op, x, packed.dtype, weight=packed)
    _require_tensors(op, x, torch.float32, weight_scale=scale)
    columns = () if group_size == -1 else (group_count(k, group_size),)
    if scale.ndim != 1 + len(columns) or tuple(scale.shape[1:]) != columns or not scale.is_contiguous():
        needs = f"group_size={group_size} with k={k} needs a contiguous [{', '.join(['N', *map(str, columns)])}]"
        raise ValueError(f"{op}: weight.scale has {_text(scale)}; {needs}")
    if layout == KPACK_V1:
        check_packed(op, packed, bits, weight.n, k)
