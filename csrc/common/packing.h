// Weight codes in layout kpack_v1 (modiff_kernels/quant/packing.py), one row of k codes at a time.
//
// 8 bits: the codes. 4 bits: two's complement nibbles, even k low. 3 bits: u = code + 4 in two planes, the low two bits
// (four codes to a byte, the first lowest), then bit 2 (eight codes to a byte).
#pragma once
#include "common/hd.h"

namespace modiff {

// Bytes of a row.
MODIFF_HD int64_t packed_width(int bits, int64_t k) {
  return bits == 8 ? k : bits == 4 ? ceil_div(k, 2) : ceil_div(k, 4) + ceil_div(k, 8);
}

// Code i of a row.
MODIFF_HD int8_t unpack_code(const uint8_t* row, int bits, int64_t k, int64_t i) {
  if (bits == 8) return static_cast<int8_t>(row[i]);
  if (bits == 4) {
    const int nibble = (row[i / 2] >> (4 * (i % 2))) & 15;
    return static_cast<int8_t>((nibble ^ 8) - 8);
  }
  const uint8_t* high = row + ceil_div(k, 4);
  const int low_bits = (row[i / 4] >> (2 * (i % 4))) & 3, high_bit = (high[i / 8] >> (i % 8)) & 1;
  return static_cast<int8_t>(low_bits + 4 * high_bit - 4);
}

// Eight codes of a row from a multiple of eight on: the nibbles of a word; the bytes of both planes of 3 bits.
MODIFF_HD uint32_t pack_nibbles(const int8_t (&codes)[8]) {
  uint32_t word = 0;
  MODIFF_UNROLL for (int i = 0; i < 8; ++i)
    word |= static_cast<uint32_t>(codes[i] & 15) << (4 * i);
  return word;
}

MODIFF_HD uint16_t pack_low_bits(const int8_t (&codes)[8]) {
  uint32_t plane = 0;
  MODIFF_UNROLL for (int i = 0; i < 8; ++i)
    plane |= static_cast<uint32_t>((codes[i] + 4) & 3) << (2 * i);
  return static_cast<uint16_t>(plane);
}

MODIFF_HD uint8_t pack_high_bits(const int8_t (&codes)[8]) {
  uint32_t plane = 0;
  MODIFF_UNROLL for (int i = 0; i < 8; ++i)
    plane |= static_cast<uint32_t>(((codes[i] + 4) >> 2) & 1) << i;
  return static_cast<uint8_t>(plane);
}

// Eight 4-bit codes of a word to eight int8 in order: codes 0-3 in `first`, 4-7 in `second`. Nibbles are spread to
// bytes, then all four signs are extended at once: a byte of 0..15 becomes itself, or itself - 16.
MODIFF_HD uint32_t spread_nibbles(uint32_t four) {
  const uint32_t two = (four | (four << 8)) & 0x00FF00FFu;
  return (two | (two << 4)) & 0x0F0F0F0Fu;
}

MODIFF_HD uint32_t extend_nibbles(uint32_t bytes) { return bytes | ((bytes & 0x08080808u) * 0x1Eu); }

MODIFF_HD void unpack_eight_nibbles(uint32_t word, uint32_t& first, uint32_t& second) {
  first = extend_nibbles(spread_nibbles(word & 0xFFFFu));
  second = extend_nibbles(spread_nibbles(word >> 16));
}

// Four 3-bit codes, their low two bits in a byte and bit 2 in a nibble, to four int8: pairs and bits are spread to
// bytes; u ^ 4 is the code in three bits, whose signs are extended at once.
MODIFF_HD uint32_t spread_pairs(uint32_t byte) {
  const uint32_t two = (byte | (byte << 12)) & 0x000F000Fu;
  return (two | (two << 6)) & 0x03030303u;
}

MODIFF_HD uint32_t spread_bits(uint32_t nibble) { return (nibble * 0x00204081u) & 0x01010101u; }

MODIFF_HD uint32_t join_planes(uint32_t byte, uint32_t nibble) {
  const uint32_t codes = spread_pairs(byte) | ((spread_bits(nibble) ^ 0x01010101u) << 2);
  return codes | ((codes & 0x04040404u) * 0x3Eu);
}

// Eight 3-bit codes in order: 16 bits of the low plane, 8 bits of the high one.
MODIFF_HD void unpack_eight_planes(uint32_t low, uint32_t high, uint32_t& first, uint32_t& second) {
  first = join_planes(low & 0xFFu, high & 0xFu);
  second = join_planes((low >> 8) & 0xFFu, (high >> 4) & 0xFu);
}

// The same eight codes as int8 in the upper bits of a byte, where no signs need to be extended: times 16, and times 32.
MODIFF_HD void raise_eight_nibbles(uint32_t word, uint32_t& first, uint32_t& second) {
  const uint32_t even = (word << 4) & 0xF0F0F0F0u, odd = word & 0xF0F0F0F0u;
  first = permute_bytes(even, odd, 0x5140);
  second = permute_bytes(even, odd, 0x7362);
}

// A factor is the sum of the shifts that bring every pair, or bit, to its byte; what they bring elsewhere is masked.
MODIFF_HD uint32_t raise_planes(uint32_t byte, uint32_t nibble) {
  const uint32_t pairs = (byte & 0x0Fu) * (1u << 5 | 1u << 11) + (byte & 0xF0u) * (1u << 17 | 1u << 23);
  const uint32_t bits = nibble * (1u << 7 | 1u << 14 | 1u << 21 | 1u << 28);
  return (pairs & 0x60606060u) | (~bits & 0x80808080u);
}
MODIFF_HD void raise_eight_planes(uint32_t low, uint32_t high, uint32_t& first, uint32_t& second) {
  first = raise_planes(low, high & 0xFu);
  second = raise_planes(low >> 8, (high >> 4) & 0xFu);
}

}  // namespace modiff
