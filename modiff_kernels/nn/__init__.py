"""Low-bit layers in the place of `torch.nn.Linear` and `torch.nn.Conv2d`, and the state they work on."""

from modiff_kernels.nn.layer import ModulatedConv2d, ModulatedLinear, sampling_run
from modiff_kernels.nn.tensors import ModulationState

__all__ = ["ModulatedConv2d", "ModulatedLinear", "ModulationState", "sampling_run"]
