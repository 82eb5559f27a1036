"""Self-attention of ours beside torch's scaled_dot_product_attention, which the backend reference is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.layers.products import Form
from benchmarks.runner import Entrant, LeftOut, Row
from benchmarks.timing import timer_of
from modiff_kernels import ops
from modiff_kernels.evaluation import sqnr

SIZES = {"cifar10_small16": (64, 3, 32), "ddpm_cifar10": (256, 1, 256), "sd15_level3": (256, 8, 160)}
"""By layer: tokens, heads and width of a head."""
LEAST_SQNR_DB = {torch.float32: 100.0, torch.float16: 50.0}


def problem(name: str, batch: int) -> str:
    """What rows have in their column `problem`."""
    tokens, heads, width = SIZES[name]
    return f"attention-{name}-n{tokens}-h{heads}x{width}-b{batch}"


class AttentionCase:
    """One layer at a batch, for benchmarks/runner.py."""

    baselines = {"speedup_vs_torch": ("attention.torch",)}  # noqa: RUF012 (a constant)

    def __init__(self, name: str, batch: int, device: torch.device, rounds: int) -> None:
        tokens, self.heads, self.width = SIZES[name]
        self.problem, self.timer = problem(name, batch), timer_of(device, rounds)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        shape = (3, batch, tokens, self.heads * self.width)
        self.operands = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        self.expected = self._call("reference")()

    def _call(self, backend: str) -> Callable[[], Tensor]:
        q, k, v = self.operands
        return lambda: ops.attention(q, k, v, self.heads, self.width**-0.5, backend=backend)

    def make(self, form: Form) -> Callable[[], Tensor]:
        call = self._call("reference" if form.backend == "torch" else form.backend)
        try:
            call()
        except ops.BackendUnavailable as error:
            raise LeftOut(str(error)) from None
        return call

    def verify(self, entrant: Entrant) -> float | str:
        sqnr_db, least = sqnr(entrant.subject(), self.expected), LEAST_SQNR_DB[self.expected.dtype]
        return sqnr_db if sqnr_db >= least else f"{sqnr_db:.1f} dB to torch, at least {least:g} expected"

    def timed(self, entrant: Entrant) -> list[float]:
        return self.timer(entrant.subject)

    def rows(self, entrant: Entrant) -> list[Row]:
        return [self._row(entrant, "time", "us", [1e6 * s for s in entrant.times])]

    def ratio_rows(self, entrant: Entrant, metric: str, faster: list[float]) -> list[Row]:
        return [self._row(entrant, metric, "x", faster)]

    def _row(self, entrant: Entrant, metric: str, unit: str, values: list[float]) -> Row:
        row = {"op": "attention", "problem": self.problem, "backend": entrant.config.backend, "metric": metric}
        return row | {"unit": unit, "sqnr_db": entrant.sqnr_db, **self.timer.columns, **record.percentiles(values)}
