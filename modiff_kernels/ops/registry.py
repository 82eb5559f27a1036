"""How a declaration in schema.py becomes an op: a torch.library registration and a fast eager function of the same
name.
"""

import functools
import inspect
from collections.abc import Callable
from operator import itemgetter
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from . import dispatch
from .problem import check

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

MAX_PLANS = 4096  # per op; a run needs one per layer shape, so reaching this means shapes that never repeat

EAGER_TYPES = (Tensor, torch.nn.Parameter)  # other types (fake, functional tensors) need torch's dispatcher

_library = torch.library.Library("modiff", "DEF")

_inlined: list[Callable[..., Any]] = []
_inlining = False


def inline_kernels() -> None:
    """From now on code that torch.compile makes calls the kernels of traceable backends, not the ops around them.

    An op of this package is Python below torch's dispatcher, which a compiled call would pass through at every op.
    """
    global _inlining
    if not _inlining:
        for fn in _inlined:
            torch.compiler.allow_in_graph(fn)
        _inlining = True


def is_about_values(error: RuntimeError) -> bool:
    """Whether `error`, of compiled code, is what ops called one by one raise as ValueError: NaN or Inf in x.

    Code that inductor calls from C++ tells the kernel alone, and this is the only reason that kernel has.
    """
    return "holds NaN or Inf" in str(error) or '("modiff_cpu::quantize"' in str(error)


class Op(Protocol[P, R]):
    """What `declare` makes of a declaration."""

    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Check the arguments, select a backend, call it."""
        ...

    @property
    def plan(self) -> Callable[P, Callable[..., R]]:
        """Check the arguments (all of them, by position) and give the selected backend's function, which takes them
        without `backend`: for callers that repeat a call on tensors of the same formats and cannot afford the checks.
        """
        ...


def _items(positions: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A fast function from a tuple to the tuple of its items at `positions`."""
    return itemgetter(*positions) if len(positions) > 1 else itemgetter(slice(positions[0], positions[0] + 1))


def torch_must_see(tensor: Any) -> bool:
    """Whether an op on `tensor` has to go through torch's dispatcher: compiling, fake tensors, dispatch modes."""
    return torch.compiler.is_compiling() or type(tensor) not in EAGER_TYPES or torch._C._len_torch_dispatch_stack() > 0


def declare(schema: str) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Register the decorated function as op `modiff::<its name>` with `schema` (arguments and returns, torch's
    notation).

    The function's body is the op's fake: it returns empty tensors of the right shapes, dtypes and strides, and runs
    only after the arguments were checked. The returned function checks, selects a backend and calls it: directly in
    eager mode, through torch.ops where torch must see the op (compiling, fake tensors, dispatch modes). What was found
    for a combination of shapes, strides, dtypes, devices and other arguments is kept, so that a repeated call costs a
    lookup.
    """

    def register(fn: Callable[P, R]) -> Op[P, R]:
        name = fn.__name__
        _library.define(name + schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
        op = getattr(torch.ops.modiff, name).default
        signature = inspect.signature(fn)
        names = tuple(signature.parameters)
        defaults = {key: p.default for key, p in signature.parameters.items() if p.default is not p.empty}
        is_tensor = ["Tensor" in str(argument.type) for argument in op._schema.arguments]
        tensors_of = _items([i for i, tensor in enumerate(is_tensor) if tensor])
        others_of = _items([i for i, tensor in enumerate(is_tensor) if not tensor])
        empty_results: Callable[..., Any] = fn
        plans: dict[tuple[Any, ...], Callable[..., Any]] = {}
        dispatch.on_reset(plans.clear)

        def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            rest = names[len(args) :]
            known = all(key in kwargs or key in defaults for key in rest) and all(key in rest for key in kwargs)
            if len(args) > len(names) or not known:
                signature.bind(*args, **kwargs)  # raises the usual TypeError
            return args + tuple([kwargs[key] if key in kwargs else defaults[key] for key in rest])

        def plan(args: tuple[Any, ...]) -> Callable[..., Any]:
            problem = check(name, dict(zip(names, args[:-1])))
            if problem.device_type == "meta":
                return empty_results
            return dispatch.select(problem, args[-1]).fn

        def execute(args: tuple[Any, ...]) -> Any:
            try:
                formats = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors_of(args)]
                key = (others_of(args), *formats)
                kernel = plans.get(key)
            except (AttributeError, TypeError):  # not a tensor, or not hashable: integers in a list, or a wrong type
                hashable = tuple([tuple(a) if isinstance(a, list) else a for a in args])
                if hashable == args:
                    return op(*args)
                return execute(hashable)
            if kernel is None:
                if len(plans) >= MAX_PLANS:
                    plans.clear()
                kernel = plans[key] = plan(args)
            return kernel(*args[:-1])

        def inlined(*args: Any) -> Any:
            sizes = [size for tensor in tensors_of(args) if tensor is not None for size in tensor.shape]
            if any(isinstance(size, torch.SymInt) for size in sizes):  # no backend can be chosen for unknown sizes
                return op(*args)
            selection = dispatch.select(check(name, dict(zip(names, args[:-1]))), args[-1])
            return selection.fn(*args[:-1]) if selection.traceable else op(*args)

        _inlined.append(inlined)

        def fake(*args: Any) -> Any:
            bound = bind(args, {})
            check(name, dict(zip(names, bound[:-1])))
            return empty_results(*bound)

        def registered(*args: Any) -> Any:
            return execute(bind(args, {}))

        _library.impl(name, registered, "CPU")
        _library.impl(name, registered, "CUDA")
        torch.library.register_fake(f"modiff::{name}", fake, lib=_library)

        @functools.wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = bind(args, kwargs) if kwargs or len(args) != len(names) else args
            if torch_must_see(bound[0]):
                return inlined(*bound) if _inlining and torch.compiler.is_compiling() else op(*bound)
            return execute(bound)

        result: Any = call
        result.plan = lambda *args: plan(args)
        return result

    return register
