// Which tile a call gets, and how many splits of K. All choices stand here, with their reasons.
#pragma once
#include "cuda/sm90/tensor_map.h"

namespace modiff::cuda::sm90 {

// Tiles by the bytes of codes and weight that they load per multiplication, fewest first.
//
//   256 x 160  160 divides 320, 640, 960, 1280, 1920 and 2560, so no column of a UNet's layers is wasted; of all tiles
//              whose sums fit into the registers of two warpgroups it loads least, 416 bytes for 40960 sums
//   128 x 256  for multiples of 256 that are none of 160, and where rows are few
//   128 x 128  for less than one wave of the larger ones
//   128 x 64   for few rows and a large weight: many blocks, which all read it
//
// Packed weights have the first and the last: large tiles hide the unpacking, small ones read a weight from memory.
struct Tile {
  int rows, columns;
};
constexpr Tile kTiles[] = {{256, 160}, {128, 256}, {128, 128}, {128, 64}};
constexpr int kTileCount = 4;

constexpr bool has_tile(int tile, int weight_bits) { return weight_bits == 8 || tile == 0 || tile == kTileCount - 1; }

// Index of the tile of this size that weights of `weight_bits` have, -1 if there is none.
constexpr int tile_of_size(int rows, int columns, int weight_bits) {
  for (int tile = 0; tile < kTileCount; ++tile)
    if (kTiles[tile].rows == rows && kTiles[tile].columns == columns && has_tile(tile, weight_bits)) return tile;
  return -1;
}

struct Tiling {
  int tile;
  Window window;
  Schedule schedule;
};

// Estimated clocks of a multiprocessor; only their order matters, and none of them is measured yet. Those of the epilogue
// are read from the machine code (docs/cuda_kernels.md, "Clocks").
//   per k-block     multiplications at 4096 a clock, or loads at 32 bytes a clock of the L2 cache, of codes that two
//                   blocks share half
//   per work item   the epilogue: a clock for kEpilogue sums, by all splits in turn or by one; with splits before it an
//                   addition of 4 bytes in the L2 cache at half that rate. In a cluster one consumer of each block runs
//                   it for its rows, hardly faster than two for all of them, and half of the sums go to the other
//                   block, kSent bytes a clock
//   per call        1500 to fill the pipeline, which later work items find full; with splits 3000 to clear the sums
constexpr int64_t kMultiplications = 4096, kLoads = 32, kEpilogue = 6, kFill = 1500, kClear = 3000, kSent = 14;

inline int64_t estimated_clocks(const Tiling& tiling, int weight_bits, int multiprocessors) {
  const Tile tile = kTiles[tiling.tile];
  const Schedule& s = tiling.schedule;
  const int64_t sums = int64_t{tile.rows} * tile.columns;
  const int rows_loaded = shares_codes(s) ? tile.rows / 2 : tile.rows;
  const int64_t loaded = int64_t{kBlockK} * (rows_loaded + tile.columns * weight_bits / 8) / kLoads;
  const int64_t multiplied = sums * kBlockK / kMultiplications;
  // Half a k-block is loaded as a whole one; the pipeline evens out loads over a tap.
  const Window& w = tiling.window;
  const int64_t tap = most(loaded * w.boxes, multiplied * w.boxes - (w.last_half ? multiplied / 2 : 0));
  const bool added = s.splits > 1 && !trades_sums(s);
  const int64_t finished = added           ? sums / kEpilogue / s.splits + sums * 4 * 2 / kLoads
                           : s.splits == 1 ? sums / kEpilogue
                                           : sums / kEpilogue + sums / 2 * 4 / kSent;
  const int64_t work = ceil_div(tap * ceil_div(s.k_blocks, s.splits), w.boxes) + finished;
  return ceil_div(work_count(s), block_count(s, multiprocessors)) * work + kFill + (added ? kClear : 0);
}

// More splits than this, or splits of fewer k-blocks, only add to each other's sums.
constexpr int kMostSplits = 16, kFewestKBlocks = 4;

inline Tiling tiling_of_tile(const ProductCall& call, int tile, int splits) {
  const ProductProblem& p = call.problem;
  Tiling tiling{};
  tiling.tile = tile;
  tiling.window = window_of(p);
  tiling.schedule.row_tiles = static_cast<int>(ceil_div(p.samples * p.out_h * p.out_w, kTiles[tile].rows));
  tiling.schedule.column_tiles = static_cast<int>(ceil_div(p.c_out, kTiles[tile].columns));
  tiling.schedule.k_blocks = k_block_count(tiling.window);
  tiling.schedule.splits = splits;
  return tiling;
}

// The tiling that the call is told, or the one with the fewest estimated clocks; among equals the earlier tile, then
// fewer splits.
inline Tiling tiling_of(const ProductCall& call, int multiprocessors) {
  if (call.tiling.architecture == 90) {
    return tiling_of_tile(call, tile_of_size(call.tiling.rows, call.tiling.columns, call.weight_bits),
                          call.tiling.splits);
  }
  Tiling best{};
  int64_t fewest = -1;
  for (int tile = 0; tile < kTileCount; ++tile) {
    if (!has_tile(tile, call.weight_bits)) continue;
    Tiling tiling = tiling_of_tile(call, tile, 1);
    const int most_splits = most(1, least(kMostSplits, tiling.schedule.k_blocks / kFewestKBlocks));
    for (int splits = 1; splits <= most_splits; ++splits) {
      tiling.schedule.splits = splits;
      const int64_t clocks = estimated_clocks(tiling, call.weight_bits, multiprocessors);
      if (fewest >= 0 && clocks >= fewest) continue;
      fewest = clocks;
      best = tiling;
    }
  }
  return best;
}

// Scratch of a call, in words: with more than two splits, how many of every tile have arrived, then the tiles' sums
// in the order of registers.
struct Scratch {
  int64_t arrived, sums, words;
};

inline Scratch scratch_of(const Tiling& tiling) {
  const Schedule& s = tiling.schedule;
  const int64_t tiles = int64_t{s.row_tiles} * s.column_tiles;
  Scratch scratch{};
  if (s.splits <= 2) return scratch;
  scratch.sums = ceil_div(tiles, 4) * 4;
  scratch.words = scratch.sums + tiles * kTiles[tiling.tile].rows * kTiles[tiling.tile].columns;
  return scratch;
}

}  // namespace modiff::cuda::sm90
