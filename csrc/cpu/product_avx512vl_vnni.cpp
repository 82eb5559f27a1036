// AVX-VNNI in the encoding of AVX-512: its loop on machines that have only this one, for the tests.
#define MODIFF_VECTOR_BYTES 32
#define MODIFF_DPBUSD _mm256_dpbusd_epi32
#include "cpu/product_kernels.h"

namespace modiff::cpu {

void product_avx512vl_vnni(const ProductProblem& problem) { Convolution(problem).run(); }

}  // namespace modiff::cpu
