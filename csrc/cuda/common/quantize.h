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
  bool delayed;                  // given_scale is the absmax of an earlier call, of which the scales are made
  void* scratch;                 // scratch_of(problem, tiling_of(problem)).bytes, aligned to 16
};

// What a call is told besides tensors, as numbers: prologue, samples, rows, channels, num_groups, silu, affine,
// act_bits, granularity, packed, delayed, eps, clip_ratio.
constexpr int kQuantizeForm = 13;

inline void set_form(QuantizeCall& call, const double* form) {
  QuantizeProblem& p = call.problem;
  p.prologue = static_cast<Prologue>(form[0]);
  p.samples = static_cast<int64_t>(form[1]);
  p.rows = static_cast<int64_t>(form[2]);
  p.channels = static_cast<int64_t>(form[3]);
  p.num_groups = static_cast<int64_t>(form[4]);
  p.silu = form[5] != 0;
  p.affine = form[6] != 0;
  p.act_bits = static_cast<int>(form[7]);
  p.granularity = static_cast<Granularity>(form[8]);
  p.packed = form[9] != 0;
  call.delayed = form[10] != 0;
  p.eps = static_cast<float>(form[11]);
  p.clip_ratio = static_cast<float>(form[12]);
}

// Launches on the current device. Returns 0, or the cudaError_t of the launch.
int quantize_identity(const QuantizeCall& call, Stream stream);
int quantize_group_norm(const QuantizeCall& call, Stream stream);
int quantize_layer_norm(const QuantizeCall& call, Stream stream);
int quantize_geglu(const QuantizeCall& call, Stream stream);

}  // namespace modiff::cuda
