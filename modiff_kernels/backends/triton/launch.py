"""Launches of kernels."""

import os
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


_COUNTERS = 4096  # of a stream: 64 samples of a group norm over 4096 channels
_STREAMS = 64  # torch has 32 of its own for each of two priorities
_rows: dict[torch.device, Tensor] = {}
_row_of: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """int32 zeros by which the programs of a kernel count who has arrived; the kernel leaves them at zero.

    Every stream has its own, as its kernels follow each other. CUDA graphs use those of the stream that they were
    captured on: graphs captured on one stream must not be replayed at the same time (those of a network share their
    memory anyway). They are made before a capture, which only records their zeroing; where they were not, or are not
    enough, a launch gets new ones.
    """
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    row = _row_of.get((device, stream))
    if row is None:
        if device not in _rows and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            with torch.inference_mode(False):
                _rows[device] = torch.zeros((_STREAMS, _COUNTERS), dtype=torch.int32, device=device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # once: other streams use them, too
        taken = sum(known == device for known, _ in _row_of)
        if device in _rows and taken < _STREAMS:
            row = _row_of[device, stream] = _rows[device][taken]
    if row is None or count > _COUNTERS:
        return torch.zeros(count, dtype=torch.int32, device=device)
    return row
