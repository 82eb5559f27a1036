"""How a declaration in schema.py becomes an op: a torch.library registration and a fast eager function of the same
name.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import dispatch
from .problem import check

P = ParamSpec("P")
R = TypeVar("R")

MAX_PLANS = 4096  # per op; a run needs one per layer shape, so reaching this means shapes that never repeat

_library = torch.library.Library("modiff", "DEF")


def declare(schema: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as op `modiff::<its name>` with `schema` (arguments and returns, torch's
    notation).

    The function's body is the op's fake: it returns empty tensors of the right shapes, dtypes and strides, and runs
    only after the arguments were checked. The returned function checks, selects a backend and calls it: directly in
    eager mode, through torch.ops where torch must see the op (compiling, fake tensors, dispatch modes). What was found
    for a combination of shapes, strides, dtypes, devices and other arguments is kept.
    """

    def register(fn: Callable[P, R]) -> Callable[P, R]:
        name = fn.__name__
        signature = inspect.signature(fn)
        names = tuple(signature.parameters)
        defaults = {key: p.default for key, p in signature.parameters.items() if p.default is not p.empty}
        plans: dict[tuple[Any, ...], Callable[..., Any]] = {}

        def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            try:
                values = [*args, *[kwargs[key] if key in kwargs else defaults[key] for key in names[len(args) :]]]
            except KeyError:
                values = []
            if len(values) != len(names) or not kwargs.keys() <= set(names[len(args) :]):
                signature.bind(*args, **kwargs)  # raises the usual TypeError
            return tuple([tuple(value) if isinstance(value, list) else value for value in values])

        def plan(args: tuple[Any, ...]) -> Callable[..., Any]:
            problem = check(name, dict(zip(names, args[:-1], strict=False)))
            if problem.device_type == "meta":
                return fn
            return dispatch.select(problem, args[-1]).fn

        def execute(args: tuple[Any, ...]) -> Any:
            key = tuple([(a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a for a in args])
            try:
                kernel = plans.get(key)
            except TypeError:  # unhashable: integers given as a list
                if not any(isinstance(a, list) for a in args):
                    raise
                return execute(bind(args, {}))
            if kernel is None:
                if len(plans) >= MAX_PLANS:
                    plans.clear()
                kernel = plans[key] = plan(args)
            return kernel(*args[:-1])

        def fake(*args: Any) -> Any:
            bound = bind(args, {})
            check(name, dict(zip(names, bound[:-1], strict=False)))
            return fn(*bound)

        def dispatched(*args: Any) -> Any:
            return execute(bind(args, {}))

        _library.define(name + schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
        _library.impl(name, dispatched, "CPU")
        _library.impl(name, dispatched, "CUDA")
        torch.library.register_fake(f"modiff::{name}", fake, lib=_library)
        op = getattr(torch.ops.modiff, name).default
        dispatch.on_reset(plans.clear)

        @functools.wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = bind(args, kwargs) if kwargs or len(args) != len(names) else args
            if torch.compiler.is_compiling() or _torch_must_see(bound[0]):
                return op(*bound)
            return execute(bound)

        return call

    return register


def _torch_must_see(x: Any) -> bool:
    """Whether the call must go through torch's dispatcher: tensor subclasses (fake, functional) and active dispatch
    modes.
    """
    return type(x) not in (Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack() > 0
