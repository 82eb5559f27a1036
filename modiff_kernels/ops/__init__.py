"""The ops, as functions and as torch ops `torch.ops.modiff.*`; see `schema` for their contracts and `dispatch` for
backends."""

from ..quant.operands import GEGLU, IDENTITY, PackedWeight, Prologue, Window
from . import dispatch
from .dispatch import BackendUnavailable, preferred_layout, prepare_weight
from .problem import Problem
from .schema import attention, modulate, modulate_kernel, pack_weight, product, quantize, unpack_weight

__all__ = ["attention", "modulate", "modulate_kernel", "pack_weight", "prepare_weight", "product", "quantize"]
__all__ += ["BackendUnavailable", "Problem", "dispatch", "preferred_layout", "unpack_weight"]
__all__ += ["GEGLU", "IDENTITY", "PackedWeight", "Prologue", "Window"]
