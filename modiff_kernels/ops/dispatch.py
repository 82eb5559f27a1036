"""Which backend solves which problem: one table, asked with `select` and printed with `table`.

`backend="auto"` walks `backends.BACKENDS`; a named backend is a demand and never falls back. The environment variable
MODIFF_BACKEND, read once, puts one backend in the place of "auto". One that fails to load stays with its reason."""

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch

from ..backends import BACKENDS
from ..log import logger
from ..quant.operands import PackedWeight, Window
from ..quant.packing import KPACK_V1
from .problem import Problem

AUTO = "auto"
REFERENCE = "reference"
OPS = ("quantize", "product", "attention")
REFERENCE_OPS = ("attention",)  # where the reference is no loss: it is torch's own kernel
EAGER_TYPES = (torch.Tensor, torch.nn.Parameter)  # other types (fake, functional tensors) need torch's dispatcher

Rejected = tuple[tuple[str, str], ...]
"""Backends and why they were not taken."""


class BackendUnavailable(RuntimeError):
    """No backend, or not the demanded one, can solve the problem; the message lists every reason."""


class Selection(NamedTuple):
    """The chosen backend, its function, those asked before it, and whether compiled code can call its parts."""

    backend: str
    fn: Callable[..., Any]
    rejected: Rejected
    traceable: bool


def _checked_name(name: str, what: str) -> str:
    if name not in (AUTO, *BACKENDS):
        raise ValueError(f"{what}={name!r} is not known; choose one of {', '.join((AUTO, *BACKENDS))}")
    return name


@cache
def forced_backend() -> str | None:
    """The backend that MODIFF_BACKEND demands, None if unset or "auto"."""
    name = _checked_name(os.environ.get("MODIFF_BACKEND", AUTO), "MODIFF_BACKEND")
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


@cache
def why_unavailable(name: str) -> str | None:
    """Why backend `name` cannot run on this machine at all, None if it can."""
    module = load(name)
    return module if isinstance(module, str) else getattr(module, "unavailable", lambda: None)()


def torch_must_see(tensor: Any) -> bool:
    """Whether an op on `tensor` has to go through torch's dispatcher: compiling, fake tensors, dispatch modes."""
    return torch.compiler.is_compiling() or type(tensor) not in EAGER_TYPES or torch._C._len_torch_dispatch_stack() > 0


def runs_on(name: str, device_type: str) -> bool:
    return BACKENDS[name] in (None, device_type)


def why_not(problem: Problem, name: str) -> str | None:
    """Why backend `name` cannot solve `problem`, None if it can."""
    if not runs_on(name, problem.device_type):
        return f"it does not run on {problem.device_type}"
    if (reason := why_unavailable(name)) is not None:
        return reason
    module = load(name)
    if problem.op == "modulate":
        quantize, product = parts_of(problem)
        return module.why_not(quantize) or module.why_not(product)
    return module.why_not(problem) if hasattr(module, problem.op) else f"it has no {problem.op}"


def parts_of(whole: Problem) -> tuple[Problem, Problem]:
    rows = whole.m if whole.window is None else whole.m * whole.window.stride[0] * whole.window.stride[1]
    quantize = replace(whole, op="quantize", m=rows, n=0, k=whole.channels, window=None, weight_bits=None, layout=None)
    granularity = "per_sample" if whole.granularity == "per_block" else whole.granularity
    product = replace(whole, op="product", granularity=granularity, act_bits=None, prologue=None, scale_given=False)
    return quantize, product


@cache
def composed(quantize: Callable[..., Any], product: Callable[..., Any]) -> Callable[..., Any]:
    """`ops.modulate` as these two functions, of backends, or of all, which also take the name of one."""

    def modulate(
        h, prologue, x_hat, scale, weight, y_hat, skip, window, out_dtype, bits, granularity, clip_ratio, write_out,
        last_absmax=None, *backend,
    ):  # fmt: skip
        form = bits, granularity, clip_ratio, True
        codes, used, absmax = quantize(h, prologue, x_hat, scale, *form, last_absmax, *backend)
        out = product(codes, used, None, weight, y_hat, None, skip, window, out_dtype, write_out, *backend)
        return out, used, absmax

    return modulate


def _function(problem: Problem, name: str, backend: str) -> Callable[..., Any]:
    module = load(name)
    if problem.op == "modulate" and not (hasattr(module, "modulate") and module.why_not(problem) is None):
        quantizing = select(parts_of(problem)[0], backend).backend
        return composed(load(quantizing).quantize, module.product)
    return getattr(module, problem.op)


def candidates(device_type: str, backend: str = AUTO, problem: Problem | None = None) -> tuple[str, ...]:
    """Backends to ask, in order, for a call with `backend` on `device_type`; for `problem`, those first that say so."""
    _checked_name(backend, "backend")
    forced = forced_backend()
    if forced is not None and backend not in (AUTO, forced):
        text = f"MODIFF_BACKEND={forced} forces another; unset it or pass 'auto'"
        raise BackendUnavailable(f"backend={backend!r} was asked for, but {text}")
    demanded = forced or backend
    if demanded != AUTO:
        return (demanded,)
    names = [name for name in BACKENDS if runs_on(name, device_type)]
    if problem is not None:
        names.sort(key=lambda name: not getattr(load(name), "goes_first", lambda problem: False)(problem))
    return tuple(names)


@cache
def select(problem: Problem, backend: str = AUTO) -> Selection:
    """The backend for `problem`. Raises BackendUnavailable with every reason if none, or not the demanded one, fits."""
    names = candidates(problem.device_type, backend, problem)
    if problem.op in REFERENCE_OPS and backend == AUTO and REFERENCE not in names:
        names += (REFERENCE,)  # MODIFF_BACKEND chooses the kernels; nobody means these with it
    rejected: Rejected = ()
    for name in names:
        reason = why_not(problem, name)
        if reason is None:
            if problem.op not in REFERENCE_OPS and (forced_backend() or backend) == AUTO:
                _warn_slow(problem.op, name, rejected)
            return Selection(name, _function(problem, name, backend), rejected, getattr(load(name), "TRACEABLE", False))
        rejected += ((name, reason),)
    raise BackendUnavailable(f"no backend for {problem} (backend={backend!r}): {_text(rejected)}")


def _text(rejected: Rejected) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in rejected)


def _warn_slow(op: str, taken: str, rejected: Rejected) -> None:
    """Say once which faster backends this machine does not have, and what else the reference computes."""
    for name, reason in rejected:
        absent = reason == why_unavailable(name)
        if taken == REFERENCE or (absent and BACKENDS[name] == "cpu"):
            what = "layers run" if absent else f"{op} runs"
            _warn(f"{what} on the slower backend {taken!r}, not on {name!r}: {reason}")


_warn = cache(logger.warning)


def preferred_layout(problem: Problem, backend: str = AUTO) -> str:
    """The layout that the backend for `problem` likes best; `problem.layout` is ignored. Raises like `select`."""
    for name in candidates(problem.device_type, backend, problem):
        if why_unavailable(name) is None:
            likes = getattr(load(name), "preferred_layout", lambda problem: KPACK_V1)
            in_its_layout = replace(problem, layout=likes(problem))
            if why_not(in_its_layout, name) is None:
                return str(in_its_layout.layout)
    select(replace(problem, layout=KPACK_V1), backend)  # has the reasons
    return KPACK_V1


def prepare_weight(
    weight: PackedWeight, k: int, window: Window | None, layout: str, backend: str = AUTO
) -> PackedWeight:
    """A weight [n, k], of a convolution with this window, in `layout`: itself if it has that, else by the first backend
    of the device (or `backend`) that makes it. ValueError with every reason if none does."""
    if weight.layout == layout:
        return weight
    rejected: Rejected = ()
    for name in candidates(weight.packed.device.type, backend):
        reason = why_unavailable(name) or f"it reads weights in layout {KPACK_V1!r} alone"
        if hasattr(load(name), "prepare_weight") and why_unavailable(name) is None:
            try:
                return load(name).prepare_weight(weight, k, window, layout)
            except ValueError as error:
                reason = str(error)
        rejected += ((name, reason),)
    raise ValueError(f"no backend makes the weight layout {layout!r} of {weight.layout!r}: {_text(rejected)}")


def table(op: str) -> dict[str, str | None]:
    """Why a backend does not have `op` here, None if it has, of each."""
    lacks = "this backend does not have the op"
    return {name: why_unavailable(name) or (None if hasattr(load(name), op) else lacks) for name in BACKENDS}


def reset() -> None:
    """Forget all choices and read MODIFF_BACKEND again at the next one."""
    for forget in forgetters:
        forget()


_CACHED = (forced_backend, load, why_unavailable, select, _warn)
forgetters: list[Callable[[], None]] = [function.cache_clear for function in _CACHED]
