// What host and device code share: the mark of functions that both compile, bit casts, and float32 arithmetic that no
// compiler fuses or approximates. The host compiler needs -ffp-contract=off where its processor has a fused
// multiply-add.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// Always inlined on the host: files compiled for different processors then never share a copy.
#if defined(__CUDACC__)
#define MODIFF_HD __host__ __device__ __forceinline__
#define MODIFF_UNROLL _Pragma("unroll")
#define MODIFF_NO_UNROLL _Pragma("unroll 1")
#else
#define MODIFF_HD inline __attribute__((always_inline))
#define MODIFF_UNROLL
#define MODIFF_NO_UNROLL
#endif

namespace modiff {

MODIFF_HD float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

MODIFF_HD uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

// One rounding each, to nearest even.
#if defined(__CUDA_ARCH__)
MODIFF_HD float add_rn(float a, float b) { return __fadd_rn(a, b); }
MODIFF_HD float sub_rn(float a, float b) { return __fsub_rn(a, b); }
MODIFF_HD float mul_rn(float a, float b) { return __fmul_rn(a, b); }
MODIFF_HD float div_rn(float a, float b) { return __fdiv_rn(a, b); }
MODIFF_HD float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MODIFF_HD float rint_even(float x) { return ::rintf(x); }
MODIFF_HD float ceil_up(float x) { return ::ceilf(x); }
#else
MODIFF_HD float add_rn(float a, float b) { return a + b; }
MODIFF_HD float sub_rn(float a, float b) { return a - b; }
MODIFF_HD float mul_rn(float a, float b) { return a * b; }
MODIFF_HD float div_rn(float a, float b) { return a / b; }
MODIFF_HD float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MODIFF_HD float rint_even(float x) { return __builtin_rintf(x); }
MODIFF_HD float ceil_up(float x) { return __builtin_ceilf(x); }
#endif

// min(max(x, low), high); a NaN stays one.
MODIFF_HD float clamp_nan(float x, float low, float high) {
#if defined(__CUDA_ARCH__)
  float clamped;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(x), "f"(low));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(clamped), "f"(high));
  return clamped;
#else
  x = x < low ? low : x;
  return x > high ? high : x;
#endif
}

// An integral float as an integer; 0 for NaN, which has none.
MODIFF_HD int32_t to_int(float x) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(x);
#else
  return x == x ? static_cast<int32_t>(x) : 0;
#endif
}

// The bytes of a (0 to 3) and b (4 to 7) that the lower four nibbles of `order`, 7 at most, name, the lowest first.
MODIFF_HD uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t order) {
#if defined(__CUDA_ARCH__)
  uint32_t word;  // __byte_perm would mask the nibbles once more
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(order));
  return word;
#else
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(both >> (8 * (order >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return word;
#endif
}

template <class T>
MODIFF_HD T least(T a, T b) {
  return b < a ? b : a;
}

template <class T>
MODIFF_HD T most(T a, T b) {
  return a < b ? b : a;
}

template <class T, class U>
MODIFF_HD auto ceil_div(T a, U b) {
  return (a + b - 1) / b;
}

}  // namespace modiff
