// An int8 GEMM of CUTLASS for sm_90a with the epilogue that a user of it would write:
//
//   out[m, n] = row_scale[m] * column_scale[n] * sum_k codes[m, k] * weight[n, k]      int32 sums, float16 out
//
// codes [m, k] and weight [n, k] int8, k a multiple of 16, n of 8. benchmarks/baselines/cutlass_int8 compiles this file once per
// tile; the macros TILE_M, _N and _K, CLUSTER_M, SCHEDULE (Cooperative, Pingpong) and SCHEDULER come from there.
#include <cstdint>

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>
#include <cutlass/util/packed_stride.hpp>

#define JOINED_(a, b) a##b
#define JOINED(a, b) JOINED_(a, b)

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

using Tile = Shape<Int<TILE_M>, Int<TILE_N>, Int<TILE_K>>;
using Cluster = Shape<Int<CLUSTER_M>, _1, _1>;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using Arch = cutlass::arch::Sm90;
using TensorCores = cutlass::arch::OpClassTensorOp;

template <template <class> class Function, class Out, class... Children>
using Compute =
    fusion::Sm90EVT<fusion::Sm90Compute<Function, Out, float, cutlass::FloatRoundStyle::round_to_nearest>, Children...>;
// CUTLASS names them after the vector: a row of values, one per column of the result.
using ColumnScale = fusion::Sm90RowBroadcast<0, Tile, float>;
using RowScale = fusion::Sm90ColBroadcast<0, Tile, float>;
using Scaled = Compute<cutlass::multiplies, cutlass::half_t, RowScale,
                       Compute<cutlass::multiplies, float, ColumnScale, fusion::Sm90AccFetch>>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    Arch, TensorCores, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, RowMajor,
    8, cutlass::half_t, RowMajor, 8,
    cute::conditional_t<cute::is_same_v<cutlass::gemm::JOINED(KernelTmaWarpSpecialized, SCHEDULE),
                                        cutlass::gemm::KernelTmaWarpSpecializedCooperative>,
                        cutlass::epilogue::TmaWarpSpecializedCooperative, cutlass::epilogue::TmaWarpSpecialized>,
    Scaled>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    Arch, TensorCores, int8_t, RowMajor, 16, int8_t, ColumnMajor, 16, int32_t, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::JOINED(KernelTmaWarpSpecialized, SCHEDULE)>::CollectiveOp;
using Device = cutlass::gemm::device::GemmUniversalAdapter<
    cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue, cutlass::gemm::SCHEDULER>>;

// sizes: m, n, k.
Device::Arguments arguments(const void* codes, const void* weight, const float* row_scale, const float* column_scale,
                            void* out, const int64_t* sizes) {
  const int m = static_cast<int>(sizes[0]), n = static_cast<int>(sizes[1]), k = static_cast<int>(sizes[2]);
  static const int multiprocessors = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(0);
  Device::Arguments args{};
  args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  args.problem_shape = {m, n, k, 1};
  args.mainloop = {
      static_cast<const int8_t*>(codes), cutlass::make_cute_packed_stride(Device::GemmKernel::StrideA{}, {m, k, 1}),
      static_cast<const int8_t*>(weight), cutlass::make_cute_packed_stride(Device::GemmKernel::StrideB{}, {n, k, 1})};
  args.epilogue.thread = {{row_scale, 0.0f, {}}, {{column_scale, 0.0f, {}}, {}, {}}, {}};
  args.epilogue.ptr_C = nullptr;
  args.epilogue.ptr_D = static_cast<cutlass::half_t*>(out);
  args.epilogue.dD = cutlass::make_cute_packed_stride(Device::GemmKernel::StrideD{}, {m, n, 1});
  args.hw_info.device_id = 0;
  args.hw_info.sm_count = multiprocessors;
  return args;
}

}  // namespace

#include "entry.h"
