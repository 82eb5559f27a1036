"""Backends. Each module of this package implements ops under one name and says what it cannot do.

A backend module has::

    NAME: str
    KERNELS: dict[str, Kernel]                     op name -> function with the op's arguments, without `backend`
    unavailable() -> str | None                    why the whole backend cannot run here
    preferred_layout(problem) -> str               weight layout that suits the problem best;
                                                   problem.m is 0 when not known yet
    prepare_weight(weight_packed, weight_bits, n, k, layout_from, layout_to, kernel_size, groups) -> Tensor
                                                   ValueError if it does not know one of the layouts

and, if its kernels are compiled in advance::

    build_info() -> dict[str, str] | str           what its library was built with, or why that is not known

Backends never import each other, nor anything above them.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Kernel(NamedTuple):
    """One op of one backend: `fn(*op_arguments)`, and `why_not(problem)`, a reason why it cannot solve a problem, or
    None. traceable: `fn` consists of torch ops that have fakes, so that compiled code can call these and not the op.
    """

    fn: Callable[..., Any]
    why_not: Callable[[Any], str | None]
    traceable: bool = False


def library_build_info(namespace: str) -> dict[str, str] | str:
    """What the loaded library of a private namespace was built with (csrc/common/build_info.h), or, if that library is
    older than this op, what to do.
    """
    op = getattr(getattr(torch.ops, namespace), "build_info", None)
    if op is None:
        return "the library is older than this package; build it again with `python setup.py build_ext --inplace`"
    return json.loads(op())
