"""Fused residual blocks."""

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
from modiff_kernels.nn.blocks.time_projections import TimeProjections
from modiff_kernels.nn.state_tensors import INITIALIZE


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
        shared = self.time_projections
        if shared is not None and shared.covers(self.time_emb_proj) and not torch.compiler.is_compiling():
            shift = shared.of(self.time_emb_proj, temb)
        elif self.time_emb_proj is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
        else:
            shift = temb
        return shift.expand(samples, -1).contiguous()
