// Launches the products on a stream: with shared memory above the 48 KiB that a kernel may have unasked.
#pragma once
#include "cuda/common/stream_launch.cuh"
#include "cuda/sm80/tensor_cta.h"

namespace modiff::cuda::sm80 {

template <class Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kResident)
    tensor_kernel(const __grid_constant__ typename Body::Args args) {
#if __CUDA_ARCH__ >= 900
  constexpr bool kThere = !Body::kS4;  // s4 would be emulated, at a fraction of the rate of bytes
#else
  constexpr bool kThere = true;
#endif
  if constexpr (kThere) {
    extern __shared__ __align__(128) unsigned char memory[];
    TensorCta cta;
    Body::run(cta, *reinterpret_cast<typename Body::Shared*>(memory), args);
  } else {
    __trap();
  }
}

// Bodies with a kResident need the tensor cores; the others are launched as everywhere.
template <class Body, class = void>
constexpr bool kOnTensorCores = false;
template <class Body>
constexpr bool kOnTensorCores<Body, std::void_t<decltype(Body::kResident)>> = true;

struct TensorLaunch : StreamLaunch {
  int device;

  template <class Body>
  void run(int64_t blocks, const typename Body::Args& args) {
    if constexpr (!kOnTensorCores<Body>) {
      StreamLaunch::run<Body>(blocks, args);
    } else {
      constexpr int kBytes = sizeof(typename Body::Shared);
      static_assert(kBytes <= 99 << 10, "what a block may have on sm_86 and sm_89");
      if (error == cudaSuccess && blocks > INT_MAX) error = cudaErrorInvalidConfiguration;
      if (error == cudaSuccess && kBytes > 48 << 10) error = allow_shared<Body>(tensor_kernel<Body>, kBytes, device);
      if (error != cudaSuccess) return;
      tensor_kernel<Body><<<static_cast<unsigned>(blocks), Body::kThreads, kBytes, stream>>>(args);
      error = cudaGetLastError();
    }
  }
};

}  // namespace modiff::cuda::sm80
