// What becomes of the integer sums of a product, eight consecutive output channels of a row at a time:
//
//   v[m, n] = scale[m / rows_per_scale] * weight_scale[n]
//             * (sum[m, n] - zero_point[m / rows_per_scale] * weights[m, n])
//
//   with y_hat   y_hat += v              out = y_hat + skip, if there is an out
//   without                              out = v + bias + skip
//   GEGLU                                out[m, j] = (v + bias)[m, 2j] * gelu((v + bias)[m, 2j + 1])
//
// in float32; out is made from y_hat as it is stored. weights[m, n]: the sum of the weight's codes over the taps of the
// kernel that lie inside the image for pixel m (padding stands for x = 0, a code equal to the zero point, while its
// code is 0 in `sum`).
//
// Operands, row major, M = samples * out_h * out_w rows, less than 2^31, of N = c_out:
//   scale, zero_point      [M / rows_per_scale]    float32, int32 or null
//   weight_scale           [N]                     float32
//   bias                   [N]                     float32, float16 or bfloat16, or null
//   tap_sums               [N, T]                  int32, with zero points only; T = kernel_h * kernel_w with padding,
//                                                  else 1
//   y_hat, skip, out       [M, N]                  float32, float16 or bfloat16, or null; GEGLU: out [M, N / 2] alone
//
// Bytes per output: 2t + s with a state of t and an output of s bytes, s more for skip.
#pragma once
#include "cuda/product.h"

namespace modiff::cuda {

struct EpilogueArgs {
  int64_t rows, columns, rows_per_scale;
  const float* scale;
  const int32_t* zero_point;
  const float* weight_scale;
  Parameter bias;
  const int32_t* tap_sums;
  // The window, for taps outside the image, which only padding brings about.
  bool padded;
  int taps, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t h, w, out_h, out_w;
  void* y_hat;
  const void* skip;
  void* out;
  DType y_hat_dtype, skip_dtype, out_dtype;
  bool geglu;
  bool whole;  // all tensors are aligned to 16 bytes and columns is a multiple of eight
};

inline bool aligned_to_vectors(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline EpilogueArgs epilogue_args(const ProductCall& call) {
  const ProductProblem& p = call.problem;
  EpilogueArgs args{};
  args.rows = p.samples * p.out_h * p.out_w;
  args.columns = p.c_out;
  args.rows_per_scale = call.rows_per_scale;
  args.scale = p.scale;
  args.zero_point = p.zero_point;
  args.weight_scale = p.weight_scale;
  args.bias = call.bias;
  args.tap_sums = call.tap_sums;
  args.padded = p.pad_h != 0 || p.pad_w != 0;
  args.taps = args.padded ? static_cast<int>(p.kernel_h * p.kernel_w) : 1;
  args.kernel_w = static_cast<int>(p.kernel_w);
  args.stride_h = static_cast<int>(p.stride_h);
  args.stride_w = static_cast<int>(p.stride_w);
  args.pad_h = static_cast<int>(p.pad_h);
  args.pad_w = static_cast<int>(p.pad_w);
  args.dilation_h = static_cast<int>(p.dilation_h);
  args.dilation_w = static_cast<int>(p.dilation_w);
  args.h = p.h;
  args.w = p.w;
  args.out_h = p.out_h;
  args.out_w = p.out_w;
  args.geglu = call.geglu;
  args.y_hat = p.y_hat;
  args.skip = p.skip;
  args.out = p.out;
  args.y_hat_dtype = p.y_hat_dtype;
  args.skip_dtype = p.skip_dtype;
  args.out_dtype = p.out_dtype;
  args.whole = p.c_out % kVector == 0 && aligned_to_vectors(p.y_hat) && aligned_to_vectors(p.skip) &&
               aligned_to_vectors(p.out) && aligned_to_vectors(p.weight_scale);
  return args;
}

// Eight values of a row of `base` from element `at` on; those past `count` 0.
MODIFF_HD void load_row(const void* base, DType dtype, int64_t at, int count, bool whole, float (&values)[kVector]) {
  if (dtype == DType::kFloat32) {
    load_values(static_cast<const float*>(base) + at, count, whole, values);
  } else if (dtype == DType::kFloat16) {
    load_values(static_cast<const Half*>(base) + at, count, whole, values);
  } else {
    load_values(static_cast<const BFloat16*>(base) + at, count, whole, values);
  }
}

// Stores values and leaves in them what was stored, rounded.
template <int kValues, class T>
MODIFF_HD void store_values(T* p, int count, bool whole, bool streaming, float (&values)[kVector]) {
  Raw<T> raw{};
  MODIFF_UNROLL for (int i = 0; i < kValues / 2; ++i)
    set_pair(raw, i, values[2 * i], values[2 * i + 1]);
  MODIFF_UNROLL for (int i = 0; i < kValues; ++i)
    values[i] = value_of(raw, i);
  store_raw<kValues>(p, raw, count, whole, streaming);
}

template <int kValues = kVector>
MODIFF_HD void store_row(void* base, DType dtype, int64_t at, int count, bool whole, bool streaming,
                         float (&values)[kVector]) {
  if (dtype == DType::kFloat32) {
    store_values<kValues>(static_cast<float*>(base) + at, count, whole, streaming, values);
  } else if (dtype == DType::kFloat16) {
    store_values<kValues>(static_cast<Half*>(base) + at, count, whole, streaming, values);
  } else {
    store_values<kValues>(static_cast<BFloat16*>(base) + at, count, whole, streaming, values);
  }
}

// Of numbers from 0 to 2^31 - 1, which a GPU divides much faster than those of 64 bits.
MODIFF_HD int64_t quotient(int64_t a, int64_t b) { return static_cast<uint32_t>(a) / static_cast<uint32_t>(b); }

// Subtracts zero_point * weights[row, column + i] from sums[i].
MODIFF_HD void subtract_zero_point(const EpilogueArgs& args, int64_t row, int64_t column, int count, int32_t zero_point,
                                   int32_t (&sums)[kVector]) {
  const int32_t* tap_sums = args.tap_sums + column * args.taps;
  const int64_t line = quotient(row, args.out_w), sample = quotient(line, args.out_h);
  const int64_t top = (line - sample * args.out_h) * args.stride_h - args.pad_h;
  const int64_t left = (row - line * args.out_w) * args.stride_w - args.pad_w;
  MODIFF_NO_UNROLL for (int tap = 0; tap < args.taps; ++tap) {
    const int64_t y = top + tap / args.kernel_w * args.dilation_h, x = left + tap % args.kernel_w * args.dilation_w;
    if (args.padded && (y < 0 || y >= args.h || x < 0 || x >= args.w)) continue;
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
      if (i < count) sums[i] -= zero_point * tap_sums[i * args.taps + tap];
    }
  }
}

// Eight channels from `column` on of row `row`: sums[i] is the sum over the codes. Nothing is done outside [M, N].
MODIFF_HD void finish_vector(const EpilogueArgs& args, int64_t row, int64_t column, const int32_t (&sums)[kVector]) {
  if (row >= args.rows || column >= args.columns) return;
  const int count = static_cast<int>(least<int64_t>(kVector, args.columns - column));
  const bool whole = args.whole;  // then count is kVector
  const int64_t at = row * args.columns + column, granule = quotient(row, args.rows_per_scale);
  const float scale = args.scale[granule];
  const int32_t zero_point = args.zero_point == nullptr ? 0 : args.zero_point[granule];
  int32_t sum[kVector];
  MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
    sum[i] = sums[i];
  if (zero_point != 0) subtract_zero_point(args, row, column, count, zero_point, sum);
  float value[kVector], weight_scale[kVector];
  load_values(args.weight_scale + column, count, whole, weight_scale);
  MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
    value[i] = mul_rn(static_cast<float>(sum[i]), mul_rn(scale, weight_scale[i]));
  }
  float other[kVector];
  if (args.y_hat != nullptr) {
    load_row(args.y_hat, args.y_hat_dtype, at, count, whole, other);
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
      value[i] = add_rn(other[i], value[i]);
  } else {
    load_parameters(args.bias, column, count, 0.0f, other);
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
      value[i] = add_rn(value[i], other[i]);
  }
  if (args.geglu) {
    MODIFF_UNROLL for (int i = 0; i < kVector / 2; ++i)
      value[i] = mul_rn(value[2 * i], gelu(value[2 * i + 1]));
    return store_row<kVector / 2>(args.out, args.out_dtype, at / 2, count / 2, whole, false, value);
  }
  if (args.y_hat != nullptr) {
    // The state is read again a step later; the L2 cache is for what the next op reads, which is y_hat without an out.
    store_row(args.y_hat, args.y_hat_dtype, at, count, whole, args.out != nullptr, value);
  }
  if (args.out == nullptr) return;
  if (args.skip != nullptr) {
    load_row(args.skip, args.skip_dtype, at, count, whole, other);
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
      value[i] = add_rn(value[i], other[i]);
  }
  store_row(args.out, args.out_dtype, at, count, whole, false, value);
}

}  // namespace modiff::cuda
