"""Fused attention, self and cross."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels import ops
from modiff_kernels.backends.reference import apply_prologue
from modiff_kernels.nn import step
from modiff_kernels.nn.blocks.base import ALONE, FusedBlock, Parts, Role, group_norm, is_as_written, is_untouched
from modiff_kernels.nn.layer import LinearStack
from modiff_kernels.ops import IDENTITY, Prologue
from modiff_kernels.ops.dispatch import AUTO

PROCESSORS = "diffusers.models.attention_processor", ("AttnProcessor", "AttnProcessor2_0")
NEVER = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")  # parts of other attentions


class FusedAttention(FusedBlock):
    """out = to_out(softmax(q k^T) v) + skip with q, k, v = to_*(prologue(x)), or k, v = to_*(encoder states).

    As a block of its own: self-attention over pixels or tokens with a GroupNorm before it and, as skip, its input. As
    a part of `FusedBasicTransformerBlock`, which calls `attend`, prologue and skip are those of the block.

    q, k and v of self-attention read one quantised residual and are one product where their weights can be stacked. k
    and v of cross-attention have mode "constant": computed from float activations, and kept as long as the encoder
    states are the same tensor (`nn.cache`). With another processor than those of this equation, or inputs that it does
    not have, the original attention computes in float."""

    stands_for = "attention_processor.Attention"
    layers: ClassVar = {"to_q": Role("group_norm"), "to_k": ALONE, "to_v": ALONE, "to_out.0": Role(adds=True)}

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether the block, used alone, computes exactly the equation above."""
        return (
            is_plain_attention(block)
            and type(block.group_norm) is nn.GroupNorm
            and block.to_k.in_features == block.to_q.in_features
            and not block.is_cross_attention
        )

    def build(self, block: nn.Module, parts: Parts) -> None:
        self.heads, self.scale = block.heads, block.scale
        self.residual_connection, self.group_norm = block.residual_connection, block.group_norm
        self.fused_for = block.processor
        self.is_cross_attention = block.is_cross_attention
        shared = "to_k" if self.is_cross_attention else "to_q"
        self.to_q = parts.layer("to_q", "to_q")
        self.to_k = parts.layer("to_k", shared)
        self.to_v = parts.layer("to_v", shared)
        self.to_out = nn.ModuleList([parts.layer("to_out.0"), block.to_out[1]])
        readers = (self.to_k, self.to_v) if self.is_cross_attention else (self.to_q, self.to_k, self.to_v)
        if self.is_cross_attention:
            for layer in readers:
                layer.become_constant()
        self.stacked = LinearStack(readers) if LinearStack.fits(readers) else readers

    def get_processor(self, return_deprecated_lora: bool = False) -> Any:
        return self.original.processor

    processor = property(get_processor)

    def set_processor(self, processor: Any, _remove_lora: bool = False) -> None:
        self.original.set_processor(processor)
        self._modules.pop("processor", None)
        if isinstance(processor, nn.Module):
            self._modules["processor"] = processor  # whose weights are those of the UNet
        if is_plain_attention(self.original):
            self.fused_for = processor
        self.state.relocations += 1

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "processor":
            self.set_processor(value)
        else:
            super().__setattr__(name, value)

    def run(
        self, x: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None, **more: Any
    ) -> Tensor:
        if self.group_norm is None:  # a part of a block, which has computed its prologue
            return self.attend(IDENTITY, x.contiguous(), None, encoder_hidden_states, attention_mask, more)
        given = encoder_hidden_states is not None or attention_mask is not None
        if given or self.original.processor is not self.fused_for:
            return self.original(x, encoder_hidden_states, attention_mask, **more)
        prologue = group_norm(self.group_norm, silu=False)
        if x.ndim == 3:
            x = x.contiguous()
            return self.attend(prologue, x, x if self.residual_connection else None)
        samples, channels, height, width = x.shape
        x = x.contiguous(memory_format=torch.channels_last)
        tokens = x.permute(0, 2, 3, 1).view(samples, height * width, channels)
        out = self.attend(prologue, tokens, tokens if self.residual_connection else None)
        return out.view(samples, height, width, -1).permute(0, 3, 1, 2)

    def attend(
        self, prologue: Prologue, x: Tensor, skip: Tensor | None, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, others: dict[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        """to_out of the attention, plus `skip`: new tokens [N, L, C].

        x: tokens [N, L, C], contiguous. encoder_hidden_states: [N, S, K], for cross-attention alone. attention_mask,
        others: as for diffusers' `Attention`."""
        dtype = x.dtype
        given = encoder_hidden_states is not None and not self.is_cross_attention
        if given or self.original.processor is not self.fused_for:
            normed = apply_prologue(x, prologue).to(dtype)
            out = self.original(normed, encoder_hidden_states, attention_mask, **(others or {}))
            return out if skip is None else out + skip
        # In the activations' dtype y_hat itself is read, otherwise a converted copy is written.
        write_out = self.state.dtype_on(x.device) != dtype
        if self.is_cross_attention:
            if encoder_hidden_states is None:
                encoder_hidden_states = apply_prologue(x, prologue).to(dtype)
            q = step.run(self.to_q, prologue, x, dtype, write_out=write_out)
            if isinstance(self.stacked, LinearStack):
                k, v = self.stacked.split(step.constant(self.stacked, encoder_hidden_states, dtype))
            else:
                k, v = (step.constant(layer, encoder_hidden_states, dtype) for layer in self.stacked)
        elif isinstance(self.stacked, LinearStack):
            q, k, v = self.stacked.split(step.run(self.stacked, prologue, x, dtype, write_out=write_out))
        else:
            q, k, v = step.run_each(self.stacked, prologue, x, dtype, write_out)
        attended = self._softmax_product(q, k, v, attention_mask)
        return step.run(self.to_out[0], IDENTITY, attended, dtype, skip=skip)

    def _softmax_product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scale = (q.shape[-1] // self.heads) ** -0.5
        if type(self.original.processor).__name__ == "AttnProcessor":
            scale = self.scale
        if mask is None:
            key = "attention", q.shape, k.shape, q.dtype, q.device
            return step.repeated(self.to_q.kernels, key, ops.attention, (q, k, v, self.heads, scale), AUTO)
        samples = q.shape[0]
        mask = self.original.prepare_attention_mask(mask, k.shape[1], samples)
        mask = mask.view(samples, self.heads, -1, mask.shape[-1])
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return attended.transpose(1, 2).flatten(2).contiguous()


def is_plain_attention(block: nn.Module) -> bool:
    """Whether diffusers' `Attention` is nothing but projections and softmax, with an optional GroupNorm."""
    last = block.to_out[0] if isinstance(block.to_out, nn.ModuleList) else None
    linears = [block.to_q, block.to_k, block.to_v, last]
    kind = type(block.processor)
    return (
        kind.__module__ == PROCESSORS[0]
        and kind.__name__ in PROCESSORS[1]
        and is_as_written(kind)
        and all(isinstance(linear, nn.Linear) for linear in linears)
        and block.to_k.in_features == block.to_v.in_features
        and block.to_k.out_features == block.to_q.out_features
        and all(getattr(block, part, None) is None for part in NEVER)
        and block.rescale_output_factor == 1.0
        and not (block.upcast_attention and kind.__name__ == "AttnProcessor")
        and not (block.training and block.to_out[1].p > 0)
        and is_untouched(block)
    )
