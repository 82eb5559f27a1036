// The quantising ops on a GPU, as plain functions: what the binding calls, without a torch or device header.
#pragma once
#include "common/problem.h"
#include "cuda/common/quantize_tiling.h"
#include "cuda/stream.h"

namespace modiff::cuda {

struct QuantizeCall {
  QuantizeProblem problem;       // gamma, beta and shift stay null in it:
  Parameter gamma, beta, shift;  // here they keep the model's dtype, as a conversion would be a launch of its own
  const void* further;           // channels from `own` on, then input is [samples, rows, own]; or null
  int64_t own;                   // a multiple of kVector, or all channels
  int64_t shift_stride;          // elements between the rows of shift [samples, channels]; 0: one row for all
  void* scratch;                 // scratch_of(problem, tiling_of(problem)).bytes, aligned to 16
};

// Launches on the current device. Returns 0, or the cudaError_t of the launch.
int quantize_identity(const QuantizeCall& call, Stream stream);
int quantize_group_norm(const QuantizeCall& call, Stream stream);
int quantize_layer_norm(const QuantizeCall& call, Stream stream);
int quantize_geglu(const QuantizeCall& call, Stream stream);

}  // namespace modiff::cuda
