// The kernels of the prologue layer norm for every dtype; a file of its own, so that files compile side by side.
#include "cuda/common/quantize_launch.h"
#include "cuda/common/stream_launch.cuh"

namespace modiff::cuda {

int quantize_layer_norm(const QuantizeCall& call, Stream stream) {
  StreamLaunch launch{static_cast<cudaStream_t>(stream)};
  quantize_with<Prologue::kLayerNorm>(call, launch);
  return launch.error;
}

}  // namespace modiff::cuda
