// Attention over tokens in float32 on AVX-512.
#pragma once
#include "common/problem.h"

namespace modiff::cpu {

// A task holds the scores of kAttentionRows queries and the keys and values of one head: these many keys fit into an L2
// cache.
constexpr int64_t kAttentionRows = 48;
constexpr int64_t kAttentionKeys = 2048;

#if defined(__x86_64__)
void attention_avx512(const AttentionProblem&);
#endif

}  // namespace modiff::cpu
