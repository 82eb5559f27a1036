// An int8 convolution of CUTLASS 2: implicit GEMM by mma.sync, which newer GPUs run too.
//
//   out[n, p, q, k] = scale * column_scale[k] * sum_(r, s, c) codes[n, p + r, q + s, c] * weight[k, r, s, c]
//
// codes NHWC and weight KRSC int8, channels multiples of 16, one scale for the whole tensor; int32 sums, float16 out.
// benchmarks/baselines/cutlass_int8 compiles this file once per tile; the macros TILE_M, _N and _K, WARP_M and
// _N and STAGES come from there.
#include <cstdint>

#include <cutlass/conv/kernel/default_conv2d_fprop_with_broadcast.h>
#include <cutlass/epilogue/thread/linear_combination_bias_elementwise.h>

// After the kernel's headers, which declare what it uses.
#include <cutlass/conv/device/implicit_gemm_convolution.h>

namespace {

using NHWC = cutlass::layout::TensorNHWC;
using Half = cutlass::half_t;
using Scaled = cutlass::epilogue::thread::LinearCombinationBiasElementwise<Half, int32_t, float, Half, Half, 8,
                                                                           cutlass::epilogue::thread::Identity<float>,
                                                                           cutlass::multiplies<float>, false, float>;
using Kernel = typename cutlass::conv::kernel::DefaultConv2dFpropWithBroadcast<
    int8_t, NHWC, int8_t, NHWC, Half, NHWC, int32_t, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<TILE_M, TILE_N, TILE_K>, cutlass::gemm::GemmShape<WARP_M, WARP_N, TILE_K>,
    cutlass::gemm::GemmShape<16, 8, 32>, Scaled, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>, STAGES,
    cutlass::arch::OpMultiplyAddSaturate, cutlass::conv::IteratorAlgorithm::kOptimized,
    cutlass::conv::StrideSupport::kStrided>::Kernel;
using Device = cutlass::conv::device::ImplicitGemmConvolution<Kernel>;

// sizes: n, h, w, c, k, kernel (square), stride, padding.
Device::Arguments arguments(const void* codes, const void* weight, const float* scale, const float* column_scale,
                            void* out, const int64_t* sizes) {
  const int n = static_cast<int>(sizes[0]), h = static_cast<int>(sizes[1]), w = static_cast<int>(sizes[2]);
  const int c = static_cast<int>(sizes[3]), k = static_cast<int>(sizes[4]), kernel = static_cast<int>(sizes[5]);
  const int stride = static_cast<int>(sizes[6]), padding = static_cast<int>(sizes[7]);
  const int p = (h + 2 * padding - kernel) / stride + 1, q = (w + 2 * padding - kernel) / stride + 1;
  const cutlass::conv::Conv2dProblemSize problem({n, h, w, c}, {k, kernel, kernel, c},
                                                 {padding, padding, padding, padding}, {stride, stride}, {1, 1},
                                                 {n, p, q, k}, cutlass::conv::Mode::kCrossCorrelation, 1);
  // CUTLASS wants pointers without const; it reads codes, weight and scales only.
  auto* x = static_cast<int8_t*>(const_cast<void*>(codes));
  auto* y = static_cast<int8_t*>(const_cast<void*>(weight));
  auto* d = static_cast<Half*>(out);
  return {problem,
          {x, NHWC::packed({n, h, w, c})},
          {y, NHWC::packed({k, kernel, kernel, c})},
          {d, NHWC::packed({n, p, q, k})},
          {d, NHWC::packed({n, p, q, k})},
          typename Scaled::Params(scale),
          cutlass::conv::SplitKMode::kSerial,
          const_cast<float*>(column_scale),
          nullptr,
          0,
          k};
}

}  // namespace

#include "entry.h"
