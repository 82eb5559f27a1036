#include "cpu/quantize_kernels.h"

namespace modiff::cpu {

bool quantize_plain(const QuantizeProblem& problem) { return Quantizer(problem).run(); }

}  // namespace modiff::cpu
