"""One layer of a fused block with what stands before it: norm, activation, residual and quantisation in one pass.

A `Prologue` is what a block computes between a tensor `h` and the input of a layer. `product` is the layer on it::

    product(layer, prologue, h, skip) = layer(prologue(h)) + skip

by the mode of the layer and the action of the call: quantised activations, the first call of a run, or an update. So
blocks are written as their equations. A `layer` here is a `ModulatedLayer` or a `LinearStack`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels import ops
from modiff_kernels.nn.layer import ModulatedLayer, stateless_output
from modiff_kernels.nn.stack import LinearStack
from modiff_kernels.nn.state_tensors import INITIALIZE

Layer = ModulatedLayer | LinearStack


class Prologue:
    """x = h: the plain quantiser. Subclasses put more between the two.

    shift: [N, C], added to h before the norm; only `GroupNorm` takes one.
    """

    residual_op: ClassVar[Callable[..., Any]] = staticmethod(ops.quantize_residual)
    activation_op: ClassVar[Callable[..., Any]] = staticmethod(ops.quantize_activation)
    last_arguments: ClassVar[tuple[Any, ...]] = (False,)  # packed: products take a code per byte

    def arguments(self, shift: Tensor | None) -> tuple[Any, ...]:
        """The arguments of both ops between h and x_hat."""
        return ()

    def shape(self, h: Tensor) -> tuple[int, ...]:
        """Shape of x."""
        return h.shape

    def apply(self, h: Tensor, shift: Tensor | None) -> Tensor:
        """x itself, in float."""
        return h


class GroupNorm(Prologue):
    """x = silu?(norm(h + shift)) of an image [N, C, H, W] or of tokens [N, L, C]."""

    residual_op = staticmethod(ops.group_norm_silu_quantize_residual)
    activation_op = staticmethod(ops.group_norm_silu_quantize_activation)
    last_arguments = ()

    def __init__(self, norm: nn.GroupNorm, silu: bool) -> None:
        self.norm = norm
        self.silu = silu

    def arguments(self, shift: Tensor | None) -> tuple[Any, ...]:
        norm = self.norm
        return shift, norm.weight, norm.bias, norm.num_groups, norm.eps, self.silu

    def apply(self, h: Tensor, shift: Tensor | None) -> Tensor:
        norm = self.norm
        if shift is not None:
            h = h + shift[:, :, None, None]
        if h.ndim == 3:
            h = h.transpose(1, 2)
        x = F.group_norm(h, norm.num_groups, norm.weight, norm.bias, norm.eps)
        x = F.silu(x) if self.silu else x
        # An image in channels_last comes out of the norm contiguous on a GPU.
        return x.transpose(1, 2).contiguous() if x.ndim == 3 else x.contiguous(memory_format=torch.channels_last)


class LayerNorm(Prologue):
    """x = norm(h) of tokens [N, L, C], over C."""

    residual_op = staticmethod(ops.layer_norm_quantize_residual)
    activation_op = staticmethod(ops.layer_norm_quantize_activation)
    last_arguments = ()

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.norm = norm

    def arguments(self, shift: Tensor | None) -> tuple[Any, ...]:
        return self.norm.weight, self.norm.bias, self.norm.eps

    def apply(self, h: Tensor, shift: Tensor | None) -> Tensor:
        norm = self.norm
        return F.layer_norm(h, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class Geglu(Prologue):
    """x = value * gelu(gate) of h = [value, gate], [N, L, 2K] -> [N, L, K]."""

    residual_op = staticmethod(ops.geglu_quantize_residual)
    activation_op = staticmethod(ops.geglu_quantize_activation)
    last_arguments = ()

    def shape(self, h: Tensor) -> tuple[int, ...]:
        return (*h.shape[:-1], h.shape[-1] // 2)

    def apply(self, h: Tensor, shift: Tensor | None) -> Tensor:
        value, gate = h.chunk(2, dim=-1)
        return value * F.gelu(gate)


PLAIN = Prologue()
GEGLU = Geglu()


def product(
    layer: Layer,
    prologue: Prologue,
    h: Tensor,
    dtype: torch.dtype,
    *,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    write_out: bool = True,
) -> Tensor:
    """layer(prologue(h)) + skip, in `dtype`, that of the block's activations; mutates the layer's state.

    h may have another dtype: that of a y_hat. write_out False: the reader takes any float dtype and changes nothing, so
    an update may return y_hat itself.
    """
    if layer.mode == "quantized":
        return quantized(layer, activation(layer, prologue, h, shift), skip, dtype)
    if layer.state.action is INITIALIZE:
        return initialize_layer(layer, prologue.apply(h, shift), skip)
    return accumulate(layer, residual(layer, prologue, h, dtype, shift), skip, dtype, write_out)


def residual(
    layer: Layer, prologue: Prologue, h: Tensor, dtype: torch.dtype, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scale of the residual of prologue(h), for the input edge of `layer`; updates x_hat."""
    edge = layer.edge
    x_hat = edge.ensure(prologue.shape(h), dtype, h.device, layer.memory_format)
    codes, scale, absmax = edge.call(
        layer.name,
        prologue.residual_op,
        h,
        *prologue.arguments(shift),
        x_hat,
        edge.scale(),
        edge.act_bits,
        edge.granularity,
        edge.clip_ratio,
        *prologue.last_arguments,
        layer.backend,
    )
    edge.record(absmax)
    return codes, scale


def activation(
    layer: Layer, prologue: Prologue, h: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of prologue(h)."""
    return prologue.activation_op(h, *prologue.arguments(shift), layer.act_bits, layer.granularity, True, layer.backend)


def accumulate(
    layer: Layer, codes: tuple[Tensor, Tensor], skip: Tensor | None, dtype: torch.dtype, write_out: bool = True
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


def initialize(layer: Layer, x: Tensor, x_hat: Tensor, y_hat: Tensor, skip: Tensor | None) -> Tensor:
    """The first call of a layer on x: overwrites x_hat and y_hat."""
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


def initialize_layer(layer: Layer, x: Tensor, skip: Tensor | None = None) -> Tensor:
    """`initialize` on the state of the layer."""
    x_hat = layer.edge.ensure(x.shape, x.dtype, x.device, layer.memory_format)
    y_hat = layer.output.ensure(layer.output_shape(x.shape), x.dtype, x.device, layer.memory_format)
    return initialize(layer, x, x_hat, y_hat, skip)


def quantized(layer: Layer, codes: tuple[Tensor, Tensor, Tensor], skip: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of plain quantised codes, plus bias and `skip`."""
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


def products(
    layers: LinearStack | tuple[ModulatedLayer, ...],
    prologue: Prologue,
    h: Tensor,
    dtype: torch.dtype,
    write_out: bool = True,
) -> tuple[Tensor, ...]:
    """`product` of layers that share an input edge, which is quantised once: as one product where they are stacked."""
    if isinstance(layers, LinearStack):
        return layers.split(product(layers, prologue, h, dtype, write_out=write_out))
    first = layers[0]
    if first.mode == "quantized":
        codes = activation(first, prologue, h)
        return tuple([quantized(layer, codes, None, dtype) for layer in layers])
    if first.state.action is INITIALIZE:
        x = prologue.apply(h, None)
        return tuple([initialize_layer(layer, x) for layer in layers])
    shared = residual(first, prologue, h, dtype)
    return tuple([accumulate(layer, shared, None, dtype, write_out) for layer in layers])


def constants(layers: LinearStack | tuple[ModulatedLayer, ...], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of layers in mode "constant" on x, computed when x is another tensor than in the call before."""
    if isinstance(layers, LinearStack):
        return layers.split(_constant(layers, x))
    return tuple([_constant(layer, x) for layer in layers])


def _constant(layer: Layer, source: Tensor) -> Tensor:
    state, weight = layer.state, layer.weight_packed
    value = state.constants.find(state.context_name, layer.name, source, weight)
    if value is None:
        value = stateless_output(layer, source.contiguous())
        value = state.constants.keep(state.context_name, layer.name, source, weight, value)
    return value
