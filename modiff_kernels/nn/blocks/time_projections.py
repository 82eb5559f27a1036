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
    linears: `time_emb_proj` of the blocks. norms: what they scale and shift, or none. skip_time_act: no silu. The
    weights are stacked in a copy, made again when one of them has changed, scales before shifts. What follows from the
    timestep alone is kept in the state's time table."""

    def __init__(
        self, linears: list[nn.Linear], norms: list[nn.GroupNorm], skip_time_act: bool, state: ModulationState
    ) -> None:
        self.modules = [*linears, *norms]
        self._linears, self._norms, self._halves = linears, norms, 2 if norms else 1
        self._skip_time_act = skip_time_act
        self._state = state
        self._index = {id(linear): i for i, linear in enumerate(linears)}
        self._widths = [linear.out_features // self._halves for linear in linears]
        self._made_at = -1  # of the weights, as the state counts their changes
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._last: tuple[Tensor | None, int, int, list[Tensor]] = (None, 0, 0, [])

    @staticmethod
    def share(blocks: list[Any]) -> None:
        """Give `FusedResnetBlock2D`s of one kind (same embedding width, with or without bias, same activation and use)
        common projections."""
        kinds: dict[tuple[Any, ...], list[Any]] = {}
        for block in blocks:
            linear = block.time_emb_proj
            form = linear.in_features, linear.bias is None, block.skip_time_act, block.scale_shift
            kinds.setdefault(form, []).append(block)
        for (_, _, skip_time_act, scale_shift), kind in kinds.items():
            norms = [block.norm2 for block in kind if scale_shift]
            shared = TimeProjections([block.time_emb_proj for block in kind], norms, skip_time_act, kind[0].state)
            for block in kind:
                block.time_projections = shared

    def covers(self, linear: nn.Module) -> bool:
        """Whether `linear` is one of those, with nothing put on it; a LoRA, for one, puts another in its place."""
        return id(linear) in self._index and has_no_hook(linear)

    def of(self, linear: nn.Linear, temb: Tensor) -> list[Tensor]:
        """[linear(silu(temb))], or gamma and beta of `scaled_norm`: [N, C], or [1, C] where all rows are the same; rows
        are contiguous."""
        table = self._state.time_table
        call = 0 if table is None else table.call_number  # where there is a table, embeddings outlive their call
        source, *known, parts = self._last
        if temb is not source or known != [tensor_version(temb), call]:
            parts = self._project(temb)
            self._last = temb, tensor_version(temb), call, parts
        return parts[self._index[id(linear)] :: len(self._linears)]

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
        whole = scaled_norm(projected, self._gamma, self._beta) if self._norms else [projected]
        return [part for tensor in whole for part in tensor.split(self._widths, dim=1)]

    def _stack_weights(self) -> None:
        """Bring the stacked weights up to date; new tensors where something has changed."""
        if self._made_at == self._state.weight_changes:
            return
        self._made_at = self._state.weight_changes
        self._weight = self._stacked([linear.weight for linear in self._linears])
        biases = [linear.bias for linear in self._linears if linear.bias is not None]
        self._bias = self._stacked(biases) if biases else None
        if self._norms:
            self._gamma = torch.cat([norm.weight.detach() for norm in self._norms])
            self._beta = torch.cat([norm.bias.detach() for norm in self._norms])

    def _stacked(self, parts: list[Any]) -> Tensor:
        halves = self._halves
        return torch.cat([part.detach().chunk(halves)[half] for half in range(halves) for part in parts])


def scaled_norm(projected: Tensor, gamma: Tensor | None, beta: Tensor | None) -> list[Tensor]:
    """gamma and beta, of every sample, of norm(h) * (1 + scale) + shift with [scale, shift] = projected [N, 2C]."""
    scale, shift = projected.chunk(2, dim=1)
    factor = scale + 1
    return [factor * gamma, torch.addcmul(shift, factor, beta)]
