#define MODIFF_TILES
#include "cpu/attention_kernels.h"

namespace modiff::cpu {

void attention_avx512_amx(const AttentionProblem& problem) {
  constexpr int64_t kLeastKeys = 512;  // with fewer, copying keys to tiles takes longer than they save
  problem.keys < kLeastKeys ? attention_avx512_vnni(problem) : attend(problem);
}

}  // namespace modiff::cpu
