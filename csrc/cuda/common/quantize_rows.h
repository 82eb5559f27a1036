// The passes by rows: `RowPass` quantises rows that a scale or a layer norm is reduced over, `RowStatistics` is the
// layer norm's first step where scales cover more than a row (then the tile passes follow).
//
// Operands: as in quantize_tiles.h; mean [N, R, 2] float32: mean and 1 / sqrt(variance + eps) of every row.
// Blocks and threads: quantize_tiling.h, "rows": 256 threads, `width` of them on a row, 4 vectors of 8 values each,
// which stay in registers between the reductions; sums are trees of a fixed shape, so that runs agree bit for bit.
// Shared memory: 64 bytes. Limit: rows of kMostRowChannels = 8192 channels. Bytes per element: RowPass s + 2t + 1
// (GEGLU 2s + 2t + 1), everything read once; RowStatistics s.
#pragma once
#include "common/cta.h"
#include "cuda/common/activation.h"

namespace modiff::cuda {

struct RowShared {
  uint32_t warps[2][kRowThreads / kWarp];
};

// A thread's place: its row of all samples, whether there is one, and its first vector.
struct RowPlace {
  int64_t row;
  bool inside;
  int lane;

  template <class Cta>
  MODIFF_HD RowPlace(const Cta& cta, const QuantizeArgs& args) {
    int64_t block = cta.block();
    const int64_t rows = args.samples * args.rows;
    const int tall = kRowThreads / args.row_width;
    if (args.backwards) block = ceil_div(static_cast<uint32_t>(rows), static_cast<uint32_t>(tall)) - 1 - block;
    row = block * tall + cta.thread() / args.row_width;
    inside = row < rows;
    lane = cta.thread() % args.row_width;
  }

  MODIFF_HD int64_t column(const QuantizeArgs& args, int j) const {
    return (lane + static_cast<int64_t>(j) * args.row_width) * kVector;
  }
  MODIFF_HD int count(const QuantizeArgs& args, int j) const {
    return inside ? static_cast<int>(least<int64_t>(most<int64_t>(args.channels - column(args, j), 0), kVector)) : 0;
  }
};

// Merges a value of every warp over the warps of a row. `warps` is free again after the next barrier: two take turns.
template <class Cta, class Merge>
MODIFF_HD uint32_t over_row(Cta& cta, uint32_t* warps, int width, uint32_t value, const Merge& merge) {
  if (width == kWarp) return value;
  const int warp = cta.thread() / kWarp, count = width / kWarp, first = warp / count * count;
  if (cta.thread() % kWarp == 0) warps[warp] = value;
  cta.sync();
  value = warps[first];
  for (int i = 1; i < count; ++i) value = merge(value, warps[first + i]);
  return value;
}

template <class Cta>
MODIFF_HD uint32_t row_max(Cta& cta, uint32_t* warps, int width, uint32_t value) {
  return over_row(cta, warps, width, cta.warp_max(value), [](uint32_t a, uint32_t b) { return most(a, b); });
}

template <class Cta>
MODIFF_HD float row_sum(Cta& cta, uint32_t* warps, int width, float value) {
  const uint32_t bits = over_row(cta, warps, width, float_to_bits(cta.warp_sum(value)), [](uint32_t a, uint32_t b) {
    return float_to_bits(add_rn(bits_to_float(a), bits_to_float(b)));
  });
  return bits_to_float(bits);
}

// Mean of a row, and 1 / sqrt(variance + eps).
struct Moments {
  float mean = 0.0f, inverse = 0.0f;

  template <class Cta, class S>
  MODIFF_HD void measure(Cta& cta, RowShared& shared, const QuantizeArgs& args, const RowPlace& place,
                         const S (&loaded)[kThreadVectors]) {
    const float channels = static_cast<float>(args.channels);
    float sum = 0.0f;
    MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j) {
      MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
        sum += value_of(loaded[j].h, i);  // 0 where there is no element
    }
    mean = div_rn(row_sum(cta, shared.warps[0], args.row_width, sum), channels);
    float squares = 0.0f;
    MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j) {
      const int count = place.count(args, j);
      MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
        const float distance = i < count ? value_of(loaded[j].h, i) - mean : 0.0f;
        squares = fma_rn(distance, distance, squares);
      }
    }
    const float variance = div_rn(row_sum(cta, shared.warps[1], args.row_width, squares), channels);
    inverse = div_rn(1.0f, ::sqrtf(add_rn(variance, args.eps)));
  }
};

// Several kernels begin a call: whichever does clears the ranges that later ones take the maximum into.
template <class Cta>
MODIFF_HD void clear_ranges(const Cta& cta, int threads, uint32_t* range, int64_t count) {
  if (cta.block() != 0) return;
  for (int64_t i = cta.thread(); i < count; i += threads) range[i] = 0;
}

template <class In>
struct RowStatistics {
  static constexpr int kThreads = kRowThreads;
  using Args = QuantizeArgs;
  using Shared = RowShared;

  template <class Cta>
  static MODIFF_HD void run(Cta& cta, Shared& shared, const Args& args) {
    const RowPlace place(cta, args);
    Loaded<Prologue::kLayerNorm, In, NoState> loaded[kThreadVectors];
    MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j)
      loaded[j] =
          load_vector<Prologue::kLayerNorm, In, NoState>(args, place.row, place.column(args, j), place.count(args, j));
    Moments moments;
    moments.measure(cta, shared, args, place, loaded);
    if (place.inside && place.lane == 0) {
      args.mean[2 * place.row] = moments.mean;
      args.mean[2 * place.row + 1] = moments.inverse;
    }
    clear_ranges(cta, kThreads, args.range, args.range_count);
  }
};

template <Prologue P, class In, class State>
struct RowPass {
  static constexpr int kThreads = kRowThreads;
  using Args = QuantizeArgs;
  using Shared = RowShared;

  template <class Cta>
  static MODIFF_HD void run(Cta& cta, Shared& shared, const Args& args) {
    const RowPlace place(cta, args);
    Loaded<P, In, State> loaded[kThreadVectors];
    MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j)
      loaded[j] = load_vector<P, In, State>(args, place.row, place.column(args, j), place.count(args, j));
    Moments moments;
    if constexpr (P == Prologue::kLayerNorm) moments.measure(cta, shared, args, place, loaded);

    // There are less than 2^31 rows: a division of 32 bits is much the cheaper one.
    const int64_t sample = place.inside ? static_cast<uint32_t>(place.row) / static_cast<uint32_t>(args.rows) : 0;
    float residual[kThreadVectors][kVector];
    uint32_t largest = 0, below = 0;
    MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j) {
      const int count = place.count(args, j);
      const Affine f = load_affine<P>(args, sample, place.column(args, j), count);
      MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
        const float x = activation(loaded[j], i, f, moments.mean, moments.inverse, args.silu);
        residual[j][i] = i < count ? sub_rn(x, old_value(loaded[j], i)) : 0.0f;
        below = most(below, magnitude_below(residual[j][i]));
        largest = most(largest, args.affine ? magnitude_above(residual[j][i]) : magnitude(residual[j][i]));
      }
    }
    largest = row_max(cta, shared.warps[0], args.row_width, largest);
    if (args.affine) below = row_max(cta, shared.warps[1], args.row_width, below);

    const int64_t granule = args.granularity == Granularity::kPerToken    ? place.row
                            : args.granularity == Granularity::kPerTensor ? 0
                                                                          : sample;
    if (!place.inside) return;  // no barrier follows
    float scale, zero_point = 0.0f;
    const float absmax = bits_to_float(largest);
    if (args.given != nullptr) {
      scale = given_scale(args, granule);
    } else if (args.affine) {
      scale = affine_scale(bits_to_float(below), absmax, args.half);
      zero_point = affine_zero_point(bits_to_float(below), scale, args.half);
    } else {
      scale = residual_scale(absmax, args.clip_ratio, args.half);
    }
    if (place.lane == 0) {
      if (args.granularity != Granularity::kPerToken) {
        cta.atomic_max(args.range + granule, largest);
      } else if (kHasState<State>) {
        args.range[granule] = largest;
      }
      args.scale[granule] = scale;  // rows of a granule write the same
      if (args.zero_point != nullptr) args.zero_point[granule] = to_int(zero_point);
    }

    float multiplier[kVector], inverse[kVector];
    const float inv_scale = div_rn(1.0f, scale);
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
      multiplier[i] = 1.0f;
      inverse[i] = inv_scale;
    }
    MODIFF_UNROLL for (int j = 0; j < kThreadVectors; ++j) {
      const int count = place.count(args, j);
      if (count > 0)
        store_vector(args, place.row, place.column(args, j), count, loaded[j], residual[j], scale, inverse, multiplier,
                     zero_point);
    }
  }
};

}  // namespace modiff::cuda
