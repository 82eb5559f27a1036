// Launches kernels of product_body.h.
#pragma once
#include "cuda/sm90/product_body.h"

#include "cuda/sm90/hopper_cta.cuh"
#include "cuda/sm90/tensor_map.cuh"

namespace modiff::cuda::sm90 {

template <class Body>
cudaError_t launch(const ProductArgs<CUtensorMap>& args, const Device& device, cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(typename Body::Shared));
  const cudaError_t allowed =
      cudaFuncSetAttribute(product_kernel<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const int blocks = least(work_count(args.schedule), device.multiprocessors);
  product_kernel<Body><<<static_cast<unsigned>(blocks), Body::kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

// By the index of the tiling's tile.
cudaError_t launch_8bit(int tile, const ProductArgs<CUtensorMap>& args, const Device& device, cudaStream_t stream);
cudaError_t launch_packed(int tile, int weight_bits, const ProductArgs<CUtensorMap>& args, const Device& device,
                          cudaStream_t stream);

}  // namespace modiff::cuda::sm90
