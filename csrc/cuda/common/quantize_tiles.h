// The passes by tiles: `RangePass` (dynamic scales that cover more than a row) and `TilePass` (codes and state, with a
// scale that is given or found by the range pass). Equations: modiff_kernels/ops/schema.py.
//
// Operands (N samples, R rows of C channels each; an NHWC image has R = H * W), row major:
//   input        [N, R, C] (GEGLU: 2C)    float      read; or [N, R, own] and further [N, R, C - own]
//   x_hat        [N, R, C]                float      read by both, written by TilePass; null: plain form
//   range        [granules]               bits       absmax: atomic maximum, cleared before; affine: [2, granules]
//   block_range  [N, ceil(R / 16), C]     bits       per_block: absmax of 16 rows of a channel; the last block of a
//                                                    sample takes the rows that are left, and so the last two entries
//   codes        [N, R, C]                int8       written
//   scale        [granules]               float32    zero_point [granules] int32, plain form only
//
// Blocks and threads: quantize_tiling.h, "tiles": 128 threads, 4 rows of 8 values each, no loop over tiles. All loads
// of a thread are under way before the first is used: 64 bytes each of h and x_hat with 2-byte dtypes. Shared memory: 4
// KiB for the ranges of per_block, 32 bytes otherwise used. No bank conflicts: thread t has word t. Bytes per element
// (s of input, twice for GEGLU, t of x_hat): RangePass s + t, TilePass s + 2t + 1; per_block writes and reads 1/4 byte
// more. The second reading comes from the L2 cache as far as it reaches: passes alternate direction.
#pragma once
#include "common/cta.h"
#include "cuda/common/activation.h"

namespace modiff::cuda {

// A thread's place: 4 rows from `row` (of its sample) and `count` channels from `column`.
struct TilePlace {
  int64_t sample, tile, row, column;
  int count, below;  // below: threads of the tile with lower rows
  bool first_of_sample;
};

template <class Cta>
MODIFF_HD TilePlace tile_place(const Cta& cta, const TileGrid& grid, int64_t channels, bool backwards) {
  uint32_t block = static_cast<uint32_t>(cta.block());
  if (backwards) block = grid.blocks - 1 - block;
  const uint32_t column = block % grid.columns, tile = block / grid.columns % grid.tiles;
  TilePlace place;
  place.sample = block / grid.columns / grid.tiles;
  place.tile = tile;
  place.below = cta.thread() / grid.width;
  place.row = (static_cast<int64_t>(tile) * grid.tall() + place.below) * kThreadVectors;
  place.column = (static_cast<int64_t>(column) * grid.width + cta.thread() % grid.width) * kVector;
  place.count = static_cast<int>(least<int64_t>(most<int64_t>(channels - place.column, 0), kVector));
  place.first_of_sample = column == 0 && tile == 0;
  return place;
}

// The residuals of a thread (or, plain, activations), 0 where there is no element.
template <Prologue P, class In, class State>
struct TileValues {
  Loaded<P, In, State> loaded[kThreadVectors];
  float residual[kThreadVectors][kVector];

  MODIFF_HD void load(const QuantizeArgs& args, const TilePlace& place) {
    const int64_t first = place.sample * args.rows + place.row;
    MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j)
      loaded[j] = load_vector<P, In, State>(args, first + j, place.column, count(args, place, j));
    const Affine f = load_affine<P>(args, place.sample, place.column, place.count);
    MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j) {
      const int values = count(args, place, j);
      float mean = 0.0f, inverse = 0.0f;
      if constexpr (P == Prologue::kLayerNorm) {
        if (values > 0) {
          mean = args.mean[2 * (first + j)];
          inverse = args.mean[2 * (first + j) + 1];
        }
      }
      MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
        const float x = activation(loaded[j], i, f, mean, inverse, args.silu);
        residual[j][i] = i < values ? sub_rn(x, old_value(loaded[j], i)) : 0.0f;
      }
    }
  }

  static MODIFF_HD int count(const QuantizeArgs& args, const TilePlace& place, int j) {
    return place.row + j < args.rows ? place.count : 0;
  }
};

MODIFF_HD int64_t tile_granule(const QuantizeArgs& args, const TilePlace& place) {
  return args.granularity == Granularity::kPerTensor ? 0 : place.sample;
}

template <Prologue P, class In, class State>
struct RangePass {
  static constexpr int kThreads = kTileThreads;
  using Args = QuantizeArgs;
  struct Shared {
    uint32_t channel[kVector][kThreads];
    uint32_t warps[2][kThreads / kWarp];
  };

  template <class Cta>
  static MODIFF_HD void run(Cta& cta, Shared& shared, const Args& args) {
    const TilePlace place = tile_place(cta, args.grid, args.channels, args.backwards);
    TileValues<P, In, State> values;
    values.load(args, place);
    uint32_t largest = 0, below = 0;
    if (args.affine) {
      MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j) {
        MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
          below = most(below, magnitude_below(values.residual[j][i]));
          largest = most(largest, magnitude_above(values.residual[j][i]));
        }
      }
    } else {
      MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
        uint32_t channel = 0;
        MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j)
          channel = most(channel, magnitude(values.residual[j][i]));
        largest = most(largest, channel);
        if (args.granularity == Granularity::kPerBlock) shared.channel[i][cta.thread()] = channel;
      }
    }
    largest = block_max(cta, shared.warps[0], kThreads, largest);
    if (args.granularity == Granularity::kPerBlock) write_blocks(cta, shared, args, place);
    uint32_t* range = args.range + tile_granule(args, place);
    if (args.affine) {
      below = block_max(cta, shared.warps[1], kThreads, below);
      if (cta.thread() == 0) {
        cta.atomic_max(range, below);
        cta.atomic_max(range + args.granules, largest);
      }
    } else if (cta.thread() == 0) {
      cta.atomic_max(range, largest);
    }
  }

 private:
  // Of the threads that have the 16 rows of a block, the uppermost merges and writes; block_max was the barrier.
  template <class Cta>
  static MODIFF_HD void write_blocks(Cta& cta, Shared& shared, const Args& args, const TilePlace& place) {
    constexpr int kMerged = kBlockRows / kThreadVectors;
    if (place.below % kMerged != 0 || place.row >= args.rows) return;
    uint32_t* out = args.block_range +
                    (place.sample * ceil_div(args.rows, kBlockRows) + place.row / kBlockRows) * args.channels +
                    place.column;
    for (int i = 0; i < place.count; ++i) {
      uint32_t largest = 0;
      for (int k = 0; k < kMerged; ++k) largest = most(largest, shared.channel[i][cta.thread() + k * args.grid.width]);
      out[i] = largest;
    }
  }
};

template <Prologue P, class In, class State>
struct TilePass {
  static constexpr int kThreads = kTileThreads;
  using Args = QuantizeArgs;
  struct Shared {
    uint32_t warps[kThreads / kWarp];
  };

  template <class Cta>
  static MODIFF_HD void run(Cta& cta, Shared& shared, const Args& args) {
    const TilePlace place = tile_place(cta, args.grid, args.channels, false);
    TileValues<P, In, State> values;
    values.load(args, place);
    const int64_t granule = tile_granule(args, place);
    float scale, zero_point = 0.0f;
    if (args.given != nullptr) {
      scale = given_scale(args, granule);
      uint32_t largest = 0;
      MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j) {
        MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
          largest = most(largest, magnitude(values.residual[j][i]));
      }
      largest = block_max(cta, shared.warps, kThreads, largest);
      if (cta.thread() == 0) cta.atomic_max(args.range + granule, largest);
    } else if (args.affine) {
      const float below = bits_to_float(args.range[granule]);
      scale = affine_scale(below, bits_to_float(args.range[args.granules + granule]), args.half);
      zero_point = affine_zero_point(below, scale, args.half);
    } else {
      const float absmax = bits_to_float(args.range[granule]);
      scale = args.granularity == Granularity::kPerBlock ? block_scale(absmax, args.clip_ratio, args.half)
                                                         : residual_scale(absmax, args.clip_ratio, args.half);
    }
    if (cta.thread() == 0 && place.first_of_sample && place.sample == granule) {
      args.scale[granule] = scale;
      if (args.zero_point != nullptr) args.zero_point[granule] = to_int(zero_point);
    }

    float multiplier[kVector], inverse[kVector];
    multipliers(args, place, scale, multiplier, inverse);
    const int64_t first = place.sample * args.rows + place.row;
    MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j) {
      const int count = TileValues<P, In, State>::count(args, place, j);
      if (count > 0)
        store_vector(args, first + j, place.column, count, values.loaded[j], values.residual[j], scale, inverse,
                     multiplier, zero_point);
    }
  }

 private:
  // 1 and 1 / scale, or those of the block that the thread's rows lie in.
  static MODIFF_HD void multipliers(const Args& args, const TilePlace& place, float scale, float (&multiplier)[kVector],
                                    float (&inverse)[kVector]) {
    const float inv_scale = div_rn(1.0f, scale);
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
      multiplier[i] = 1.0f;
      inverse[i] = inv_scale;
    }
    if (args.granularity != Granularity::kPerBlock || place.row >= args.rows) return;
    const int64_t entries = ceil_div(args.rows, kBlockRows), last = args.rows / kBlockRows - 1;
    const int64_t block = least(place.row / kBlockRows, last);
    const uint32_t* range = args.block_range + (place.sample * entries + block) * args.channels + place.column;
    // The rows that are left are the last block's, too; elsewhere the second entry is the first again.
    const uint32_t* rest = range + (block == last ? entries - 1 - last : 0) * args.channels;
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
      if (i >= place.count) continue;
      const float absmax = bits_to_float(most(range[i], rest[i]));
      multiplier[i] = block_multiplier(absmax, args.clip_ratio, scale, args.half);
      inverse[i] = div_rn(1.0f, mul_rn(scale, multiplier[i]));
    }
  }
};

}  // namespace modiff::cuda
