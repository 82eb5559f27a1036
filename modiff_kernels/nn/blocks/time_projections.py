"""Projections of the time embedding, as one product for all residual blocks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels.nn.blocks.base import has_no_hook
from modiff_kernels.nn.cache import ROWS, one_row, tensor_version
from modiff_kernels.nn.tensors import ModulationState


class TimeProjections:
    """silu and the projections of one time embedding for many blocks, as one product in the first block that asks.
    linears: `time_emb_proj` of the blocks. skip_time_act: no silu. The weights are stacked in a copy, made again when
    one of them has changed. What follows from the timestep alone is kept in the state's time table."""

    def __init__(self, linears: list[nn.Linear], skip_time_act: bool, state: ModulationState) -> None:
        self.modules = linears
        self._skip_time_act = skip_time_act
        self._state = state
        self._index = {id(linear): i for i, linear in enumerate(linears)}
        self._widths = [linear.out_features for linear in linears]
        self._made_at = -1  # of the weights, as the state counts their changes
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._last: tuple[Tensor | None, int, int, list[Tensor]] = (None, 0, 0, [])

    @staticmethod
    def share(blocks: list[Any]) -> None:
        """Give `FusedResnetBlock2D`s of one kind (same embedding width, with or without bias, same activation) common
        projections."""
        kinds: dict[tuple[Any, ...], list[Any]] = {}
        for block in blocks:
            linear = block.time_emb_proj
            kinds.setdefault((linear.in_features, linear.bias is None, block.skip_time_act), []).append(block)
        for (_, _, skip_time_act), kind in kinds.items():
            shared = TimeProjections([block.time_emb_proj for block in kind], skip_time_act, kind[0].state)
            for block in kind:
                block.time_projections = shared

    def covers(self, linear: nn.Module) -> bool:
        """Whether `linear` is one of those, with nothing put on it; a LoRA, for one, puts another in its place."""
        return id(linear) in self._index and has_no_hook(linear)

    def of(self, linear: nn.Linear, temb: Tensor) -> Tensor:
        """linear(silu(temb)): [N, C], or [1, C] where all rows are the same; possibly not contiguous."""
        table = self._state.time_table
        call = 0 if table is None else table.call_number  # where there is a table, embeddings outlive their call
        source, *known, parts = self._last
        if temb is not source or known != [tensor_version(temb), call]:
            parts = self._project(temb)
            self._last = temb, tensor_version(temb), call, parts
        return parts[self._index[id(linear)]]

    def _project(self, temb: Tensor) -> list[Tensor]:
        self._stack_weights()
        table = self._state.time_table
        entry = None if table is None else table.entry_of(temb)
        if entry is None:
            return self._parts(temb)
        weight, parts = entry.projections.get(id(self), (None, []))
        if weight is not self._weight:
            parts = [one_row(part) for part in self._parts(temb[:1].expand(ROWS, -1))]
            entry.projections[id(self)] = self._weight, parts
        return parts

    def _parts(self, temb: Tensor) -> list[Tensor]:
        projected = F.linear(temb if self._skip_time_act else F.silu(temb), self._weight, self._bias)
        return list(projected.split(self._widths, dim=1))

    def _stack_weights(self) -> None:
        """Bring the stacked weights up to date; new tensors where something has changed."""
        if self._made_at == self._state.weight_changes:
            return
        self._made_at = self._state.weight_changes
        self._weight = torch.cat([linear.weight.detach() for linear in self.modules])
        biases = [linear.bias.detach() for linear in self.modules if linear.bias is not None]
        self._bias = torch.cat(biases) if biases else None
