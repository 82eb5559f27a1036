// The products of capability 8.0 and newer as csrc/cuda/product.h declares them. The kernels stand in product_*.cu, so
// that files compile side by side.
#include "cuda/kept.h"
#include "cuda/sm80/product_launch.h"
#include "cuda/sm80/stream_launch.cuh"

namespace modiff::cuda {
namespace sm80 {

extern template void launch_tile<Operands::kBytes>(int, int64_t, const ProductArgs&, TensorLaunch&);
extern template void launch_tile<Operands::kUnpacked>(int, int64_t, const ProductArgs&, TensorLaunch&);
extern template void launch_tile<Operands::kNibbles>(int, int64_t, const ProductArgs&, TensorLaunch&);

}  // namespace sm80

namespace {

// tiling_of compares some sixty tilings, twice in a call.
const sm80::Tiling& tiling_for(const ProductCall& call, const Device& device) {
  const ProductProblem& p = call.problem;
  const int64_t rows = p.samples * p.out_h * p.out_w, k = p.kernel_h * p.kernel_w * p.c_in;
  const ProductTiling& told = call.tiling;
  const std::array<int64_t, 10> key = {
      rows,      p.c_out,      k,          call.weight_bits, call.code_bits, device.multiprocessors, told.architecture,
      told.rows, told.columns, told.splits};
  return kept<sm80::Tiling>(key, [&] { return sm80::tiling_of(call, device.multiprocessors); });
}

}  // namespace

int64_t product_sm80_scratch(const ProductCall& call, const Device& device) { return tiling_for(call, device).bytes; }

int product_sm80(const ProductCall& call, const Device& device, Stream stream) {
  const sm80::Tiling& tiling = tiling_for(call, device);
  if (tiling.operands == sm80::Operands::kNibbles && device.capability >= 90) return cudaErrorNotSupported;
  sm80::TensorLaunch launch{{static_cast<cudaStream_t>(stream)}, device.index};
  sm80::multiply(call, tiling, launch);
  return launch.error;
}

}  // namespace modiff::cuda
