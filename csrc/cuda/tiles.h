// The tilings that a caller may ask for: what tools measure, and what the binding lets through.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "cuda/product.h"
#include "cuda/sm80/tile_config.h"
#include "cuda/sm90/tiling.h"

namespace modiff::cuda {

// Why `call` cannot have the tiling that it is told on a GPU of this capability, null if it can.
inline const char* tiling_problem(const ProductCall& call, int capability) {
  const ProductTiling& tiling = call.tiling;
  const ProductProblem& p = call.problem;
  if (tiling.architecture == 0) return nullptr;
  if (tiling.splits < 1) return "less than one split of K";
  if (tiling.architecture == 90) {
    if (capability != 90) return "the kernels of sm_90 run on capability 9.0 alone";
    if (call.code_bits != 8) return "the kernels of sm_90 read codes of 8 bits";
    if (const char* limit = sm90::limit_of(call)) return limit;
    if (sm90::tile_of_size(tiling.rows, tiling.columns, call.weight_bits) < 0) return "sm_90 has no such tile";
    if (tiling.splits > sm90::k_block_count(sm90::window_of(p, call.weight_bits))) return "more splits than k-blocks";
    return nullptr;
  }
  if (tiling.architecture != 80) return "there are kernels of sm_90 and sm_80";
  if (call.code_bits == 4 && capability >= 90) return "capability 9.0 and newer have no tensor cores for 4 bits";
  const sm80::Operands operands = sm80::operands_of(call.code_bits, call.weight_bits);
  if (sm80::tile_of_size(tiling.rows, tiling.columns, operands) < 0) return "sm_80 has no such tile";
  const int k_blocks = sm80::k_block_count(p.kernel_h * p.kernel_w * p.c_in, operands);
  if (sm80::used_splits(k_blocks, tiling.splits) != tiling.splits) return "some splits would have no k-blocks";
  return nullptr;
}

// Every tiling of `call` on this GPU: of each architecture those with the best estimate first, sm_90 before sm_80. So
// the first one is what a call gets that says nothing.
inline std::vector<ProductTiling> tilings_of(const ProductCall& call, int capability, int multiprocessors) {
  const ProductProblem& p = call.problem;
  std::vector<std::pair<double, ProductTiling>> estimated;
  std::vector<ProductTiling> tilings;
  const auto add = [&](const ProductTiling& tiling, double estimate) {
    ProductCall told = call;
    told.tiling = tiling;
    if (tiling_problem(told, capability) == nullptr) estimated.emplace_back(estimate, tiling);
  };
  const auto flush = [&] {
    std::stable_sort(estimated.begin(), estimated.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    for (const auto& [estimate, tiling] : estimated) tilings.push_back(tiling);
    estimated.clear();
  };
  for (int tile = 0; tile < sm90::kTileCount; ++tile) {
    sm90::Tiling tiling = sm90::tiling_of_tile(call, tile, 1);
    const int most_splits = most(1, least(sm90::kMostSplits, tiling.schedule.k_blocks / sm90::kFewestKBlocks));
    for (int& splits = tiling.schedule.splits; splits <= most_splits; ++splits) {
      const sm90::Tile& size = sm90::kTiles[tile];
      add({90, size.rows, size.columns, splits},
          static_cast<double>(sm90::estimated_clocks(tiling, call.weight_bits, multiprocessors)));
    }
  }
  flush();
  const int64_t rows = p.samples * p.out_h * p.out_w, k = p.kernel_h * p.kernel_w * p.c_in;
  const sm80::Operands operands = sm80::operands_of(call.code_bits, call.weight_bits);
  const int k_blocks = sm80::k_block_count(k, operands);
  for (int tile = 0; tile < sm80::kTileCount; ++tile) {
    for (int splits = 1; splits <= sm80::kMostSplits; ++splits) {
      if (splits > 1 && k_blocks / splits < sm80::kLeastKBlocks) break;
      const sm80::TileSize& size = sm80::kTiles[tile];
      add({80, size.m, size.n, splits},
          sm80::estimated_cycles({tile, splits}, rows, p.c_out, k, call.weight_bits, operands, multiprocessors));
    }
  }
  flush();
  return tilings;
}

}  // namespace modiff::cuda
