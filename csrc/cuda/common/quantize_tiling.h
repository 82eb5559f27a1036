// One call of a quantising op: what its kernels are given, and how it is shared out among thread blocks.
//
// Two ways to share out [samples, rows, channels]; a thread holds kThreadVectors vectors of eight values in either:
//
//   tiles   4 consecutive rows per thread, `width` threads side by side on vectors of a row, kTileThreads / width below
//           each other. For scales given, or found by a pass before.
//   rows    `width` threads per row (32 to 256), each on every width-th vector of it, kRowThreads / width rows in a
//           block. For what is reduced over a row: per_token scales, layer norm.
//
// Samples are dissolved where nothing depends on them (the [M, K] input of a Linear has samples of single rows).
#pragma once
#include "common/cta.h"
#include "common/rounding.h"
#include "cuda/common/vectors.h"

namespace modiff::cuda {

constexpr int kThreadVectors = 4;
constexpr int kTileThreads = 128;  // 16 rows of 256 channels: with per_block one block, reduced within a thread block
constexpr int kRowThreads = 256;
constexpr int64_t kMostRowChannels = kRowThreads * kThreadVectors * kVector;
constexpr int64_t kEnoughBlocks = 264;  // two per multiprocessor of an H100

// Tiles of a tensor: `columns` side by side, `tiles` of rows below each other in every sample. What the threads would
// divide 64-bit numbers for.
struct TileGrid {
  int width;  // threads side by side in a tile
  uint32_t columns, tiles, blocks;

  MODIFF_HD int tall() const { return kTileThreads / width; }
  MODIFF_HD int rows() const { return tall() * kThreadVectors; }
};

// Arguments of all passes. Ranges are bit patterns, see common/rounding.h.
struct QuantizeArgs {
  int64_t samples, rows, channels;
  Granularity granularity;
  int64_t granules;
  TileGrid grid;
  int row_width;  // threads on a row, in passes by rows
  bool whole;     // all vectors are whole and aligned
  bool
      backwards;  // the last block first: a pass begins with what the one before it read last, which is in the L2 cache
  const void* input;
  const void* further;  // of the channels from `own` on
  int64_t own;
  void* x_hat;         // null: plain form
  float* mean;         // [rows of all samples, 2]: mean and 1 / deviation of rows (layer norm in tiles)
  float* coefficient;  // [2, samples, channels]: a, then b of x = a * h + b (group norm)
  Parameter gamma, beta;
  float eps, clip_ratio, half;
  bool silu, affine;
  const float* given;  // null: dynamic
  bool one_given;
  bool delayed;     // given is the absmax of an earlier call, of which the scales are made
  uint32_t* range;  // [granules]: absmax; affine: [2, granules]: below, above
  int64_t range_count;
  uint32_t* block_range;  // [samples, ceil(rows / 16), channels], per_block only
  int8_t* codes;
  int packed_bits;  // 0: a byte for each code
  float* scale;
  int32_t* zero_point;
};

MODIFF_HD float given_scale(const QuantizeArgs& args, int64_t granule) {
  const float given = args.given[args.one_given ? 0 : granule];
  return args.delayed ? residual_scale(given, args.clip_ratio, args.half) : given;
}

struct QuantizeTiling {
  int64_t samples, rows, channels;
  Granularity granularity;
  int64_t granules;
  bool by_rows;  // the quantising pass; a range pass is always by tiles
  TileGrid grid;
  int row_width;
  int64_t row_blocks;
  bool range_pass;
};

// Threads side by side in a tile: a power of two without a remainder where one from 4 (64 bytes of a 2-byte dtype) to
// 32 divides the row, else the next one, up to 16. With per_block a tile holds whole blocks of 16 rows, as 32 * 4 rows
// do.
inline int tile_width(int64_t channels) {
  const int64_t vectors = ceil_div(channels, kVector);
  int64_t width = least<int64_t>(vectors & -vectors, 32);
  if (width < 4)
    for (width = 1; width < vectors && width < 16;) width *= 2;
  return static_cast<int>(width);
}

// Threads of a row: at most kThreadVectors vectors each, fewer where few rows would leave multiprocessors idle.
inline int row_width(int64_t rows, int64_t channels) {
  const int64_t vectors = ceil_div(channels, kVector);
  int64_t width = kWarp;
  while (width < kRowThreads &&
         (width * kThreadVectors < vectors || (width < vectors && ceil_div(rows * width, kRowThreads) < kEnoughBlocks)))
    width *= 2;
  return static_cast<int>(width);
}

inline QuantizeTiling tiling_of(const QuantizeProblem& p) {
  QuantizeTiling tiling{};
  tiling.samples = p.samples;
  tiling.rows = p.rows;
  tiling.channels = p.channels;
  tiling.granularity = p.granularity;
  if (p.granularity == Granularity::kPerBlock && block_count(p.rows, p.act_bits) == 0)
    tiling.granularity = Granularity::kPerSample;
  if (tiling.granularity == Granularity::kPerSample && p.rows == 1 && p.channels <= kMostRowChannels)
    tiling.granularity = Granularity::kPerToken;
  const bool per_token = tiling.granularity == Granularity::kPerToken;
  tiling.granules = tiling.granularity == Granularity::kPerTensor ? 1 : per_token ? p.samples * p.rows : p.samples;
  tiling.by_rows = per_token || (p.prologue == Prologue::kLayerNorm && p.given_scale != nullptr);
  tiling.range_pass = p.given_scale == nullptr && !per_token;
  if (tiling.granularity == Granularity::kPerTensor && p.prologue != Prologue::kGroupNorm) {
    tiling.rows *= tiling.samples;
    tiling.samples = 1;
  }
  tiling.grid.width = tile_width(p.channels);
  tiling.grid.columns = static_cast<uint32_t>(ceil_div(ceil_div(p.channels, kVector), tiling.grid.width));
  tiling.grid.tiles = static_cast<uint32_t>(ceil_div(tiling.rows, tiling.grid.rows()));
  tiling.grid.blocks = static_cast<uint32_t>(tiling.samples) * tiling.grid.tiles * tiling.grid.columns;
  tiling.row_width = row_width(p.samples * p.rows, p.channels);
  tiling.row_blocks = ceil_div(tiling.samples * tiling.rows, kRowThreads / tiling.row_width);
  return tiling;
}

// Scratch of a call, in bytes from its start; every part begins at a multiple of 16.
struct Scratch {
  int64_t mean, coefficient, statistics, block_range, range, bytes;
};

inline Scratch scratch_of(const QuantizeProblem& p, const QuantizeTiling& tiling) {
  Scratch s{};
  const auto part = [&s](int64_t words) {
    const int64_t at = s.bytes;
    s.bytes += ceil_div(words * 4, 16) * 16;
    return at;
  };
  const bool group_norm = p.prologue == Prologue::kGroupNorm;
  s.mean = part(p.prologue == Prologue::kLayerNorm && !tiling.by_rows ? 2 * tiling.samples * tiling.rows : 0);
  s.coefficient = part(group_norm ? 2 * tiling.samples * tiling.channels : 0);
  s.statistics = part(group_norm ? 2 * tiling.samples * tiling.grid.tiles * tiling.channels : 0);
  s.block_range = part(tiling.granularity == Granularity::kPerBlock
                           ? tiling.samples * ceil_div(tiling.rows, kBlockRows) * tiling.channels
                           : 0);
  s.range = part(p.x_hat == nullptr ? tiling.granules * (p.affine ? 2 : 1) : 0);
  return s;
}

}  // namespace modiff::cuda
