// The kernels of one call in their order, for any way to launch them (cuda/common/quantize_launch.h):
//
//   Product, [FinishSplits]      with splits of K
#pragma once
#include "cuda/sm80/product_kernel.h"

namespace modiff::cuda::sm80 {

struct Tiling {
  Operands operands;
  TileChoice choice;
  int64_t k;  // codes of a row of the weight
  int64_t partial_columns;
  int64_t bytes;  // of scratch: the sums of splits
};

inline Tiling tiling_of(const ProductCall& call, TileChoice choice) {
  const ProductProblem& p = call.problem;
  Tiling tiling{};
  tiling.operands = operands_of(call.code_bits, call.weight_bits);
  tiling.choice = choice;
  tiling.k = p.kernel_h * p.kernel_w * p.c_in;
  tiling.partial_columns = ceil_div(p.c_out, kVector) * kVector;
  if (choice.splits > 1)
    tiling.bytes = choice.splits * p.samples * p.out_h * p.out_w * tiling.partial_columns * int64_t{4};
  return tiling;
}

inline Tiling tiling_of(const ProductCall& call, int multiprocessors) {
  if (call.tiling.architecture == 80)
    return tiling_of(call, TileChoice{tile_of_size(call.tiling.rows, call.tiling.columns,
                                                   operands_of(call.code_bits, call.weight_bits)),
                                      call.tiling.splits});
  const ProductProblem& p = call.problem;
  const Tiling any = tiling_of(call, TileChoice{0, 1});
  return tiling_of(call, choose_tile(p.samples * p.out_h * p.out_w, p.c_out, any.k, call.weight_bits, any.operands,
                                     multiprocessors));
}

inline OperandArgs operand_args(const ProductCall& call, const Tiling& tiling) {
  const ProductProblem& p = call.problem;
  OperandArgs args{};
  args.codes = reinterpret_cast<const uint8_t*>(p.codes);
  args.weight = reinterpret_cast<const uint8_t*>(p.weight);
  args.rows = static_cast<int>(p.samples * p.out_h * p.out_w);
  args.columns = static_cast<int>(p.c_out);
  const int codes_per_byte = 8 / call.code_bits;
  args.k = static_cast<int>(tiling.k) / codes_per_byte;
  args.channels = static_cast<int>(p.c_in) / codes_per_byte;
  args.h = static_cast<int>(p.h);
  args.w = static_cast<int>(p.w);
  args.out_h = static_cast<int>(p.out_h);
  args.out_w = static_cast<int>(p.out_w);
  args.kernel_h = static_cast<int>(p.kernel_h);
  args.kernel_w = static_cast<int>(p.kernel_w);
  args.stride_h = static_cast<int>(p.stride_h);
  args.stride_w = static_cast<int>(p.stride_w);
  args.pad_h = static_cast<int>(p.pad_h);
  args.pad_w = static_cast<int>(p.pad_w);
  args.dilation_h = static_cast<int>(p.dilation_h);
  args.dilation_w = static_cast<int>(p.dilation_w);
  args.weight_bits = call.weight_bits;
  args.row_bytes = packed_width(call.weight_bits, tiling.k);
  args.high_plane = ceil_div(tiling.k, 4);
  return args;
}

template <Operands kOperands, class Launch>
void launch_tile(int tile, int64_t blocks, const ProductArgs& args, Launch& launch) {
  switch (tile) {
    case 0:
      if constexpr (has_tile(0, kOperands)) return launch.template run<Product<Wide, kOperands>>(blocks, args);
      return;
    case 1:
      return launch.template run<Product<Large, kOperands>>(blocks, args);
    case 2:
      return launch.template run<Product<Narrow, kOperands>>(blocks, args);
    default:
      return launch.template run<Product<Small, kOperands>>(blocks, args);
  }
}

template <class Launch>
void multiply(const ProductCall& call, const Tiling& tiling, Launch& launch) {
  const TileSize& tile = kTiles[tiling.choice.tile];
  ProductArgs args{};
  args.operands = operand_args(call, tiling);
  args.epilogue = epilogue_args(call);
  args.tiles_m = ceil_div(args.operands.rows, tile.m);
  args.tiles_n = ceil_div(args.operands.columns, tile.n);
  args.k_blocks = k_block_count(tiling.k, tiling.operands);
  args.splits = tiling.choice.splits;
  args.k_blocks_per_split = ceil_div(args.k_blocks, args.splits);
  args.partial = static_cast<int32_t*>(call.scratch);
  args.partial_columns = tiling.partial_columns;
  const int64_t blocks = static_cast<int64_t>(args.tiles_m) * args.tiles_n * args.splits;
  switch (tiling.operands) {
    case Operands::kBytes:
      launch_tile<Operands::kBytes>(tiling.choice.tile, blocks, args, launch);
      break;
    case Operands::kUnpacked:
      launch_tile<Operands::kUnpacked>(tiling.choice.tile, blocks, args, launch);
      break;
    case Operands::kNibbles:
      launch_tile<Operands::kNibbles>(tiling.choice.tile, blocks, args, launch);
      break;
  }
  if (args.splits > 1) launch.template run<FinishSplits>(FinishSplits::blocks(args), args);
}

}  // namespace modiff::cuda::sm80
