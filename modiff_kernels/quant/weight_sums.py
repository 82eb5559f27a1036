"""Sums of a weight's codes, which zero points are multiplied with: made once per weight and kept beside it."""

from typing import Any

import torch
from torch import Tensor

from .affine import expand_weight_scale
from .operands import PackedWeight
from .packing import unpack

KEPT = "_modiff_sums"  # attribute of a packed weight: its sums by taps, with what they were made of


def weight_sums(weight: PackedWeight, k: int, taps: int) -> Tensor:
    """Of a weight [N, k] in kpack_v1 the sums [N, taps] over the codes of each tap, int32; with groups along K of codes
    times their scales, float32. They live as long as `weight.packed` and are made again after it was written to; a
    graph that captures the first call makes them in every replay, as only a replay would fill what is kept."""
    packed, scale = weight.packed, weight.scale
    kept, made_of = packed.__dict__.setdefault(KEPT, {}), (_version(packed), _version(scale))
    held: Any = kept.get(taps)
    if held is not None and held[0] is scale and held[1] == made_of:
        return held[2]
    codes = unpack(packed, weight.bits, k)
    grouped = weight.group_size != -1
    terms = codes * expand_weight_scale(scale, k, weight.group_size) if grouped else codes
    sums = terms.view(weight.n, taps, -1).sum(-1, dtype=torch.float32 if grouped else torch.int32)
    if not (packed.is_cuda and torch.cuda.is_current_stream_capturing()):
        kept[taps] = scale, made_of, sums
    return sums


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
