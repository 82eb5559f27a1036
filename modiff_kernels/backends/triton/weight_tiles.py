"""Tiles of a packed weight as int8, read straight from layout kpack_v1 (quant/packing.py).

==== ============================================ =========================
bits row of a weight, K codes                     bytes for BLOCK_K codes
==== ============================================ =========================
8    int8 [K]                                     BLOCK_K
4    uint8 [ceil(K/2)], two's complement nibbles  BLOCK_K / 2
3    uint8 [ceil(K/4)] + [ceil(K/8)] of code + 4  BLOCK_K / 4 + BLOCK_K / 8
==== ============================================ =========================

A tile is [BLOCK_N, BLOCK_K] with K fast, as int8 tensor cores want it. Neighbouring codes share a byte, so a thread
unpacks what it loaded itself: joining the parts of a byte along a new fastest dimension and folding it into K moves
nothing between threads. Compiled, four bytes are unpacked at once in a register (PTX below); the interpreter has none.

A tile starts at a multiple of 8. Codes past the end of a row are arbitrary: the other operand must be 0 there."""

import triton
import triton.language as tl

from .launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


def _fields_ptx(bits: int) -> str:
    """Output i: bits [i * bits, (i + 1) * bits) of every byte of the input, at bit 0."""
    count, mask = 8 // bits, ((1 << bits) - 1) * 0x01010101
    return "".join(f"shr.u32 ${i}, ${count}, {i * bits};\nand.b32 ${i}, ${i}, {mask};\n" for i in range(count))


def _unbias_ptx(output: str, bias: int) -> str:
    """Subtract `bias` from every byte, which is below 128: with bit 7 set no byte borrows from the next one."""
    return (
        f"or.b32 {output}, {output}, {0x80808080};\n"
        f"sub.u32 {output}, {output}, {bias * 0x01010101};\n"
        f"xor.b32 {output}, {output}, {0x80808080};\n"
    )


# A nibble's two's complement is (u ^ 8) - 8.
_SIGNED = "".join(f"xor.b32 {out}, {out}, {0x08080808};\n" + _unbias_ptx(out, 8) for out in ("$0", "$1"))
NIBBLES_PTX = tl.constexpr(_fields_ptx(4) + _SIGNED)
PAIRS_PTX = tl.constexpr(_fields_ptx(2))
BITS_PTX = tl.constexpr(_fields_ptx(1))
# From the two low bits ($1) and the high bit ($2) of code + 4.
THREE_BITS_PTX = tl.constexpr("shl.b32 $0, $2, 2;\nor.b32 $0, $0, $1;\n" + _unbias_ptx("$0", 4))


@triton.jit
def _nibbles(packed):
    if _INTERPRETED:
        signed = packed.to(tl.int8, bitcast=True)
        low, high = (signed << 4) >> 4, signed >> 4
    else:
        low, high = tl.inline_asm_elementwise(
            NIBBLES_PTX, "=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def _pairs(packed):
    if _INTERPRETED:
        a, b, c, d = packed & 3, (packed >> 2) & 3, (packed >> 4) & 3, packed >> 6
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            PAIRS_PTX,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.uint8, tl.uint8, tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _bits(packed):
    if _INTERPRETED:
        a, b, c, d = packed & 1, (packed >> 1) & 1, (packed >> 2) & 1, (packed >> 3) & 1
        e, f, g, h = (packed >> 4) & 1, (packed >> 5) & 1, (packed >> 6) & 1, packed >> 7
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            BITS_PTX,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.uint8, tl.uint8, tl.uint8, tl.uint8, tl.uint8, tl.uint8, tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
    return tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))


@triton.jit
def _three_bits(low, high):
    if _INTERPRETED:
        codes = (low + 4 * high).to(tl.int8) - 4
    else:
        codes = tl.inline_asm_elementwise(THREE_BITS_PTX, "=&r,r,r", [low, high], dtype=tl.int8, is_pure=True, pack=4)
    return codes


@triton.jit
def load_codes(at, k, end, EVEN_K: tl.constexpr):
    """What is at the addresses `at`, whose columns are the elements k of their rows; 0 from element `end` on."""
    if EVEN_K:
        return tl.load(at)
    else:
        return tl.load(at, mask=(k < end)[None, :], other=0)


@triton.jit
def load_weight_tile(
    weight, rows, row_codes, row_bytes, first, left, BITS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr
):
    """Codes int8 [rows, BLOCK_K] of the weight, from code `first` on of the valid rows with numbers `rows`, which hold
    `row_codes` codes in `row_bytes` bytes; `left` codes may be read from there on, with EVEN_K at least BLOCK_K."""
    row = weight + rows.to(tl.int64)[:, None] * row_bytes
    if BITS == 8:
        k = tl.arange(0, BLOCK_K)
        tile = load_codes(row + (first + k)[None, :], k, left, EVEN_K)
    elif BITS == 4:
        k = tl.arange(0, BLOCK_K // 2)
        low, high = _nibbles(load_codes(row + (first // 2 + k)[None, :], 2 * k, left, EVEN_K))
        tile = tl.reshape(tl.join(low, high), (rows.shape[0], BLOCK_K))
    else:
        k4 = tl.arange(0, BLOCK_K // 4)
        k8 = tl.arange(0, BLOCK_K // 8)
        low = load_codes(row + (first // 4 + k4)[None, :], 4 * k4, left, EVEN_K)
        high = load_codes(row + ((row_codes + 3) // 4 + first // 8 + k8)[None, :], 8 * k8, left, EVEN_K)
        low = tl.reshape(_pairs(low), (rows.shape[0], BLOCK_K))
        high = tl.reshape(_bits(high), (rows.shape[0], BLOCK_K))
        tile = _three_bits(low, high)
    return tile
