// Launches kernels of product_body.h.
#pragma once
#include "cuda/sm90/product_launch.h"

#include "cuda/common/stream_launch.cuh"
#include "cuda/sm90/hopper_cta.cuh"

namespace modiff::cuda::sm90 {

template <class Body>
cudaError_t launch(const ProductArgs<CUtensorMap>& args, const Device& device, cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(typename Body::Shared));
  const cudaError_t allowed = allow_shared<Body>(product_kernel<Body>, kBytes, device.index);
  if (allowed != cudaSuccess) return allowed;
  const int blocks = least(work_count(args.schedule), device.multiprocessors);
  product_kernel<Body><<<static_cast<unsigned>(blocks), Body::kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace modiff::cuda::sm90
