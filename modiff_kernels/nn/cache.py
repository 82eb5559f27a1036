"""What is computed once and kept: outputs of layers whose input does not change along a run (`KeptOutputs`), and what a
network derives from the timestep alone (`TimeTable`).

A run calls the network at the timesteps of a schedule, and the next run mostly at the same ones. Features
(`time_proj`), embedding (`time_embedding`) and the embedding's projections in the residual blocks follow from the
timestep and the weights, so they are a table over the schedule, filled as it is walked through."""

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def tensor_version(tensor: Tensor) -> int:
    """A number that grows with every in-place change of `tensor`; 0 for inference tensors, which do not count."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


@torch.no_grad()
def sample_of(tensor: Tensor) -> Tensor:
    """A view of some values: other ones where it was written to through `.data`, which counts as no change. Which ones
    does not depend on where they lie in memory."""
    count, step, start = _diagonal(tensor.shape, tensor.stride())
    return tensor.as_strided((count,), (step,), tensor.storage_offset() + start)


@functools.cache
def _diagonal(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, int, int]:
    """How many places along the diagonal of the first two dimensions, in the middle of the others; step and start."""
    count = min([64, *shape[:2]])
    step = sum(size // count * step for size, step in zip(shape[:2], stride))
    return count, step, sum(size // 2 * step for size, step in zip(shape[2:], stride[2:]))


@dataclasses.dataclass
class _Kept:
    source: Tensor | None
    version: int
    weight: Tensor
    value: Tensor


class KeptOutputs:
    """By context and layer: the output for the tensor that the layer read last.

    A tensor is the same if it is the same object, unchanged in place since (torch counts that). Those made in
    torch.inference_mode() do not count their changes, so nothing is kept for them: call the UNet under torch.no_grad().

    losses: grows whenever something kept is forgotten. ends: of runs, which forget all. moves: how often a value was
    not kept at an old address, by context."""

    def __init__(self) -> None:
        self.losses = self.ends = 0
        self.moves: collections.Counter[str] = collections.Counter()
        self._kept: dict[tuple[str, str], _Kept] = {}

    def find(self, context: str, layer: str, source: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What `keep` got for this very source and weight, if they are unchanged and it is of `dtype`; else None."""
        kept = self._kept.get((context, layer))
        if kept is None or kept.source is not source or kept.weight is not weight or kept.value.dtype is not dtype:
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
        form = value.shape, value.dtype, value.device
        if kept is not None and form == (kept.value.shape, kept.value.dtype, kept.value.device):
            value = kept.value.copy_(value)
        else:
            self.moves[context] += 1
            if value.is_inference():
                with torch.inference_mode(False):
                    value = value.clone()  # later calls may write it
        known = None if source.is_inference() else source
        self._kept[context, layer] = _Kept(known, tensor_version(source), weight, value)
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
        self.ends += 1
        for kept in self._kept.values():
            kept.source = None

    def take(self, context: str) -> dict[tuple[str, str], _Kept]:
        """Take out what belongs to `context`."""
        return {key: self._kept.pop(key) for key in [*self._kept] if key[0] == context}

    def put_back(self, taken: dict[tuple[str, str], _Kept]) -> None:
        """Put back what `take` gave: memory for new values, which belong to no tensor."""
        self._kept.update({key: dataclasses.replace(kept, source=None) for key, kept in taken.items()})

    def release(self) -> None:
        self._kept.clear()

    def nbytes(self) -> int:
        return sum(kept.value.nbytes for kept in self._kept.values())


MOST_ENTRIES = 1024  # as many as the longest schedules have calls; a table that is full begins anew

ROWS = 2
"""How many rows are computed, of which one is kept: products of one row are the only ones whose order of summation
depends on where the weights lie in memory, and with that a saved model's pictures."""


@dataclasses.dataclass
class Entry:
    """For one timestep and batch: features [N, F] and embedding [N, D], whose rows are one row in memory. projections:
    by what projects them (`TimeProjections`), valid for its weights; tensors of one row each."""

    features: Tensor
    embedding: Tensor | None = None
    projections: dict[Any, tuple[Any, list[Tensor]]] = dataclasses.field(default_factory=dict)

    def nbytes(self) -> int:
        """Bytes in memory, of one row each."""
        rows = [table[:1] for table in (self.features, self.embedding) if table is not None]
        for _, parts in self.projections.values():
            rows += parts
        return sum(row.nbytes for row in rows)


class _Call(threading.local):
    """The UNet call of this thread: its number, its timestep until `time_proj` has taken it, then its entry."""

    number = 0
    timestep: float | None = None
    entry: Entry | None = None


class TimeTable:
    """The table of one UNet. `time_proj` and `time_embedding` are its modules, whose forwards go through `features`
    and `embedding`.

    A call of the UNet with a known timestep stands between `begin_call` and `end_call`; all others compute as ever, as
    do calls with gradients, and `time_embedding` of anything but the features. Compiled code reads tensors that stay:
    `for_compiled`, the embedding, and with it the projections; before its call `load` writes them, or takes them away.
    Entries hold as long as the weights stay, as `state` counts it. is_active: whether there are entries at all; for one
    who sees that a hook or an adapter is on the modules or below."""

    def __init__(self, state: Any, time_proj: nn.Module, time_embedding: nn.Module) -> None:
        self.modules = time_proj, time_embedding
        self.is_active = True
        self._state, self._made_at = state, state.weight_changes
        self._entries: dict[tuple[float, int], Entry] = {}
        self._call = _Call()
        self._projecting: list[Any] = []  # what has asked for projections
        self.rows: list[Tensor] = []
        self.for_compiled: Tensor | None = None

    def begin_call(self, timestep: float) -> None:
        self._call.number += 1
        self._call.timestep = timestep if self.is_active and not torch.is_grad_enabled() else None

    def end_call(self) -> None:
        self._call.timestep = self._call.entry = None

    def load(self, value: float | None, timestep: Tensor, batch: int, device: torch.device) -> None:
        """For compiled code that is called next: `timestep` of `batch` images, all `value`; None if not known."""
        entry = None
        if value is not None and self._projecting:
            self.begin_call(value)
            try:
                if (entry := self._complete_entry(batch, device)) is None:
                    timesteps = timestep.reshape(-1)[:1].expand(batch).to(device)
                    embedding = self.modules[1](self.modules[0](timesteps))
                    if (entry := self.entry_of(embedding)) is not None:
                        for one in self._projecting:
                            one.project(embedding)
            finally:
                self.end_call()
        if entry is None or entry.embedding is None:
            self.for_compiled = None
            return
        rows = [entry.embedding[:1]] + [part for one in self._projecting for part in entry.projections[one][1]]
        forms = [[(row.shape, row.dtype, row.device) for row in some] for some in (rows, self.rows)]
        if forms[0] != forms[1]:
            with torch.inference_mode(False):
                self.rows = [torch.empty_like(row) for row in rows]
            self.for_compiled = None
        torch._foreach_copy_(self.rows, rows)
        if self.for_compiled is None or len(self.for_compiled) != batch:
            left = iter(self.rows)
            self.for_compiled = next(left).expand(batch, -1)
            for one in self._projecting:
                one.for_compiled = [next(left) for _ in entry.projections[one][1]]

    def projections(self, owner: Any, embedding: Tensor) -> tuple[Any, list[Tensor]] | None:
        """Where `embedding` is that of this call: what `keep_projections` got for it from `owner`, or (None, [])."""
        entry = self.entry_of(embedding)
        return None if entry is None else entry.projections.get(owner, (None, []))

    def keep_projections(self, owner: Any, weight: Any, parts: list[Tensor]) -> None:
        self._call.entry.projections[owner] = weight, parts
        if owner not in self._projecting:
            self._projecting.append(owner)

    def _complete_entry(self, batch: int, device: torch.device) -> Entry | None:
        """That of the call, if it holds all that compiled code asks for."""
        if self._made_at != self._state.weight_changes or torch.is_autocast_enabled(device.type):
            return None
        entry = self._entries.get((self._call.timestep, batch))
        return entry if entry is not None and all(one in entry.projections for one in self._projecting) else None

    @property
    def call_number(self) -> int:
        return self._call.number

    def entry_of(self, embedding: Tensor) -> Entry | None:
        """The entry of this call if `embedding` is its embedding, else None."""
        entry = self._call.entry
        return entry if entry is not None and entry.embedding is embedding else None

    def features(self, compute: Callable[[Tensor], Tensor], timesteps: Tensor) -> Tensor:
        """compute(timesteps) [N, F] for timesteps [N], all equal in a call that was begun; not to be written to."""
        if torch.compiler.is_compiling() or self._call.timestep is None:
            return compute(timesteps)
        key = self._call.timestep, len(timesteps)
        self._call.timestep = None
        if timesteps.ndim != 1 or torch.is_autocast_enabled(timesteps.device.type):
            return compute(timesteps)
        if self._made_at != self._state.weight_changes or len(self._entries) >= MOST_ENTRIES:
            self._entries.clear()
        self._made_at = self._state.weight_changes
        entry = self._entries.get(key)
        if entry is None:
            # In the dtype of the embedding's weights, to which the UNet casts it: the cast gives the same object then.
            row = compute(timesteps[:1]).to(next(self.modules[1].parameters()).dtype)
            entry = self._entries[key] = Entry(row.expand(len(timesteps), -1))
        self._call.entry = entry
        return entry.features

    def embedding(self, compute: Callable[..., Tensor], features: Tensor, condition: Tensor | None = None) -> Tensor:
        """compute(features, condition) [N, D]; not to be written to."""
        if torch.compiler.is_compiling():
            known = self.for_compiled if condition is None else None
            return compute(features, condition) if known is None else known
        entry = self._call.entry
        if entry is None or entry.features is not features or condition is not None:
            return compute(features, condition)
        if entry.embedding is None:
            entry.embedding = one_row(compute(features[:1].expand(ROWS, -1))).expand(len(features), -1)
        return entry.embedding

    def nbytes(self) -> int:
        return sum(entry.nbytes() for entry in list(self._entries.values())) + sum(row.nbytes for row in self.rows)

    def release(self) -> None:
        self._entries.clear()
        self.rows, self.for_compiled = [], None


def one_row(rows: Tensor) -> Tensor:
    """The first row of a result that has ROWS equal ones, without the memory of the others."""
    return rows[:1].clone()
