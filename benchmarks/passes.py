"""The quantising passes of a network's fused blocks, and each of them in plain torch, written for inductor.

A pass is read off the network (`pass_table`). Its plain form (`plain_pass`) takes what inductor likes best: tensors as
rows, [N, L, C], or [N, L / 16, 16, C] where a scale covers blocks of 16 rows, which are views of channels_last images
and of tokens. Two ways of writing it, because which one inductor makes faster code of depends on the pass:

obvious   torch's own norms, ranges by one reduction
tuned     norms as sums of values and of squares, which a loop over NHWC vectorises and torch.nn.functional.group_norm
          does not; ranges by row first, so that the residual is made and measured in one loop; what is small, and read
          by all values, stored instead of computed again for each
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import SMALL_NETWORKS, build_unet, conditions
from modiff_kernels.quant.affine import MIN_SCALE
from modiff_kernels.quant.spec import BLOCK_ROWS, quant_max, quant_min

WAYS = ("obvious", "tuned")


@dataclass(frozen=True)
class Pass:
    """What stands between two products: x = prologue(h), `rows` by `channels` an image, is quantised.

    prologue: "identity", "group_norm", "layer_norm" or "geglu". height, width: of an image, (0, 0) for tokens.
    """

    prologue: str
    channels: int
    rows: int
    height: int = 0
    width: int = 0
    groups: int = 1
    silu: bool = False
    shift: bool = False

    @property
    def kind(self) -> str:
        """The pass without its size."""
        what = "residual" if self.prologue == "identity" else self.prologue
        return "+".join([what, *(name for name in ("silu", "shift") if getattr(self, name))])

    @property
    def read_channels(self) -> int:
        """Channels of h."""
        return self.channels * (2 if self.prologue == "geglu" else 1)

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}" if self.height else f"{self.rows}"
        return f"{self.kind}-{self.channels}@{size}"


def pass_table(network: str) -> dict[Pass, int]:
    """Every quantising pass of one update of the fused network -> how often it occurs.

    Those of layers outside fused blocks, and of conv_in and conv_out, which stay in floating point, are not in it.
    """
    unet = build_unet(network, "cpu" if network in SMALL_NETWORKS else "meta")
    table: Counter[Pass] = Counter()

    def count(module: torch.nn.Module, prologue: str = "identity", **how: bool) -> None:
        def see(module: torch.nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            x = out if prologue == "geglu" else inputs[0]
            groups = getattr(module, "num_groups", 1)
            if x.ndim == 4:
                size = (x.shape[1], x.shape[2] * x.shape[3], *x.shape[2:])
            elif prologue == "group_norm":  # diffusers hands tokens over as [N, C, L]
                size = (x.shape[1], x.shape[2])
            else:
                size = (x.shape[-1], x.numel() // x.shape[-1])
            table[Pass(prologue, *size, groups=groups, **how)] += 1

        module.register_forward_hook(see)

    for module in unet.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            count(module.norm1, "group_norm", silu=True)
            count(module.norm2, "group_norm", silu=True, shift=True)
            if module.conv_shortcut is not None:
                count(module.conv_shortcut)
        elif kind == "Attention":
            if module.group_norm is not None:
                count(module.group_norm, "group_norm")
            count(module.to_out[0])
        elif kind == "Transformer2DModel":
            count(module.norm, "group_norm")
            count(module.proj_out)
        elif kind == "BasicTransformerBlock":
            for norm in (module.norm1, module.norm2, module.norm3):
                count(norm, "layer_norm")
            count(module.ff.net[0], "geglu")
        elif kind in ("Upsample2D", "Downsample2D"):
            count(module)  # the block quantises what it gets, before pixels are repeated or padded
    channels, size = unet.config.in_channels, unet.config.sample_size
    inputs = (torch.empty(1, channels, size, size, device=unet.device), torch.zeros(1, device=unet.device))
    with torch.inference_mode():
        unet(*inputs, **conditions(unet, 1))
    return dict(table)


def as_rows(x: Tensor, blocks: bool) -> Tensor:
    """A view of a channels_last image or of tokens as [N, L, C], with `blocks` as [N, L / 16, 16, C]."""
    rows = x.permute(0, 2, 3, 1).flatten(1, 2) if x.ndim == 4 else x
    return rows.unflatten(1, (-1, BLOCK_ROWS)) if blocks else rows


def _stored(x: Tensor) -> Tensor:
    """x, which inductor writes to memory here instead of computing it again for every reader."""
    return x.as_strided(x.shape, x.stride())


def _normalised(item: Pass, h: Tensor, shift: Tensor | None, gamma: Tensor, beta: Tensor, eps: float, way: str):
    """The norm of `item` over rows h."""
    if item.prologue == "layer_norm":
        if way == "obvious":
            return F.layer_norm(h, h.shape[-1:], gamma, beta, eps)
        mean = h.mean(-1, keepdim=True)
        scale = torch.rsqrt((h * h).mean(-1, keepdim=True) - mean * mean + eps)
        return (h - mean) * scale * gamma + beta
    if shift is not None:
        h = h + shift.view(shift.shape[0], *[1] * (h.ndim - 2), -1)
    if way == "obvious":
        # As a channels_last image: of three dimensions group_norm would make a contiguous copy, channels first.
        image = h.view(h.shape[0], *((item.height, item.width) if item.height else (item.rows // 4, 4)), -1)
        x = F.group_norm(image.permute(0, 3, 1, 2), item.groups, gamma, beta, eps)
        return x.permute(0, 2, 3, 1).reshape(h.shape)
    rows = tuple(range(1, h.ndim - 1))
    count = item.rows * (item.channels // item.groups)
    total, squares = (t.sum(rows).unflatten(1, (item.groups, -1)).sum(-1, keepdim=True) for t in (h, h * h))
    mean = total / count
    a = torch.rsqrt(squares / count - mean * mean + eps) * gamma.unflatten(0, (item.groups, -1))
    b = beta.unflatten(0, (item.groups, -1)) - mean * a
    shape = (h.shape[0], *[1] * len(rows), item.channels)
    # Both are [N, groups, C / groups]; as a view the consumer would divide every index by C / groups.
    a, b = (t.as_strided(shape, (item.channels, *[item.channels] * len(rows), 1)) for t in (a, b))
    return h * a + b


def prologue(item: Pass, way: str, h: Tensor, shift, gamma, beta, eps: float) -> Tensor:
    """x, in float32."""
    h = h.float()
    if item.prologue == "identity":
        return h
    if item.prologue == "geglu":
        value, gate = h.chunk(2, dim=-1)
        return value * F.gelu(gate)
    x = _normalised(item, h, shift, gamma, beta, eps, way)
    if not item.silu:
        return x
    return F.silu(x) if way == "obvious" else x / (1 + torch.exp(-x))


def _over_sample(x: Tensor, reduce: Callable[..., Tensor], way: str) -> Tensor:
    """The largest or smallest value of every sample, with its dimensions kept."""
    dims = tuple(range(1, x.ndim))
    if way == "obvious":
        return reduce(x, dims, keepdim=True)
    return reduce(reduce(x, -1, keepdim=True), dims[:-1], keepdim=True)


def _quantised(x: Tensor, scale: Tensor, bits: int, zero_point: Tensor | None = None) -> Tensor:
    codes = torch.round(x * (1.0 / scale))
    if zero_point is not None:
        codes = codes + zero_point
    return codes.clamp(quant_min(bits), quant_max(bits))


def plain_pass(item: Pass, bits: int, form: str, way: str, eps: float) -> Callable[..., tuple[Tensor, ...]]:
    """The pass as a function (h, x_hat, shift, gamma, beta) -> (codes, scale, absmax or zero_point).

    form: "residual", with a scale per sample or, for h of four dimensions, multipliers per block; x_hat is updated in
    place. "activation": affine, a scale and a zero point per sample; x_hat is not used.
    """

    def residual(h: Tensor, x_hat: Tensor, shift, gamma, beta) -> tuple[Tensor, ...]:
        old = x_hat.float()
        change = prologue(item, way, h, shift, gamma, beta, eps) - old
        if change.ndim == 3:
            absmax = _over_sample(change.abs(), torch.amax, way)
            scale = torch.clamp_min(absmax / (2 ** (bits - 1) - 0.5), MIN_SCALE)
            sent = _quantised(change, scale, bits)
        else:
            reach, most = 2 ** (bits - 1) - 13 / 16, 2 ** (8 - bits)
            largest = change.abs().amax(2, keepdim=True)
            absmax = largest.amax((1, 2, 3), keepdim=True)
            scale = torch.clamp_min(absmax / (reach * most), MIN_SCALE)
            multiplier = torch.ceil(largest / (scale * reach)).clamp(1, most)
            inverse = 1.0 / (scale * multiplier)
            if way == "tuned":
                multiplier, inverse = _stored(multiplier), _stored(inverse)
            sent = torch.round(change * inverse).clamp(quant_min(bits), quant_max(bits)) * multiplier
        x_hat.copy_(old + scale * sent)
        return sent.to(torch.int8), scale.flatten(), absmax.flatten()

    def activation(h: Tensor, x_hat: Tensor | None, shift, gamma, beta) -> tuple[Tensor, ...]:
        x = prologue(item, way, h, shift, gamma, beta, eps)
        low = _over_sample(x, torch.amin, way).clamp_max(0.0)
        high = _over_sample(x, torch.amax, way).clamp_min(0.0)
        scale = torch.clamp_min((high - low) / (2**bits - 1), MIN_SCALE)
        zero_point = torch.round(-low * (1.0 / scale)) + quant_min(bits)
        zero_point = zero_point.clamp(quant_min(bits), quant_max(bits))
        codes = _quantised(x, scale, bits, zero_point).to(torch.int8)
        return codes, scale.flatten(), zero_point.to(torch.int32).flatten()

    return {"residual": residual, "activation": activation}[form]
