"""Fused residual blocks."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels.nn import step
from modiff_kernels.nn.blocks.base import ALONE, FusedBlock, Parts, Role, group_norm, is_untouched
from modiff_kernels.nn.blocks.concatenation import Concatenation
from modiff_kernels.nn.blocks.time_projections import TimeProjections, scaled_norm
from modiff_kernels.ops import IDENTITY, Prologue


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
        if shared is not None and shared.covers(projection) and not torch.compiler.is_compiling():
            parts = shared.of(projection, temb)
        else:
            time = temb if projection is None else projection(temb if self.skip_time_act else F.silu(temb))
            parts = scaled_norm(time, norm.gamma, norm.beta) if self.scale_shift else [time]
        rows = [part.expand(samples, -1) for part in parts]
        return norm._replace(gamma=rows[0], beta=rows[1]) if self.scale_shift else norm._replace(shift=rows[0])
