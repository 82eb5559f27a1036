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
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {in_clusters(args.schedule) ? 2u : 1u, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(block_count(args.schedule, device.multiprocessors));
  config.blockDim = Body::kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, product_kernel<Body>, args);
}

}  // namespace modiff::cuda::sm90
