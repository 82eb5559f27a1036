// The launchers of sm_90, as above, with the smallest tile of each width of the weight.
#include "cuda/sm90/product.cu"
#include "cuda/sm90/product.cuh"

namespace modiff::cuda::sm90 {

cudaError_t launch_8bit(int tile, const ProductArgs<CUtensorMap>& args, cudaLaunchConfig_t config, int device) {
  if (tile != 3) return cudaErrorInvalidValue;
  return launch<Product<8, 1, 64>>(args, config, device);
}
cudaError_t launch_packed(int tile, int bits, const ProductArgs<CUtensorMap>& args, cudaLaunchConfig_t on, int device) {
  if (tile != 3) return cudaErrorInvalidValue;
  return bits == 4 ? launch<Product<4, 1, 64>>(args, on, device) : launch<Product<3, 1, 64>>(args, on, device);
}

}  // namespace modiff::cuda::sm90
