// Elementary functions that the compiler vectorises. Included only by files compiled for one ISA.
#pragma once
#include <cstdint>

#include "cpu/convert.h"

namespace modiff::cpu {
namespace {

#if defined(__FMA__)
inline float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
inline float fma_(float a, float b, float c) { return a * b + c; }
#endif

// exp on [-87, 88] (clamped), relative error below 2e-7: 2^n * p(r), Cephes polynomial.
inline float exp_(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = __builtin_rintf(x * 1.44269504088896341f);
  float r = fma_(n, -0.693359375f, x);
  r = fma_(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fma_(p, r, 1.3981999507e-3f);
  p = fma_(p, r, 8.3334519073e-3f);
  p = fma_(p, r, 4.1665795894e-2f);
  p = fma_(p, r, 1.6666665459e-1f);
  p = fma_(p, r, 5.0000001201e-1f);
  p = fma_(p, r * r, r) + 1.0f;
  return p * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

}  // namespace
}  // namespace modiff::cpu
