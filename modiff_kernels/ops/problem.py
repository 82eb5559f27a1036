"""`Problem`: the one key by which ops are chosen and reported."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..quant.operands import Window


@dataclass(frozen=True)
class Problem:
    """What an op is asked to do, without the data.

    op: "quantize", "product", "attention", or "modulate": the first two in one piece.
    m: rows (Linear), pixels of the output (convolution) or of the image (quantize). n: output features (0: the op has
        none). k: products summed per output, or channels of what is quantised. Of attention: m queries of all samples,
        n keys of a sample, k values of a head.
    dtype: of what is quantised, or of the output. state_dtype: of x_hat or y_hat, None without state.
    prologue: its kind, of ops that quantise. window: None for a Linear.
    granularity: of a product it is read from the number of scales. scale_given: of ops that quantise, whether the
        scale is an argument (static, delayed). geglu: of a product, of its weight."""

    op: str
    device_type: str
    capability: tuple[int, int] | None = None
    dtype: torch.dtype | None = None
    state_dtype: torch.dtype | None = None
    m: int = 0
    n: int = 0
    k: int = 0
    window: Window | None = None
    act_bits: int | None = None
    weight_bits: int | None = None
    group_size: int = -1
    granularity: str | None = None
    prologue: str | None = None
    scale_given: bool = False
    layout: str | None = None
    geglu: bool = False

    @property
    def channels(self) -> int:
        if self.window is None:
            return self.k
        return self.k // self.taps * self.window.groups

    @property
    def taps(self) -> int:
        return 1 if self.window is None else self.window.kernel_size[0] * self.window.kernel_size[1]

    @property
    def is_pointwise(self) -> bool:
        """Whether every output row reads one input row, so that a scale per row leaves the sum."""
        return self.window is None or self.window.is_pointwise

    def __str__(self) -> str:
        parts: list[Any] = [self.op, self.device_type, f"m{self.m}", f"n{self.n}" if self.n else None, f"k{self.k}"]
        if self.window is not None:
            pairs = zip(("kernel", "stride", "padding", "dilation"), self.window[:4])
            parts += [f"{name}{a}x{b}" for name, (a, b) in pairs]
            parts.append(f"groups{self.window.groups}")
        bits = [f"{of}{bits}" for of, bits in (("w", self.weight_bits), ("a", self.act_bits)) if bits is not None]
        dtypes = [str(d).removeprefix("torch.") for d in (self.dtype, self.state_dtype) if d is not None]
        parts += ["".join(bits), f"group{self.group_size}" if self.group_size != -1 else None, "/".join(dtypes)]
        parts += [self.granularity, "given" * self.scale_given, self.prologue != "identity" and self.prologue]
        return "-".join(part for part in (*parts, "gated" * self.geglu, self.layout) if part)


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
