// Launches kernel bodies (common/cta.h) on a stream.
#pragma once
#include <climits>

#include <cuda_runtime_api.h>

#include "common/cta.h"

namespace modiff::cuda {

struct StreamLaunch {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;  // the first one; nothing is launched after it

  template <class Body>
  void run(int64_t blocks, const typename Body::Args& args) {
    if (error != cudaSuccess) return;
    if (blocks > INT_MAX) {
      error = cudaErrorInvalidConfiguration;
      return;
    }
    kernel<Body><<<static_cast<unsigned>(blocks), Body::kThreads, 0, stream>>>(args);
    error = cudaGetLastError();
  }

  void clear(void* words, int64_t count) {
    if (error == cudaSuccess) error = cudaMemsetAsync(words, 0, static_cast<size_t>(count) * 4, stream);
  }
};

}  // namespace modiff::cuda
