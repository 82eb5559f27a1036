// Plain structs that describe one kernel call: pointers, extents, modes. No torch types, usable from any compiler.
#pragma once
#include <cstdint>

namespace modiff {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline int64_t element_size(DType t) { return t == DType::kFloat32 ? 4 : 2; }

// How many values one residual scale covers. The index of the scale of row l of sample n is 0, n or n * rows + l.
// kPerBlock: one scale per sample times a small integer per (sample, block of rows, channel); see quantize_kernels.h.
enum class Granularity : int32_t { kPerTensor = 0, kPerSample = 1, kPerToken = 2, kPerBlock = 3 };

inline int64_t scale_index(Granularity g, int64_t n, int64_t l, int64_t rows) {
  return g == Granularity::kPerTensor ? 0 : g == Granularity::kPerToken ? n * rows + l : n;
}

// What produces the activation x that is quantised.
enum class Prologue : int32_t { kIdentity = 0, kGroupNorm = 1, kLayerNorm = 2, kGeglu = 3 };

// One fused quantisation: rows of `channels` values, `rows` rows per sample, `samples` samples, all contiguous (an NHWC
// image is rows = h * w). kGeglu reads rows of 2 * channels values.
struct QuantizeProblem {
  Prologue prologue;
  int64_t samples, rows, channels;
  const void* input;  // [samples, rows, channels] (kGeglu: 2 * channels)
  DType input_dtype;
  // Group and layer norm.
  const float* gamma;   // [channels] or null (ones)
  const float* beta;    // [channels] or null (zeros)
  int64_t norm_stride;  // between the rows of gamma and beta [samples, channels] of a group norm; 0: one row for all
  const float* shift;   // [samples, channels], added before group norm, or null
  int64_t num_groups;
  float eps;
  bool silu;
  // Residual form: x_hat is read and updated. Plain form: x_hat is null.
  void* x_hat;  // [samples, rows, channels]
  DType x_hat_dtype;
  bool affine;  // plain form only: asymmetric codes with a zero point
  int act_bits;
  Granularity granularity;
  float clip_ratio;
  const float* given_scale;  // null: dynamic
  int64_t given_scale_count;
  // Results.
  int8_t* codes;  // [samples, rows, channels], or `packed`: every row in kpack_v1 (common/packing.h), GPU only
  bool packed;
  float* scale;         // one per granule
  float* absmax;        // one per granule: of the residual (residual form), of the activation (plain symmetric)
  int32_t* zero_point;  // one per granule, plain form only
};

// The product of codes and a weight. With y_hat: y_hat += v, out = y_hat (+ skip), if out is given; without: out = v +
// bias (+ skip).
//
// v[m, n] = scale[m] * weight_scale[n] * sum_k (code[m, k] - zero_point[m]) * weight_q[n, k], NHWC implicit GEMM with
// m = (sample, p, q), k = (r, s, c). A Linear is the case h = rows, w = 1, kernel 1x1.
struct ProductProblem {
  int64_t samples, h, w, c_in, c_out, kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int64_t out_h, out_w;
  const int8_t* codes;  // [samples, h, w, c_in]
  const float* scale;
  Granularity granularity;    // of scale and zero_point, over output rows (kPerToken: 1x1, stride 1 only)
  const int32_t* zero_point;  // null: zero
  const int8_t* weight;       // layout vnni_v1
  int weight_bits;            // of its codes
  const float* weight_scale;  // [c_out]
  const float* bias;          // [c_out] or null; without y_hat only
  void* y_hat;                // [samples, out_h, out_w, c_out], or null
  DType y_hat_dtype;
  const void* skip;  // like out, or null
  DType skip_dtype;
  void* out;  // or null
  DType out_dtype;
};

// out = softmax(scale * q k^T) v for every sample and head, float32. A row of a tensor holds the values of all heads.
struct AttentionProblem {
  int64_t samples, heads, queries, keys, width;  // width: of one head
  float scale;
  const float *q, *k, *v;                // [samples, queries or keys, heads * width]
  int64_t q_sample, k_sample, v_sample;  // strides in values
  int64_t q_row, k_row, v_row;
  float* out;  // [samples, queries, heads * width], contiguous
};

}  // namespace modiff
