#define MODIFF_VECTOR_BYTES 32
#define MODIFF_DPBUSD _mm256_dpbusd_avx_epi32
#include "cpu/product_kernels.h"

namespace modiff::cpu {

void product_avx_vnni(const ProductProblem& problem) { Convolution(problem).run(); }

}  // namespace modiff::cpu
