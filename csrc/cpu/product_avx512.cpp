#define MODIFF_VECTOR_BYTES 64
#include "cpu/product_kernels.h"

namespace modiff::cpu {

void product_avx512(const ProductProblem& problem) { Convolution(problem).run(); }

}  // namespace modiff::cpu
