// The products of capability 8.0 and newer as csrc/cuda/product.h declares them. The kernels stand in product_*.cu, so
// that files compile side by side.
#include "cuda/sm80/product_launch.h"
#include "cuda/sm80/stream_launch.cuh"

namespace modiff::cuda {
namespace sm80 {

extern template void launch_tile<Operands::kBytes>(int, int64_t, const ProductArgs&, TensorLaunch&);
extern template void launch_tile<Operands::kUnpacked>(int, int64_t, const ProductArgs&, TensorLaunch&);
extern template void launch_tile<Operands::kNibbles>(int, int64_t, const ProductArgs&, TensorLaunch&);

}  // namespace sm80

int64_t product_sm80_scratch(const ProductCall& call, const Device& device) {
  return sm80::tiling_of(call, device.multiprocessors).bytes;
}

int product_sm80(const ProductCall& call, const Device& device, Stream stream) {
  const sm80::Tiling tiling = sm80::tiling_of(call, device.multiprocessors);
  if (tiling.operands == sm80::Operands::kNibbles && device.capability >= 90) return cudaErrorNotSupported;
  sm80::TensorLaunch launch{{static_cast<cudaStream_t>(stream)}, device.index};
  sm80::multiply(call, tiling, launch);
  return launch.error;
}

}  // namespace modiff::cuda
