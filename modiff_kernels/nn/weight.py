"""Packed weights of layers: made from codes in the layout that the layer's backend likes best, alone or stacked."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from modiff_kernels import ops
from modiff_kernels.ops import PackedWeight, dispatch
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.calibrated import QuantizedWeight
from modiff_kernels.quant.packing import KPACK_V1


def placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What stands for a float weight of which there are codes alone: one value in memory."""
    return torch.zeros((1,) * len(shape), dtype=dtype, device=device).expand(tuple(shape))


def pack(weight: QuantizedWeight, problem: Problem, backend: str) -> PackedWeight:
    """The storage of `weight` for products like `problem`. Raises BackendUnavailable if nothing solves them."""
    packed = PackedWeight(ops.pack_weight(weight.codes, weight.bits), weight.scale, weight.bits, weight.group_size)
    return ops.prepare_weight(packed, problem.k, problem.window, ops.preferred_layout(problem, backend))


def moved(weight: PackedWeight, problem: Problem, backend: str, device: torch.device) -> PackedWeight:
    """`weight` on the `device` of products like `problem`, without geglu."""
    portable = ops.prepare_weight(without_geglu(weight), problem.k, problem.window, KPACK_V1)
    there = portable._replace(packed=portable.packed.to(device), scale=portable.scale.to(device))
    return ops.prepare_weight(there, problem.k, problem.window, ops.preferred_layout(problem, backend))


def with_geglu(weight: PackedWeight, problem: Problem, backend: str) -> PackedWeight:
    """`weight` of values and then gates with the two in turn and with `geglu`, if the backend of products like
    `problem` has GEGLU in their epilogue; else itself."""
    chosen = dispatch.select(replace(problem, geglu=False), backend).backend
    if weight.geglu or dispatch.why_not(replace(problem, geglu=True), chosen) is not None:
        return weight
    return weight._replace(packed=interleaved(weight.packed), scale=interleaved(weight.scale), geglu=True)


def without_geglu(weight: PackedWeight) -> PackedWeight:
    """`weight` with values and then gates."""
    if not weight.geglu:
        return weight
    apart = [torch.cat((rows[::2], rows[1::2])) for rows in (weight.packed, weight.scale)]
    return weight._replace(packed=apart[0], scale=apart[1], geglu=False)


def interleaved(rows: Tensor) -> Tensor:
    """`rows`, values and then gates, in pairs of a value and its gate."""
    return torch.stack(rows.chunk(2), dim=1).flatten(0, 1)


def codes_of(weight: PackedWeight, problem: Problem) -> QuantizedWeight:
    """What `pack` made `weight` of."""
    weight = without_geglu(weight)
    packed = ops.prepare_weight(weight, problem.k, problem.window, KPACK_V1).packed
    codes = ops.unpack_weight(packed, weight.bits, problem.n, problem.k)
    return QuantizedWeight(codes, weight.scale, weight.bits, weight.group_size)


def stack(weights: Sequence[PackedWeight], k: int) -> PackedWeight:
    """Weights of Linears of one k, format and layout as one, along the output channels."""
    portable = [ops.prepare_weight(weight, k, None, KPACK_V1) for weight in weights]
    scale = torch.cat([weight.scale for weight in weights])
    packed = portable[0]._replace(packed=torch.cat([weight.packed for weight in portable]), scale=scale)
    return ops.prepare_weight(packed, k, None, weights[0].layout)


def parts_of(stacked: PackedWeight, weights: Sequence[PackedWeight]) -> list[PackedWeight]:
    """`weights`, which `stacked` is made of, as views of it where the layout allows it: nothing is stored twice."""
    flat = [weight.packed.flatten() for weight in weights]
    if not torch.equal(torch.cat(flat), stacked.packed.flatten()):
        return list(weights)
    views = stacked.packed.flatten().split([len(part) for part in flat])
    return [weight._replace(packed=view.view(weight.packed.shape)) for weight, view in zip(weights, views)]
