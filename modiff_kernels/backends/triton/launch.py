"""Launches of kernels."""

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # set before kernels are imported, see Triton's docs

record: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None
"""Takes kernel, arguments and keywords in the place of a launch: to compile without a GPU (tools/triton_forms.py)."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **keywords: Any) -> None:
    """`kernel[grid](*args, **keywords)` on the device of the first argument."""
    if record is not None:
        record(kernel, args, keywords)
    elif INTERPRETED or args[0].device.index == torch.cuda.current_device():
        kernel[grid](*args, **keywords)
    else:
        with torch.cuda.device(args[0].device):
            kernel[grid](*args, **keywords)


_COUNTERS = 4096  # of a stream: a group norm over 2560 channels of 372 samples
_STREAMS = 64  # torch has 32 of its own for each of two priorities
_rows: dict[torch.device, Tensor] = {}
_row_of: dict[tuple[torch.device, int], Tensor | None] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros, with which the programs of a kernel count who has arrived; it leaves them at zero.

    Every stream has its own: its kernels follow each other. A CUDA graph has those of the stream that it was captured
    on, so graphs captured on one stream must not run at the same time (those of a network share their memory anyway).
    All are zeroed at the first use of the device, as a capture would only record it; where that is too late, or they
    are too few, a launch gets new ones."""
    gpu = device.type == "cuda"
    key = device, torch._C._cuda_getCurrentRawStream(device.index) if gpu else 0
    row = _row_of.get(key)
    if row is None and device not in _rows and not (gpu and torch.cuda.is_current_stream_capturing()):
        with torch.inference_mode(False):
            _rows[device] = torch.zeros((_STREAMS, _COUNTERS), dtype=torch.int32, device=device)
        if gpu:
            torch.cuda.synchronize(device)  # other streams use them, too
    if row is None and device in _rows:
        taken = sum(known == device for known, _ in _row_of)
        row = _row_of[key] = _rows[device][taken] if taken < _STREAMS else None
    return torch.zeros(count, dtype=torch.int32, device=device) if row is None or count > _COUNTERS else row


class _Scratch(threading.local):
    """Of a thread, whose launches on a stream follow each other: the memory of every stream, and its parts so far."""

    def __init__(self) -> None:
        self.held: dict[tuple[torch.device, int], tuple[Tensor, dict[Any, list[Tensor]]]] = {}


_scratch = _Scratch()
_MOST_PARTS = 1024


def scratch(device: torch.device, integers: tuple[int, ...], floats: tuple[int, ...], count: int) -> list[Tensor]:
    """Vectors of so many int32 and float32 for what the kernels of one op leave to each other, and its `counters`; the
    next op of the thread on this stream overwrites them. What is captured gets its own, which live with the graph."""
    gpu = device.type == "cuda"
    if gpu and torch.cuda.is_current_stream_capturing():
        return [*_divided(None, device, integers, floats)[1], counters(device, count)]
    stream = device, torch._C._cuda_getCurrentRawStream(device.index) if gpu else 0
    memory, known = _scratch.held.get(stream, (None, {}))
    key = integers, floats, count
    if (found := known.get(key)) is None:
        held, parts = _divided(memory if len(known) < _MOST_PARTS else None, device, integers, floats)
        if held is not memory:
            _scratch.held[stream] = _, known = held, {}
        found = known[key] = [*parts, counters(device, count)]
    return found


def _divided(
    memory: Tensor | None, device: torch.device, integers: tuple[int, ...], floats: tuple[int, ...]
) -> tuple[Tensor, list[Tensor]]:
    """`memory`, or new one where it is too small, and its parts, aligned as allocations are."""
    counts = integers + floats
    sizes = [-(-count // 128) * 128 for count in counts]
    if memory is None or memory.shape[0] < sum(sizes):
        memory = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    parts = [part[:count] for part, count in zip(memory[: sum(sizes)].split(sizes), counts)]
    return memory, parts[: len(integers)] + [part.view(torch.float32) for part in parts[len(integers) :]]
