// The launchers and kernels of sm_80 that tests/backends/cuda/test_ptx.py executes: all products, and of each prologue
// those of one input and two states (none and one), as all of them take a minute to compile.
#include "cuda/common/quantize_launch.h"
#include "cuda/sm80/product.cu"
#include "cuda/sm80/product_bytes.cu"
#include "cuda/sm80/product_nibbles.cu"
#include "cuda/sm80/product_unpacked.cu"

namespace modiff::cuda {

#define QUANTIZE(name, prologue, In, State)                                                           \
  int quantize_##name(const QuantizeCall& call, Stream stream) {                                      \
    StreamLaunch launch{static_cast<cudaStream_t>(stream)};                                           \
    if (call.problem.x_hat == nullptr) quantize_typed<Prologue::prologue, In, NoState>(call, launch); \
    if (call.problem.x_hat != nullptr) quantize_typed<Prologue::prologue, In, State>(call, launch);   \
    return launch.error;                                                                              \
  }
QUANTIZE(identity, kIdentity, Half, BFloat16)
QUANTIZE(group_norm, kGroupNorm, Half, Half)
QUANTIZE(layer_norm, kLayerNorm, BFloat16, float)
QUANTIZE(geglu, kGeglu, float, Half)

}  // namespace modiff::cuda
