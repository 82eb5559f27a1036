"""Compiled CUDA kernels (csrc/cuda) for NVIDIA GPUs from sm_80 (A100) on: the quantising ops.

The library holds raw kernels in the private namespace `modiff_cuda`; this file gives them the shape of the ops. It is
built where nvcc is found and loads with any torch, also one without CUDA. Integer products are not in it; those of the
backend `triton` read the same codes and weights.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.packing import KPACK_V1, check_layout
from . import Kernel

NAME = "cuda"

_LEAST_CAPABILITY = (8, 0)
_LIBRARY = Path(__file__).resolve().parent.parent / "_lib" / "libmodiff_cuda.so"
_GRANULARITY = {"per_tensor": 0, "per_sample": 1, "per_token": 2, "per_block": 3}  # csrc/common/problem.h
_IDENTITY, _GROUP_NORM, _LAYER_NORM, _GEGLU = range(4)

MAX_ROW = 8192
"""Channels of a row that a thread block holds in registers: csrc/cuda/common/quantize_plan.h kMostRowChannels."""

MAX_ROWS = 1 << 31
MAX_ELEMENTS = 1 << 36  # 2^31 blocks of at least 32 elements: one row of 4 vectors


@lru_cache(maxsize=1)
def why_not_loaded() -> str | None:
    """Why the library is not there, or None. It is loaded at the first call."""
    if not _LIBRARY.exists():
        return (
            f"{_LIBRARY.name} was not built: no nvcc was found at installation, or MODIFF_CUDA=OFF or "
            "MODIFF_SKIP_BUILD=1 was set"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} does not load: {error}"
    return None


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why these kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return why_not_loaded() or "torch sees no CUDA device"
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if max(capabilities) < _LEAST_CAPABILITY:
        found = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
        return f"compute capability {found}: the kernels need 8.0 (A100) or newer"
    return why_not_loaded()


def preferred_layout(problem: Any) -> str:
    """The portable layout, which every backend on CUDA reads."""
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
        check_layout("prepare_weight (cuda)", layout)
    return weight_packed


def quantize_op() -> Any:
    """The op of the library, which `unavailable` has loaded; tests put an emulation in its place."""
    return torch.ops.modiff_cuda.quantize.default


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
    return quantize_op()(
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
        _GRANULARITY[granularity],
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


def _why_not(problem: Any) -> str | None:
    if problem.capability is not None and problem.capability < _LEAST_CAPABILITY:
        return f"compute capability {problem.capability[0]}.{problem.capability[1]}: the kernels need 8.0 or newer"
    if problem.m >= MAX_ROWS:
        return f"m={problem.m} rows; they are counted in 31 bits"
    if problem.m * problem.k >= MAX_ELEMENTS:
        return f"{problem.m} x {problem.k} elements may take more blocks than a launch has; less than 2^36 always fit"
    whole_rows = problem.granularity == "per_token" or problem.op.startswith("layer_norm")
    if whole_rows and problem.k > MAX_ROW:
        return f"{problem.k} channels: rows are held in registers, of at most {MAX_ROW} channels"
    return None


KERNELS: dict[str, Kernel] = {
    fn.__name__: Kernel(fn, _why_not)
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
