"""What all fused blocks have in common."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from modiff_kernels import ops
from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.layer import low_bit
from modiff_kernels.nn.tensors import ModulationState
from modiff_kernels.ops import Prologue
from modiff_kernels.quant.calibrated import NOT_CALIBRATED, CalibratedLayer

Calibrated = Mapping[str, CalibratedLayer]  # by path
Block = TypeVar("Block", bound="FusedBlock")


class Parts(NamedTuple):
    """Makes the layers and inner blocks of a fused block from those of `block`, under their paths in the UNet."""

    block: nn.Module
    config: ModiffConfig
    state: ModulationState
    path: str
    calibrated: Calibrated

    def layer(self, name: str, shared_input: str | None = None) -> Any:
        """The low-bit form of the layer `name`; shared_input: name of the layer whose input it shares."""
        path, shared = f"{self.path}.{name}", shared_input and f"{self.path}.{shared_input}"
        known = self.calibrated.get(path, NOT_CALIBRATED)
        return low_bit(self.block.get_submodule(name), self.config, self.state, path, shared, known)

    def inner(self, form: type[Block], name: str) -> Block:
        return form(self._replace(block=self.block.get_submodule(name), path=f"{self.path}.{name}"))


class Role(NamedTuple):
    """What a block does around a layer: the prologue of its input, with SiLU or not; whether it adds a skip connection
    to its output; whether the output is values and gates, of which the prologue "geglu" makes one tensor."""

    prologue: str = "identity"
    silu: bool = False
    adds: bool = False
    is_gated: bool = False


ALONE = Role()

REMEDY = "use ModiffConfig(fuse=False), or change single modules before accelerate()"

CHANGE = "call handle.remove(), make the change, then accelerate() again"


class FusedBlock(nn.Module):
    """A block whose layers are low-bit and whose elementwise passes are fused with their quantisation.

    stands_for: the block of diffusers.models. takes: the name of its input. layers: names of the layers that are
    computed in low bits, where the block has them. left_out: children that stay as they are, and whose layers are
    replaced by themselves. parts: children that are called as they are where something was put on them, such as a hook.
    scalable: names of layers whose input is quantised as it is, so that its channels may be scaled before."""

    stands_for: ClassVar[str]
    takes: ClassVar[str] = "hidden_states"
    layers: ClassVar[Mapping[str, Role]]
    left_out: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()
    scalable: ClassVar[tuple[str, ...]] = ()

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.__dict__["original"] = parts.block  # not a child: its parameters are ours, under the same keys
        self.state, self.path = parts.state, parts.path
        self.training = parts.block.training
        self.build(parts.block, parts)

    @property
    def __class__(self) -> Any:  # by which others look for modules to change, as isinstance() does
        return type(self.__dict__.get("original", self))

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise RuntimeError(f"block '{self.path}' is fused and cannot become a {kind.__name__}; {REMEDY}")

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether `block` computes exactly the equation of this form."""
        raise NotImplementedError

    def build(self, block: nn.Module, parts: Parts) -> None:
        """Set the children, under their names in `block`."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "FusedBlock":
        self.original.train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output, new tensors in its input's dtype; takes what the original block takes, mutates the state
        of its layers, raises what they raise."""
        x, *args = args or [kwargs.pop(self.takes)]
        if x.requires_grad and torch.is_grad_enabled():
            text = "call the UNet inside `with torch.no_grad():`, or handle.remove() first to train or differentiate"
            raise RuntimeError(f"block '{self.path}' has no gradient but its input asks for one; {text}")
        try:
            return self.run(x, *args, **kwargs)
        except (ValueError, TypeError, ops.BackendUnavailable) as error:
            if str(error).startswith("block '"):  # from a block inside this one
                raise
            raise type(error)(f"block '{self.path}': {error}") from error
        except (AttributeError, KeyError) as error:
            raise RuntimeError(f"block '{self.path}' has parts that do not fit ({error}); {CHANGE}") from error

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def group_norm(norm: nn.GroupNorm, silu: bool, further: Tensor | None = None) -> Prologue:
    """silu?(norm(h)) with the parameters that `norm` has now; h has the channels of `further`, too."""
    held = norm._parameters  # torch looks there last, after half a microsecond
    return Prologue("group_norm", held["weight"], held["bias"], None, norm.num_groups, norm.eps, silu, further)


def layer_norm(norm: nn.LayerNorm) -> Prologue:
    """norm(h) with the parameters that `norm` has now."""
    held = norm._parameters
    return Prologue("layer_norm", held["weight"], held["bias"], eps=norm.eps)


def is_untouched(*modules: nn.Module) -> bool:
    """No hooks, no other forward than it was written with, in `modules` or below: a fused block would not call them."""
    return all(has_no_hook(module) and is_as_written(type(module)) for top in modules for module in top.modules())


def has_no_hook(module: nn.Module) -> bool:
    """No hooks and no forward of its own, on the module alone."""
    return "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


COMPUTING = ("forward", "_conv_forward", "__call__")


def is_as_written(kind: type) -> bool:
    """Whether the methods that compute are of the Python modules that the class and its bases are from."""
    methods = [(owner, vars(owner).get(name)) for owner in kind.__mro__ for name in COMPUTING]
    return all(method is None or getattr(method, "__module__", None) == owner.__module__ for owner, method in methods)


def is_adapter(module: nn.Module) -> bool:
    """Whether `module`, such as a LoRA of peft, stands around a layer, its `base_layer`, and adds to its output: by
    weights of its own, times a number that may change at any time. peft itself is not imported."""
    return "base_layer" in module._modules and type(module).__module__.startswith("peft.")
