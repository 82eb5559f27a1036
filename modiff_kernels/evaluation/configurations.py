"""Configurations that are set side by side, and UNets accelerated as one of them says."""

import argparse
import contextlib
import dataclasses
import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import modiff_kernels as mk
from modiff_kernels.config.plan import MODULATED, QUANTIZED
from modiff_kernels.evaluation import UserError, user_errors
from modiff_kernels.quant.spec import BLOCK_ROWS

FLOAT_BITS = 32
FIRST_CALL_BITS = 16  # two updates of 8 bits


@dataclasses.dataclass(frozen=True)
class Row:
    """One configuration. Full precision has 32 bits; `mode` is float, weight_only, quantized or modulated.
    schedule, plan: as ModiffConfig takes them; None computes every call, and all layers as `mode` says. cuda_graphs: as
    ModiffConfig takes it, for float rows those of torch.compile."""

    key: str
    name: str
    mode: str
    weight_bits: int = FLOAT_BITS
    act_bits: int = FLOAT_BITS
    channels_last: bool = True
    compiled: bool = False
    schedule: str | None = None
    plan: str | None = None
    cuda_graphs: bool = False


def row_of(args: argparse.Namespace, name: str, **more: Any) -> Row:
    """The one configuration that --mode, --weight-bits and --act-bits stand for."""
    act_bits = FLOAT_BITS if args.mode == "weight_only" else args.act_bits
    return Row(args.command, name, args.mode, args.weight_bits, act_bits, **more)


def build_rows(
    weight_bits: Sequence[int], act_bits: Sequence[int] | None, compiled: bool, schedule: str | None = None,
    plan: str | None = None,
) -> list[Row]:  # fmt: skip
    """All rows for these bits; `act_bits` None takes 8, 4 for plain layers, 8, 4, 3 for modulated ones.

    schedule: of more rows, modulated and plain ones with `act_bits` (None: 8); None leaves them out. plan: of one more
    row for each of `weight_bits`; its modes bring their own bits."""
    rows = [
        Row("float-contiguous", "float32 eager contiguous", "float", channels_last=False),
        Row("float-channels_last", "float32 eager channels_last", "float"),
        Row("float-compile", "float32 torch.compile channels_last", "float", compiled=True),
    ][: 3 if compiled else 2]
    rows += [Row(f"weight-only-w{w}", f"W{w} float activations", "weight_only", w) for w in weight_bits]
    low_bit: list[tuple[str, str, str, tuple[int, ...], str | None]] = [
        ("plain", "plain W{}A{}", "quantized", (8, 4), None),
        ("modulated", "modulated W{}A{}", "modulated", (8, 4, 3), None),
        ("scheduled", "modulated W{}A{} scheduled", "modulated", (8,), schedule),
        ("plain-scheduled", "plain W{}A{} scheduled", "quantized", (8,), schedule),
    ]
    for key, name, mode, default, of_row in low_bit if schedule is not None else low_bit[:2]:
        for w, a in itertools.product(weight_bits, act_bits or default):
            rows.append(Row(f"{key}-w{w}a{a}", name.format(w, a), mode, w, a, schedule=of_row))
    for w in weight_bits if plan is not None else ():
        rows.append(Row(f"planned-w{w}", f"W{w} planned", "modulated", w, (act_bits or (8,))[0], plan=plan))
    return rows


def select_rows(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows whose key is one of `names` or begins with it; all for no names. Order as in `rows`."""
    chosen = {name: [row for row in rows if f"{row.key}-".startswith(f"{name}-")] for name in names}
    for name, found in chosen.items():
        if not found:
            raise UserError(f"--rows: no row {name!r}; allowed: {', '.join(row.key for row in rows)}")
    return [row for row in rows if not names or any(row in found for found in chosen.values())]


def config_of_row(
    row: Row, backend: str = "auto", granularity: str | None = None, max_state_bytes: int | None = None
) -> mk.ModiffConfig:
    mode = "modulated" if row.mode == "modulated" else "quantized"
    return mk.ModiffConfig(
        weight_bits=None if row.mode == "float" else row.weight_bits,
        act_bits=None if row.mode in ("float", "weight_only") else row.act_bits,
        mode=mode,
        backend=backend,
        granularity=None if mode == "quantized" and granularity == "per_block" else granularity,
        schedule=row.schedule,
        plan=row.plan or (row.mode if row.mode in (MODULATED, QUANTIZED) else None),  # on a GPU None has others, too
        cuda_graphs=row.cuda_graphs,
        max_state_bytes=max_state_bytes,
    )


class Quantised:
    """An accelerated UNet as a report needs it: run boundaries, state bytes, average bits, backend. state_bytes: the
    most that the state has taken in the runs so far."""

    state_bytes = 0

    def __init__(self, unet: Any, row: Row, *of_config: Any, calibration: Path | None = None, **more: Any) -> None:
        """Accelerate `unet` in place as `row` says; UserError where it cannot run here. of_config, more: as
        `config_of_row` takes them. calibration: folder of a CalibrationResult, whose mode and bits then count."""
        with user_errors(f"{row.name}: "):
            config = config_of_row(row, *of_config, **more)
            result = None if calibration is None else mk.CalibrationResult.load(calibration)
            if result is not None:
                own = {name: getattr(config, name) for name in ("backend", "schedule", "max_state_bytes")}
                config = dataclasses.replace(result.config, **own, plan=row.plan or result.config.mode)
            self.handle = mk.accelerate(unet, config, calibration=result or "auto")

    @classmethod
    def loaded(cls, handle: Any) -> "Quantised":
        quantised = cls.__new__(cls)
        quantised.handle = handle
        return quantised

    @contextlib.contextmanager
    def sampling_run(self, scheduler: Any = None) -> Iterator[None]:
        """One sampling run. scheduler: the one that samples, which step schedules need."""
        with self.handle.sampling_run(scheduler=scheduler):
            yield
            self.state_bytes = max(self.state_bytes, self.handle.state.nbytes())

    def average_bits(self, calls: int) -> float:
        """Bits of the activations, averaged over the quantised layers and the `calls` of the UNet in a run. Multipliers
        of granularity per_block count, with 8 - act_bits bits for every block. A call that a schedule lets a layer skip
        counts 0 bits; which these are is that of the last run."""
        means = []
        for row in self._low_bit:
            layer = self.handle.layers[row.name]
            later = float(layer.act_bits if layer.act_bits is not None and layer.mode != "float" else FLOAT_BITS)
            if layer.mode == "modulated" and layer.granularity == "per_block":
                later += (8 - later) / BLOCK_ROWS
            first = FIRST_CALL_BITS if layer.mode == "modulated" else later
            means.append((first + later * (calls - 1 - self.handle.skipped_calls())) / calls)
        return statistics.fmean(means) if means else float(FLOAT_BITS)

    def calls_computed(self, calls: int) -> int:
        return calls - self.handle.skipped_calls()

    @property
    def backend(self) -> str:
        """Backend of the low-bit layers; where there are several, each with its number of layers."""
        found = Counter(layer.backend for layer in self._low_bit).most_common()
        return found[0][0] if len(found) == 1 else ", ".join(f"{name} {count}" for name, count in found)

    @property
    def _low_bit(self) -> list[Any]:
        return [layer for layer in self.handle.rows() if layer.bits != "-"]
