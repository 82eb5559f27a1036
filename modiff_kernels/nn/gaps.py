"""Scales of residuals in runs whose schedule leaves calls out."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from modiff_kernels.nn.state_tensors import Edge, Slot


class Gaps:
    """The gap of an edge is the number of calls from its last update to this one, over which its residual has grown.

    A static scale (of one call) is multiplied by the gap, a delayed one (of the calls before the last update) by the
    ratio of the gaps. All of this happens around a call, never inside, and the factor is a tensor: compiled code sees
    no number that changes, so it is not compiled again for each gap, and one graph serves equal factors.
    """

    def __init__(self) -> None:
        self._factors: dict[tuple[float, torch.device], Tensor] = {}
        self._in_use: frozenset[float] = frozenset()

    def begin_call(self, edges: "Iterable[Edge]", context: str, call: int) -> None:
        """Set the factors of `call`."""
        values = set()
        for edge, slot in _scaled(edges, context):
            gap = max(call - slot.call, 1)
            value = gap if edge.scale_mode == "static" else gap / slot.gap
            factor = self._factors.get((value, slot.device))
            if factor is None:
                factor = torch.full((1,), value, dtype=torch.float32, device=slot.device)
                self._factors[value, slot.device] = factor
            slot.factor = factor
            values.add(value)
        self._in_use = frozenset(values)

    def kind_of_call(self, edges: "Iterable[Edge]", context: str) -> tuple[frozenset[float], bool]:
        """The factors of this call, and whether a delayed scale is yet to come: the first update is dynamic."""
        scaled = _scaled(edges, context)
        return self._in_use, any(edge.scale_mode == "delayed" and slot.absmax is None for edge, slot in scaled)

    def end_call(self, edges: "Iterable[Edge]", context: str, call: int) -> None:
        """Note which edges `call` has updated."""
        for _, slot in _scaled(edges, context):
            if slot.updated:
                slot.gap, slot.call = max(call - slot.call, 1), call
                slot.updated = False


def _scaled(edges: "Iterable[Edge]", context: str) -> "Iterator[tuple[Edge, Slot]]":
    """Edges with a static or delayed scale, and their slots in this run."""
    for edge in edges:
        slot = edge.slots.get(context)
        if edge.scale_mode != "dynamic" and slot is not None and slot.written:
            yield edge, slot
