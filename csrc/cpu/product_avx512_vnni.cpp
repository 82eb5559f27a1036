#define MODIFF_VECTOR_BYTES 64
#define MODIFF_DPBUSD _mm512_dpbusd_epi32
#include "cpu/product_kernels.h"

namespace modiff::cpu {

void product_avx512_vnni(const ProductProblem& problem) { Convolution(problem).run(); }

}  // namespace modiff::cpu
