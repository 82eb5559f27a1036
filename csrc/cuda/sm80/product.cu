#include "cuda/sm80/product_launch.h"
#include "cuda/sm80/stream_launch.cuh"

namespace modiff::cuda {

int64_t product_sm80_scratch(const ProductCall& call, const Device& device) {
  return sm80::plan_of(call, device.multiprocessors).bytes;
}

int product_sm80(const ProductCall& call, const Device& device, Stream stream) {
  sm80::TensorLaunch launch{{static_cast<cudaStream_t>(stream)}};
  sm80::multiply(call, sm80::plan_of(call, device.multiprocessors), launch);
  return launch.error;
}

}  // namespace modiff::cuda
