#include "cuda/sm80/product_launch.h"
#include "cuda/sm80/stream_launch.cuh"

namespace modiff::cuda::sm80 {

template void launch_tile<Operands::kBytes>(int, int64_t, const ProductArgs&, TensorLaunch&);

}  // namespace modiff::cuda::sm80
