// The op quantize on the CPU, with its prologues (group norm + SiLU, layer norm, GEGLU) and both forms, residual and plain.
#pragma once
#include "common/problem.h"

namespace modiff::cpu {

// Returns false when an activation was NaN or infinite. With dynamic scales x_hat is then unchanged in the granule that
// holds it; other samples or rows may have been updated, because each goes through all phases while it is in the cache.
using QuantizeFn = bool (*)(const QuantizeProblem&);

bool quantize_plain(const QuantizeProblem&);
#if defined(__x86_64__)
bool quantize_avx2(const QuantizeProblem&);
bool quantize_avx512(const QuantizeProblem&);
#endif

}  // namespace modiff::cpu
