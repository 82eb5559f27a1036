// Launches kernel bodies (common/cta.h) on a stream.
#pragma once
#include <atomic>
#include <climits>

#include <cuda_runtime_api.h>

#include "common/cta.h"

namespace modiff::cuda {

// Lets a kernel have more than 48 KiB of dynamic shared memory: said once for each device (up to 63, as the binding
// knows them); threads that say it at the same time say the same.
template <class Body, class Kernel>
cudaError_t allow_shared(Kernel* kernel, int bytes, int device) {
  static std::atomic<uint64_t> said{0};
  const uint64_t bit = uint64_t{1} << device;
  if (said & bit) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) said |= bit;
  return error;
}

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
