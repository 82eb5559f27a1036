// The launchers and kernels of sm_80 that tests/backends/cuda/test_ptx.py executes: all products, and of each prologue
// those of one input and two states (none and one), as all of them take a minute to compile.
#include "cuda/common/quantize_launch.h"
#include "cuda/sm80/product.cu"
#include "cuda/sm80/product_bytes.cu"
#include "cuda/sm80/product_nibbles.cu"
#include "cuda/sm80/product_unpacked.cu"

namespace modiff::cuda {

template <Prologue prologue, class In, class State>
int quantize(const QuantizeCall& call, Stream stream) {
  StreamLaunch launch{static_cast<cudaStream_t>(stream)};
  if (call.problem.x_hat == nullptr) {
    quantize_typed<prologue, In, NoState>(call, launch);
  } else {
    quantize_typed<prologue, In, State>(call, launch);
  }
  return launch.error;
}

int quantize_identity(const QuantizeCall& call, Stream stream) {
  return quantize<Prologue::kIdentity, Half, BFloat16>(call, stream);
}
int quantize_group_norm(const QuantizeCall& call, Stream stream) {
  return quantize<Prologue::kGroupNorm, Half, Half>(call, stream);
}
int quantize_layer_norm(const QuantizeCall& call, Stream stream) {
  return quantize<Prologue::kLayerNorm, BFloat16, float>(call, stream);
}
int quantize_geglu(const QuantizeCall& call, Stream stream) {
  return quantize<Prologue::kGeglu, float, Half>(call, stream);
}

}  // namespace modiff::cuda
