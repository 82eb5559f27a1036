// An int8 convolution of CUTLASS 3 for sm_90a: implicit GEMM by wgmma and TMA's im2col, in the one schedule that
// CUTLASS 4.2 has for it (not persistent, one consumer warpgroup).
//
//   out[n, p, q, k] = scale * column_scale[k] * sum_(r, s, c) codes[n, p + r, q + s, c] * weight[k, r, s, c]
//
// codes NHWC and weight KRSC int8, channels multiples of 16, one scale for the whole tensor; int32 sums, float16 out.
// benchmarks/baselines/cutlass_int8 compiles this file once per tile; the macros TILE_M, _N and _K and CLUSTER_M come from there.
#include <cstdint>

#include <cute/tensor.hpp>
#include <cutlass/kernel_hardware_info.h>

// After what they need.
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/convnd_problem_shape.hpp>
#include <cutlass/conv/device/conv_universal_adapter.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

using Tile = Shape<Int<TILE_M>, Int<TILE_N>, Shape<Int<TILE_K>>>;
using Cluster = Shape<Int<CLUSTER_M>, _1, _1>;
using NHWC = cutlass::layout::TensorNHWC;
using Arch = cutlass::arch::Sm90;
using TensorCores = cutlass::arch::OpClassTensorOp;
constexpr cutlass::conv::Operator kForward = cutlass::conv::Operator::kFprop;

template <template <class> class Function, class Out, class... Children>
using Compute =
    fusion::Sm90EVT<fusion::Sm90Compute<Function, Out, float, cutlass::FloatRoundStyle::round_to_nearest>, Children...>;
using ColumnScale = fusion::Sm90RowBroadcast<0, Tile, float>;
using Scale = fusion::Sm90ScalarBroadcast<float>;
using Scaled = Compute<cutlass::multiplies, cutlass::half_t, Scale,
                       Compute<cutlass::multiplies, float, ColumnScale, fusion::Sm90AccFetch>>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    Arch, TensorCores, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, NHWC, 8,
    cutlass::half_t, NHWC, 8, cutlass::epilogue::TmaWarpSpecialized, Scaled>::CollectiveOp;
using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
    Arch, TensorCores, kForward, int8_t, NHWC, 16, int8_t, NHWC, 16, int32_t, Tile, Cluster,
    cutlass::conv::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
using Problem = cutlass::conv::ConvProblemShape<kForward, Mainloop::DispatchPolicy::NumSpatialDimensions>;
using Device =
    cutlass::conv::device::ConvUniversalAdapter<cutlass::conv::kernel::ConvUniversal<Problem, Mainloop, Epilogue>>;

// sizes: n, h, w, c, k, kernel (square), stride, padding.
Device::Arguments arguments(const void* codes, const void* weight, const float* scale, const float* column_scale,
                            void* out, const int64_t* sizes) {
  const int n = static_cast<int>(sizes[0]), h = static_cast<int>(sizes[1]), w = static_cast<int>(sizes[2]);
  const int c = static_cast<int>(sizes[3]), k = static_cast<int>(sizes[4]), kernel = static_cast<int>(sizes[5]);
  const int stride = static_cast<int>(sizes[6]), padding = static_cast<int>(sizes[7]);
  const Problem problem(cutlass::conv::Mode::kCrossCorrelation, {n, h, w, c}, {k, kernel, kernel, c},
                        {padding, padding}, {padding, padding}, {stride, stride}, {1, 1}, 1);
  using StrideD = typename Device::ConvKernel::StrideD;
  StrideD stride_d{};
  for_each(make_seq<rank<0>(StrideD{})>{},
           [&](auto i) { get<0, i>(stride_d) = problem.stride_C[Problem::RankT - 2 - i]; });
  Device::Arguments args{};
  args.problem_shape = problem;
  args.mainloop = {static_cast<const int8_t*>(codes), static_cast<const int8_t*>(weight)};
  args.epilogue.thread = {{{0.0f}, {scale}, {}}, {{column_scale, 0.0f, {}}, {}, {}}, {}};
  args.epilogue.ptr_C = nullptr;
  args.epilogue.ptr_D = static_cast<cutlass::half_t*>(out);
  args.epilogue.dD = stride_d;
  return args;
}

}  // namespace

#include "entry.h"
