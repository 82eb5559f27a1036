// The integer products on a GPU, as plain functions: what the binding calls, without a torch or device header.
#pragma once
#include "common/problem.h"
#include "cuda/common/vectors.h"
#include "cuda/stream.h"

namespace modiff::cuda {

// The tiling of a call, where a caller says so: tiles of `rows` x `columns` outputs and `splits` splits of K, by the
// kernels of csrc/cuda/sm90 or sm80.
struct ProductTiling {
  int architecture;  // 90, 80, or 0: the kernels choose, by the estimates of sm90/tiling.h and sm80/tile_config.h
  int rows, columns;
  int splits;
};

// v[m, n] = scale[m / rows_per_scale] * weight_scale[n] * sum_k (code[m, k] - zero_point[m / rows_per_scale]) *
// weight[n, k] for the output pixels m = (sample, p, q) of `problem`, whose granularity is not read here.
struct ProductCall {
  // weight: kpack_v1 (common/packing.h), c_out rows of kernel_h * kernel_w * c_in / groups codes; bias stays null in
  // it.
  ProductProblem problem;
  Parameter bias;          // [c_out], here it keeps the model's dtype
  int weight_bits;         // 8, 4, 3
  int code_bits = 8;       // or 4, with 4-bit weights, by sm80 below capability 9.0: codes are packed like a weight
  bool geglu = false;      // columns are pairs of a value and its gate: common/epilogue.h
  int64_t rows_per_scale;  // output pixels that share a scale and a zero point
  const int32_t* tap_sums = nullptr;  // of the weight's codes, with zero points: common/epilogue.h
  void* scratch;                      // aligned to 16
  ProductTiling tiling;
  bool weight_settled = false;  // no kernel that may still run writes the weight: it is read before those end
};

constexpr int64_t kMostPixels = int64_t{1} << 31;  // of all images of a call; kernels count them in 31 bits

// Sizes in the order in which the callers have them: samples, h, w, c_in, c_out, kernel_h, kernel_w, stride_h,
// stride_w, pad_h, pad_w, dilation_h, dilation_w, groups.
constexpr int kGeometry = 14;

inline void set_geometry(ProductProblem& p, const int64_t* values) {
  int64_t* fields[kGeometry] = {&p.samples,  &p.h,        &p.w,     &p.c_in,  &p.c_out,      &p.kernel_h,   &p.kernel_w,
                                &p.stride_h, &p.stride_w, &p.pad_h, &p.pad_w, &p.dilation_h, &p.dilation_w, &p.groups};
  for (int i = 0; i < kGeometry; ++i) *fields[i] = values[i];
  p.out_h = (p.h + 2 * p.pad_h - p.dilation_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_w = (p.w + 2 * p.pad_w - p.dilation_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
}

// What a call is told besides tensors, as numbers, of which integers below 2^53 are exact: the geometry, weight_bits,
// geglu, whether out is wanted, its dtype, the fields of a ProductTiling, and weight_settled.
constexpr int kProductForm = kGeometry + 9;

// Sets all of it but whether out is wanted, and returns that.
inline bool set_form(ProductCall& call, const double* form) {
  int64_t value[kProductForm];
  for (int i = 0; i < kProductForm; ++i) value[i] = static_cast<int64_t>(form[i]);
  set_geometry(call.problem, value);
  const int64_t* more = value + kGeometry;
  call.weight_bits = static_cast<int>(more[0]);
  call.geglu = more[1] != 0;
  call.problem.out_dtype = static_cast<DType>(more[3]);
  call.tiling = {static_cast<int>(more[4]), static_cast<int>(more[5]), static_cast<int>(more[6]),
                 static_cast<int>(more[7])};
  call.weight_settled = more[8] != 0;
  return more[2] != 0;
}

// What a call needs to know of the GPU.
struct Device {
  int index;
  int capability;  // 80, 86, 89, 90, ...
  int multiprocessors;
};

// Bytes of scratch of a call, and the call. They launch on the current device and return 0, or the cudaError_t of the
// launch. csrc/cuda/sm80 runs on every capability from 80 on, csrc/cuda/sm90 on 90 alone, and there for calls without
// a limit: product_sm90_limit says why it cannot run one, or gives null.
int64_t product_sm80_scratch(const ProductCall& call, const Device& device);
int product_sm80(const ProductCall& call, const Device& device, Stream stream);
const char* product_sm90_limit(const ProductCall& call);
int64_t product_sm90_scratch(const ProductCall& call, const Device& device);
int product_sm90(const ProductCall& call, const Device& device, Stream stream);

}  // namespace modiff::cuda
