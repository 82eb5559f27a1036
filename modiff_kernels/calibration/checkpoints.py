"""Importer for the published checkpoints of Q-Diffusion: their weights as integer codes, exactly.

A checkpoint is the `state_dict` of their QuantModel. By layer path P (in the network of *their* code)::

    P.weight                                           float32, not quantised
    P.weight_quantizer.{alpha, delta, zero_point}      alpha like the weight (or its first part), delta per channel
    P.weight_quantizer_0.{alpha, delta, zero_point}    of the second part, where a shortcut is split

    code = clamp(floor(W / delta) + (alpha >= 0) + zero_point, 0, 2^b - 1),    W_q = (code - zero_point) * delta

Codes here are signed and have no zero point: code - zero_point as it stands. Where that does not fit `bits` (a
channel's zero point is not 2^(b-1)), the layer is stored in 8 bits; its values stay those of the checkpoint. Only
channels of 8-bit checkpoints can fail to fit 8 bits: they are rounded again, and counted in the metadata."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from modiff_kernels.calibration.job import check_choice, layers_of
from modiff_kernels.calibration.result import CalibrationResult
from modiff_kernels.config import ModiffConfig
from modiff_kernels.quant.affine import expand_weight_scale, weight_rows
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight
from modiff_kernels.quant.spec import quant_max, quant_min

PARTS = ("weight_quantizer", "weight_quantizer_0")


def import_qdiffusion(
    checkpoint: str | Path | Mapping[str, Tensor],
    unet: nn.Module,
    bits: int,
    config: ModiffConfig | None = None,
    load_weights: bool = False,
) -> CalibrationResult:
    """Weight codes of a Q-Diffusion checkpoint for the layers of a `unet` with the same float weights.

    bits: of the weights, which the file does not say (its name does: cifar_w4a8_ckpt.pth). config: with weight_bits
    `bits`; default: float activations. Layers are found by their weights, output channel by output channel, so that
    names do not matter and q, k, v may be one tensor there and three here. Activation scales are not read: modulation
    quantises residuals, which the checkpoint knows nothing of. load_weights: put its float weights into the network of
    research code that it was made from (CompVis' LDM, ddpm_cifar10), whose names it has after a prefix as `model.`.

    Raises ValueError on a file that is no such checkpoint, and names the layers whose weights are not in it."""
    config = ModiffConfig(weight_bits=bits, act_bits=None) if config is None else config
    check_choice("bits", bits, (config.weight_bits,))
    tensors = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint)
    if load_weights:
        _load(tensors, unet)
    channels = _channels(tensors, bits)
    layers: dict[str, CalibratedLayer] = {}
    missing: list[str] = []
    rounded = 0
    for path, module in layers_of(unet, config).items():
        found = [channels.get(_key(row)) for row in module.weight.detach()]
        if any(channel is None for channel in found):
            missing.append(path)
            continue
        weight, count = _layer(found, bits)
        layers[path] = CalibratedLayer(weight)
        rounded += count
    if missing:
        advice = "give the UNet that it was made from, in float32, or name them in skip_modules"
        raise ValueError(f"import_qdiffusion: it does not hold the weights of {', '.join(missing[:5])}; {advice}")
    return CalibrationResult("qdiffusion-checkpoint", config, layers, {"channels_rounded_again": rounded})


def _read(path: str | Path) -> Mapping[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"import_qdiffusion: cannot read {path} as a PyTorch checkpoint ({error})") from error
    return tensors.get("state_dict", tensors)


def _load(tensors: Mapping[str, Tensor], network: nn.Module) -> None:
    own = list(network.state_dict())
    prefixes = [name.removesuffix(own[0]) for name in tensors if name.endswith(own[0])] or ["model."]
    missing = {prefix: [name for name in own if prefix + name not in tensors] for prefix in prefixes}
    prefix = min(prefixes, key=lambda prefix: len(missing[prefix]))
    if missing[prefix]:
        text = f"has no {prefix + missing[prefix][0]!r}; give the network that it was made from, in its own code"
        raise ValueError(f"import_qdiffusion: the checkpoint {text}")
    network.load_state_dict({name: tensors[prefix + name] for name in own})


class Channel(NamedTuple):
    """An output channel: code - zero_point float32 [K], its scales float32 [groups], and the group_size."""

    codes: Tensor
    scale: Tensor
    group_size: int


def _channels(tensors: Mapping[str, Tensor], bits: int) -> dict[bytes, Channel]:
    channels: dict[bytes, Channel] = {}
    for path in (name.removesuffix(".weight") for name in tensors if name.endswith(".weight")):
        parts = [f"{path}.{part}" for part in PARTS if f"{path}.{part}.delta" in tensors]
        if not parts:
            continue
        weight = tensors[f"{path}.weight"].float()
        inputs = [tensors[f"{part}.alpha"].shape[1] for part in parts]
        width = math.gcd(*inputs)
        codes, scales = [], []
        for part, own, size in zip(parts, weight.tensor_split(np.cumsum(inputs)[:-1].tolist(), 1), inputs):
            alpha, delta, zero_point = (tensors[f"{part}.{name}"].float() for name in ("alpha", "delta", "zero_point"))
            if own.shape != alpha.shape:
                raise ValueError(f"import_qdiffusion: {part}.alpha does not fit its weight; the checkpoint is damaged")
            code = ((own / delta).floor() + (alpha >= 0) + zero_point).clamp(0, 2**bits - 1)
            codes.append(code - zero_point)
            scales.append(delta.view(-1, 1).expand(len(weight), size // width))
        joined = torch.cat(codes, 1)
        rows = weight_rows(joined if joined.ndim in (2, 4) else joined.flatten(1))
        for row, own, scale in zip(weight, rows, torch.cat(scales, 1)):
            channels[_key(row)] = Channel(own, scale, -1 if len(parts) == 1 else width)
    if not channels:
        raise ValueError(f"import_qdiffusion: no weight quantiser (*.{PARTS[0]}.delta); give one of Q-Diffusion's")
    return channels


def _layer(channels: list[Channel], bits: int) -> tuple[QuantizedWeight, int]:
    codes, group_size = torch.stack([channel.codes for channel in channels]), channels[0].group_size
    scale = torch.stack([channel.scale for channel in channels])
    if group_size == -1:
        scale = scale[:, 0].contiguous()
    fits = quant_min(bits) <= codes.min() and codes.max() <= quant_max(bits)
    outside = (codes < quant_min(8)).any(1) | (codes > quant_max(8)).any(1)
    if outside.any():
        steps = expand_weight_scale(scale, codes.shape[1], group_size)
        again = QuantizedWeight.rounded((codes * steps)[outside], 8, group_size)
        codes[outside], scale[outside] = again.codes.float(), again.scale
    return QuantizedWeight(codes.to(torch.int8), scale, bits if fits else 8, group_size), int(outside.sum())


def _key(row: Tensor) -> bytes:
    return row.detach().float().flatten().contiguous().cpu().numpy().tobytes()
