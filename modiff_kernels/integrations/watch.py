"""`Watch`: whether a network still is what its low-bit layers and fused blocks were made from."""

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modiff_kernels.integrations.replacements import Replacements
from modiff_kernels.log import logger
from modiff_kernels.nn.blocks import FusedAttention, FusedBlock
from modiff_kernels.nn.blocks.base import CHANGE, COMPUTING, REMEDY, has_no_hook, is_adapter
from modiff_kernels.nn.cache import sample_of
from modiff_kernels.nn.layer import ModulatedLayer

FREE = ("training", "forward", "processor", "fused_for", "original")  # of blocks, which follow changes of them

_version = attrgetter("_version")


class Watch:
    """Before every call it looks whether the parameters of low-bit layers are the same objects, and weights not changed
    in place as torch counts it; before the first of a run also at some values, since writes to `.data` are not counted,
    and at all modules that fused blocks do not call. Other weights are followed. Refused are a hook and the like on
    such a module, and other parts, attributes and methods than low-bit layers and blocks were made from. On CUDA a
    later call finds the verdict on the values (never run on a GPU)."""

    def __init__(self, unet: nn.Module, replaced: Replacements) -> None:
        self._unet, self._state = unet, replaced.state
        self._layers = list(replaced.layers.values())
        self._table = self._state.time_table
        shared = {getattr(block, "time_projections", None) for block in replaced.fused.values()}
        owners: list[Any] = list(filter(None, (*shared, self._table)))
        self._of_time = [module for owner in owners for top in owner.modules for module in top.modules()]
        self._parameters = [module._parameters for module in (*self._layers, *self._of_time)]
        inside = {id(layer.original): (path, layer.original) for path, layer in replaced.layers.items()}
        for block in replaced.fused.values():
            inside.update({id(module): (path, module) for path, module in _not_called(block)})
        self._inside = list(inside.values())
        parts = [part for block in replaced.fused.values() for part in block.modules()]
        blocks = {part.path: part for part in parts if isinstance(part, FusedBlock)}
        self._read = [*self._inside, *blocks.items(), *replaced.layers.items()]
        modules = [*self._of_time, *[module for _, module in self._read]]
        self._attributes = [module.__dict__ for module in modules]
        processors = [block.fused_for for block in blocks.values() if isinstance(block, FusedAttention)]
        self._classes = list({*map(type, (*processors, *modules))})
        self._convs = [module for module in unet.modules() if isinstance(module, nn.Conv2d)]
        self._facts = [_facts(module) for _, module in self._inside]
        self._contents = [_contents_of(module) for _, module in self._read]
        self._outside = self._outside_now()
        self._signs: Any = None
        self._time: Any = None
        self._ends = -1
        self._verdict: Tensor | None = None
        self._take_stock()

    def look(self) -> None:
        """To be called before a call begins. Raises RuntimeError before anything changes."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            text = "cannot be traced or exported; call handle.remove() before torch.jit.trace or torch.export"
            raise RuntimeError(f"an accelerated UNet has state that joins its calls, and {text}")
        state = self._state
        begins, self._ends = state.kept.ends != self._ends, state.kept.ends
        signs = RemovableHandle.next_id, self._unet.training, sum(map(len, self._attributes))
        if begins or signs != self._signs:
            self._check_modules()
            self._signs = signs
        try:
            same = self._parameters == self._known  # which looks at identity first, and that in C
        except RuntimeError:  # another tensor was there, and compared
            same = False
        if not same or list(map(_version, self._counted)) != self._versions:
            self._check_modules()
            self._state.weight_changes += 1
            self.follow(begins)
        elif begins or (self._verdict is not None and self._verdict) or self._finds_write():
            self._compare_values(begins)

    def _take_stock(self) -> None:
        self._known = [dict(parameters) for parameters in self._parameters]
        self._held = [tensor for tensor in chain.from_iterable(map(dict.values, self._known)) if tensor is not None]
        self._counted = [tensor for tensor in self._held if tensor.ndim > 1 and not tensor.is_inference()]
        self._versions = list(map(_version, self._counted))
        self._formats = [(tensor.data_ptr(), tensor.dtype) for tensor in self._held]
        self._views = self._views_now()
        self._samples = list(map(_values, self._views))
        self._first_sample = self._samples[0][: len(self._views[0][0])] if self._views and self._views[0] else None

    def _views_now(self) -> list[list[Tensor]]:
        """Some values of the low-bit layers, and of the float weights that more is made of; [] if offloaded."""
        layers, of_time = self._parameters[: len(self._layers)], self._parameters[len(self._layers) :]
        parts = [[t for owned in part for t in owned.values() if t is not None] for part in (layers, of_time)]
        devices = {tensor.device for part in parts for tensor in part}
        whole = len(devices) == 1 and devices.pop().type != "meta"
        return [[*map(sample_of, part)] for part in parts] if whole else []

    def _outside_now(self) -> list[Any]:
        """Methods of the classes, and float convolutions: who changes all of these does not find the low-bit ones."""
        methods = [getattr(kind, name, None) for kind in self._classes for name in COMPUTING]
        return methods + [(conv.padding_mode, conv.__dict__.get("_conv_forward")) for conv in self._convs]

    def _finds_write(self) -> bool:
        """Whether the first layer has other values: on the CPU, outside of runs, whose beginnings look at all."""
        if self._state.needs_run or not self._samples or not self._layers or self._layers[0].weight is None:
            return False
        view, known, (address, dtype) = self._views[0][0], self._first_sample, self._formats[0]
        if view.device.type != "cpu":
            return False
        weight = self._layers[0].weight
        return weight.data_ptr() != address or weight.dtype != dtype or not torch.equal(view, known)

    def _compare_values(self, begins: bool) -> None:
        """Follow other values; at the beginning of a run on CUDA, ask only whether there are some."""
        unmoved = self._formats == [(tensor.data_ptr(), tensor.dtype) for tensor in self._held]
        self._verdict = None
        found = list(map(_values, self._views if unmoved else self._views_now()))
        pairs = [(new, old.to(new)) for new, old in zip(found, self._samples)]  # the same values after a cast
        if begins and found and found[0].is_cuda:
            self._verdict = torch.zeros((), dtype=torch.bool, pin_memory=True)
            self._verdict.copy_(torch.stack([(new != old).any() for new, old in pairs]).any(), non_blocking=True)
        elif not all(torch.equal(*pair) for pair in pairs):
            self.follow(begins)
        elif not unmoved:
            self._take_stock()

    def follow(self, begins: bool = False, asked: bool = False) -> None:
        """Make all again that is made of weights. Codes of a calibration belong to the weights they were made for; they
        are given up, on a write or where `asked`, or other weights refused if the user gave the calibration."""
        found = list(map(_values, self._views_now()))
        if not found:
            return
        calibrated = [layer for layer in self._layers if layer.calibrated.weight is not None]
        written = asked or list(map(_version, self._counted)) != self._versions
        others = self._samples and not torch.equal(found[0], self._samples[0].to(found[0]))
        if calibrated and (others or (written and calibrated[0].calibrated.is_optional)):
            if not all(layer.give_up_codes() for layer in calibrated):
                text = "codes come from a calibration; call handle.remove(), then load and calibrate the new ones"
                raise RuntimeError(f"weights of low-bit layers have changed, but their {text}")
            logger.info("weights have changed: the codes found beside the model are given up, and weights rounded")
        for layer in self._layers:
            layer.refresh_weight() if layer.calibrated.weight is None else layer.adopt_parameters()
        self._take_stock()
        logger.info("weights have changed, and what was made of them was made again")
        if not begins:
            self._state.begin_anew()

    def _check_modules(self) -> None:
        for (path, module), facts in zip(self._inside, self._facts):
            if _facts(module) != facts:
                text = "a hook, a forward or a class of its own and dropout in training have no effect on it"
                raise RuntimeError(f"'{path}' is computed without being called, so {text}; {REMEDY}")
        pairs = zip(self._read, self._contents)
        other = [f"parts or attributes of '{path}'" for (path, module), known in pairs if known != _contents_of(module)]
        other += ["float convolutions, or methods of classes,"] if self._outside != self._outside_now() else []
        if other:
            raise RuntimeError(f"{other[0]} were changed, and low-bit layers do not follow; {CHANGE}")
        time = [(_facts(module), _contents_of(module)) for module in self._of_time]
        if time != self._time:
            self._time = time
            self._state.weight_changes += 1  # what follows from the timestep is made anew
        if (table := self._table) is not None:
            hooks = [module._forward_hooks or module._forward_pre_hooks for module in table.modules]
            below = [module for top in table.modules for module in top.modules() if module is not top]
            table.is_active = not any(hooks) and all(has_no_hook(module) and not is_adapter(module) for module in below)


def _values(views: list[Tensor]) -> Tensor:
    return torch.cat(views) if views else torch.empty(0)


def _contents_of(module: nn.Module) -> dict[str, Any]:
    """Public attributes and children, which a fused block or a low-bit layer has read when it was made."""
    if isinstance(module, ModulatedLayer):
        return {name: module.__dict__[name] for name in module.mirrored}
    found = {**module.__dict__, **module._modules}
    return {name: value for name, value in found.items() if name[0] != "_" and name not in FREE}


def _facts(module: nn.Module) -> tuple[type, bool, bool]:
    """What it is, whether nothing was put on it, and whether it is a dropout that drops."""
    return type(module), has_no_hook(module), isinstance(module, nn.Dropout) and module.training and module.p > 0


def _not_called(block: FusedBlock) -> Iterator[tuple[str, nn.Module]]:
    """With paths: the original of a block and what is below it, and what is below the block, but for what it calls."""
    for top in (block.original, block):
        called = [top._modules.get(name) for name in (*block.left_out, "time_emb_proj")]
        left = {id(module) for part in called if part is not None for module in part.modules()}
        left |= {id(block), *[id(block._modules.get(name)) for name in block.parts]}
        names = top.named_modules(prefix=block.path)
        yield from ((path, module) for path, module in names if id(module) not in left)
