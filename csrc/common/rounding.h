// The quantiser of modiff_kernels/quant/affine.py, one value at a time, in the same order of float32 roundings.
//
// half = 2^(bits-1): codes run from -half to half - 1. Ranges are bit patterns of |x|: as integers they order finite <
// inf < NaN, so that their maximum depends on no order and a NaN reaches absmax and scale.
#pragma once
#include "common/hd.h"

namespace modiff {

constexpr float kMinScale = 0x1p-100f;  // keeps 1 / scale finite for an all-zero residual
constexpr int64_t kBlockRows = 16;      // quant/spec.py BLOCK_ROWS

MODIFF_HD float half_range(int bits) { return static_cast<float>(1 << (bits - 1)); }

MODIFF_HD uint32_t magnitude(float x) { return float_to_bits(x) & 0x7FFFFFFFu; }

// max(-x, 0) and max(x, 0); NaN counts above.
MODIFF_HD uint32_t magnitude_below(float x) { return x < 0.0f ? magnitude(x) : 0u; }
MODIFF_HD uint32_t magnitude_above(float x) { return x < 0.0f ? 0u : magnitude(x); }

// Blocks of a sample of `rows` rows at granularity per_block; 0: it is per_sample. quant/spec.py block_count.
MODIFF_HD int64_t block_count(int64_t rows, int bits) { return bits == 8 ? 0 : rows / kBlockRows; }

// max(scale, 2^-100), but a NaN stays one.
MODIFF_HD float usable_scale(float scale) { return scale < kMinScale ? kMinScale : scale; }

MODIFF_HD float symmetric_scale(float absmax, float clip_ratio, float levels) {
  return usable_scale(div_rn(mul_rn(absmax, clip_ratio), levels));
}

// affine.residual_scale
MODIFF_HD float residual_scale(float absmax, float clip_ratio, float half) {
  return symmetric_scale(absmax, clip_ratio, half - 0.5f);
}

// affine.block_multipliers: the scale of a sample, and the integer multiplier of a block of it.
MODIFF_HD float block_reach(float half) { return half - 0.8125f; }
MODIFF_HD float largest_multiplier(float half) { return 128.0f / half; }

MODIFF_HD float block_scale(float absmax, float clip_ratio, float half) {
  return symmetric_scale(absmax, clip_ratio, mul_rn(block_reach(half), largest_multiplier(half)));
}

MODIFF_HD float block_multiplier(float absmax, float clip_ratio, float scale, float half) {
  const float m = ceil_up(div_rn(mul_rn(absmax, clip_ratio), mul_rn(scale, block_reach(half))));
  return clamp_nan(m, 1.0f, largest_multiplier(half));
}

// affine.affine_range over [-below, above]; below and above are at least 0.
MODIFF_HD float affine_scale(float below, float above, float half) {
  return usable_scale(div_rn(add_rn(above, below), 2.0f * half - 1.0f));
}

MODIFF_HD float affine_zero_point(float below, float scale, float half) {
  return clamp_nan(rint_even(mul_rn(below, div_rn(1.0f, scale))) - half, -half, half - 1.0f);
}

// clamp(rne(x * inv_scale) + zero_point, -half, half - 1), a float; NaN stays NaN, and so reaches x_hat.
MODIFF_HD float code_of(float x, float inv_scale, float zero_point, float half) {
  return clamp_nan(add_rn(rint_even(mul_rn(x, inv_scale)), zero_point), -half, half - 1.0f);
}

}  // namespace modiff
