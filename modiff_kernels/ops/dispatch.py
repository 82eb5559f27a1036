"""Which backend solves which problem: one table, asked with `select` and printed with `table`.

`backend="auto"` walks PRIORITY; a named backend is a demand and never falls back. The environment variable
MODIFF_BACKEND, read once, puts one backend in the place of "auto". Backends are loaded at the first question; one that
fails to load stays in the table with its reason.
"""

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from .problem import CHECKS, Problem

AUTO = "auto"
REFERENCE = "reference"
BACKENDS = ("cpu", "onednn", "triton", "cuda", REFERENCE)
# No kernel for CUDA has been measured yet. triton comes first because it needs no compiler and has group scales, groups
# and channels that are no multiple of 16; cuda has the same ops, with the same codes and layouts, where triton is not
# installed or does not solve the problem. Measured rows (benchmarks/bench_products.py) shall decide.
PRIORITY = {"cpu": ("cpu", "onednn", REFERENCE), "cuda": ("triton", "cuda", REFERENCE)}
# Where the reference is no loss: conversions happen once per weight, before sampling; attention is torch's own kernel.
REFERENCE_OPS = ("attention", "pack_weight", "unpack_weight")

logger = logging.getLogger("modiff_kernels")


class BackendUnavailable(RuntimeError):
    """No backend, or not the demanded one, can solve the problem; the message lists every reason."""


class Selection(NamedTuple):
    """The chosen backend, its function, (backend, reason) of those that were asked before it, and whether compiled
    code can call what the function is made of.
    """

    backend: str
    fn: Callable[..., Any]
    rejected: tuple[tuple[str, str], ...]
    traceable: bool


class Row(NamedTuple):
    """One cell of the table: `reason` says why `backend` has no `op` here, None if it has."""

    op: str
    backend: str
    reason: str | None


@cache
def forced_backend() -> str | None:
    """The backend that MODIFF_BACKEND demands, None if unset or "auto"."""
    name = os.environ.get("MODIFF_BACKEND", AUTO)
    if name not in (AUTO, *BACKENDS):
        raise ValueError(f"MODIFF_BACKEND={name!r} is not known; choose one of {', '.join((AUTO, *BACKENDS))}")
    return None if name == AUTO else name


@cache
def load(name: str) -> Any:
    """The module of backend `name`, or, as a str, why it could not be loaded."""
    module_name = f"modiff_kernels.backends.{name}"
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        return "it is not part of this installation" if error.name == module_name else f"it failed to load: {error}"
    except (ImportError, OSError) as error:
        return f"it failed to load: {error}"


def why_unavailable(name: str) -> str | None:
    """Why backend `name` cannot run on this machine at all, None if it can."""
    module = load(name)
    return module if isinstance(module, str) else module.unavailable()


def why_not(problem: Problem, name: str) -> str | None:
    """Why backend `name` cannot solve `problem`, None if it can."""
    if name not in PRIORITY.get(problem.device_type, ()):
        return f"it does not run on {problem.device_type}"
    reason = why_unavailable(name)
    if reason is not None:
        return reason
    kernel = load(name).KERNELS.get(problem.op)
    return f"it has no {problem.op}" if kernel is None else kernel.why_not(problem)


def candidates(device_type: str, backend: str = AUTO) -> tuple[str, ...]:
    """Backends to ask, in order, for a call with `backend` on `device_type`."""
    if backend not in (AUTO, *BACKENDS):
        raise ValueError(f"backend={backend!r} is not known; choose one of {', '.join((AUTO, *BACKENDS))}")
    forced = forced_backend()
    if forced is not None and backend not in (AUTO, forced):
        raise BackendUnavailable(
            f"backend={backend!r} was asked for, but MODIFF_BACKEND={forced} forces another for the whole run; unset "
            f"MODIFF_BACKEND or pass backend='auto'"
        )
    demanded = forced or backend
    return PRIORITY.get(device_type, ()) if demanded == AUTO else (demanded,)


@cache
def select(problem: Problem, backend: str = AUTO) -> Selection:
    """The backend for `problem`. Raises BackendUnavailable with every reason if none, or not the demanded one, fits."""
    rejected: list[tuple[str, str]] = []
    names = candidates(problem.device_type, backend)
    if problem.op in REFERENCE_OPS and backend == AUTO and REFERENCE not in names:
        names += (REFERENCE,)  # MODIFF_BACKEND chooses the kernels; nobody means these with it
    for name in names:
        reason = why_not(problem, name)
        if reason is None:
            if name == REFERENCE and problem.op not in REFERENCE_OPS and (forced_backend() or backend) == AUTO:
                others = tuple(rejected) or ((problem.device_type, "no other backend runs on this device type"),)
                _warn_slow(problem.op, others)
            kernel = load(name).KERNELS[problem.op]
            return Selection(name, kernel.fn, tuple(rejected), kernel.traceable)
        rejected.append((name, reason))
    raise _nothing_fits(problem, backend, rejected)


def _nothing_fits(problem: Problem, backend: str, rejected: Sequence[tuple[str, str]]) -> BackendUnavailable:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected) or "no backend runs on this device type"
    return BackendUnavailable(f"no backend for {problem} (backend={backend!r}): {reasons}")


@cache
def _warn_slow(op: str, rejected: tuple[tuple[str, str], ...]) -> None:
    for name, reason in rejected:
        logger.warning("%s runs on the slow backend 'reference', not on '%s': %s", op, name, reason)


def preferred_layout(problem: Problem, backend: str = AUTO) -> str:
    """The layout that the backend for `problem` likes best; `problem.layout` is ignored. Raises like `select`."""
    rejected: list[tuple[str, str]] = []
    for name in candidates(problem.device_type, backend):
        reason = why_unavailable(name)
        if reason is None:
            layout: str = load(name).preferred_layout(problem)
            reason = why_not(replace(problem, layout=layout), name)
            if reason is None:
                return layout
        rejected.append((name, reason))
    raise _nothing_fits(problem, backend, rejected)


def prepare_weight(weight_packed: Tensor, layout_to: str, arguments: Sequence[Any], backend: str = AUTO) -> Tensor:
    """`weight_packed` in `layout_to`, by the first backend that makes it; ValueError with every reason if none does."""
    reasons = []
    for name in candidates(weight_packed.device.type, backend):
        reason = why_unavailable(name)
        if reason is None:
            try:
                return load(name).prepare_weight(weight_packed, *arguments)
            except ValueError as error:
                reason = str(error)
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no backend makes the weight layout {layout_to!r}: {'; '.join(reasons)}")


def table() -> list[Row]:
    """Every op on every backend with the reason why it is not there."""
    rows = []
    for op in CHECKS:
        for name in BACKENDS:
            reason = why_unavailable(name)
            if reason is None and op not in load(name).KERNELS:
                reason = f"it has no {op}"
            rows.append(Row(op, name, reason))
    return rows


def on_reset(forget: Callable[[], None]) -> None:
    """Have `reset` call `forget` too."""
    _forgetters.append(forget)


def reset() -> None:
    """Forget all choices and read MODIFF_BACKEND again at the next one."""
    for forget in _forgetters:
        forget()


_forgetters: list[Callable[[], None]] = [c.cache_clear for c in (forced_backend, load, select, _warn_slow)]
