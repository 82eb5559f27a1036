// Group norm in front of a quantiser: x = silu?(group_norm(h + shift)), folded into x = silu?(a[n, c] * h + b[n, c]).
//
// Operands (N samples, R rows of C channels, G groups), row major:
//   input        [N, R, C]        float      read; or [N, R, own] and further [N, R, C - own]
//   statistics   [N, P, 2, C]     float32    scratch: per tile of rows and channel, mean and sum of squares around it;
//                                            P = ceil(R / rows of a tile)
//   coefficient  [2, N, C]        float32    scratch: a, then b
//
// `TileStatistics`: tiles as in quantize_tiling.h; two reductions over the rows of a tile in shared memory (4 KiB).
// `Coefficients`: one block of 256 threads per group of a sample. Means and squares are merged as in Chan et al., so
// that a mean far from 0 does not cancel the variance (shift moves means only):
//
//   mean = sum_p,c n_p (m_pc + shift_c) / (R C/G)      var = sum_p,c (q_pc + n_p (m_pc + shift_c - mean)^2) / (R C/G)
//   a_c  = gamma_c / sqrt(var + eps)                   b_c = beta_c + (shift_c - mean) a_c
//
// Bytes per element: s for the input, 8 / (rows of a tile) for the scratch, which stays in the L2 cache.
#pragma once
#include "cuda/common/quantize_rows.h"
#include "cuda/common/quantize_tiles.h"

namespace modiff::cuda {

struct NormArgs {
  int64_t samples, rows, channels;
  TileGrid grid;
  bool whole, backwards;
  const void* input;
  const void* further;
  int64_t own;
  float* statistics;
  float* coefficient;
  Parameter gamma, beta, shift;
  int64_t shift_stride, norm_stride;
  int64_t num_groups;
  float eps;
  uint32_t* range;
  int64_t range_count;

  // Rows of a tile: the last of a sample has what is left.
  MODIFF_HD float tile_rows(int64_t tile) const {
    return static_cast<float>(least<int64_t>(grid.rows(), rows - tile * grid.rows()));
  }
  MODIFF_HD float shift_at(int64_t sample, int64_t channel) const {
    return parameter_at(shift, sample * shift_stride + channel, 0.0f);
  }
};

template <class In>
struct TileStatistics {
  static constexpr int kThreads = kTileThreads;
  using Args = NormArgs;
  struct Shared {
    float channel[kVector][kThreads];
  };

  template <class Cta>
  static MODIFF_HD void run(Cta& cta, Shared& shared, const Args& args) {
    const TilePlace place = tile_place(cta, args.grid, args.channels, args.backwards);
    const Source<In> source(args, place.sample * args.rows + place.row, place.column);
    const bool whole = args.whole && place.count == kVector;
    Raw<In> raw[kThreadVectors];
    bool inside[kThreadVectors];
    MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j) {
      inside[j] = place.row + j < args.rows;
      raw[j] = load_raw(source.at + j * source.stride, inside[j] ? place.count : 0, inside[j] && whole);
    }
    const float rows = args.tile_rows(place.tile);
    float mean[kVector], squares[kVector];
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
      mean[i] = 0.0f;
      MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j)
        mean[i] += value_of(raw[j], i);  // 0 beyond the last row
    }
    sum_rows(cta, shared, args.grid.width, mean);
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
      mean[i] = div_rn(mean[i], rows);
      squares[i] = 0.0f;
      MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j) {
        const float distance = inside[j] ? value_of(raw[j], i) - mean[i] : 0.0f;
        squares[i] = fma_rn(distance, distance, squares[i]);
      }
    }
    sum_rows(cta, shared, args.grid.width, squares);
    if (place.below != 0) return;  // no barrier follows
    float* out = args.statistics + (place.sample * args.grid.tiles + place.tile) * 2 * args.channels + place.column;
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
      if (i >= place.count) continue;
      out[i] = mean[i];
      out[args.channels + i] = squares[i];
    }
  }

 private:
  // Sums over the threads below each other, in every one of them: a tree.
  template <class Cta>
  static MODIFF_HD void sum_rows(Cta& cta, Shared& shared, int width, float (&value)[kVector]) {
    const int t = cta.thread();
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
      shared.channel[i][t] = value[i];
    for (int reach = kThreads / 2; reach >= width; reach /= 2) {
      cta.sync();
      if (t < reach) {
        MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
          shared.channel[i][t] += shared.channel[i][t + reach];
      }
    }
    cta.sync();
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
      value[i] = shared.channel[i][t % width];
    cta.sync();
  }
};

struct Coefficients {
  static constexpr int kThreads = kRowThreads;
  using Args = NormArgs;
  using Shared = RowShared;

  template <class Cta>
  static MODIFF_HD void run(Cta& cta, Shared& shared, const Args& args) {
    const uint32_t groups = static_cast<uint32_t>(args.num_groups), block = static_cast<uint32_t>(cta.block());
    const uint32_t per_group = static_cast<uint32_t>(args.channels) / groups, parts = args.grid.tiles * per_group;
    const int64_t sample = block / groups, first = static_cast<int64_t>(block % groups) * per_group;
    const float* statistics = args.statistics + sample * args.grid.tiles * 2 * args.channels + first;
    const float size = static_cast<float>(args.rows) * static_cast<float>(per_group);

    float sum = 0.0f;
    for (uint32_t i = cta.thread(); i < parts; i += kThreads) {
      const Part part(args, statistics, sample, first, per_group, i);
      sum = fma_rn(part.rows, part.mean, sum);
    }
    const float mean = div_rn(row_sum(cta, shared.warps[0], kThreads, sum), size);
    float squares = 0.0f;
    for (uint32_t i = cta.thread(); i < parts; i += kThreads) {
      const Part part(args, statistics, sample, first, per_group, i);
      const float distance = part.mean - mean;
      squares += fma_rn(part.rows * distance, distance, part.squares);
    }
    const float variance = div_rn(row_sum(cta, shared.warps[1], kThreads, squares), size);
    const float inverse = div_rn(1.0f, ::sqrtf(add_rn(variance, args.eps)));
    float* a = args.coefficient + sample * args.channels + first;
    float* b = a + args.samples * args.channels;
    for (uint32_t c = cta.thread(); c < per_group; c += kThreads) {
      const float factor = inverse * parameter_at(args.gamma, sample * args.norm_stride + first + c, 1.0f);
      a[c] = factor;
      const float term = parameter_at(args.beta, sample * args.norm_stride + first + c, 0.0f);
      b[c] = fma_rn(args.shift_at(sample, first + c) - mean, factor, term);
    }
    clear_ranges(cta, kThreads, args.range, args.range_count);
  }

 private:
  // Statistics of one tile of rows of one channel, shifted.
  struct Part {
    float rows, mean, squares;
    MODIFF_HD Part(const Args& args, const float* statistics, int64_t sample, int64_t first, uint32_t per_group,
                   uint32_t i) {
      const int64_t tile = i / per_group, c = i % per_group;
      rows = args.tile_rows(tile);
      mean = statistics[tile * 2 * args.channels + c] + args.shift_at(sample, first + c);
      squares = statistics[(tile * 2 + 1) * args.channels + c];
    }
  };
};

}  // namespace modiff::cuda
