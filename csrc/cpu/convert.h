// Conversions between the storage dtypes and float32, one row at a time. Included only by files compiled for one ISA.
#pragma once
#include <cstring>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "common/problem.h"

namespace modiff::cpu {
namespace {

inline float half_to_float(uint16_t h) {
#if defined(__F16C__) || defined(__AVX512F__)
  return _cvtsh_ss(h);
#else
  return half_bits_to_float(h);
#endif
}

inline uint16_t float_to_half(float value) {
#if defined(__F16C__) || defined(__AVX512F__)
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return float_to_half_bits(value);
#endif
}

// Asks for the cache lines of `count` values, to be written. Inlined by force: GCC drops calls of functions that do
// nothing but prefetch.
#define MODIFF_INLINE __attribute__((always_inline)) inline
MODIFF_INLINE void prefetch(const void* base, DType dtype, int64_t offset, int64_t count) {
  constexpr int64_t kLine = 64;
  const int64_t size = element_size(dtype);
  const char* first = static_cast<const char*>(base) + offset * size;
  for (int64_t i = 0; i < count * size; i += kLine) __builtin_prefetch(first + i, 1);
}

// Returns the row as float32: the memory itself, or `buffer` filled with converted values.
inline const float* load_row(const void* base, DType dtype, int64_t offset, int64_t count, float* buffer) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base) + offset;
  const uint16_t* row = static_cast<const uint16_t*>(base) + offset;
  int64_t i = 0;
  if (dtype == DType::kFloat16) {
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
      _mm512_storeu_ps(buffer + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i))));
#endif
    for (; i < count; ++i) buffer[i] = half_to_float(row[i]);
  } else {
    for (; i < count; ++i) buffer[i] = bfloat16_bits_to_float(row[i]);
  }
  return buffer;
}

inline void store_row(void* base, DType dtype, int64_t offset, int64_t count, const float* values) {
  if (dtype == DType::kFloat32) {
    float* row = static_cast<float*>(base) + offset;
    if (row != values) std::memcpy(row, values, count * sizeof(float));
    return;
  }
  uint16_t* row = static_cast<uint16_t*>(base) + offset;
  int64_t i = 0;
  if (dtype == DType::kFloat16) {
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i),
                          _mm512_cvtps_ph(_mm512_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
    for (; i < count; ++i) row[i] = float_to_half(values[i]);
  } else {
    for (; i < count; ++i) row[i] = float_to_bfloat16_bits(values[i]);
  }
}

}  // namespace
}  // namespace modiff::cpu
