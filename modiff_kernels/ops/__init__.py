"""The ops, as functions and as torch ops `torch.ops.modiff.*`; see `schema` for their contracts and `dispatch` for
backends.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .dispatch import BackendUnavailable
from .problem import Problem, capability
from .schema import (
    accumulate_conv2d,
    accumulate_linear,
    attention,
    geglu_quantize_activation,
    geglu_quantize_residual,
    group_norm_silu_quantize_activation,
    group_norm_silu_quantize_residual,
    initialize_conv2d,
    initialize_linear,
    layer_norm_quantize_activation,
    layer_norm_quantize_residual,
    modulated_conv2d,
    modulated_linear,
    pack_weight,
    quantize_activation,
    quantize_residual,
    quantized_conv2d,
    quantized_linear,
    unpack_weight,
)

__all__ = [
    "BackendUnavailable",
    "Problem",
    "accumulate_conv2d",
    "accumulate_linear",
    "attention",
    "dispatch",
    "geglu_quantize_activation",
    "geglu_quantize_residual",
    "group_norm_silu_quantize_activation",
    "group_norm_silu_quantize_residual",
    "initialize_conv2d",
    "initialize_linear",
    "layer_norm_quantize_activation",
    "layer_norm_quantize_residual",
    "modulated_conv2d",
    "modulated_linear",
    "pack_weight",
    "preferred_layout",
    "prepare_weight",
    "quantize_activation",
    "quantize_residual",
    "quantized_conv2d",
    "quantized_linear",
    "unpack_weight",
]


def preferred_layout(
    op: str,
    device: torch.device | str,
    *,
    n: int,
    k: int,
    weight_bits: int,
    group_size: int = -1,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    act_bits: int = 8,
    granularity: str = "per_sample",
    kernel_size: Sequence[int] | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    m: int = 0,
    backend: str = "auto",
) -> str:
    """The weight layout to store a layer's weight in, so that `op` ("modulated_linear", ...) finds its best backend.

    Give the layer's sizes and formats as they will be at run time; `k` is r * s * c_in / groups for a conv, and m = 0
    says that the number of rows is not known yet. Convert with `prepare_weight`. Raises BackendUnavailable if no
    backend fits.
    """
    device = torch.device(device)
    problem = Problem(
        op=op,
        device_type=device.type,
        capability=capability(device),
        dtype=dtype,
        state_dtype=state_dtype,
        m=m,
        n=n,
        k=k,
        kernel_size=None if kernel_size is None else (kernel_size[0], kernel_size[1]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
        act_bits=act_bits,
        weight_bits=weight_bits,
        group_size=group_size,
        granularity=granularity,
    )
    return dispatch.preferred_layout(problem, backend)


def prepare_weight(
    weight_packed: Tensor,
    weight_bits: int,
    n: int,
    k: int,
    layout_from: str = "kpack_v1",
    layout_to: str = "kpack_v1",
    kernel_size: Sequence[int] = (1, 1),
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convert a weight [n, k] to another layout, by the first backend of the device (or `backend`) that has it.

    kernel_size and groups: of the conv the weight belongs to. Returns `weight_packed` itself if the layouts are equal.
    Raises ValueError if no backend makes the layout.
    """
    if layout_from == layout_to:
        return weight_packed
    arguments = (weight_bits, n, k, layout_from, layout_to, (kernel_size[0], kernel_size[1]), groups)
    return dispatch.prepare_weight(weight_packed, layout_to, arguments, backend)
