// The kernels of the prologue group norm for every dtype; a file of its own, so that files compile side by side.
#include "cuda/common/quantize_launch.h"
#include "cuda/common/stream_launch.cuh"

namespace modiff::cuda {

int quantize_group_norm(const QuantizeCall& call, Stream stream) {
  StreamLaunch launch{static_cast<cudaStream_t>(stream)};
  quantize_with<Prologue::kGroupNorm>(call, launch);
  return launch.error;
}

}  // namespace modiff::cuda
