"""`LinearStack`: Linear layers that read one tensor, computed as one product."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modiff_kernels import ops
from modiff_kernels.nn.state import ModulationState
from modiff_kernels.nn.state_tensors import Edge, StateTensor
from modiff_kernels.quant.packing import KPACK_V1

if TYPE_CHECKING:
    from modiff_kernels.nn.layer import ModulatedLayer


class LinearStack:
    """Layers of one input as one Linear: weights stacked along the output channels, one y_hat [..., sum of widths].

    It has the attributes of a `ModulatedLinear` that steps of a fused block read. Its weight is made of the packed
    weights of its layers, again whenever one of them changes. Where the layout allows it, they become views of the
    stacked one, so that nothing is stored twice.
    """

    @staticmethod
    def fits(layers: Sequence["ModulatedLayer"]) -> bool:
        """Whether the layers are of one kind: input, mode, bits, groups, layout and dtype.

        Layers that scale the channels of their input do not read one tensor.
        """
        if any(layer.input_scale is not None for layer in layers):
            return False
        kinds = {
            (layer.edge, layer.mode, layer.weight_arguments, layer.backend, layer.weight.shape[1], layer.weight.dtype)
            for layer in layers
        }
        return len(kinds) == 1

    def __init__(self, layers: Sequence["ModulatedLayer"]) -> None:
        first = layers[0]
        self.layers = tuple(layers)
        self.widths = [layer.weight.shape[0] for layer in layers]
        self.name = "+".join([first.name, *(layer.name.rpartition(".")[2] for layer in layers[1:])])
        self.state: ModulationState = first.state
        self.backend = first.backend
        self.act_bits = first.act_bits
        self.granularity = first.granularity
        self.first_step_bits = first.first_step_bits
        self.memory_format = first.memory_format
        self.initialize_op, self.accumulate_op = first.initialize_op, first.accumulate_op
        self.quantized_op = first.quantized_op
        self.output: StateTensor | None = None
        if first.mode == "modulated":
            self.output = self.state.y_hat(self.name)
            for layer in layers:
                del self.state.outputs[layer.name]
                layer.output = self.output
        for layer in layers:
            layer.stack = self
        self._stale = True

    @property
    def mode(self) -> str:
        """That of the layers."""
        return self.layers[0].mode

    @property
    def edge(self) -> Edge | None:
        """What the layers read."""
        return self.layers[0].edge

    @property
    def weight_arguments(self) -> tuple[Any, ...]:
        """weight_bits, group_size and layout."""
        return self.layers[0].weight_arguments

    @property
    def weight_packed(self) -> Tensor:
        """The stacked weight in the layout of the layers."""
        if self._stale:
            self._restack()
        return self._weight_packed

    @property
    def weight_scale(self) -> Tensor:
        """Scales of the stacked weight."""
        if self._stale:
            self._restack()
        return self._weight_scale

    @property
    def bias_data(self) -> Tensor | None:
        """The stacked bias, zero for a layer without; None if no layer has one."""
        if self._stale:
            self._restack()
        return self._bias_data

    def output_shape(self, x_shape: torch.Size) -> tuple[int, ...]:
        """Shape of y_hat for an input of `x_shape`."""
        return (*x_shape[:-1], sum(self.widths))

    def split(self, out: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the layers: parts of the columns of `out`."""
        return out.split(self.widths, dim=-1)

    def refresh_weight(self) -> None:
        """Note that the weight of a layer has changed."""
        self._stale = True

    def _restack(self) -> None:
        layers = self.layers
        weight_bits, _, layout = layers[0].weight_arguments
        k = layers[0].weight.shape[1]
        portable = [
            ops.prepare_weight(layer.weight_packed, weight_bits, n, k, layout_from=layout)
            for layer, n in zip(layers, self.widths)
        ]
        packed = torch.cat(portable)
        if layout != KPACK_V1:
            packed = ops.prepare_weight(packed, weight_bits, sum(self.widths), k, layout_to=layout)
        self._weight_packed = packed
        self._weight_scale = torch.cat([layer.weight_scale for layer in layers])
        biases = [
            layer.weight.new_zeros(n) if layer.bias_data is None else layer.bias_data
            for layer, n in zip(layers, self.widths)
        ]
        self._bias_data = None if all(layer.bias_data is None for layer in layers) else torch.cat(biases)
        self._stale = False
        parts = [layer.weight_packed.flatten() for layer in layers]
        if torch.equal(torch.cat(parts), packed.flatten()):
            views = packed.flatten().split([len(part) for part in parts])
            for layer, view in zip(layers, views):
                layer.weight_packed = view.view(layer.weight_packed.shape)
