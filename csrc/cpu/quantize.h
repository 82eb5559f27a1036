// quantize_residual, quantize_activation and their fused forms (group norm + SiLU, layer norm, GEGLU) on the CPU.
#pragma once
#include "common/problem.h"

namespace modiff::cpu {

// Returns false when an activation was NaN or infinite. In the dynamic residual form x_hat is then unchanged.
using QuantizeFn = bool (*)(const QuantizeProblem&);

bool quantize_plain(const QuantizeProblem&);
#if defined(__x86_64__)
bool quantize_avx2(const QuantizeProblem&);
bool quantize_avx512(const QuantizeProblem&);
#endif

}  // namespace modiff::cpu
