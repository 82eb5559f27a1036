// The kernels of one call in their order, for any way to launch them: `launch.run<Body>(blocks, args)` and
// `launch.clear(words, count)`. A stream does that on a GPU (stream_launch.cuh), loops do it in tests.
//
//   identity, GEGLU   [clear], [RangePass], TilePass            or RowPass
//   layer norm        RowStatistics, RangePass, TilePass        or [clear], RowPass
//   group norm        TileStatistics, Coefficients, [RangePass], TilePass or RowPass
//
// RangePass: dynamic scales, not per_token. Nothing waits for the device; results are the same in every run.
#pragma once
#include "cuda/common/norm_statistics.h"
#include "cuda/common/quantize.h"

namespace modiff::cuda {

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

inline QuantizeArgs quantize_args(const QuantizeCall& call, const QuantizeTiling& tiling, const Scratch& at) {
  const QuantizeProblem& p = call.problem;
  char* scratch = static_cast<char*>(call.scratch);
  QuantizeArgs args{};
  args.samples = tiling.samples;
  args.rows = tiling.rows;
  args.channels = tiling.channels;
  args.granularity = tiling.granularity;
  args.granules = tiling.granules;
  args.grid = tiling.grid;
  args.row_width = tiling.row_width;
  args.whole = p.channels % kVector == 0 && aligned(p.input, 16) && aligned(call.further, 16) && aligned(p.x_hat, 16) &&
               aligned(p.codes, kVector);
  args.input = p.input;
  args.further = call.further != nullptr ? call.further : p.input;
  args.own = call.own;
  args.x_hat = p.x_hat;
  args.mean = reinterpret_cast<float*>(scratch + at.mean);
  args.coefficient = reinterpret_cast<float*>(scratch + at.coefficient);
  args.gamma = call.gamma;
  args.beta = call.beta;
  args.eps = p.eps;
  args.clip_ratio = p.clip_ratio;
  args.half = half_range(p.act_bits);
  args.silu = p.silu;
  args.affine = p.affine;
  args.given = p.given_scale;
  args.one_given = p.given_scale_count == 1;
  args.delayed = call.delayed;
  args.range =
      p.x_hat != nullptr ? reinterpret_cast<uint32_t*>(p.absmax) : reinterpret_cast<uint32_t*>(scratch + at.range);
  args.range_count = tiling.granularity == Granularity::kPerToken ? 0 : tiling.granules * (p.affine ? 2 : 1);
  args.block_range = reinterpret_cast<uint32_t*>(scratch + at.block_range);
  args.codes = p.codes;
  args.packed_bits = p.packed ? p.act_bits : 0;
  args.scale = p.scale;
  args.zero_point = p.zero_point;
  return args;
}

template <class In, class Launch>
void fold_group_norm(const QuantizeCall& call, const QuantizeTiling& tiling, const Scratch& at,
                     const QuantizeArgs& args, Launch& launch) {
  NormArgs norm{};
  norm.samples = tiling.samples;
  norm.rows = tiling.rows;
  norm.channels = tiling.channels;
  norm.grid = tiling.grid;
  norm.whole = args.whole;
  norm.backwards = !tiling.range_pass;  // against the pass that follows
  norm.input = args.input;
  norm.further = args.further;
  norm.own = args.own;
  norm.statistics = reinterpret_cast<float*>(static_cast<char*>(call.scratch) + at.statistics);
  norm.coefficient = args.coefficient;
  norm.gamma = call.gamma;
  norm.beta = call.beta;
  norm.shift = call.shift;
  norm.shift_stride = call.shift_stride;
  norm.norm_stride = call.problem.norm_stride;
  norm.num_groups = call.problem.num_groups;
  norm.eps = args.eps;
  norm.range = args.range;
  norm.range_count = args.range_count;
  launch.template run<TileStatistics<In>>(tiling.grid.blocks, norm);
  launch.template run<Coefficients>(tiling.samples * norm.num_groups, norm);
}

template <Prologue P, class In, class State, class Launch>
void quantize_typed(const QuantizeCall& call, Launch& launch) {
  const QuantizeTiling tiling = tiling_of(call.problem);
  const Scratch at = scratch_of(call.problem, tiling);
  QuantizeArgs args = quantize_args(call, tiling, at);
  bool cleared = args.range_count == 0;
  if constexpr (P == Prologue::kGroupNorm) {
    fold_group_norm<In>(call, tiling, at, args, launch);
    cleared = true;
  }
  if constexpr (P == Prologue::kLayerNorm) {
    if (!tiling.by_rows) {
      launch.template run<RowStatistics<In>>(tiling.row_blocks, args);
      cleared = true;
    }
  }
  if (!cleared) launch.clear(args.range, args.range_count);
  if (tiling.by_rows) {
    launch.template run<RowPass<P, In, State>>(tiling.row_blocks, args);
    return;
  }
  if (tiling.range_pass) {
    args.backwards = true;
    launch.template run<RangePass<P, In, State>>(tiling.grid.blocks, args);
  }
  launch.template run<TilePass<P, In, State>>(tiling.grid.blocks, args);
}

template <Prologue P, class In, class Launch>
void quantize_from(const QuantizeCall& call, Launch& launch) {
  if (call.problem.x_hat == nullptr) return quantize_typed<P, In, NoState>(call, launch);
  switch (call.problem.x_hat_dtype) {
    case DType::kFloat32:
      return quantize_typed<P, In, float>(call, launch);
    case DType::kFloat16:
      return quantize_typed<P, In, Half>(call, launch);
    case DType::kBFloat16:
      return quantize_typed<P, In, BFloat16>(call, launch);
  }
}

template <Prologue P, class Launch>
void quantize_with(const QuantizeCall& call, Launch& launch) {
  switch (call.problem.input_dtype) {
    case DType::kFloat32:
      return quantize_from<P, float>(call, launch);
    case DType::kFloat16:
      return quantize_from<P, Half>(call, launch);
    case DType::kBFloat16:
      return quantize_from<P, BFloat16>(call, launch);
  }
}

}  // namespace modiff::cuda
