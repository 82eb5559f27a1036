"""Fused up- and down-sampling: what is done to the image before the convolution is done to its codes."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels.nn import step
from modiff_kernels.nn.blocks.base import ALONE, FusedBlock, Parts, is_untouched
from modiff_kernels.nn.step import Spread
from modiff_kernels.ops import IDENTITY


class FusedResample(FusedBlock):
    """A convolution of an image that is changed before."""

    layers: ClassVar = {"conv": ALONE}

    def build(self, block: nn.Module, parts: Parts) -> None:
        self.conv = parts.layer("conv")


class FusedUpsample2D(FusedResample):
    """out = conv(repeat(x)), every pixel twice in both directions; x_hat and codes at the low resolution."""

    stands_for = "upsampling.Upsample2D"

    @staticmethod
    def fits(block: nn.Module) -> bool:
        return (
            block.use_conv
            and not block.use_conv_transpose
            and block.interpolate
            and block.norm is None
            and block.name == "conv"
            and block.conv.kernel_size != (1, 1)  # its scales may be per pixel, which are not repeated
            and is_untouched(block)
        )

    def run(self, x: Tensor, output_size: Any = None, *unused: Any, **unused_too: Any) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if output_size is not None and tuple(output_size) != (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(F.interpolate(x, size=output_size, mode="nearest"))
        return step.run(self.conv, IDENTITY, x, x.dtype, spread=REPEAT)


class FusedDownsample2D(FusedResample):
    """out = conv(x with a row of zeros below and a column of zeros at the right); x_hat without these zeros. Other
    forms of diffusers' block pad in the convolution itself and have nothing to fuse."""

    stands_for = "downsampling.Downsample2D"

    @staticmethod
    def fits(block: nn.Module) -> bool:
        return (
            block.use_conv
            and block.padding == 0
            and block.norm is None
            and not hasattr(block, "Conv2d_0")
            and block.conv.kernel_size != (1, 1)  # its scales may be per pixel, and zeros have none
            and is_untouched(block)
        )

    def run(self, x: Tensor, *unused: Any, **unused_too: Any) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if self.conv.mode == "quantized":  # a zero has the code of the zero point, another one for every sample
            return step.run(self.conv, IDENTITY, _padded(x), x.dtype)
        return step.run(self.conv, IDENTITY, x, x.dtype, spread=PAD)


def _padded(image: Tensor) -> Tensor:
    return F.pad(image, (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last)


def _repeated(codes: Tensor) -> Tensor:
    """int8 codes, every pixel twice in both directions, channels_last."""
    repeated = F.interpolate(codes.view(torch.uint8), scale_factor=2.0, mode="nearest").view(torch.int8)
    return repeated.contiguous(memory_format=torch.channels_last)


REPEAT = Spread(_repeated, lambda shape: (shape[0], shape[1], 2 * shape[2], 2 * shape[3]))
PAD = Spread(_padded, lambda shape: (shape[0], shape[1], shape[2] + 1, shape[3] + 1))
