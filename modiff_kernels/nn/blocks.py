"""Fused forms of diffusers' blocks: what stands between two convolutions becomes one pass that ends in int8 codes.

ResnetBlock2D
    GroupNorm + SiLU (+ time embedding) + residual + quantise in one pass, twice; the second reads the first
    convolution's y_hat itself. A 1x1 shortcut adds its product onto the same y_hat as the second convolution, because
    only the sum of the two leaves the block: one state tensor less.
Attention (self, with its own GroupNorm)
    GroupNorm + residual + quantise in one pass, shared by q, k and v; the attention's input is added in the epilogue
    of the output projection.
Upsample2D
    x_hat and codes at the low resolution; the codes are repeated instead of the activation.

`fuse` finds the blocks that have exactly this form; every other block stays as it is, with single layers replaced. The
layers inside are those of `linear` and `conv2d`, so weights, state and explain() are the same. The results equal those
of the single layers up to float rounding.
"""

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels import ops
from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.conv2d import ModulatedConv2d
from modiff_kernels.nn.layer import ModulatedLayer
from modiff_kernels.nn.linear import ModulatedLinear
from modiff_kernels.nn.state import INITIALIZE, ModulationState, tensor_version
from modiff_kernels.quant.calibrated import NOT_CALIBRATED, CalibratedLayer


def fuse(
    unet: nn.Module,
    state: ModulationState,
    config: ModiffConfig,
    left_float: Container[str],
    calibrated: Mapping[str, CalibratedLayer],
) -> dict[str, nn.Module]:
    """The fused form of every block of `unet` that has one, by path. The UNet itself is not changed.

    left_float: paths of layers that must stay float; a block that holds one is not fused. calibrated: by path of the
    layer. Codes of an activation that a fused pass computes take no input_scale: such a block is not fused either.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    forms: dict[type, tuple[type[_FusedBlock], tuple[str, ...]]] = {
        ResnetBlock2D: (FusedResnetBlock2D, ("conv1", "conv2", "conv_shortcut")),
        Attention: (FusedAttention, ("to_q", "to_k", "to_v", "to_out.0")),
        Upsample2D: (FusedUpsample2D, ("conv",)),
    }
    fused: dict[str, nn.Module] = {}
    for path, module in unet.named_modules():
        if type(module) not in forms:
            continue
        form, layers = forms[type(module)]
        paths = [f"{path}.{layer}" for layer in layers if layer != "conv_shortcut"]
        scaled = any(calibrated.get(key, NOT_CALIBRATED).input_scale is not None for key in paths)
        if form.fits(module) and not scaled and not any(f"{path}.{layer}" in left_float for layer in layers):
            fused[path] = form(module, config, state, path, calibrated)
    resnets = [block for block in fused.values() if isinstance(block, FusedResnetBlock2D)]
    _TimeProjections.share([block for block in resnets if type(block.time_emb_proj) is nn.Linear])
    return fused


class _FusedBlock(nn.Module):
    """A block whose layers are low-bit and whose elementwise passes are fused with their quantisation."""

    def __init__(
        self,
        block: nn.Module,
        config: ModiffConfig,
        state: ModulationState,
        path: str,
        calibrated: Mapping[str, CalibratedLayer],
    ) -> None:
        super().__init__()
        self.__dict__["original"] = block  # not a child: its parameters are ours, under the same keys
        self.state = state
        self.path = path
        self.training = block.training

        def conv2d(name: str) -> ModulatedConv2d:
            key = f"{path}.{name}"
            known = calibrated.get(key, NOT_CALIBRATED)
            return ModulatedConv2d.from_conv2d(block.get_submodule(name), config, state, key, calibrated=known)

        def linear(name: str, edge: str | None = None) -> ModulatedLinear:
            key = f"{path}.{name}"
            known = calibrated.get(key, NOT_CALIBRATED)
            return ModulatedLinear.from_linear(block.get_submodule(name), config, state, key, edge, known)

        self.build(block, conv2d, linear)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether `block` computes exactly what this form computes."""
        raise NotImplementedError

    def build(
        self, block: nn.Module, conv2d: Callable[..., ModulatedConv2d], linear: Callable[..., ModulatedLinear]
    ) -> None:
        """Set the children, under their names in `block`; conv2d(name) and linear(name, edge) make layers."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's output, a new tensor in x's dtype; mutates the state of its layers, raises what they raise."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"block '{self.path}' has no gradient but its input asks for one; call the UNet inside "
                f"`with torch.no_grad():`, or handle.remove() first to train or differentiate"
            )
        try:
            return self.run(x, *args, **kwargs)
        except (ValueError, TypeError, ops.BackendUnavailable) as error:
            raise type(error)(f"block '{self.path}': {error}") from error

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


def _is_untouched(block: nn.Module) -> bool:
    """No hooks and no forward of its own, in the block or below: a fused block would not call them."""
    return all(
        "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks
        for module in block.modules()
    )


def _residual(layer: ModulatedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scale of the residual of `x`, for the input edge of `layer`; updates x_hat."""
    edge = layer.edge
    x_hat = edge.ensure(x.shape, x.dtype, x.device, layer.memory_format)
    codes, scale, absmax = edge.call(
        layer.name,
        ops.quantize_residual,
        x,
        x_hat,
        edge.scale(),
        edge.act_bits,
        edge.granularity,
        edge.clip_ratio,
        False,  # packed: products take a code per byte
        layer.backend,
    )
    edge.record(absmax)
    return codes, scale


def _norm_residual(
    layer: ModulatedLayer, norm: nn.GroupNorm, h: Tensor, shift: Tensor | None, silu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes and scale of the residual of silu?(norm(h + shift)); dtype is that of the block's activations."""
    edge = layer.edge
    x_hat = edge.ensure(h.shape, dtype, h.device, layer.memory_format)
    codes, scale, absmax = edge.call(
        layer.name,
        ops.group_norm_silu_quantize_residual,
        h,
        shift,
        norm.weight,
        norm.bias,
        norm.num_groups,
        norm.eps,
        silu,
        x_hat,
        edge.scale(),
        edge.act_bits,
        edge.granularity,
        edge.clip_ratio,
        layer.backend,
    )
    edge.record(absmax)
    return codes, scale


def _norm_activation(
    layer: ModulatedLayer, norm: nn.GroupNorm, h: Tensor, shift: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of silu?(norm(h + shift))."""
    return ops.group_norm_silu_quantize_activation(
        h,
        shift,
        norm.weight,
        norm.bias,
        norm.num_groups,
        norm.eps,
        silu,
        layer.act_bits,
        layer.granularity,
        True,
        layer.backend,
    )


def _accumulate(
    layer: ModulatedLayer, codes: tuple[Tensor, Tensor], skip: Tensor | None, dtype: torch.dtype, write_out: bool = True
) -> Tensor:
    """Adds the product onto y_hat; its value plus `skip`, or y_hat itself (not to be changed) if nothing is written."""
    y_hat = layer.output.current()
    out = layer.output.call(
        layer.name,
        layer.accumulate_op,
        *codes,
        layer.weight_packed,
        layer.weight_scale,
        y_hat,
        skip,
        *layer.weight_arguments,
        dtype,
        write_out,
        layer.backend,
    )
    return out if write_out else y_hat


def _initialize(layer: ModulatedLayer, x: Tensor, x_hat: Tensor, y_hat: Tensor, skip: Tensor | None) -> Tensor:
    return layer.initialize_op(
        x,
        x_hat,
        y_hat,
        layer.weight_packed,
        layer.weight_scale,
        layer.bias_data,
        skip,
        *layer.weight_arguments,
        layer.first_step_bits,
        True,
        layer.backend,
    )


def _initialize_layer(layer: ModulatedLayer, x: Tensor, skip: Tensor | None = None) -> Tensor:
    x_hat = layer.edge.ensure(x.shape, x.dtype, x.device, layer.memory_format)
    y_hat = layer.output.ensure(layer.output_shape(x.shape), x.dtype, x.device, layer.memory_format)
    return _initialize(layer, x, x_hat, y_hat, skip)


def _quantized(
    layer: ModulatedLayer, codes: tuple[Tensor, Tensor, Tensor], skip: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return layer.quantized_op(
        *codes,
        layer.weight_packed,
        layer.weight_scale,
        layer.bias_data,
        skip,
        *layer.weight_arguments,
        dtype,
        layer.backend,
    )


def _group_norm(norm: nn.GroupNorm, h: Tensor) -> Tensor:
    return F.group_norm(h, norm.num_groups, norm.weight, norm.bias, norm.eps)


class FusedResnetBlock2D(_FusedBlock):
    """out = conv2(silu(norm2(conv1(silu(norm1(x))) + time))) + (conv_shortcut(x) or x)."""

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
            and _is_untouched(block)
        )

    def build(
        self, block: nn.Module, conv2d: Callable[..., ModulatedConv2d], linear: Callable[..., ModulatedLinear]
    ) -> None:
        self.norm1 = block.norm1
        self.conv1 = conv2d("conv1")
        self.time_emb_proj = block.time_emb_proj
        self.norm2 = block.norm2
        self.conv2 = conv2d("conv2")
        self.conv_shortcut = None
        self.skip_time_act = block.skip_time_act
        self.time_projections: _TimeProjections | None = None
        if block.conv_shortcut is not None:
            shortcut = conv2d("conv_shortcut")
            if shortcut.mode == "modulated":
                del self.state.outputs[shortcut.name]
                shortcut.output = self.conv2.output
            self.conv_shortcut = shortcut

    def run(self, x: Tensor, temb: Tensor | None = None, *unused: Any) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        dtype = x.dtype
        shift = self._time_shift(temb, x.shape[0])
        if self.conv1.mode == "quantized":
            skip = x
            if self.conv_shortcut is not None:
                layer = self.conv_shortcut
                skip = _quantized(layer, layer.activation_codes(x), None, dtype)
            h = _quantized(self.conv1, _norm_activation(self.conv1, self.norm1, x, None, True), None, dtype)
            return _quantized(self.conv2, _norm_activation(self.conv2, self.norm2, h, shift, True), skip, dtype)
        if self.state.action is INITIALIZE:
            return self._initialize(x, shift)
        h = _accumulate(self.conv1, _norm_residual(self.conv1, self.norm1, x, None, True, dtype), None, dtype, False)
        codes = _norm_residual(self.conv2, self.norm2, h, shift, True, dtype)
        if self.conv_shortcut is None:
            return _accumulate(self.conv2, codes, x, dtype)
        _accumulate(self.conv2, codes, None, dtype, False)
        codes = _residual(self.conv_shortcut, self.conv_shortcut.scaled(x))
        return _accumulate(self.conv_shortcut, codes, None, dtype)

    def _initialize(self, x: Tensor, shift: Tensor | None) -> Tensor:
        h = _initialize_layer(self.conv1, F.silu(_group_norm(self.norm1, x)))
        if shift is not None:
            h = h + shift[:, :, None, None]
        h = F.silu(_group_norm(self.norm2, h))
        if self.conv_shortcut is None:
            return _initialize_layer(self.conv2, h, skip=x)
        out = _initialize_layer(self.conv2, h)
        layer, y_hat = self.conv_shortcut, self.conv2.output.slots[self.state.context_name].tensor
        x_hat = layer.edge.ensure(x.shape, x.dtype, x.device, layer.memory_format)
        product = torch.empty_like(y_hat)
        out = _initialize(layer, layer.scaled(x), x_hat, product, skip=out)
        y_hat += product
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


class _TimeProjections:
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
                shared = _TimeProjections(kind)
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


class FusedAttention(_FusedBlock):
    """Self-attention over pixels or tokens: out = to_out(sdpa(q, k, v)) (+ x) with q, k, v = to_*(norm(x))."""

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether the block computes exactly the equation above."""
        linears = [block.to_q, block.to_k, block.to_v, block.to_out[0] if block.to_out is not None else None]
        return (
            type(block.processor).__name__ in ("AttnProcessor", "AttnProcessor2_0")
            and type(block.group_norm) is nn.GroupNorm
            and all(isinstance(linear, nn.Linear) for linear in linears)
            and block.to_k.in_features == block.to_q.in_features
            and block.to_k.out_features == block.to_q.out_features
            and not block.is_cross_attention
            and block.spatial_norm is None
            and block.norm_q is None
            and block.norm_k is None
            and getattr(block, "add_k_proj", None) is None
            and block.rescale_output_factor == 1.0
            and not (block.upcast_attention and type(block.processor).__name__ == "AttnProcessor")
            and not (block.training and block.to_out[1].p > 0)
            and _is_untouched(block)
        )

    def build(
        self, block: nn.Module, conv2d: Callable[..., ModulatedConv2d], linear: Callable[..., ModulatedLinear]
    ) -> None:
        self.heads = block.heads
        self.scale = block.scale
        self.residual_connection = block.residual_connection
        edge = f"{self.path}.to_q"
        self.group_norm = block.group_norm
        self.to_q = linear("to_q", edge)
        self.to_k = linear("to_k", edge)
        self.to_v = linear("to_v", edge)
        self.to_out = nn.ModuleList([linear("to_out.0"), block.to_out[1]])

    def get_processor(self, return_deprecated_lora: bool = False) -> Any:
        """The attention processor that this block stands for."""
        return self.original.processor

    def set_processor(self, processor: Any, _remove_lora: bool = False) -> None:
        """Refuses any other kind of processor: the fused block would not call it."""
        if type(processor) is not type(self.original.processor):
            raise RuntimeError(
                f"block '{self.path}' is fused and would not call {type(processor).__name__}; set attention "
                f"processors before accelerate(), or use ModiffConfig(fuse=False)"
            )

    def run(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("self-attention without a mask is fused here; use ModiffConfig(fuse=False) to pass either")
        if x.ndim == 3:
            return self._tokens(x.contiguous())
        samples, channels, height, width = x.shape
        tokens = (
            x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).view(samples, height * width, channels)
        )
        return self._tokens(tokens).view(samples, height, width, -1).permute(0, 3, 1, 2)

    def _tokens(self, x: Tensor) -> Tensor:
        dtype, projections, to_out = x.dtype, (self.to_q, self.to_k, self.to_v), self.to_out[0]
        skip = x if self.residual_connection else None
        if to_out.mode == "quantized":
            activation = _norm_activation(self.to_q, self.group_norm, x, None, False)
            attended = self._attend(*[_quantized(layer, activation, None, dtype) for layer in projections])
            codes = ops.quantize_activation(attended, to_out.act_bits, to_out.granularity, True, to_out.backend)
            return _quantized(to_out, codes, skip, dtype)
        if self.state.action is INITIALIZE:
            normed = _group_norm(self.group_norm, x.transpose(1, 2)).transpose(1, 2).contiguous()
            attended = self._attend(*[_initialize_layer(layer, normed) for layer in projections])
            return _initialize_layer(to_out, attended, skip)
        residual = _norm_residual(self.to_q, self.group_norm, x, None, False, dtype)
        # In the activations' dtype y_hat itself is read, otherwise a converted copy is written.
        write = self.state.dtype_on(x.device) != dtype
        attended = self._attend(*[_accumulate(layer, residual, None, dtype, write) for layer in projections])
        return _accumulate(to_out, _residual(to_out, attended), skip, dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = (q.shape[-1] // self.heads) ** -0.5
        if type(self.original.processor).__name__ == "AttnProcessor":
            scale = self.scale
        return ops.attention(q, k, v, self.heads, scale)


class FusedUpsample2D(_FusedBlock):
    """out = conv(repeat(x)), every pixel twice in both directions."""

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether the block computes exactly the equation above."""
        return (
            block.use_conv
            and not block.use_conv_transpose
            and block.interpolate
            and block.norm is None
            and block.name == "conv"
            and block.conv.kernel_size != (1, 1)  # its scales may be per pixel, which are not repeated
            and _is_untouched(block)
        )

    def build(
        self, block: nn.Module, conv2d: Callable[..., ModulatedConv2d], linear: Callable[..., ModulatedLinear]
    ) -> None:
        self.conv = conv2d("conv")

    def run(self, x: Tensor, output_size: Any = None, *unused: Any) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if output_size is not None and tuple(output_size) != (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(F.interpolate(x, size=output_size, mode="nearest"))
        layer = self.conv
        if layer.mode == "quantized":
            x_q, scale, zero_point = ops.quantize_activation(x, layer.act_bits, layer.granularity, True, layer.backend)
            return _quantized(layer, (_repeat(x_q), scale, zero_point), None, x.dtype)
        if self.state.action is INITIALIZE:
            repeated = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x_hat = torch.empty_like(repeated, dtype=self.state.dtype_on(x.device))
            y_hat = layer.output.ensure(layer.output_shape(repeated.shape), x.dtype, x.device, layer.memory_format)
            out = _initialize(layer, repeated, x_hat, y_hat, None)
            layer.edge.ensure(x.shape, x.dtype, x.device, layer.memory_format).copy_(x_hat[:, :, ::2, ::2])
            return out
        codes, scale = _residual(layer, x)
        return _accumulate(layer, (_repeat(codes), scale), None, x.dtype)


def _repeat(codes: Tensor) -> Tensor:
    """int8 codes, every pixel twice in both directions, channels_last."""
    return F.interpolate(codes.view(torch.uint8), scale_factor=2.0, mode="nearest").view(torch.int8)
