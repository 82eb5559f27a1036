"""Low-bit layers in the place of `torch.nn.Linear` and `torch.nn.Conv2d`, and the state they work on."""

from modiff_kernels.nn.conv2d import ModulatedConv2d
from modiff_kernels.nn.linear import ModulatedLinear
from modiff_kernels.nn.state import ModulationState
from modiff_kernels.nn.state_tensors import Edge, StateTensor

__all__ = ["Edge", "ModulatedConv2d", "ModulatedLinear", "ModulationState", "StateTensor"]
