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

// 32 3-bit codes in order, four int8 to a word: two words of the low plane, one of the high one. A nibble gets the three
// bits of a code, those of even codes in a word of their own; four nibbles at once pick bytes from the table of all codes.
// The constants are arguments for callers that hold them in registers.
struct PlaneConstants {
  uint32_t negative = 0xFFFEFDFCu, mask = 0x33333333u;
};
MODIFF_HD void unpack_planes(const uint32_t (&low)[2], uint32_t high, uint32_t (&words)[8],
                             const PlaneConstants& constants = {}) {
  constexpr uint32_t positive = 0x03020100u;
  const auto& [negative, mask] = constants;
  MODIFF_UNROLL for (int i = 0; i < 2; ++i) {
    // Bits 0 and 2 of a byte's lower nibble go to bits 2 and 6, bits 1 and 3 to the same of another word.
    const uint32_t nibbles = permute_bytes(high, high >> 4, i == 0 ? 0x5140 : 0x7362);
    const uint32_t even = (low[i] & mask) | ((nibbles & 0x05050505u) * (1u << 2 | 1u << 4) & ~mask);
    const uint32_t odd = (low[i] >> 2 & mask) | ((nibbles & 0x0A0A0A0Au) * (1u << 1 | 1u << 3) & ~mask);
    MODIFF_UNROLL for (int j = 0; j < 2; ++j) {
      const uint32_t evens = permute_bytes(negative, positive, even >> (16 * j));
      const uint32_t odds = permute_bytes(negative, positive, odd >> (16 * j));
      words[4 * i + 2 * j] = permute_bytes(evens, odds, 0x5140);
      words[4 * i + 2 * j + 1] = permute_bytes(evens, odds, 0x7362);
    }
  }
}

// Eight 4-bit codes as int8 in the upper bits of a byte, 16 times as large, where no signs need to be extended.
MODIFF_HD void raise_eight_nibbles(uint32_t word, uint32_t& first, uint32_t& second) {
  const uint32_t even = (word << 4) & 0xF0F0F0F0u, odd = word & 0xF0F0F0F0u;
  first = permute_bytes(even, odd, 0x5140);
  second = permute_bytes(even, odd, 0x7362);
}

}  // namespace modiff
