"""The places at which the contract is tested: every backend where it can run, and stand-ins for a GPU on the host.

A place takes tensors of the CPU and calls the public ops with its backend. `limits` says, apart from the backend, which
products it may refuse, so that a backend that refuses more (or everything) fails."""

import importlib
import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partialmethod
from typing import Any

import pytest
import torch

from modiff_kernels import ops
from modiff_kernels.backends import cpu
from modiff_kernels.ops import check, dispatch
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.operands import PackedWeight

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LAUNCH = "modiff_kernels.backends.triton.launch"  # which needs triton
MUTATED = ("x_hat", "y_hat", "last_absmax")


def _per_token_of_a_window(problem: Problem) -> bool:
    """Scales of single input pixels do not leave the sum under a larger window."""
    return problem.granularity == "per_token" and not problem.is_pointwise


def _cpu_limits(problem: Problem) -> bool:
    if problem.op == "quantize":
        return False
    return problem.geglu or problem.group_size != -1 or _per_token_of_a_window(problem) or problem.k > 1 << 16


def _triton_limits(problem: Problem) -> bool:
    if problem.op == "quantize":
        return False
    taps = problem.k // problem.taps  # codes per tap: packed ones begin at whole bytes
    unaligned = problem.weight_bits != 8 and problem.taps > 1 and taps % 8 != 0
    groups = problem.group_size != -1 and (problem.group_size % 32 != 0 or (problem.taps > 1 and taps % 32 != 0))
    return unaligned or groups or _per_token_of_a_window(problem)


def _cuda_limits(problem: Problem) -> bool:
    if problem.op == "quantize":
        return False
    packed = problem.weight_bits != 8 and problem.k % 32 != 0
    groups = problem.group_size != -1 or (problem.window is not None and problem.window.groups != 1)
    return groups or packed or problem.channels % 16 != 0 or _per_token_of_a_window(problem)


LIMITS = {"cpu": _cpu_limits, "triton": _triton_limits, "cuda": _cuda_limits}
LIMITS["reference"] = lambda problem: False


@dataclass(frozen=True)
class Place:
    """A backend, and where and how it runs.

    own: the ops that it has code of its own for. few: every call takes long there, so tests choose few, telling ones.
    raises: NaN and Inf in what is quantised are refused; otherwise they show in the results (ops/schema.py).
    stand_in: what plays the GPU: "sm80", "sm90", "interpreter"."""

    name: str
    backend: str
    own: tuple[str, ...] = ("quantize", "product", "modulate")
    device: str = "cpu"
    threads: int = 1
    isa: str | None = None
    few: bool = False
    raises: bool = True
    dtypes: tuple[torch.dtype, ...] = FLOATS
    stand_in: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def missing(self) -> str | None:
        """Why it is not here."""
        gpu = torch.cuda.is_available()
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if self.device == "cuda":  # without a GPU these tests are deselected
            if interpreted and gpu and self.backend == "triton":
                return "TRITON_INTERPRET=1: the kernels are interpreted in this process"
            return dispatch.why_unavailable(self.backend) if gpu else None
        if self.stand_in == "interpreter":
            return None if interpreted and not gpu else "the kernels are compiled for the GPU in this process"
        if self.stand_in is not None:
            compiler = os.environ.get("CXX", "g++")
            return None if shutil.which(compiler) else f"the C++ compiler {compiler!r} was not found"
        if (reason := dispatch.why_unavailable(self.backend)) is not None:
            return reason
        if self.backend == "cpu":
            if self.isa == cpu.isa():
                return "it is that of the place cpu"
            isa = cpu.isa() if self.isa is None else self.isa
            if not torch.ops.modiff_cpu.isas() >> cpu.ISAS.index(isa) & 1 or (isa == "plain" and self.own != _QUANTIZE):
                return f"this CPU has {cpu.isa()}"
        return None

    @contextmanager
    def entered(self, stand_ins: Callable[[str], dict[tuple[Any, str], Any]]) -> Iterator["Place"]:
        """The process as the place needs it: instruction set, stand-ins (attributes of modules)."""
        before = dict(dispatch.BACKENDS)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MODIFF_BACKEND", raising=False)
            if self.isa is not None:
                patch.setattr(cpu, "_isa", cpu.ISAS.index(self.isa))
            if self.stand_in is not None:
                patch.setitem(dispatch.BACKENDS, self.backend, "cpu")
                patch.setattr(dispatch.load(self.backend), "unavailable", lambda: None)
                for (owner, name), value in stand_ins(self.stand_in).items():
                    patch.setattr(owner, name, value)
            dispatch.reset()
            yield self
        dispatch.reset()
        assert dict(dispatch.BACKENDS) == before

    def problem(self, op: str, *args: Any, **kwargs: Any) -> Problem:
        """Of a call, as the dispatcher sees it."""
        *given, _ = _bound(op, args, kwargs)
        problem = getattr(check, op)(*given)
        if self.device == "cuda":
            return replace(problem, device_type="cuda", capability=torch.cuda.get_device_capability())
        return problem

    def prepared(self, weight: PackedWeight, problem: Problem) -> PackedWeight | None:
        """`weight` in the layout that the backend likes best; None where it does not solve the product (`LIMITS`)."""
        refused = LIMITS[self.backend](problem)
        try:
            layout = ops.preferred_layout(problem, self.backend)
        except ops.BackendUnavailable:
            if refused:
                return None
            raise
        assert not refused, f"{self.backend} solves {problem}, which LIMITS excludes"
        return ops.prepare_weight(weight, problem.k, problem.window, layout, self.backend)

    def call(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """`ops.<op>` with this backend; results and changed state are on the CPU."""
        *given, _ = _bound(op, args, kwargs)
        moved = [_moved(argument, self.device) for argument in given]
        torch.set_num_threads(self.threads)
        results = getattr(ops, op)(*moved, backend=self.backend)
        torch.set_num_threads(1)  # of the oracles
        if self.backend == "triton":
            assert not importlib.import_module(_LAUNCH).counters(moved[0].device, 0).any(), "a counter is left"
        if self.device == "cpu":
            return results
        for name, argument, there in zip(inspect.signature(getattr(ops, op)).parameters, given, moved):
            if name in MUTATED and argument is not None:
                argument.copy_(there)
        return tuple(t.cpu() for t in results) if isinstance(results, tuple) else results.cpu()

    quantize = partialmethod(call, "quantize")
    product = partialmethod(call, "product")
    modulate = partialmethod(call, "modulate")


def _bound(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    bound = inspect.signature(getattr(ops, op)).bind(*args, **kwargs)
    bound.apply_defaults()
    return list(bound.arguments.values())


def _moved(argument: Any, device: str) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.to(device)
    if hasattr(argument, "_fields"):
        return type(argument)(*(_moved(field, device) for field in argument))
    return argument


_QUANTIZE, _PRODUCT = ("quantize",), ("product", "modulate")
_GPU = {"raises": False, "device": "cuda"}
_STAND_IN = {"raises": False, "few": True}

PLACES = (
    Place("reference", "reference", ("quantize", "product", "modulate", "attention")),
    Place("cpu", "cpu", ("quantize", "product", "modulate", "attention")),
    Place("cpu-2-threads", "cpu", ("quantize", "product", "attention"), threads=2),  # other tiles of the work
    Place("cpu-avx512-vnni", "cpu", _PRODUCT, isa="avx512_vnni"),
    Place("cpu-avx512", "cpu", (*_PRODUCT, "attention"), isa="avx512"),
    Place("cpu-avx-vnni", "cpu", _PRODUCT, isa="avx_vnni"),
    Place("cpu-avx2", "cpu", ("quantize", "product", "modulate"), isa="avx2"),
    Place("cpu-plain", "cpu", _QUANTIZE, isa="plain"),
    Place("sm80-emulated", "cuda", stand_in="sm80", **_STAND_IN),
    Place("sm90-emulated", "cuda", ("product",), stand_in="sm90", **_STAND_IN),  # one code quantises on both
    # The interpreter truncates float32 to bfloat16 instead of rounding it.
    Place("triton-interpreted", "triton", stand_in="interpreter", dtypes=FLOATS[:2], **_STAND_IN),
    Place("triton-gpu", "triton", **_GPU),
    Place("cuda-gpu", "cuda", **_GPU),
)


def places(op: str, names: Sequence[str] | None = None) -> list[Any]:
    """Parameters of a test: the places of this machine with code for `op`, all or those of `names`."""
    here = [p for p in PLACES if op in p.own and (names is None or p.name in names) and not p.missing]
    return [pytest.param(p, id=p.name, marks=[pytest.mark.gpu] if p.device == "cuda" else []) for p in here]
