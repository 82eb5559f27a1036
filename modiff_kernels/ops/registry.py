"""How a declaration in schema.py becomes an op: a torch.library registration and a fast eager function of one name."""

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from ..quant.operands import Window
from . import dispatch
from .dispatch import torch_must_see
from .problem import Problem

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

MAX_KEPT = 4096  # kernels per op; a run needs one per layer shape, so reaching this means shapes that never repeat

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
    def kernel_for(self) -> Callable[..., Callable[..., R]]:
        """Check the arguments (all of them, by position) and give the selected backend's function, which takes them
        without `backend`: for callers that repeat a call on tensors of the same formats and cannot afford the checks.
        """
        ...


class _Spread:
    """The arguments of an op as torch's schemas can have them: named tuples field by field, a window as integers.

    fn: the declaration, whose last parameter is `backend`.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        hints = typing.get_type_hints(fn)
        self.kinds: list[Any] = []  # of each parameter: a named tuple, Window, or None for what stays as it is
        self.schema_parameters: list[inspect.Parameter] = []
        for name in inspect.signature(fn).parameters:
            kind, fields = None, {name: hints[name]}
            if hints[name] == Window | None:
                kind, fields = Window, {name: Sequence[int]}
            elif hasattr(hints[name], "_fields"):
                kind = hints[name]
                fields = {f"{name}_{field}": hint for field, hint in typing.get_type_hints(kind).items()}
            self.kinds.append(kind)
            for field, hint in fields.items():
                hint = typing.Optional[Tensor] if hint == Tensor | None else hint  # noqa: UP045 (what torch knows)
                self.schema_parameters.append(
                    inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint)
                )
        self.returns = hints["return"]

    def schema(self, mutates: Sequence[str]) -> str:
        """The schema in torch's notation."""

        def prototype() -> None: ...

        signature = inspect.Signature(self.schema_parameters, return_annotation=self.returns)
        prototype.__signature__ = signature  # type: ignore[attr-defined]
        return torch.library.infer_schema(prototype, mutates_args=mutates)

    def flat(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of the declaration as those of the schema."""
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
        """Arguments of the schema as those of the declaration."""
        args: list[Any] = []
        at = 0
        for kind in self.kinds:
            if kind is None or kind is Window:
                args.append(values[at] if kind is None else Window.from_ints(values[at]))
                at += 1
            else:
                args.append(kind(*values[at : at + len(kind._fields)]))
                at += len(kind._fields)
        return tuple(args)


def binder(fn: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...]]:
    """A function that gives all arguments of a call of `fn` by position."""
    signature = inspect.signature(fn)
    names = tuple(signature.parameters)
    defaults = {key: p.default for key, p in signature.parameters.items() if p.default is not p.empty}

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        rest = names[len(args) :]
        known = all(key in kwargs or key in defaults for key in rest) and all(key in rest for key in kwargs)
        if len(args) > len(names) or not known:
            signature.bind(*args, **kwargs)  # raises the usual TypeError
        return args + tuple([kwargs[key] if key in kwargs else defaults[key] for key in rest])

    return bind


def declare(check: Callable[..., Problem], mutates: Sequence[str] = ()) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Register the decorated function as op `modiff::<its name>`; its schema is that of its signature.

    check: gives the problem of arguments, or raises. The function's body is the op's fake: it returns empty tensors of
    the right shapes, dtypes and strides, and runs only after the arguments were checked. The returned function checks,
    selects a backend and calls it: directly in eager mode, through torch.ops where torch must see the op (compiling,
    fake tensors, dispatch modes). What was found for a combination of shapes, strides, dtypes, devices and other
    arguments is kept, so that a repeated call costs a lookup.
    """

    def register(fn: Callable[P, R]) -> Op[P, R]:
        name = fn.__name__
        spread = _Spread(fn)
        _library.define(
            name + spread.schema(mutates), tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
        )
        op = getattr(torch.ops.modiff, name).default
        bind = binder(fn)
        is_tensor = ["Tensor" in str(argument.type) for argument in op._schema.arguments]
        tensors_of = itemgetter(*[i for i, tensor in enumerate(is_tensor) if tensor], 0)
        others_of = itemgetter(*[i for i, tensor in enumerate(is_tensor) if not tensor], -1)
        empty_results: Callable[..., Any] = fn
        kept: dict[tuple[Any, ...], Callable[..., Any]] = {}
        dispatch.on_reset(kept.clear)

        def kernel_for(*args: Any) -> Callable[..., Any]:
            problem = check(*args[:-1])
            if problem.device_type == "meta":
                return empty_results
            return dispatch.select(problem, args[-1]).fn

        def execute(args: tuple[Any, ...]) -> Any:
            flat = spread.flat(args)
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
                return op(*flat)
            args = spread.nested(flat)
            selection = dispatch.select(check(*args[:-1]), args[-1])
            return selection.fn(*args[:-1]) if selection.traceable else op(*flat)

        _inlined.append(inlined)

        def fake(*flat: Any) -> Any:
            args = spread.nested(flat)
            check(*args[:-1])
            return empty_results(*args)

        def registered(*flat: Any) -> Any:
            return execute(spread.nested(flat))

        _library.impl(name, registered, "CPU")
        _library.impl(name, registered, "CUDA")
        torch.library.register_fake(f"modiff::{name}", fake, lib=_library)

        @functools.wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = bind(args, kwargs)
            if torch_must_see(bound[0]):
                flat = spread.flat(bound)
                return inlined(*flat) if _inlining and torch.compiler.is_compiling() else op(*flat)
            return execute(bound)

        result: Any = call
        result.kernel_for = kernel_for
        return result

    return register
