"""An accelerated UNet as the command line needs it: run boundaries, state bytes, average bits, backend."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import modiff_kernels as mk
from modiff_kernels.cli.arguments import UserError
from modiff_kernels.cli.rows import Row
from modiff_kernels.quant.spec import BLOCK_ROWS

__all__ = ["Quantised", "config_of_row"]

FLOAT_BITS = 32


def config_of_row(
    row: Row, backend: str = "auto", granularity: str | None = None, max_state_bytes: int | None = None
) -> mk.ModiffConfig:
    """The configuration that `row` stands for; ValueError if it is impossible."""
    mode = "modulated" if row.mode == "modulated" else "quantized"
    plain = row.mode == "float"
    return mk.ModiffConfig(
        weight_bits=None if plain else row.weight_bits,
        act_bits=None if plain or row.mode == "weight_only" else row.act_bits,
        mode=mode,
        backend=backend,
        granularity=None if mode == "quantized" and granularity == "per_block" else granularity,
        schedule=row.schedule,
        plan=row.plan,
        cuda_graphs=row.cuda_graphs,
        max_state_bytes=max_state_bytes,
    )


class Quantised:
    """Accelerates `unet` in place as `row` says. UserError for a configuration that cannot run here.

    calibration: folder of a CalibrationResult, whose mode and bits then count.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        row: Row,
        backend: str = "auto",
        granularity: str | None = None,
        max_state_bytes: int | None = None,
        calibration: Path | None = None,
    ) -> None:
        try:
            result = None if calibration is None else mk.CalibrationResult.load(calibration)
            if result is None:
                config = config_of_row(row, backend, granularity, max_state_bytes)
            else:
                config = dataclasses.replace(
                    result.config,
                    backend=backend,
                    schedule=row.schedule,
                    plan=row.plan,
                    max_state_bytes=max_state_bytes,
                )
            self.handle = mk.accelerate(unet, config, calibration=result)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{row.name}: {error}") from error
        self.state_bytes = 0

    @classmethod
    def loaded(cls, handle: mk.Handle) -> Quantised:
        """Of a UNet that diffusers loaded in low bits."""
        quantised = cls.__new__(cls)
        quantised.handle = handle
        quantised.state_bytes = 0
        return quantised

    @contextlib.contextmanager
    def sampling_run(self, scheduler: Any = None) -> Iterator[None]:
        """One sampling run; afterwards `state_bytes` is the most that the state has taken so far.

        scheduler: the one that samples, which step schedules need.
        """
        with self.handle.sampling_run(scheduler=scheduler):
            yield
            self.state_bytes = max(self.state_bytes, self.handle.state.nbytes())

    def average_bits(self, calls: int) -> float:
        """Bits of the activations, averaged over the quantised layers and the `calls` of the UNet in a run.

        Multipliers of granularity per_block count, with 8 - act_bits bits for every block. A call that a schedule lets
        a layer skip counts 0 bits; which these are is that of the last run.
        """
        total = 0.0
        layers = [layer for layer in self.handle.rows() if layer.bits != "-"]
        for row in layers:
            layer = self.handle.layers[row.name]
            later = float(layer.act_bits if layer.act_bits is not None and layer.mode != "float" else FLOAT_BITS)
            if layer.mode == "modulated" and layer.granularity == "per_block":
                later += (8 - later) / BLOCK_ROWS
            first = (layer.first_step_bits or FLOAT_BITS) if layer.mode == "modulated" else later
            total += first + later * (calls - 1 - self.handle.skipped_calls(row.name))
        return total / (calls * len(layers)) if layers else float(FLOAT_BITS)

    def calls_computed(self, calls: int) -> int:
        """How many of the `calls` of the last run computed the UNet, or a part of it."""
        return calls - self.handle.skipped_calls("conv_in")

    @property
    def backend(self) -> str:
        """Backend of the low-bit layers; where there are several, each with its number of layers."""
        layers = Counter(layer.backend for layer in self.handle.rows() if layer.bits != "-")
        if len(layers) == 1:
            return next(iter(layers))
        return ", ".join(f"{name} {count}" for name, count in layers.most_common())
