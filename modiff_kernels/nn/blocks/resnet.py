"""Fused residual blocks, and the projections of the time embedding, as one product for all of them."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels.nn import step
from modiff_kernels.nn.blocks.base import ALONE, FusedBlock, Parts, Role, group_norm, has_no_hook, is_untouched
from modiff_kernels.nn.blocks.concatenation import Concatenation
from modiff_kernels.nn.cache import ROWS, one_row, tensor_version
from modiff_kernels.nn.tensors import ModulationState
from modiff_kernels.ops import IDENTITY, Prologue


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
        self.for_compiled: list[Tensor] = []  # where the table has them

    @staticmethod
    def share(blocks: list[Any]) -> None:
        """Give blocks of one kind (same embedding width, bias or none, activation and use) common projections."""
        kinds: dict[tuple[Any, ...], list[Any]] = {}
        for block in blocks:
            linear = block.time_emb_proj
            form = linear.in_features, linear.bias is None, block.skip_time_act, block.scale_shift
            kinds.setdefault(form, []).append(block)
        for (_, _, skip_time_act, scale_shift), kind in kinds.items():
            norms = [block.norm2 for block in kind if scale_shift]
            shared = TimeProjections([block.time_emb_proj for block in kind], norms, skip_time_act, kind[0].state)
            for i, block in enumerate(kind):
                block.time_projections, block.time_index = shared, i

    def covers(self, linear: nn.Module) -> bool:
        """Whether `linear` is one of those, with nothing put on it; a LoRA, for one, puts another in its place."""
        return id(linear) in self._index and has_no_hook(linear)

    def of_table(self, index: int, linear: nn.Module, temb: Tensor) -> list[Tensor] | None:
        """As `of`, for compiled code: of block `index`, if the table has loaded them for it; else None."""
        table = self._state.time_table
        if table is None or temb is not table.for_compiled or linear is not self._linears[index]:
            return None
        return self.for_compiled[index :: len(self._linears)]

    def of(self, linear: nn.Linear, temb: Tensor) -> list[Tensor]:
        """[linear(silu(temb))], or gamma and beta of `scaled_norm`: [N, C], [1, C] where rows are equal; contiguous."""
        table = self._state.time_table
        call = 0 if table is None else table.call_number  # where there is a table, embeddings outlive their call
        source, *known, parts = self._last
        if temb is not source or known != [tensor_version(temb), call]:
            parts = self.project(temb)
            self._last = temb, tensor_version(temb), call, parts
        return parts[self._index[id(linear)] :: len(self._linears)]

    def project(self, temb: Tensor) -> list[Tensor]:
        """For all blocks, scales before shifts."""
        self._stack_weights()
        table = self._state.time_table
        known = None if table is None else table.projections(self, temb)
        if table is None or known is None:
            return self._parts(temb)
        weight, parts = known
        if weight is not self._weight:
            parts = [one_row(part) for part in self._parts(temb[:1].expand(ROWS, -1))]
            table.keep_projections(self, self._weight, parts)
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


class FusedResnetBlock2D(FusedBlock):
    """out = conv2(silu(norm2(conv1(silu(norm1(x))) + time))) + (conv_shortcut(x) or x), or with norm2(conv1(...)) *
    (1 + scale) + time: a gamma and a beta for every sample. A 1x1 shortcut adds its product onto the y_hat of conv2,
    because only the sum of the two leaves the block: one state tensor less."""

    stands_for = "resnet.ResnetBlock2D"
    takes = "input_tensor"
    layers: ClassVar = {
        "conv1": Role("group_norm", silu=True),
        "conv2": Role("group_norm", silu=True, adds=True),
        "conv_shortcut": ALONE,
    }
    scalable = ("conv_shortcut",)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        return (
            type(block.norm1) is type(block.norm2) is nn.GroupNorm
            and isinstance(block.nonlinearity, nn.SiLU)
            and block.norm2.affine
            and block.upsample is block.downsample is None
            and block.output_scale_factor == 1.0
            and not (block.training and block.dropout.p > 0)
            and is_untouched(block)
        )

    def build(self, block: nn.Module, parts: Parts) -> None:
        self.norm1 = block.norm1
        self.conv1 = parts.layer("conv1")
        self.time_emb_proj = block.time_emb_proj
        self.norm2 = block.norm2
        self.conv2 = parts.layer("conv2")
        self.conv_shortcut = None
        self.skip_time_act, self.scale_shift = block.skip_time_act, block.time_embedding_norm == "scale_shift"
        self.takes_time = self.scale_shift or block.time_embedding_norm == "default"  # a VAE has "group"
        self.time_projections: TimeProjections | None = None
        self.time_index = 0  # of this block there
        if block.conv_shortcut is not None:
            self.conv_shortcut = parts.layer("conv_shortcut")
            if self.conv_shortcut.mode == "modulated":
                self.conv_shortcut.add_onto(self.conv2.output)

    def run(self, x: Tensor, temb: Tensor | None = None, *unused: Any, **unused_too: Any) -> Tensor:
        dtype, further, read = x.dtype, None, IDENTITY
        conv1, conv2, shortcut = self.conv1, self.conv2, self.conv_shortcut
        if type(x) is Concatenation:
            if shortcut is None or shortcut.input_scale is not None:
                x = x.whole()
            else:
                x, further = x.parts
                read = Prologue(further=further)
        x = x.contiguous(memory_format=torch.channels_last)
        h = step.run(conv1, group_norm(self.norm1, True, further), x, dtype, write_out=False)
        prologue = self._second_norm(temb if self.takes_time else None, x.shape[0])
        if shortcut is None:
            return step.run(conv2, prologue, h, dtype, skip=x)
        if conv2.mode == "quantized":
            skip = step.run(shortcut, read, shortcut.scaled(x), dtype)
            return step.run(conv2, prologue, h, dtype, skip=skip)
        step.run(conv2, prologue, h, dtype, write_out=False)
        return step.run(shortcut, read, shortcut.scaled(x), dtype)

    def _second_norm(self, temb: Tensor | None, samples: int) -> Prologue:
        norm = group_norm(self.norm2, True)
        if temb is None:
            if self.scale_shift:
                raise ValueError("time_embedding_norm='scale_shift' needs a time embedding, but temb is None; pass one")
            return norm
        shared, projection = self.time_projections, self.time_emb_proj
        parts = None
        if shared is not None and torch.compiler.is_compiling():
            parts = shared.of_table(self.time_index, projection, temb)
        elif shared is not None and shared.covers(projection):
            parts = shared.of(projection, temb)
        if parts is None:
            time = temb if projection is None else projection(temb if self.skip_time_act else F.silu(temb))
            parts = scaled_norm(time, norm.gamma, norm.beta) if self.scale_shift else [time]
        rows = [part.expand(samples, -1) for part in parts]
        return norm._replace(gamma=rows[0], beta=rows[1]) if self.scale_shift else norm._replace(shift=rows[0])
