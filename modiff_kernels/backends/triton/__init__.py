"""Triton kernels for NVIDIA GPUs from sm_80 (A100) on; no compiler is needed on the user's machine.

Quantisation, and integer products on the int8 tensor cores. Importing this package imports no triton and touches no
GPU: `quantize` and `product` are imported at their first use, after `unavailable()` has said that they can run."""

import importlib
from functools import lru_cache
from typing import Any

from ...quant.packing import KPACK_V1
from .. import LEAST_CAPABILITY, why_no_gpu, why_no_sums, why_too_old
from . import quantize_tiling, tiles

MAX_ROWS = 1 << 31

_FUNCTIONS = {"quantize": ".quantize_launch", "product": ".product_launch"}


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = function = getattr(importlib.import_module(_FUNCTIONS[name], __name__), name)
    return function


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    if (reason := why_no_gpu()) is not None:
        return reason
    try:
        import triton  # noqa: F401 (whether it loads is the question)
    except ImportError as error:
        return f"triton does not load ({error}); install it with: pip install 'modiff-kernels[triton]'"
    return None


def why_not(problem: Any) -> str | None:
    return why_too_old(problem.capability) or _REASONS[problem.op](problem)


def _product_why_not(problem: Any) -> str | None:
    if problem.layout != KPACK_V1:
        return f"it reads weights in layout {KPACK_V1!r}, not {problem.layout!r}"
    groups = 1 if problem.window is None else problem.window.groups
    weight = (problem.weight_bits, problem.group_size)
    shape = tiles.Shape(problem.m, problem.n, problem.channels // groups, problem.taps, groups, *weight)
    if shape.weight_bits != 8 and shape.taps > 1 and shape.channels % 8 != 0:
        wanted = "a tap must begin at a byte, so their number must be divisible by 8; use weight_bits=8"
        return f"{shape.weight_bits}-bit weights with {shape.channels} input channels per tap: {wanted}"
    if not any(tiles.fits(tile, shape) for tile in tiles.candidates(problem.capability or LEAST_CAPABILITY)):
        wanted = "a step along K is inside one group, so both (channels: above 1x1 only) must be divisible by 32"
        return f"group_size={shape.group_size} with {shape.channels} input channels per tap: {wanted}"
    if problem.m >= MAX_ROWS:
        return f"m={problem.m} rows; they are counted in int32"
    return why_no_sums(problem, grouped=True)


_REASONS = {"quantize": quantize_tiling.why_not, "product": _product_why_not}
