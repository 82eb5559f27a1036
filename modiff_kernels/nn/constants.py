"""Outputs of layers whose input does not change along a run: computed once, kept here."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class _Constant:
    source: Tensor | None
    version: int
    weight: Tensor
    value: Tensor


class Constants:
    """By context and layer: the output for the tensor that the layer read last.

    A tensor is the same if it is the same object, unchanged in place since (torch counts that). Values are never looked
    at. Tensors made in torch.inference_mode() do not count their changes, so nothing is kept for them: call the UNet
    under torch.no_grad() with tensors made outside of inference mode.

    losses: grows whenever something kept is forgotten.
    """

    def __init__(self) -> None:
        self.losses = 0
        self._kept: dict[tuple[str, str], _Constant] = {}

    def find(self, context: str, layer: str, source: Tensor, weight: Tensor) -> Tensor | None:
        """What `keep` got for this very source and weight, if they are unchanged; else None."""
        kept = self._kept.get((context, layer))
        if kept is None or kept.source is not source or kept.weight is not weight:
            return None
        # Compiled code asks for no versions: whoever runs it has looked for changed tensors before (`expire`).
        if not torch.compiler.is_compiling() and kept.version != source._version:
            return None
        return kept.value

    def keep(self, context: str, layer: str, source: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        """Keep `value` until source or weight change; the tensor that is kept, at the old address where it fits."""
        if torch.compiler.is_compiling():
            return value
        kept = self._kept.get((context, layer))
        if kept is not None and _alike(kept.value, value):
            value = kept.value.copy_(value)
        known = None if source.is_inference() else source
        version = 0 if known is None else source._version
        self._kept[context, layer] = _Constant(known, version, weight, value)
        return value

    def expire(self) -> None:
        """Forget what belongs to tensors that were changed in place."""
        for kept in self._kept.values():
            if kept.source is not None and kept.source._version != kept.version:
                kept.source = None
                self.losses += 1

    def forget(self) -> None:
        """Forget all tensors; the memory of the values stays for the next ones."""
        self.losses += 1
        for kept in self._kept.values():
            kept.source = None

    def release(self) -> None:
        """Free all values."""
        self._kept.clear()

    def nbytes(self) -> int:
        """Bytes of the values."""
        return sum(kept.value.nbytes for kept in self._kept.values())


def _alike(old: Tensor, new: Tensor) -> bool:
    same = old.shape == new.shape and old.dtype is new.dtype and old.device == new.device
    return same and old.is_inference() == new.is_inference()
