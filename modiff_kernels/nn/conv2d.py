"""`ModulatedConv2d`: a low-bit `torch.nn.Conv2d`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels import ops
from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.layer import ModulatedLayer
from modiff_kernels.nn.state import ModulationState
from modiff_kernels.ops.problem import conv2d_output_shape
from modiff_kernels.quant.calibrated import NOT_CALIBRATED, CalibratedLayer


class ModulatedConv2d(ModulatedLayer):
    """2-D convolution with zero padding on x [N, C, H, W]; computes in channels_last and returns channels_last."""

    op_suffix = "conv2d"
    memory_format = torch.channels_last
    initialize_op = staticmethod(ops.initialize_conv2d)
    modulated_op = staticmethod(ops.modulated_conv2d)
    accumulate_op = staticmethod(ops.accumulate_conv2d)
    quantized_op = staticmethod(ops.quantized_conv2d)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        config: ModiffConfig,
        state: ModulationState,
        name: str,
        edge: str | None = None,
        calibrated: CalibratedLayer = NOT_CALIBRATED,
    ) -> "ModulatedConv2d":
        """The low-bit form of `conv`, which is kept inside and not changed.

        The arguments are those of `ModulatedLinear.from_linear`. Raises ValueError on padding that is not the same
        number of zeros on both sides, on weights that hold NaN or Inf, on a missing or impossible static scale, and on
        a calibration of another layer.
        """
        reason = why_not_conv2d(conv)
        if reason is not None:
            raise ValueError(f"layer '{name}': {reason}; leave it float")
        granularity = config.layer_granularity
        if granularity == "per_token" and not _is_pointwise(conv):
            granularity = "per_sample"
        layer = cls(conv, config, state, name, edge, granularity, calibrated)
        for attribute in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        ):
            setattr(layer, attribute, getattr(conv, attribute))
        return layer

    def canonical(self, x: Tensor) -> Tensor:
        """Channels_last [N, C, H, W]."""
        return x.contiguous(memory_format=torch.channels_last)

    def conv_arguments(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """kernel_size, stride, padding, dilation and groups."""
        conv = self.original
        return conv.kernel_size, conv.stride, _padding(conv), conv.dilation, conv.groups

    def output_shape(self, x_shape: torch.Size) -> tuple[int, ...]:
        """[N, out_channels, P, Q]."""
        return conv2d_output_shape(x_shape, self.weight.shape[0], *self.conv_arguments()[:4])

    def float_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """torch.nn.functional.conv2d."""
        _, *arguments = self.conv_arguments()
        return F.conv2d(x, weight, bias, *arguments)


def why_not_conv2d(conv: nn.Conv2d) -> str | None:
    """Why `conv` has no low-bit form, or None."""
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r} is not supported, only 'zeros'"
    if conv.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size)):
        return "padding='same' with an even kernel pads the two sides differently"
    return None


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        vertical, horizontal = (d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size))
        return vertical, horizontal
    return conv.padding


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and _padding(conv) == (0, 0)
