// Attention over tokens on AVX-512, without and with VNNI, and AMX.
#pragma once
#include "common/problem.h"

namespace modiff::cpu {

#if defined(__x86_64__)
void attention_avx512(const AttentionProblem&);
void attention_avx512_vnni(const AttentionProblem&);
void attention_avx512_amx(const AttentionProblem&);
#endif

}  // namespace modiff::cpu
