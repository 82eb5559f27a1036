"""The quantising ops: csrc/cuda/common/quantize*.h in the shape of ops/schema.py.

Arguments are already checked. Nothing here reads the device.
"""

from typing import Any

from torch import Tensor

from . import library

GRANULARITY = {"per_tensor": 0, "per_sample": 1, "per_token": 2, "per_block": 3}  # csrc/common/problem.h
_IDENTITY, _GROUP_NORM, _LAYER_NORM, _GEGLU = range(4)

MAX_ROW = 8192
"""Channels of a row that a thread block holds in registers: csrc/cuda/common/quantize_plan.h kMostRowChannels."""

MAX_ROWS = 1 << 31
MAX_ELEMENTS = 1 << 36  # 2^31 blocks of at least 32 elements: one row of 4 vectors


def _quantize(
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
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.ndim == 4:
        samples, channels, height, width = x.shape
        rows = height * width
    else:
        samples, channels = x.shape[0], x.shape[-1] // (2 if prologue == _GEGLU else 1)
        rows = x.shape[1:-1].numel()
    return library.quantize_op()(
        x,
        prologue,
        gamma,
        beta,
        shift,
        num_groups,
        eps,
        silu,
        x_hat,
        affine,
        act_bits,
        GRANULARITY[granularity],
        clip_ratio,
        scale,
        packed,
        samples,
        rows,
        channels,
    )


def quantize_residual(x, x_hat, scale, act_bits, granularity, clip_ratio=1.0, packed=False):
    return _quantize(x, x_hat, scale, act_bits, granularity, clip_ratio=clip_ratio, packed=packed)


def group_norm_silu_quantize_residual(
    h, shift, gamma, beta, num_groups, eps, silu, x_hat, scale, act_bits, granularity, clip_ratio=1.0
):
    return _quantize(
        h, x_hat, scale, act_bits, granularity, prologue=_GROUP_NORM,
        gamma=gamma, beta=beta, shift=shift, num_groups=num_groups, eps=eps, silu=silu, clip_ratio=clip_ratio,
    )  # fmt: skip


def layer_norm_quantize_residual(h, gamma, beta, eps, x_hat, scale, act_bits, granularity, clip_ratio=1.0):
    return _quantize(
        h, x_hat, scale, act_bits, granularity, prologue=_LAYER_NORM,
        gamma=gamma, beta=beta, eps=eps, clip_ratio=clip_ratio,
    )  # fmt: skip


def geglu_quantize_residual(h, x_hat, scale, act_bits, granularity, clip_ratio=1.0):
    return _quantize(h, x_hat, scale, act_bits, granularity, prologue=_GEGLU, clip_ratio=clip_ratio)


def quantize_activation(x, act_bits, granularity, affine=True):
    return _quantize(x, None, None, act_bits, granularity, affine=affine)


def group_norm_silu_quantize_activation(
    h, shift, gamma, beta, num_groups, eps, silu, act_bits, granularity, affine=True
):
    return _quantize(
        h, None, None, act_bits, granularity, prologue=_GROUP_NORM,
        gamma=gamma, beta=beta, shift=shift, num_groups=num_groups, eps=eps, silu=silu, affine=affine,
    )  # fmt: skip


def layer_norm_quantize_activation(h, gamma, beta, eps, act_bits, granularity, affine=True):
    return _quantize(
        h, None, None, act_bits, granularity, prologue=_LAYER_NORM, gamma=gamma, beta=beta, eps=eps, affine=affine
    )


def geglu_quantize_activation(h, act_bits, granularity, affine=True):
    return _quantize(h, None, None, act_bits, granularity, prologue=_GEGLU, affine=affine)


def why_not(problem: Any) -> str | None:
    """Why these kernels cannot solve `problem`, None if they can."""
    if problem.m >= MAX_ROWS:
        return f"m={problem.m} rows; they are counted in 31 bits"
    if problem.m * problem.k >= MAX_ELEMENTS:
        return f"{problem.m} x {problem.k} elements may take more blocks than a launch has; less than 2^36 always fit"
    whole_rows = problem.granularity == "per_token" or problem.op.startswith("layer_norm")
    if whole_rows and problem.k > MAX_ROW:
        return f"{problem.k} channels: rows are held in registers, of at most {MAX_ROW} channels"
    return None


QUANTIZING_KERNELS = {
    fn.__name__: fn
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
}
