"""`ModulatedLinear`: a low-bit `torch.nn.Linear`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modiff_kernels import ops
from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.layer import ModulatedLayer
from modiff_kernels.nn.state import ModulationState
from modiff_kernels.quant.calibrated import NOT_CALIBRATED, CalibratedLayer


class ModulatedLinear(ModulatedLayer):
    """y = x W^T + b on x [..., in_features], two dimensions or more; dimension 0 counts the samples."""

    op_suffix = "linear"
    memory_format = torch.contiguous_format
    initialize_op = staticmethod(ops.initialize_linear)
    modulated_op = staticmethod(ops.modulated_linear)
    accumulate_op = staticmethod(ops.accumulate_linear)
    quantized_op = staticmethod(ops.quantized_linear)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: ModiffConfig,
        state: ModulationState,
        name: str,
        edge: str | None = None,
        calibrated: CalibratedLayer = NOT_CALIBRATED,
    ) -> "ModulatedLinear":
        """The low-bit form of `linear`, which is kept inside and not changed.

        name: the path of the layer, unique in `state`. edge: key of the tensor it reads; layers that always get the
        very same tensor share one, default: a tensor of its own. calibrated: codes, scales and bias from
        calibration. Raises ValueError on weights that hold NaN or Inf, on a missing or impossible static scale, and on
        a calibration of another layer.
        """
        layer = cls(linear, config, state, name, edge, config.layer_granularity, calibrated)
        layer.in_features = linear.in_features
        layer.out_features = linear.out_features
        return layer

    def canonical(self, x: Tensor) -> Tensor:
        """Contiguous [N, K] or [N, L, K]."""
        if x.ndim > 3:
            x = x.flatten(1, -2)
        return x.contiguous()

    def output_shape(self, x_shape: torch.Size) -> tuple[int, ...]:
        """[..., out_features]."""
        return (*x_shape[:-1], self.weight.shape[0])

    def float_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """torch.nn.functional.linear."""
        return F.linear(x, weight, bias)
