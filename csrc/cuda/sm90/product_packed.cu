#include "cuda/sm90/product.cuh"

namespace modiff::cuda::sm90 {

cudaError_t launch_packed(int tile, int weight_bits, const ProductArgs<CUtensorMap>& args, cudaLaunchConfig_t config,
                          int device) {
  if (weight_bits == 4) {
    return tile == 0 ? launch<Product<4, 2, 160>>(args, config, device)
                     : launch<Product<4, 1, 64>>(args, config, device);
  }
  return tile == 0 ? launch<Product<3, 2, 160>>(args, config, device) : launch<Product<3, 1, 64>>(args, config, device);
}

}  // namespace modiff::cuda::sm90
