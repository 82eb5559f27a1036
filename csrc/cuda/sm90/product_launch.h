// The launches of the kernels of product_body.h by the index of the tiling's tile, for the host alone; they stand in
// product_8bit.cu and product_packed.cu. config: without what depends on the kernel.
#pragma once
#include "cuda/sm90/product_body.h"
#include "cuda/sm90/tensor_map.cuh"

namespace modiff::cuda::sm90 {

cudaError_t launch_8bit(int tile, const ProductArgs<CUtensorMap>& args, cudaLaunchConfig_t config, int device);
cudaError_t launch_packed(int tile, int weight_bits, const ProductArgs<CUtensorMap>& args, cudaLaunchConfig_t config,
                          int device);

}  // namespace modiff::cuda::sm90
