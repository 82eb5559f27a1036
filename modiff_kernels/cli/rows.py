"""The configurations that `modiff compare` sets side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modiff_kernels.cli.arguments import UserError

__all__ = ["Row", "build_rows", "select_rows"]

PLAIN_ACT_BITS = (8, 4)
MODULATED_ACT_BITS = (8, 4, 3)
SCHEDULED_ACT_BITS = (8,)


@dataclass(frozen=True)
class Row:
    """One configuration. Full precision has 32 bits; `mode` is float, weight_only, quantized or modulated.

    schedule, plan: as ModiffConfig takes them; None computes every call, and all layers as `mode` says. cuda_graphs: as
    ModiffConfig takes it, for float rows those of torch.compile.
    """

    key: str
    name: str
    mode: str
    weight_bits: int = 32
    act_bits: int = 32
    channels_last: bool = True
    compiled: bool = False
    schedule: str | None = None
    plan: str | None = None
    cuda_graphs: bool = False


def build_rows(
    weight_bits: Sequence[int],
    act_bits: Sequence[int] | None,
    compiled: bool,
    schedule: str | None = None,
    plan: str | None = None,
) -> list[Row]:
    """All rows for these bits; `act_bits` None takes 8, 4 for plain layers, 8, 4, 3 for modulated ones.

    schedule: of more rows, modulated ones with `act_bits` (None: 8); None leaves them out. plan: of one more row for
    each of `weight_bits`; its modes bring their own bits.
    """
    rows = [
        Row("float-contiguous", "float32 eager contiguous", "float", channels_last=False),
        Row("float-channels_last", "float32 eager channels_last", "float"),
    ]
    if compiled:
        rows.append(Row("float-compile", "float32 torch.compile channels_last", "float", compiled=True))
    for w in weight_bits:
        rows.append(Row(f"weight-only-w{w}", f"W{w} float activations", "weight_only", w))
    for w in weight_bits:
        for a in act_bits or PLAIN_ACT_BITS:
            rows.append(Row(f"plain-w{w}a{a}", f"plain W{w}A{a}", "quantized", w, a))
    for w in weight_bits:
        for a in act_bits or MODULATED_ACT_BITS:
            rows.append(Row(f"modulated-w{w}a{a}", f"modulated W{w}A{a}", "modulated", w, a))
    for w in weight_bits if schedule is not None else ():
        for a in act_bits or SCHEDULED_ACT_BITS:
            name = f"modulated W{w}A{a} scheduled"
            rows.append(Row(f"scheduled-w{w}a{a}", name, "modulated", w, a, schedule=schedule))
    for w in weight_bits if plan is not None else ():
        rows.append(Row(f"planned-w{w}", f"W{w} planned", "modulated", w, (act_bits or (8,))[0], plan=plan))
    return rows


def select_rows(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows whose key is one of `names` or begins with it; all for no names. Order as in `rows`."""
    for name in names:
        if not any(f"{row.key}-".startswith(f"{name}-") for row in rows):
            raise UserError(f"--rows: no row {name!r}; allowed: {', '.join(row.key for row in rows)}")
    return [row for row in rows if not names or any(f"{row.key}-".startswith(f"{name}-") for name in names)]
