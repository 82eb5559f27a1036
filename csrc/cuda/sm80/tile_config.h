// The tiles of the product and which one a call gets; no other file names a tile's size.
#pragma once
#include <cstdint>

#include "common/hd.h"

namespace modiff::cuda::sm80 {

// How the operands of the tensor cores come about.
enum class Operands {
  kBytes,     // int8 codes times 8-bit weights, both as they are in memory
  kUnpacked,  // int8 codes times 4- or 3-bit weights, which become bytes in shared memory
  kNibbles,   // packed 4-bit codes times 4-bit weights, both as they are in memory: s4
};

// Of a row of a tile in a k-block: half a line of shared memory. 128 would halve the barriers, but two stages of it
// already fill what a block may have of sm_86.
constexpr int kBlockKBytes = 64;

// kM x kN outputs of a block, in warps of kWarpM x kWarpN; kStages k-blocks are in shared memory. Sums are int32
// registers: a warp of 64 x 32 has 64 of them per thread, and with operands and addresses 128 is the budget.
template <int kM_, int kN_, int kWarpM_, int kWarpN_, int kStages_, int kResident_, bool kReadAhead_ = true>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kWarpM = kWarpM_, kWarpN = kWarpN_, kStages = kStages_;
  static constexpr int kThreads = kM / kWarpM * (kN / kWarpN) * 32;
  static constexpr int kResident = kResident_;     // blocks of a multiprocessor that registers are limited for
  static constexpr bool kReadAhead = kReadAhead_;  // fragments of the next step are read before one is multiplied
};

// Each operand byte in shared memory is read kN / kWarpN or kM / kWarpM times by ldmatrix. The large tile reads and
// writes 64 KiB there for a k-block of 512 cycles of the tensor cores, all of an A100's 128 bytes a cycle; the wide one
// 88 KiB for 1024 cycles.
using Wide = Tile<128, 256, 64, 64, 4, 1>;  // 96 KiB; weights as they are in memory alone
// Large: 48 KiB of bytes, so that two blocks fit the 99 KiB of sm_86 and sm_89, and hide each other's reads; for
// fragments ahead their 128 registers are too few.
using Large = Tile<128, 128, 64, 32, 3, 2, false>;
using Narrow = Tile<128, 64, 64, 32, 4, 3>;  // 320 columns are 5 of these and 3 (384) of the large one
using Small = Tile<64, 64, 32, 32, 4, 4>;    // few rows: most blocks, 32 KiB each

struct TileSize {
  int m, n, threads;
};

constexpr TileSize kTiles[] = {{Wide::kM, Wide::kN, Wide::kThreads},
                               {Large::kM, Large::kN, Large::kThreads},
                               {Narrow::kM, Narrow::kN, Narrow::kThreads},
                               {Small::kM, Small::kN, Small::kThreads}};
constexpr int kTileCount = 4;

struct TileChoice {
  int tile;    // index into kTiles
  int splits;  // of K, between blocks
};

inline Operands operands_of(int code_bits, int weight_bits) {
  return code_bits == 4 ? Operands::kNibbles : weight_bits == 8 ? Operands::kBytes : Operands::kUnpacked;
}

constexpr bool has_tile(int tile, Operands operands) { return tile != 0 || operands != Operands::kUnpacked; }

// Index of the tile of this size, -1 if there is none.
inline int tile_of_size(int rows, int columns, Operands operands) {
  for (int tile = 0; tile < kTileCount; ++tile)
    if (kTiles[tile].m == rows && kTiles[tile].n == columns && has_tile(tile, operands)) return tile;
  return -1;
}

// Number of k-blocks of `k` codes.
inline int k_block_count(int64_t k, Operands operands) {
  return static_cast<int>(ceil_div(operands == Operands::kNibbles ? ceil_div(k, 2) : k, kBlockKBytes));
}

// The number of splits that are not empty when `k_blocks` are dealt out in equal shares.
inline int used_splits(int k_blocks, int splits) { return ceil_div(k_blocks, ceil_div(k_blocks, splits)); }

// Cycles of one multiprocessor of an A100, from published peaks; they rank tiles, they are no measurement.
constexpr double kProductsPerCycle = 2048;  // of bytes; twice that of nibbles
constexpr double kL2BytesPerCycle = 48;
constexpr double kKBlockCycles = 40;           // barrier, and the latency that stages do not hide
constexpr double kBlockCycles = 1500;          // filling the pipeline and leaving
constexpr double kOutputBytes = 6;             // y_hat read and written, out written, 2 bytes each
constexpr double kLaunchCycles = 4000;         // of the second kernel of a split, about 2 us
constexpr double kMemoryBytesPerCycle = 1000;  // of the whole device
constexpr int kLeastKBlocks = 4;               // of a split: the pipeline has to fill
constexpr int kMostSplits = 16;

inline double estimated_cycles(const TileChoice& choice, int64_t rows, int64_t columns, int64_t k, int weight_bits,
                               Operands operands, int multiprocessors) {
  const TileSize& tile = kTiles[choice.tile];
  const bool nibbles = operands == Operands::kNibbles;
  const double blocks = static_cast<double>(ceil_div(rows, tile.m) * ceil_div(columns, tile.n) * choice.splits);
  const double k_blocks = ceil_div(k_block_count(k, operands), choice.splits);
  const double products =
      double(tile.m) * tile.n * kBlockKBytes / kProductsPerCycle;  // nibbles: twice as many, as fast
  const double weight_bytes = nibbles ? kBlockKBytes : kBlockKBytes * weight_bits / 8.0;
  const double loads = (tile.m * kBlockKBytes + tile.n * weight_bytes) / kL2BytesPerCycle;
  const double epilogue = tile.m * tile.n * kOutputBytes / kL2BytesPerCycle;
  const double block = kBlockCycles + k_blocks * (most(products, loads) + kKBlockCycles) + epilogue;
  // A block alone on a multiprocessor leaves its tensor cores idle at every barrier; that is in the k-block's cycles.
  double cycles = static_cast<double>(ceil_div(static_cast<int64_t>(blocks), multiprocessors)) * block;
  if (choice.splits > 1)
    cycles += kLaunchCycles + 8.0 * choice.splits * static_cast<double>(rows * columns) / kMemoryBytesPerCycle;
  return cycles;
}

// The choice with the least estimate; among equals the larger tile and fewer splits.
inline TileChoice choose_tile(int64_t rows, int64_t columns, int64_t k, int weight_bits, Operands operands,
                              int multiprocessors) {
  TileChoice best{0, 0};
  double least_cycles = 0;
  const int k_blocks = k_block_count(k, operands);
  for (int tile = 0; tile < kTileCount; ++tile) {
    if (!has_tile(tile, operands)) continue;
    for (int splits = 1; splits <= kMostSplits && (splits == 1 || k_blocks / splits >= kLeastKBlocks); ++splits) {
      const TileChoice choice{tile, used_splits(k_blocks, splits)};
      const double cycles = estimated_cycles(choice, rows, columns, k, weight_bits, operands, multiprocessors);
      if (best.splits == 0 || cycles < least_cycles) {
        best = choice;
        least_cycles = cycles;
      }
    }
  }
  return best;
}

}  // namespace modiff::cuda::sm80
