#include "cuda/sm90/product.cuh"

namespace modiff::cuda::sm90 {

cudaError_t launch_8bit(int tile, const ProductArgs<CUtensorMap>& args, cudaLaunchConfig_t config, int device) {
  switch (tile) {
    case 0:
      return launch<Product<8, 2, 160>>(args, config, device);
    case 1:
      return launch<Product<8, 1, 256>>(args, config, device);
    case 2:
      return launch<Product<8, 1, 128>>(args, config, device);
    default:
      return launch<Product<8, 1, 64>>(args, config, device);
  }
}

}  // namespace modiff::cuda::sm90
