"""`Watch`: whether a network still is what its low-bit layers and fused blocks were made from."""

import logging
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, is_, itemgetter

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modiff_kernels.integrations.replacements import Replacements
from modiff_kernels.nn.blocks import FusedBlock, TimeProjections
from modiff_kernels.nn.blocks.base import REMEDY, has_no_hook
from modiff_kernels.nn.cache import sample_of
from modiff_kernels.nn.layer import ModulatedLayer

logger = logging.getLogger("modiff_kernels")

_weight_and_bias, _version = itemgetter("weight", "bias"), attrgetter("_version")


class Watch:
    """Looks at every call whether parameters are the same objects, unchanged in place as torch counts it, and whether
    something may have been put on modules; in the first call of a run also at some of the values, since a write to
    `.data` is not counted, and at every module that a fused block does not call. Weights that have changed are
    followed; a hook and the like on such a module is refused. What a call looks at is listed before: it costs some
    microseconds.

    On CUDA a call does not wait for the comparison of values; a later one finds the verdict. (Never run on a GPU.)
    """

    def __init__(self, unet: nn.Module, replaced: Replacements) -> None:
        self._unet, self._state = unet, replaced.state
        self._layers = list(replaced.layers.values())
        self._parameters = [layer._parameters for layer in self._layers]
        shared = [getattr(block, "time_projections", None) for block in replaced.fused.values()]
        self._projections: set[TimeProjections] = set(filter(None, shared))
        inside = {id(layer.original): (path, layer.original) for path, layer in replaced.layers.items()}
        for block in replaced.fused.values():
            inside.update({id(module): (path, module) for path, module in _not_called(block)})
        self._inside = list(inside.values())
        self._attributes = [module.__dict__ for _, module in self._inside]
        self._facts = [_facts(module) for _, module in self._inside]
        self._signs: tuple[int, ...] = ()
        self._ends = -1
        self._verdict: Tensor | None = None
        self._times = sample_of(self._of_time())
        self._list_parameters()

    def look(self) -> None:
        """To be called before a call begins. Raises RuntimeError before anything changes."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            text = "cannot be traced or exported; call handle.remove() before torch.jit.trace or torch.export"
            raise RuntimeError(f"an accelerated UNet has state that joins its calls, and {text}")
        beginning, self._ends = self._state.kept.ends != self._ends, self._state.kept.ends
        signs = RemovableHandle.next_id, self._unet.training, sum(map(len, self._attributes))
        if beginning or signs != self._signs:
            self._check_modules()
            self._signs = signs
        same = all(map(is_, self._parameters_now(), self._held)) and list(map(_version, self._counted)) == self._versions
        if not same or list(map(Tensor.data_ptr, self._weights)) != self._addresses:
            self._follow([layer for layer in self._layers if layer.has_other_parameters()], beginning)
        if beginning or (self._verdict is not None and self._verdict.item()):
            self._compare_values(beginning)

    def refresh(self) -> None:
        """Make all codes again that are not calibrated."""
        self._compare_values(False)
        for layer in self._layers:
            if layer.calibrated.weight is None and not layer.weight.is_meta:
                layer.refresh_weight()
        self._forget_times()

    def _parameters_now(self) -> Iterator[Tensor | None]:
        return chain.from_iterable(map(_weight_and_bias, self._parameters))

    def _list_parameters(self) -> None:
        self._held = list(self._parameters_now())
        self._counted = [tensor for tensor in self._held if tensor is not None and not tensor.is_inference()]
        self._versions = list(map(_version, self._counted))
        self._weights = self._held[::2]  # the addresses of biases are left to the beginning of a run
        self._addresses = list(map(Tensor.data_ptr, self._weights))

    def _of_time(self) -> list[Tensor]:
        """Weights that the time table and its projections come from, as far as they are float."""
        table = self._state.time_table
        modules = [*chain(*[shared.linears for shared in self._projections]), *(() if table is None else table.modules)]
        return [parameter for module in modules for parameter in module.parameters()]

    def _forget_times(self) -> None:
        self._times = sample_of(self._of_time())
        for owner in filter(None, (self._state.time_table, *self._projections)):
            owner.release()

    def _compare_values(self, beginning: bool) -> None:
        """Follow where values differ from those that were used; at the beginning of a run on CUDA, ask only."""
        self._verdict, of_time = None, self._of_time()
        now = [*[parameter for layer in self._layers for parameter in layer.made_from.weights], *of_time]
        device = now[0].device if now else None
        if any(parameter.device != device for parameter in now) or device is None or device.type == "meta":
            return  # nothing to compare, or offloaded
        known = torch.cat([part.to(device) for part in (*[layer.sample for layer in self._layers], self._times)])
        found = sample_of(now)
        if device.type == "cuda" and beginning:
            self._verdict = torch.zeros((), dtype=torch.bool, pin_memory=True)
            self._verdict.copy_((found != known).any(), non_blocking=True)
        elif not torch.equal(found, known):
            self._follow([layer for layer in self._layers if layer.has_other_values()], beginning)
            self._forget_times()

    def _follow(self, layers: list[ModulatedLayer], beginning: bool) -> None:
        """Make the codes of layers again whose weights have changed; those of a calibration belong to its weights."""
        changed = [layer for layer in layers if not layer.has_same_weights()]
        if calibrated := [layer.name for layer in changed if layer.calibrated.weight is not None]:
            text = "but its codes are those of a calibration; call handle.remove(), then load and calibrate the new ones"
            raise RuntimeError(f"layer '{calibrated[0]}' got other weights, {text}")
        for layer in layers:
            layer.refresh_weight() if layer in changed else layer.note_parameters()
        self._list_parameters()
        if changed:
            logger.info("weights of %d layers have changed, their codes were made again", len(changed))
            if not beginning:
                getattr(self._state, "begin_anew", lambda: self._state.invalidate("weights have changed"))()

    def _check_modules(self) -> None:
        for (path, module), known in zip(self._inside, self._facts):
            kind, untouched, drops = facts = _facts(module)
            if facts != known:
                what = "drops values in training" if drops else "has a hook or a forward of its own"
                what = what if drops or not untouched else f"has become a {kind.__name__}"
                raise RuntimeError(f"'{path}' {what}, but is computed without being called; {REMEDY}")


def _facts(module: nn.Module) -> tuple[type, bool, bool]:
    """What it is, whether nothing was put on it, and whether it is a dropout that drops."""
    return type(module), has_no_hook(module), isinstance(module, nn.Dropout) and module.training and module.p > 0


def _not_called(block: FusedBlock) -> Iterator[tuple[str, nn.Module]]:
    """The original of a fused block and what is below it, and what is below the block, with paths; without what the
    block calls as it is."""
    for top in (block.original, block):
        called = [top._modules.get(name) for name in (*block.left_out, "time_emb_proj")]
        left = {id(module) for part in called if part is not None for module in part.modules()}
        left |= {id(block), *[id(block._modules.get(name)) for name in block.parts]}
        names = top.named_modules(prefix=block.path)
        yield from ((path, module) for path, module in names if id(module) not in left)
