"""An accelerated UNet as the command line needs it: run boundaries, state bytes, average bits, backend."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch

import modiff_kernels as mk
from modiff_kernels.cli.arguments import UserError
from modiff_kernels.cli.rows import Row
from modiff_kernels.quant.spec import BLOCK_ROWS

__all__ = ["Quantised"]

FLOAT_BITS = 32


class Quantised:
    """Accelerates `unet` in place as `row` says. UserError for a configuration that cannot run here."""

    def __init__(self, unet: torch.nn.Module, row: Row, backend: str = "auto", granularity: str | None = None) -> None:
        mode = "modulated" if row.mode == "modulated" else "quantized"
        act_bits = None if row.mode == "weight_only" else row.act_bits
        if mode == "quantized" and granularity == "per_block":
            granularity = None
        try:
            config = mk.ModiffConfig(
                weight_bits=row.weight_bits, act_bits=act_bits, mode=mode, backend=backend, granularity=granularity
            )
            self.handle = mk.accelerate(unet, config)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{row.name}: {error}") from error
        self.state_bytes = 0

    @contextlib.contextmanager
    def sampling_run(self) -> Iterator[None]:
        """One sampling run; afterwards `state_bytes` is the most that the state has taken so far."""
        with self.handle.sampling_run():
            yield
            self.state_bytes = max(self.state_bytes, self.handle.state.nbytes())

    def average_bits(self, calls: int) -> float:
        """Bits of the activations, averaged over the quantised layers and the `calls` of the UNet in a run.

        Multipliers of granularity per_block count, with 8 - act_bits bits for every block.
        """
        config = self.handle.config
        later = config.act_bits or FLOAT_BITS
        if config.layer_granularity == "per_block":
            later += (8 - later) / BLOCK_ROWS
        first = later if config.mode == "quantized" else config.first_step_bits or FLOAT_BITS
        low = (first + later * (calls - 1)) / calls
        layers = [layer for layer in self.handle.rows() if layer.bits != "-"]
        return sum(FLOAT_BITS if layer.mode == "float" else low for layer in layers) / len(layers)

    @property
    def backend(self) -> str:
        """Backend of the low-bit layers; where there are several, each with its number of layers."""
        layers = Counter(layer.backend for layer in self.handle.rows() if layer.bits != "-")
        if len(layers) == 1:
            return next(iter(layers))
        return ", ".join(f"{name} {count}" for name, count in layers.most_common())
