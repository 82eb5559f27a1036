#include "cuda/sm90/product.cuh"

namespace modiff::cuda::sm90 {

cudaError_t launch_packed(int tile, int weight_bits, const ProductArgs<CUtensorMap>& args, const Device& device,
                          cudaStream_t stream) {
  if (weight_bits == 4) {
    return tile == 0 ? launch<Product<4, 2, 160>>(args, device, stream)
                     : launch<Product<4, 1, 64>>(args, device, stream);
  }
  return tile == 0 ? launch<Product<3, 2, 160>>(args, device, stream) : launch<Product<3, 1, 64>>(args, device, stream);
}

}  // namespace modiff::cuda::sm90
