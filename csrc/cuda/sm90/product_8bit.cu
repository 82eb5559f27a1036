#include "cuda/sm90/product.cuh"

namespace modiff::cuda::sm90 {

cudaError_t launch_8bit(int tile, const ProductArgs<CUtensorMap>& args, const Device& device, cudaStream_t stream) {
  switch (tile) {
    case 0:
      return launch<Product<8, 2, 160>>(args, device, stream);
    case 1:
      return launch<Product<8, 1, 256>>(args, device, stream);
    case 2:
      return launch<Product<8, 1, 128>>(args, device, stream);
    default:
      return launch<Product<8, 1, 64>>(args, device, stream);
  }
}

}  // namespace modiff::cuda::sm90
