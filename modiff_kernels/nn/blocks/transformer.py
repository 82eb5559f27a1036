"""Fused blocks of transformers over the pixels of an image."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modiff_kernels.nn import step
from modiff_kernels.nn.blocks.attention import FusedAttention, is_plain_attention
from modiff_kernels.nn.blocks.base import FusedBlock, Parts, Role, group_norm, has_no_hook, is_untouched, layer_norm
from modiff_kernels.ops import GEGLU, IDENTITY, Prologue


class FusedFeedForward(FusedBlock):
    """out = net.2(value * gelu(gate)) + skip with [value, gate] = net.0.proj(prologue(x)); alone without the two."""

    stands_for = "attention.FeedForward"
    layers: ClassVar = {"net.0.proj": Role(is_gated=True), "net.2": Role("geglu")}

    @staticmethod
    def fits(block: nn.Module) -> bool:
        net = block.net
        return (
            len(net) in (3, 4)
            and type(net[0]).__name__ == "GEGLU"
            and isinstance(net[2], nn.Linear)
            and all(type(dropout) is nn.Dropout for dropout in net[1::2])
            and not (block.training and any(dropout.p > 0 for dropout in net[1::2]))
            and is_untouched(block)
        )

    def build(self, block: nn.Module, parts: Parts) -> None:
        geglu = nn.Module()
        geglu.proj = parts.layer("net.0.proj")
        geglu.proj.fuse_geglu(True)
        self.net = nn.ModuleList([geglu, block.net[1], parts.layer("net.2"), *block.net[3:]])

    def run(self, x: Tensor, *unused: Any, **unused_too: Any) -> Tensor:
        tokens = self.net[2].canonical(x)
        return self.feed(IDENTITY, tokens, None).view(*x.shape[:-1], -1)

    def feed(self, prologue: Prologue, x: Tensor, skip: Tensor | None) -> Tensor:
        """The equation above: new tokens [N, L, C] of contiguous ones."""
        proj = self.net[0].proj
        h = step.run(proj, prologue, x, x.dtype, write_out=False)
        return step.run(self.net[2], IDENTITY if proj.packed.geglu else GEGLU, h, x.dtype, skip=skip)


class FusedBasicTransformerBlock(FusedBlock):
    """h = x + attn1(norm1(x)); h = h + attn2(norm2(h), encoder states); out = h + ff(norm3(h)). Each LayerNorm is
    computed in the pass that quantises its residual, each addition in the epilogue of a projection."""

    stands_for = "attention.BasicTransformerBlock"
    parts = ("attn1", "attn2", "ff")
    layers: ClassVar = {
        **{f"attn{i}.{name}": role for i in (1, 2) for name, role in FusedAttention.layers.items()},
        **{f"attn{i}.to_q": Role("layer_norm") for i in (1, 2)},
        "ff.net.0.proj": Role("layer_norm", is_gated=True),
        "ff.net.2": Role("geglu", adds=True),
    }

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether the block computes exactly the equation above, with attn1 over its own tokens."""
        if block.norm_type != "layer_norm":  # others have other parts
            return False
        norms, attentions = [block.norm1, block.norm3], [block.attn1]
        if block.attn2 is not None:
            norms, attentions = [*norms, block.norm2], [*attentions, block.attn2]
        return (
            all(type(norm) is nn.LayerNorm for norm in norms)
            and block.pos_embed is None
            and not hasattr(block, "fuser")
            and block._chunk_size is None
            and not block.only_cross_attention
            and not block.attn1.is_cross_attention
            and all(is_plain_attention(a) and a.group_norm is None and not a.residual_connection for a in attentions)
            and type(block.ff).__name__ == "FeedForward"
            and FusedFeedForward.fits(block.ff)
            and is_untouched(block)
        )

    def build(self, block: nn.Module, parts: Parts) -> None:
        self.norm1 = block.norm1
        self.attn1 = parts.inner(FusedAttention, "attn1")
        self.norm2 = block.norm2
        self.attn2 = None if block.attn2 is None else parts.inner(FusedAttention, "attn2")
        self.norm3 = block.norm3
        self.ff = parts.inner(FusedFeedForward, "ff")

    def set_chunk_feed_forward(self, chunk_size: int | None, dim: int = 0) -> None:
        """Refuses to feed tokens forward in chunks: their state belongs to all of them."""
        if chunk_size is not None:
            text = "call enable_forward_chunking() before accelerate(), or use ModiffConfig(fuse=False)"
            raise RuntimeError(f"block '{self.path}' is fused and feeds all tokens forward at once; {text}")

    def run(
        self, x: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None, timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None, *unused: Any, **unused_too: Any,
    ) -> Tensor:  # fmt: skip
        h = x.contiguous()
        attentions = [(self.attn1, self.norm1, None, attention_mask)]
        if self.attn2 is not None:
            attentions.append((self.attn2, self.norm2, encoder_hidden_states, encoder_attention_mask))
        others = cross_attention_kwargs or {}
        for part, norm, states, mask in attentions:
            if has_no_hook(part):
                h = part.attend(layer_norm(norm), h, h, states, mask, others)
            else:
                normed = norm(h).to(h.dtype)
                h = h + part(normed, encoder_hidden_states=states, attention_mask=mask, **others)
        return self.ff.feed(layer_norm(self.norm3), h, h) if has_no_hook(self.ff) else h + self.ff(self.norm3(h))


class FusedTransformer2DModel(FusedBlock):
    """out = proj_out(blocks(proj_in(norm(x)))) + x over the pixels of an image, proj_* Linear or 1x1 convolutions.

    GroupNorm is computed in the pass that quantises the residual of proj_in, the addition in the epilogue of proj_out;
    pixels become tokens without a copy. The blocks between have fused forms of their own, or none."""

    stands_for = "transformers.transformer_2d.Transformer2DModel"
    layers: ClassVar = {"proj_in": Role("group_norm"), "proj_out": Role(adds=True)}
    left_out = ("transformer_blocks",)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        return (
            block.is_input_continuous
            and type(block.norm) is nn.GroupNorm
            and isinstance(block.proj_in, (nn.Linear, nn.Conv2d))
            and type(block.proj_in) is type(block.proj_out)
            and has_no_hook(block)
            and is_untouched(block.norm, block.proj_in, block.proj_out)
        )

    def build(self, block: nn.Module, parts: Parts) -> None:
        self.is_linear = isinstance(block.proj_in, nn.Linear)
        self.norm = block.norm
        self.proj_in = parts.layer("proj_in")
        self.transformer_blocks = block.transformer_blocks
        self.proj_out = parts.layer("proj_out")

    def run(
        self, x: Tensor, encoder_hidden_states: Tensor | None = None, timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None, class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None, attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        dtype = x.dtype
        x = x.contiguous(memory_format=torch.channels_last)
        image = _tokens(x) if self.is_linear else x
        h = step.run(self.proj_in, group_norm(self.norm, silu=False), image, dtype)
        tokens = h if self.is_linear else _tokens(h)
        for block in self.transformer_blocks:
            tokens = block(
                tokens,
                attention_mask=_bias(attention_mask, dtype),
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=_bias(encoder_attention_mask, dtype),
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )
        h = tokens.contiguous()
        samples, _, height, width = x.shape
        if not self.is_linear:
            h = h.view(samples, height, width, -1).permute(0, 3, 1, 2)
        out = step.run(self.proj_out, IDENTITY, h, dtype, skip=image)
        if self.is_linear:
            out = out.view(samples, height, width, -1).permute(0, 3, 1, 2)
        if not return_dict:
            return (out,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=out)


def _tokens(image: Tensor) -> Tensor:
    """[N, H * W, C] of a channels_last image [N, C, H, W], without a copy."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask [N, tokens] of ones and zeros as what is added to the scores, [N, 1, tokens]; others as they are."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
