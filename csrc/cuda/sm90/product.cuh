// Launches kernels of product_body.h.
#pragma once
#include "cuda/sm90/product_launch.h"

#include "cuda/common/stream_launch.cuh"
#include "cuda/sm90/hopper_cta.cuh"

namespace modiff::cuda::sm90 {

template <class Body>
cudaError_t launch(const ProductArgs<CUtensorMap>& args, cudaLaunchConfig_t config, int device) {
  constexpr int kBytes = static_cast<int>(sizeof(typename Body::Shared));
  const cudaError_t allowed = allow_shared<Body>(product_kernel<Body>, kBytes, device);
  if (allowed != cudaSuccess) return allowed;
  config.blockDim = Body::kThreads;
  config.dynamicSmemBytes = kBytes;
  return cudaLaunchKernelEx(&config, product_kernel<Body>, args);
}

}  // namespace modiff::cuda::sm90
