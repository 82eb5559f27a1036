"""Whether the ops of a run agree with the backend `reference`: every op is computed again, from the same inputs.

The contract (modiff_kernels/ops/schema.py): codes and integer sums are the same on all backends; where a float norm
comes before the quantiser, its last bits may differ, and a code with them; float results are equal up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modiff_kernels import ops
from modiff_kernels.evaluation import sqnr
from modiff_kernels.ops.dispatch import REFERENCE, REFERENCE_OPS
from modiff_kernels.quant.operands import PackedWeight, Window, summed
from modiff_kernels.quant.packing import KPACK_V1

EXACT = "quantize identity"  # quantises what it is given: all codes have to be equal
WRONG_DB = -300.0  # stands for NaN and for values where the reference has zeros


@dataclass
class Agreement:
    """Of all ops that were replayed.

    codes: of quantisers, differing: those that are not the reference's; exact_codes, exact_differing: the part of ops
    without a float norm. sqnr_db: of float results and state, the worst of any op; where a code differs, x_hat has to
    differ too and does not count.
    """

    ops: int = 0
    codes: int = 0
    differing: int = 0
    exact_codes: int = 0
    exact_differing: int = 0
    sqnr_db: float = math.inf
    worst_op: str = ""

    def add(self, name: str, results: list[Tensor], expected: list[Tensor]) -> None:
        """One op: its results and mutated arguments, and those of the reference."""
        self.ops += 1
        pairs = list(zip(results, expected, strict=True))
        codes_equal = None
        for result, wanted in pairs:
            if result.is_floating_point():
                continue
            equal = result == wanted
            different = result.numel() - int(equal.sum())
            self.codes += result.numel()
            self.differing += different
            if name == EXACT:
                self.exact_codes += result.numel()
                self.exact_differing += different
            if result.dtype == torch.int8:
                codes_equal = equal
        for result, wanted in pairs:
            if result.is_floating_point():
                judged = ... if codes_equal is None or result.shape != codes_equal.shape else codes_equal
                self._add_floats(name, result[judged], wanted[judged])

    def _add_floats(self, name: str, result: Tensor, wanted: Tensor) -> None:
        sqnr_db = sqnr(result, wanted)
        sqnr_db = WRONG_DB if math.isnan(sqnr_db) else max(sqnr_db, WRONG_DB)
        if sqnr_db < self.sqnr_db:
            self.sqnr_db, self.worst_op = sqnr_db, name

    def to_dict(self) -> dict[str, Any]:
        """JSON types; sqnr_db is None where all float results are equal."""
        return {
            "ops": self.ops,
            "codes": self.codes,
            "differing": self.differing,
            "exact_codes": self.exact_codes,
            "exact_differing": self.exact_differing,
            "sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else None,
            "worst_op": self.worst_op,
        }


class Replay(TorchDispatchMode):
    """While it is entered and `active`, computes every op of this package on the backend `reference` too."""

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self.agreement = Agreement()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("modiff::")
        if not self.active or func.namespace != "modiff" or name in REFERENCE_OPS:
            return func(*args, **(kwargs or {}))
        declared = func._schema.arguments
        given = {argument.name: value for argument, value in zip(declared, args)} | (kwargs or {})
        copies = {key: value.clone() if isinstance(value, Tensor) else value for key, value in given.items()}
        results = func(*args, **(kwargs or {}))
        expected = func(**{**copies, **_portable(copies), "backend": REFERENCE})
        written = [a.name for a in declared if a.alias_info is not None and a.alias_info.is_write]
        mutated = [key for key in written if given.get(key) is not None]
        self.agreement.add(
            f"{name} {given['prologue_kind']}" if "prologue_kind" in given else name,
            [*_tensors(results), *(given[key] for key in mutated)],
            [*_tensors(expected), *(copies[key] for key in mutated)],
        )
        return results


def _tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _portable(arguments: dict[str, Any]) -> dict[str, Any]:
    """The weight of an op in the layout that the reference reads."""
    fields = {name: arguments.get(f"weight_{name}") for name in PackedWeight._fields}
    if fields["layout"] in (None, KPACK_V1):
        return {}
    window = Window.from_ints(arguments["window"])
    channels = arguments["codes"].shape[-1 if window is None else 1]
    weight = ops.prepare_weight(PackedWeight(**fields), summed(channels, window), window, KPACK_V1)
    return {"weight_packed": weight.packed, "weight_layout": weight.layout}
