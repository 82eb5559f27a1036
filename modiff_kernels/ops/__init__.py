"""The ops, as functions and as torch ops `torch.ops.modiff.*`: `schema` has contracts, `dispatch` backends."""

from ..quant.operands import GEGLU, IDENTITY, PackedWeight, Prologue, Window
from ..quant.packing import pack as pack_weight
from ..quant.packing import unpack_weight
from . import dispatch
from .dispatch import BackendUnavailable, preferred_layout, prepare_weight
from .problem import Problem
from .schema import attention, modulate, modulate_kernel, product, quantize

__all__ = ["attention", "modulate", "modulate_kernel", "pack_weight", "prepare_weight", "product", "quantize"]
__all__ += ["BackendUnavailable", "Problem", "dispatch", "preferred_layout", "unpack_weight"]
__all__ += ["GEGLU", "IDENTITY", "PackedWeight", "Prologue", "Window"]
