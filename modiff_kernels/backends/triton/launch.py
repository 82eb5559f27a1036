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


_MOST_PARTS = 1024
_scratch: dict[Any, tuple[Tensor, dict[Any, list[Any]]]] = {}


def scratch(device: torch.device, integers: tuple[int, ...], floats: tuple[int, ...], count: int) -> list[Any]:
    """Vectors of so many int32 and float32 (None of none) for what the kernels of one op leave to each other, and its
    `counters`. The next op of this thread on this stream overwrites them; what is captured gets its own."""
    gpu = device.type == "cuda"
    place, key = None, (integers, floats, count)
    if not (gpu and torch.cuda.is_current_stream_capturing()):
        place = device, torch._C._cuda_getCurrentRawStream(device.index) if gpu else 0, threading.get_ident()
    memory, known = _scratch.get(place, (None, {}))
    if (found := known.get(key)) is None:
        sizes = [-(-size // 128) * 128 for size in integers + floats]  # aligned as allocations are
        if memory is None or memory.shape[0] < sum(sizes) or len(known) == _MOST_PARTS:
            memory, known = torch.empty(sum(sizes), dtype=torch.int32, device=device), {}
            if place is not None:
                _scratch[place] = memory, known
        dtypes = [torch.int32] * len(integers) + [torch.float32] * len(floats)
        parts = zip(memory[: sum(sizes)].split(sizes), integers + floats, dtypes)
        found = known[key] = [part[:size].view(dtype) if size else None for part, size, dtype in parts]
        found.append(counters(device, count))
    return found
