"""Launches of kernels."""

import os
from collections.abc import Callable
from typing import Any

import torch

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
