"""How a declaration in schema.py becomes an op: a torch.library registration and a fast eager function of one name."""

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..quant.operands import Window
from . import dispatch
from .dispatch import torch_must_see
from .problem import Problem

P = ParamSpec("P")
R = TypeVar("R")

MAX_KEPT = 4096  # kernels per op; a run needs one per layer shape, so reaching this means shapes that never repeat

_library = torch.library.Library("modiff", "DEF")
_inlined: list[Callable[..., Any]] = []
_inlining = False


def inline_kernels() -> None:
    """From now on code that torch.compile makes calls the kernels of traceable backends, not the ops around them, which
    are Python below torch's dispatcher."""
    global _inlining
    if not _inlining:
        for fn in _inlined:
            torch.compiler.allow_in_graph(fn)
        _inlining = True


def is_about_values(error: RuntimeError) -> bool:
    """Whether `error`, of compiled code, is what ops called one by one raise as ValueError: NaN or Inf in x. Code that
    inductor calls from C++ tells the kernel alone, which has no other reason."""
    return "holds NaN or Inf" in str(error) or '("modiff_cpu::quantize"' in str(error)


class _Arguments:
    """The arguments of an op: those of its declaration `fn`, by position, and flat, as torch's schemas can have them:
    named tuples field by field, a window as integers."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.signature = inspect.signature(fn)
        self.names = tuple(self.signature.parameters)
        self.defaults = {k: p.default for k, p in self.signature.parameters.items() if p.default is not p.empty}
        self.hints = typing.get_type_hints(fn)
        self.kinds: list[Any] = []  # of each parameter: a named tuple, Window, or None for what stays as it is
        for hint in map(self.hints.get, self.names):
            self.kinds.append(Window if hint == Window | None else hint if hasattr(hint, "_fields") else None)

    def schema(self, mutates: Sequence[str]) -> str:
        flat: dict[str, Any] = {}
        for name, kind in zip(self.names, self.kinds):
            if kind is None or kind is Window:
                flat[name] = Sequence[int] if kind is Window else self.hints[name]
            else:
                flat.update({f"{name}_{field}": hint for field, hint in typing.get_type_hints(kind).items()})
        parameters = []
        for name, hint in flat.items():
            known = typing.Optional[Tensor] if hint == Tensor | None else hint  # noqa: UP045 (what torch knows)
            parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=known))

        def prototype() -> None: ...

        signature = inspect.Signature(parameters, return_annotation=self.hints["return"])
        prototype.__signature__ = signature  # type: ignore[attr-defined]
        return torch.library.infer_schema(prototype, mutates_args=mutates)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments of a call by position."""
        rest = self.names[len(args) :]
        if len(args) > len(self.names) or not kwargs.keys() <= set(rest) <= kwargs.keys() | self.defaults.keys():
            self.signature.bind(*args, **kwargs)  # raises the usual TypeError
        return args + tuple([kwargs[key] if key in kwargs else self.defaults[key] for key in rest])

    def flat(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        values: list[Any] = []
        for value, kind in zip(args, self.kinds):
            if kind is None:
                values.append(value)
            elif kind is Window:
                values.append([] if value is None else value.to_ints())
            else:
                values.extend(value)
        return tuple(values)

    def nested(self, values: Sequence[Any]) -> tuple[Any, ...]:
        rest = iter(values)
        args: list[Any] = []
        for kind in self.kinds:
            if kind is None or kind is Window:
                args.append(next(rest) if kind is None else Window.from_ints(next(rest)))
            else:
                args.append(kind(*islice(rest, len(kind._fields))))
        return tuple(args)


def declare(check: Callable[..., Problem], mutates: Sequence[str] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as op `modiff::<its name>`; its schema is that of its signature.

    check: gives the problem of arguments, or raises. The function's body is the op's fake: empty tensors of the right
    shapes, dtypes and strides for checked arguments. The returned function checks, selects a backend and calls it,
    through torch.ops where torch must see the op (compiling, fake tensors, dispatch modes). What was found for a
    combination of formats and other arguments is kept, so that a repeated call costs a lookup.

    Its `kernel_for` checks arguments, all of them by position, and gives the selected backend's function, which takes
    them without `backend`: for callers that repeat a call on tensors of the same formats and cannot afford the checks.
    """

    def register(fn: Callable[P, R]) -> Callable[P, R]:
        name = fn.__name__
        arguments = _Arguments(fn)
        tags = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
        _library.define(name + arguments.schema(mutates), tags=tags)
        op = getattr(torch.ops.modiff, name).default
        mutable = [i for i, argument in enumerate(op._schema.arguments) if argument.alias_info is not None]
        plain = op
        if mutable and len(op._schema.returns) == 1:  # inductor fails on it where nothing is mutated (torch 2.13)
            _library.define(f"{name}_plain{arguments.schema(())}", tags=tags)
            plain = getattr(torch.ops.modiff, f"{name}_plain").default

        def op_of(flat: Sequence[Any]) -> Any:
            return plain if torch.compiler.is_compiling() and all(flat[i] is None for i in mutable) else op

        is_tensor = ["Tensor" in str(argument.type) for argument in op._schema.arguments]
        tensors_of = itemgetter(*[i for i, tensor in enumerate(is_tensor) if tensor], 0)
        others_of = itemgetter(*[i for i, tensor in enumerate(is_tensor) if not tensor], -1)
        empty_results: Callable[..., Any] = fn
        kept: dict[tuple[Any, ...], Callable[..., Any]] = {}
        dispatch.forgetters.append(kept.clear)

        def kernel_for(*args: Any) -> Callable[..., Any]:
            problem = check(*args[:-1])
            return empty_results if problem.device_type == "meta" else dispatch.select(problem, args[-1]).fn

        def execute(args: tuple[Any, ...]) -> Any:
            flat = arguments.flat(args)
            try:
                formats = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors_of(flat)]
                others = [tuple(a) if type(a) is list else a for a in others_of(flat)]
                key = (*others, *formats)
                kernel = kept.get(key)
            except (AttributeError, TypeError):  # not a tensor where one belongs: torch says which
                return op(*flat)
            if kernel is None:
                if len(kept) >= MAX_KEPT:
                    kept.clear()
                kernel = kept[key] = kernel_for(*args)
            return kernel(*args[:-1])

        def inlined(*flat: Any) -> Any:
            sizes = [size for tensor in tensors_of(flat) if tensor is not None for size in tensor.shape]
            if any(isinstance(size, torch.SymInt) for size in sizes):  # no backend can be chosen for unknown sizes
                return op_of(flat)(*flat)
            args = arguments.nested(flat)
            selection = dispatch.select(check(*args[:-1]), args[-1])
            return selection.fn(*args[:-1]) if selection.traceable else op_of(flat)(*flat)

        def fake(*flat: Any) -> Any:
            args = arguments.nested(flat)
            check(*args[:-1])
            return empty_results(*args)

        _inlined.append(inlined)
        for each in {op, plain}:
            for device in ("CPU", "CUDA"):
                _library.impl(each.name(), lambda *flat: execute(arguments.nested(flat)), device)
            torch.library.register_fake(each.name(), fake, lib=_library)

        @functools.wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = arguments.bind(args, kwargs)
            if torch_must_see(bound[0]):
                flat = arguments.flat(bound)
                return inlined(*flat) if _inlining and torch.compiler.is_compiling() else op_of(flat)(*flat)
            return execute(bound)

        call.kernel_for = kernel_for  # type: ignore[attr-defined]
        return call

    return register
