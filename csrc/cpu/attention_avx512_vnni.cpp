#include "cpu/attention_kernels.h"

namespace modiff::cpu {

void attention_avx512_vnni(const AttentionProblem& problem) { attend(problem); }

}  // namespace modiff::cpu
