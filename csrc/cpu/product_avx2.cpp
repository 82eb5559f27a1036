#define MODIFF_VECTOR_BYTES 32
#include "cpu/product_kernels.h"

namespace modiff::cpu {

void product_avx2(const ProductProblem& problem) { Convolution(problem).run(); }

}  // namespace modiff::cpu
