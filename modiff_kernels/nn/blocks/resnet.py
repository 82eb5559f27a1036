"""Fused residual blocks, and the projections of the time embedding that they share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels.nn.blocks.base import FusedBlock, Parts, is_untouched
from modiff_kernels.nn.blocks.steps import (
    PLAIN,
    GroupNorm,
    accumulate,
    initialize,
    initialize_layer,
    product,
    residual,
)
from modiff_kernels.nn.state_tensors import INITIALIZE, tensor_version


class FusedResnetBlock2D(FusedBlock):
    """out = conv2(silu(norm2(conv1(silu(norm1(x))) + time))) + (conv_shortcut(x) or x).

    A 1x1 shortcut adds its product onto the same y_hat as the second convolution, because only the sum of the two
    leaves the block: one state tensor less.
    """

    scalable = ("conv_shortcut",)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether the block computes exactly the equation above."""
        return (
            type(block.norm1) is nn.GroupNorm
            and type(block.norm2) is nn.GroupNorm
            and isinstance(block.nonlinearity, nn.SiLU)
            and block.time_embedding_norm == "default"
            and block.upsample is None
            and block.downsample is None
            and block.output_scale_factor == 1.0
            and not (block.training and block.dropout.p > 0)
            and is_untouched(block)
        )

    @staticmethod
    def layer_names(block: nn.Module) -> list[str]:
        """The convolutions."""
        return ["conv1", "conv2"] + ([] if block.conv_shortcut is None else ["conv_shortcut"])

    def build(self, block: nn.Module, parts: Parts) -> None:
        self.norm1 = block.norm1
        self.conv1 = parts.conv2d("conv1")
        self.time_emb_proj = block.time_emb_proj
        self.norm2 = block.norm2
        self.conv2 = parts.conv2d("conv2")
        self.prologue1, self.prologue2 = GroupNorm(block.norm1, silu=True), GroupNorm(block.norm2, silu=True)
        self.conv_shortcut = None
        self.skip_time_act = block.skip_time_act
        self.time_projections: TimeProjections | None = None
        if block.conv_shortcut is not None:
            shortcut = parts.conv2d("conv_shortcut")
            if shortcut.mode == "modulated":
                del self.state.outputs[shortcut.name]
                shortcut.output = self.conv2.output
            self.conv_shortcut = shortcut

    def run(self, x: Tensor, temb: Tensor | None = None, *unused: Any) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        dtype = x.dtype
        shift = self._time_shift(temb, x.shape[0])
        h = product(self.conv1, self.prologue1, x, dtype, write_out=False)
        if self.conv_shortcut is None:
            return product(self.conv2, self.prologue2, h, dtype, shift=shift, skip=x)
        if self.conv2.mode == "quantized":
            skip = product(self.conv_shortcut, PLAIN, self.conv_shortcut.scaled(x), dtype)
            return product(self.conv2, self.prologue2, h, dtype, shift=shift, skip=skip)
        if self.state.action is INITIALIZE:
            return self._initialize_both(x, self.prologue2.apply(h, shift))
        product(self.conv2, self.prologue2, h, dtype, shift=shift, write_out=False)
        codes = residual(self.conv_shortcut, PLAIN, self.conv_shortcut.scaled(x), dtype)
        return accumulate(self.conv_shortcut, codes, None, dtype)

    def _initialize_both(self, x: Tensor, h: Tensor) -> Tensor:
        """conv2(h) + conv_shortcut(x) on their common y_hat."""
        out = initialize_layer(self.conv2, h)
        layer, y_hat = self.conv_shortcut, self.conv2.output.slots[self.state.context_name].tensor
        x_hat = layer.edge.ensure(x.shape, x.dtype, x.device, layer.memory_format)
        shortcut = torch.empty_like(y_hat)
        out = initialize(layer, layer.scaled(x), x_hat, shortcut, skip=out)
        y_hat += shortcut
        return out

    def _time_shift(self, temb: Tensor | None, samples: int) -> Tensor | None:
        """The time embedding's projection [N, C], or None."""
        if temb is None:
            return None
        if self.time_projections is not None and not torch.compiler.is_compiling():
            shift = self.time_projections.of(self, temb)
        elif self.time_emb_proj is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
        else:
            shift = temb
        return shift.expand(samples, -1).contiguous()


class TimeProjections:
    """silu and the projections of one time embedding for many blocks, as one product in the first block that asks.

    The weights are stacked in a copy, made again when one of them has changed.
    """

    def __init__(self, blocks: list[FusedResnetBlock2D]) -> None:
        self.blocks = blocks
        self.index = {id(block): i for i, block in enumerate(blocks)}
        self.widths = [block.time_emb_proj.out_features for block in blocks]
        self.stamp: list[tuple[Tensor, int]] = []
        self.temb: Tensor | None = None
        self.temb_version = 0
        self.shifts: list[Tensor] = []

    @staticmethod
    def share(blocks: list[FusedResnetBlock2D]) -> None:
        """Give blocks of one kind (same embedding width, with or without bias, same activation) common projections."""
        kinds: dict[tuple[Any, ...], list[FusedResnetBlock2D]] = {}
        for block in blocks:
            linear = block.time_emb_proj
            kinds.setdefault((linear.in_features, linear.bias is None, block.skip_time_act), []).append(block)
        for kind in kinds.values():
            if len(kind) > 1:
                shared = TimeProjections(kind)
                for block in kind:
                    block.time_projections = shared

    def of(self, block: FusedResnetBlock2D, temb: Tensor) -> Tensor:
        """time_emb_proj(silu(temb)) of `block`: [N, C], possibly not contiguous."""
        if temb is not self.temb or tensor_version(temb) != self.temb_version:
            self._project(temb, block.skip_time_act)
        return self.shifts[self.index[id(block)]]

    def _project(self, temb: Tensor, skip_time_act: bool) -> None:
        linears = [block.time_emb_proj for block in self.blocks]
        parameters = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
        if len(self.stamp) != len(parameters) or any(
            p is not old or tensor_version(p) != version for p, (old, version) in zip(parameters, self.stamp)
        ):
            self.weight = torch.cat([linear.weight.detach() for linear in linears])
            biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
            self.bias = torch.cat(biases) if biases else None
            self.stamp = [(p, tensor_version(p)) for p in parameters]
        projected = F.linear(temb if skip_time_act else F.silu(temb), self.weight, self.bias)
        self.shifts = list(projected.split(self.widths, dim=1))
        self.temb, self.temb_version = temb, tensor_version(temb)
