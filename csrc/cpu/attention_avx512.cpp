#include "cpu/attention_kernels.h"

namespace modiff::cpu {

void attention_avx512(const AttentionProblem& problem) { attend(problem); }

}  // namespace modiff::cpu
