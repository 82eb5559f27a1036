"""Storage of weight codes: one portable, versioned layout; others belong to the backend that reads them.

kpack_v1, codes [N, K], every row on its own, K the fast dimension:

- 8 bits: int8 [N, K], the codes.
- 4 bits: uint8 [N, ceil(K/2)], two's complement nibbles, even k in the low nibble.
- 3 bits: uint8 [N, ceil(K/4) + ceil(K/8)] of u = code + 4 in two planes. First plane: the low two bits of u, k = 4i+j
  in bits 2j and 2j+1 of byte i. Second plane: bit 2 of u, k = 8i+j in bit j of byte i.

Positions past K hold code 0."""

import torch
from torch import Tensor

from .spec import check_bits, quant_max, quant_min

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
    """Storage of weight codes in layout kpack_v1, exact: new, int8 [N, K] (8 bits), uint8 [N, ceil(K/2)] (4 bits) or
    uint8 [N, ceil(K/4) + ceil(K/8)] (3 bits).

    weight_q int8 [N, K], codes in -2^(b-1) .. 2^(b-1)-1; for a convolution K = r * s * c_in / groups in (r, s, c)
    order, that is `weight.permute(0, 2, 3, 1).reshape(N, -1)`. Raises ValueError for codes out of range."""
    check_bits("pack_weight", "weight_bits", weight_bits)
    if weight_q.dtype != torch.int8 or weight_q.ndim != 2:
        given = f"{weight_q.dtype} {tuple(weight_q.shape)}"
        raise ValueError(f"pack_weight: weight_q is {given}; expected int8 [N, K], of a convolution K = (r, s, c)")
    if (found := misfit(weight_q, weight_bits)) is not None:
        allowed = f"{weight_bits} bits hold {quant_min(weight_bits)} to {quant_max(weight_bits)}"
        raise ValueError(f"pack_weight: weight_q holds codes from {found[0]} to {found[1]}, but {allowed}")
    if weight_bits == 8:
        return weight_q.clone(memory_format=torch.contiguous_format)
    if weight_bits == 4:
        return _pack_plane(weight_q & 0xF, 4)
    biased = weight_q + 4
    return torch.cat((_pack_plane(biased & 3, 2, fill=0), _pack_plane(biased >> 2, 1, fill=1)), dim=1)


def unpack_weight(weight_packed: Tensor, weight_bits: int, n: int, k: int) -> Tensor:
    """The codes int8 [n, k] of a weight made by `pack_weight`: its exact inverse, new. ValueError for another size."""
    check_packed("unpack_weight", weight_packed, weight_bits, n, k)
    return unpack(weight_packed, weight_bits, k)


def check_packed(where: str, packed: Tensor, bits: int, n: int, k: int) -> None:
    check_bits(where, "weight_bits", bits)
    shape, dtype = (n, packed_width(bits, k)), packed_dtype(bits)
    if tuple(packed.shape) != shape or packed.dtype != dtype or not packed.is_contiguous():
        text = f"{KPACK_V1} with {bits} bits, n={n}, k={k} needs a contiguous {dtype} {shape}; make it with pack_weight"
        given = f"shape {tuple(packed.shape)}, {packed.dtype}, strides {packed.stride()}"
        raise ValueError(f"{where}: the packed weight has {given}; {text}")


def unpack(weight_packed: Tensor, weight_bits: int, k: int) -> Tensor:
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
