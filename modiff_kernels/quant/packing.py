"""Storage of weight codes: one portable, versioned layout; others belong to the backend that reads them.

kpack_v1, codes [N, K], every row on its own, K the fast dimension:

- 8 bits: int8 [N, K], the codes.
- 4 bits: uint8 [N, ceil(K/2)], two's complement nibbles, even k in the low nibble.
- 3 bits: uint8 [N, ceil(K/4) + ceil(K/8)] of u = code + 4 in two planes. First plane: the low two bits of u, k = 4i+j
  in bits 2j and 2j+1 of byte i. Second plane: bit 2 of u, k = 8i+j in bit j of byte i.

Positions past K hold code 0."""

import torch
from torch import Tensor

from .spec import quant_max, quant_min

KPACK_V1 = "kpack_v1"


def packed_width(weight_bits: int, k: int) -> int:
    """Bytes per row of a kpack_v1 weight with `k` codes per row."""
    if weight_bits == 8:
        return k
    return (k + 1) // 2 if weight_bits == 4 else (k + 3) // 4 + (k + 7) // 8


def packed_dtype(weight_bits: int) -> torch.dtype:
    return torch.int8 if weight_bits == 8 else torch.uint8


def misfit(codes: Tensor, bits: int) -> tuple[int, int] | None:
    """The least and the largest of `codes` where they do not fit `bits` bits."""
    if codes.numel() == 0:
        return None
    low, high = (int(bound) for bound in codes.aminmax())
    return (low, high) if low < quant_min(bits) or high > quant_max(bits) else None


def pack(weight_q: Tensor, weight_bits: int) -> Tensor:
    """kpack_v1 storage of weight_q int8 [N, K]; a new tensor. Raises ValueError if a code does not fit."""
    if (found := misfit(weight_q, weight_bits)) is not None:
        allowed = f"{weight_bits} bits hold {quant_min(weight_bits)} to {quant_max(weight_bits)}"
        raise ValueError(f"pack_weight: weight_q holds codes from {found[0]} to {found[1]}, but {allowed}")
    if weight_bits == 8:
        return weight_q.clone(memory_format=torch.contiguous_format)
    if weight_bits == 4:
        return _pack_plane(weight_q & 0xF, 4)
    biased = weight_q + 4
    return torch.cat((_pack_plane(biased & 3, 2, fill=0), _pack_plane(biased >> 2, 1, fill=1)), dim=1)


def unpack(weight_packed: Tensor, weight_bits: int, k: int) -> Tensor:
    """Codes int8 [N, k] of a kpack_v1 weight; a new tensor."""
    if weight_bits == 8:
        return weight_packed.clone(memory_format=torch.contiguous_format)
    if weight_bits == 4:
        nibbles = _unpack_plane(weight_packed, 4, k)
        return torch.where(nibbles > 7, nibbles - 16, nibbles)
    split = (k + 3) // 4
    return _unpack_plane(weight_packed[:, :split], 2, k) + 4 * _unpack_plane(weight_packed[:, split:], 1, k) - 4


def _pack_plane(values: Tensor, bits: int, fill: int = 0) -> Tensor:
    per_byte = 8 // bits
    n, k = values.shape
    padded = torch.nn.functional.pad(values, (0, -k % per_byte), value=fill).to(torch.int32)
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=values.device)
    return (padded.reshape(n, -1, per_byte) << shifts).sum(-1).to(torch.uint8)


def _unpack_plane(packed: Tensor, bits: int, k: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    values = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.reshape(packed.shape[0], -1)[:, :k].to(torch.int8).contiguous()
