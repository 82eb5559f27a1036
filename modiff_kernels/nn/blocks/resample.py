"""Fused up- and down-sampling: what is done to the image before the convolution is done to its codes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels import ops
from modiff_kernels.nn.blocks.base import FusedBlock, Parts, is_untouched
from modiff_kernels.nn.blocks.steps import PLAIN, accumulate, activation, initialize, quantized, residual
from modiff_kernels.nn.state_tensors import INITIALIZE


class FusedUpsample2D(FusedBlock):
    """out = conv(repeat(x)), every pixel twice in both directions; x_hat and codes at the low resolution."""

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
            and is_untouched(block)
        )

    @staticmethod
    def layer_names(block: nn.Module) -> list[str]:
        """The convolution."""
        return ["conv"]

    def build(self, block: nn.Module, parts: Parts) -> None:
        self.conv = parts.conv2d("conv")

    def run(self, x: Tensor, output_size: Any = None, *unused: Any) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if output_size is not None and tuple(output_size) != (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(F.interpolate(x, size=output_size, mode="nearest"))
        layer = self.conv
        if layer.mode == "quantized":
            x_q, scale, zero_point = activation(layer, PLAIN, x)
            return quantized(layer, (_repeat(x_q), scale, zero_point), None, x.dtype)
        if self.state.action is INITIALIZE:
            repeated = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x_hat = torch.empty_like(repeated, dtype=self.state.dtype_on(x.device))
            y_hat = layer.output.ensure(layer.output_shape(repeated.shape), x.dtype, x.device, layer.memory_format)
            out = initialize(layer, repeated, x_hat, y_hat, None)
            layer.edge.ensure(x.shape, x.dtype, x.device, layer.memory_format).copy_(x_hat[:, :, ::2, ::2])
            return out
        codes, scale = residual(layer, PLAIN, x, x.dtype)
        return accumulate(layer, (_repeat(codes), scale), None, x.dtype)


class FusedDownsample2D(FusedBlock):
    """out = conv(x with a row of zeros below and a column of zeros at the right); x_hat without these zeros.

    Other forms of diffusers' block pad in the convolution itself and have nothing to fuse.
    """

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether the block computes exactly the equation above."""
        return (
            block.use_conv
            and block.padding == 0
            and block.norm is None
            and not hasattr(block, "Conv2d_0")
            and block.conv.kernel_size != (1, 1)  # its scales may be per pixel, and zeros have none
            and is_untouched(block)
        )

    @staticmethod
    def layer_names(block: nn.Module) -> list[str]:
        """The convolution."""
        return ["conv"]

    def build(self, block: nn.Module, parts: Parts) -> None:
        self.conv = parts.conv2d("conv")

    def run(self, x: Tensor, *unused: Any, **unused_too: Any) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        layer = self.conv
        if layer.mode == "quantized":  # a zero has the code of the zero point, another one for every sample
            codes = ops.quantize_activation(_padded(x), layer.act_bits, layer.granularity, True, layer.backend)
            return quantized(layer, codes, None, x.dtype)
        if self.state.action is INITIALIZE:
            padded = _padded(x)
            x_hat = torch.empty_like(padded, dtype=self.state.dtype_on(x.device))
            y_hat = layer.output.ensure(layer.output_shape(padded.shape), x.dtype, x.device, layer.memory_format)
            out = initialize(layer, padded, x_hat, y_hat, None)
            layer.edge.ensure(x.shape, x.dtype, x.device, layer.memory_format).copy_(x_hat[:, :, :-1, :-1])
            return out
        codes, scale = residual(layer, PLAIN, x, x.dtype)
        return accumulate(layer, (_padded(codes), scale), None, x.dtype)


def _padded(image: Tensor) -> Tensor:
    return F.pad(image, (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last)


def _repeat(codes: Tensor) -> Tensor:
    """int8 codes, every pixel twice in both directions, channels_last."""
    return F.interpolate(codes.view(torch.uint8), scale_factor=2.0, mode="nearest").view(torch.int8)
