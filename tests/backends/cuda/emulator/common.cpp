// The functions of csrc/common on arrays, for tests/backends/cuda/test_common.py, which calls them through ctypes.
#include "common/dtype.h"
#include "common/packing.h"
#include "common/rounding.h"

using namespace modiff;

extern "C" {

void halves_to_floats(const uint16_t* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = half_bits_to_float(in[i]);
}

void floats_to_halves(const float* in, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = float_to_half_bits(in[i]);
}

void bfloat16s_to_floats(const uint16_t* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = bfloat16_bits_to_float(in[i]);
}

void floats_to_bfloat16s(const float* in, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = float_to_bfloat16_bits(in[i]);
}

// codes[i] of x[i] with one scale and zero point.
void codes(const float* x, int8_t* out, int64_t count, float scale, float zero_point, int bits) {
  const float inverse = div_rn(1.0f, scale);
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<int8_t>(to_int(code_of(x[i], inverse, zero_point, half_range(bits))));
}

void residual_scales(const float* absmax, float* scale, int64_t count, float clip_ratio, int bits) {
  for (int64_t i = 0; i < count; ++i) scale[i] = residual_scale(absmax[i], clip_ratio, half_range(bits));
}

// absmax [count] of the blocks of one sample.
float block_multipliers(const float* absmax, float* multiplier, int64_t count, float clip_ratio, int bits) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = most(largest, magnitude(absmax[i]));
  const float half = half_range(bits), scale = block_scale(bits_to_float(largest), clip_ratio, half);
  for (int64_t i = 0; i < count; ++i) multiplier[i] = block_multiplier(absmax[i], clip_ratio, scale, half);
  return scale;
}

void affine_ranges(const float* low, const float* high, float* scale, int32_t* zero_point, int64_t count, int bits) {
  for (int64_t i = 0; i < count; ++i) {
    const float half = half_range(bits);
    scale[i] = affine_scale(-low[i], high[i], half);
    zero_point[i] = to_int(affine_zero_point(-low[i], scale[i], half));
  }
}

int64_t width_of_packed(int bits, int64_t k) { return packed_width(bits, k); }

void unpack_row(const uint8_t* row, int8_t* codes, int bits, int64_t k) {
  for (int64_t i = 0; i < k; ++i) codes[i] = unpack_code(row, bits, k, i);
}

// Eight codes to the four bytes of 4 bits or the three of 3 bits.
void pack_eight(const int8_t* codes, uint8_t* bytes, int bits) {
  int8_t eight[8];
  std::memcpy(eight, codes, sizeof(eight));
  if (bits == 4) {
    const uint32_t word = pack_nibbles(eight);
    std::memcpy(bytes, &word, sizeof(word));
    return;
  }
  const uint16_t low = pack_low_bits(eight);
  std::memcpy(bytes, &low, sizeof(low));
  bytes[2] = pack_high_bits(eight);
}

// Words of eight nibbles to eight codes each.
void unpack_words(const uint32_t* words, int8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t parts[2];
    unpack_eight_nibbles(words[i], parts[0], parts[1]);
    std::memcpy(codes + 8 * i, parts, sizeof(parts));
  }
}

// Both planes of eight codes each to eight codes each.
void unpack_planes(const uint16_t* low, const uint8_t* high, int8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t parts[2];
    unpack_eight_planes(low[i], high[i], parts[0], parts[1]);
    std::memcpy(codes + 8 * i, parts, sizeof(parts));
  }
}
}
