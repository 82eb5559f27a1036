#include "cuda/common/weight_sums.h"

#include "cuda/common/stream_launch.cuh"

namespace modiff::cuda {

int weight_tap_sums(const ProductCall& call, int32_t* tap_sums, Stream stream) {
  StreamLaunch launch{static_cast<cudaStream_t>(stream)};
  sum_weights(call, tap_sums, launch);
  return launch.error;
}

}  // namespace modiff::cuda
