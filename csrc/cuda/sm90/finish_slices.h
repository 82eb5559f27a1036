// The epilogue whose dtypes and operands are known at compile time, as common/epilogue.h has it for all: slices of 32
// columns of the tile, which TMA brings through stages of the pipeline.
//
// A stage holds two slices of kRows rows of 64 bytes, with 64B swizzling, in the order of columns, and for the same
// columns y_hat before `out`. A warp works on its own 16 rows of every slice: ldmatrix gives a thread the values that
// wgmma gives it the sums of, stmatrix puts the results in their place, and from there TMA stores them, a box of 16 rows
// at a time; what is past the end of the tensor it leaves out. A stage is given back when TMA has read it.
#pragma once
#include <type_traits>

#include "cuda/sm90/product_tile.h"

namespace modiff::cuda::sm90 {

template <class State_, class Out_, bool skip>
struct Policy {
  static constexpr bool kState = !std::is_void_v<State_>, kSkip = skip;
  using Out = Out_;
  using State = std::conditional_t<kState, State_, Out>;
  // `out` has a slice of its own unless it is y_hat.
  static constexpr bool kOut = !kState || kSkip || !std::is_same_v<State, Out>;
  static constexpr int kParts = kState + kOut;
};

// The policies that there are, each without and with a skip.
template <bool skip, class F>
MODIFF_HD void with_policy(int pair, F&& f) {
  switch (pair) {
    case 0:
      return f(Policy<Half, Half, skip>{});
    case 1:
      return f(Policy<BFloat16, BFloat16, skip>{});
    case 2:
      return f(Policy<Half, BFloat16, skip>{});
    case 3:
      return f(Policy<void, Half, skip>{});
    default:
      return f(Policy<void, BFloat16, skip>{});
  }
}

template <class F>
MODIFF_HD void with_policy(const SlicePolicy& slice, F&& f) {
  const int pair = (slice.policy - 1) / 2;
  return slice.policy % 2 == 0 ? with_policy<true>(pair, f) : with_policy<false>(pair, f);
}

inline SlicePolicy slice_policy(const EpilogueArgs& args) {
  const bool skip = args.out != nullptr && args.skip != nullptr, state = args.y_hat != nullptr;
  const DType out = args.out == nullptr ? args.y_hat_dtype : args.out_dtype;
  const bool narrow = out != DType::kFloat32 && !(state && args.y_hat_dtype == DType::kFloat32);
  const bool bias = !state && args.bias.data != nullptr;
  if (bias && (!args.bias.whole || args.bias.dtype != out)) return {};
  // One sum of the weight's codes for all pixels of a column.
  const bool zero_points = args.zero_point != nullptr;
  if (zero_points && (state || args.padded || !aligned_to_vectors(args.tap_sums))) return {};
  if (!args.whole || args.geglu || !narrow || (skip && args.skip_dtype != out)) return {};
  const bool half = out == DType::kFloat16, state_is_out = state && args.y_hat_dtype == out;
  if (state && half && !state_is_out) return {};
  const int pair = state_is_out ? (half ? 0 : 1) : state ? 2 : half ? 3 : 4;
  const bool own = !state_is_out || skip;  // `out` has a slice
  return {1 + 2 * pair + skip, state + own, {state || skip, state && skip}};
}

// Pairs of neighbouring columns of a slice, those of a thread of a warp: group * 8 + lane % 4 * 2.
template <class Out>
struct Columns {
  float scale[kSlice / 8][2];
  Raw<Out> bias;
  int32_t tap_sums[kSlice / 8][2];  // with zero points
};

// Of a slice of which `left` columns are inside; `first` is this thread's first one. What is read past the end is not
// used.
template <class Out, bool plain>
MODIFF_HD Columns<Out> load_columns(const EpilogueArgs& args, uint32_t first, int left) {
  Columns<Out> columns{};
  MODIFF_UNROLL for (int group = 0; group < kSlice / 8; ++group) {
    const uint32_t at = group * 8 < left ? first + static_cast<uint32_t>(group * 8) : first;
    load_aligned(args.weight_scale + at, columns.scale[group]);
    if (plain && args.bias.data != nullptr)
      load_aligned(static_cast<const Out*>(args.bias.data) + at, columns.bias.word[group]);
    if (plain && args.zero_point != nullptr) load_aligned(args.tap_sums + at, columns.tap_sums[group]);
  }
  return columns;
}

template <class P, class Policy, class Cta>
struct SliceEpilogue {
  using State = typename Policy::State;
  using Out = typename Policy::Out;
  static constexpr int kBlocks = P::kBlocks, kParts = Policy::kParts, kPairs = kSlice / 16;

  template <class Map>
  static MODIFF_HD void finish(Cta& cta, typename P::Shared& shared, const ProductArgs<Map>& args, const Work& work,
                               int consumer, const int32_t (&sums)[kBlocks][P::kSums], Ring<P::kStages>& ring) {
    const int thread = held(cta.thread()) % kWarpgroup, lane = thread % kWarp;
    const int tile_row = consumer * kBlocks * kMmaRows + thread / kWarp * 16;  // the warp's first one
    const int first_row = work.row_tile * P::kRows + tile_row, rows = static_cast<int>(args.epilogue.rows);
    Rows own;
    MODIFF_UNROLL for (int i = 0; i < kBlocks * 2; ++i) {
      const int row = least(first_row + lane / 4 + i / 2 * kMmaRows + i % 2 * 8, rows - 1);
      const int64_t granule = quotient(row, args.epilogue.rows_per_scale);
      own.scale[i / 2][i % 2] = mul_rn(args.epilogue.scale[granule], 1.0f / (1 << P::kRaised));
      own.zero_point[i / 2][i % 2] = 0;
      if (!Policy::kState && args.epilogue.zero_point != nullptr)
        own.zero_point[i / 2][i % 2] = args.epilogue.zero_point[granule] * (1 << P::kRaised);
    }
    // Bytes in a slice of this lane's row of matrices; the next 16 columns are 32 away, XORed.
    const uint32_t matrix = swizzled(static_cast<uint32_t>((tile_row + lane % 16) * 64 + lane / 16 * 16), 64);
    const auto first_pair = static_cast<uint32_t>(work.column_tile * P::kColumns + lane % 4 * 2);
    const int inside = static_cast<int>(args.epilogue.columns) - work.column_tile * P::kColumns;
    Columns<Out> columns = load_columns<Out, !Policy::kState>(args.epilogue, first_pair, inside);
    const bool leader = cta.elect();
    int before = 0;  // the stage whose release is due
    MODIFF_UNROLL for (int slice = 0; slice < P::kSlices; ++slice) {
      const int place = slice * kParts % P::kStageSlices, next = (slice + 1) * kSlice;
      if (place == 0) cta.wait(&shared.full[ring.stage], ring.parity);
      uint8_t* state = shared.codes[ring.stage] + place * P::kSliceBytes;
      uint8_t* out = state + (kParts - 1) * P::kSliceBytes;
      make_slice(cta, state, out, matrix, columns, own, slice, sums);
      if (slice + 1 < P::kSlices && next < inside)
        columns =
            load_columns<Out, !Policy::kState>(args.epilogue, first_pair + static_cast<uint32_t>(next), inside - next);
      cta.publish_stores();
      cta.warp_sync();
      const int x = (work.column_tile * P::kColumns + slice * kSlice) * 2;
      const bool last = place + kParts == P::kStageSlices || slice + 1 == P::kSlices;
      if (leader) {
        MODIFF_UNROLL for (int block = 0; block < kBlocks; ++block) {
          const int down = tile_row + block * kMmaRows, y = first_row + block * kMmaRows;
          if (Policy::kState) cta.store_matrix(args.y_hat, state + down * 64, x, y);
          if (Policy::kOut || args.epilogue.out != nullptr) cta.store_matrix(args.out, out + down * 64, x, y);
        }
        if (last) {
          cta.store_commit();
          if (slice * kParts >= P::kStageSlices) {
            cta.template store_wait<1>();
            release(cta, shared, args.schedule, before);
          }
        }
      }
      if (last) {
        before = ring.stage;
        ring.advance();
      }
    }
    if (leader) {
      cta.template store_wait<0>();
      release(cta, shared, args.schedule, before);
    }
    cta.warp_sync();
  }

 private:
  // Of this thread's rows; sums are 2^kRaised times as large.
  struct Rows {
    float scale[kBlocks][2];
    int32_t zero_point[kBlocks][2];
  };

  // y_hat and `out` of the warp's rows of a slice, in shared memory.
  static MODIFF_HD void make_slice(Cta& cta, uint8_t* state, uint8_t* out, uint32_t matrix, const Columns<Out>& columns,
                                   const Rows& own, int slice, const int32_t (&sums)[kBlocks][P::kSums]) {
    MODIFF_UNROLL for (int block = 0; block < kBlocks; ++block) {
      Raw<State> old[kPairs];
      Raw<Out> other[kPairs];
      MODIFF_UNROLL for (int pair = 0; pair < kPairs; ++pair) {
        if (Policy::kState) cta.load_matrices(old[pair].word, state + place_of(matrix, block, pair));
        if (Policy::kSkip) cta.load_matrices(other[pair].word, out + place_of(matrix, block, pair));
      }
      MODIFF_UNROLL for (int pair = 0; pair < kPairs; ++pair) {
        MODIFF_UNROLL for (int m = 0; m < 4; ++m) {  // rows m % 2 * 8, columns m / 2 * 8
          const int group = pair * 2 + m / 2, sum = slice * kSlice / 2 + group * 4 + m % 2 * 2;
          float value[2];
          MODIFF_UNROLL for (int j = 0; j < 2; ++j) {
            int32_t whole = sums[block][sum + j];
            if (!Policy::kState) whole -= own.zero_point[block][m % 2] * columns.tap_sums[group][j];
            value[j] = mul_rn(static_cast<float>(whole), mul_rn(own.scale[block][m % 2], columns.scale[group][j]));
            value[j] = Policy::kState ? add_rn(value_of(old[pair], m * 2 + j), value[j])
                                      : add_rn(value[j], value_of(columns.bias, group * 2 + j));
          }
          if constexpr (Policy::kState) {
            set_pair(old[pair], m, value[0], value[1]);
            MODIFF_UNROLL for (int j = 0; j < 2; ++j)
              value[j] = value_of(old[pair], m * 2 + j);
          }
          if constexpr (Policy::kSkip) {
            MODIFF_UNROLL for (int j = 0; j < 2; ++j)
              value[j] = add_rn(value[j], value_of(other[pair], m * 2 + j));
          }
          if constexpr (Policy::kOut) set_pair(other[pair], m, value[0], value[1]);
        }
        if (Policy::kState) cta.store_matrices(state + place_of(matrix, block, pair), old[pair].word);
        if (Policy::kOut) cta.store_matrices(out + place_of(matrix, block, pair), other[pair].word);
      }
    }
  }

  // Of the first block, columns 0 to 15, as `matrix`.
  static MODIFF_HD uint32_t place_of(uint32_t matrix, int block, int pair) {
    return (matrix ^ static_cast<uint32_t>(pair * 32)) + static_cast<uint32_t>(block * kMmaRows * 64);
  }
};

}  // namespace modiff::cuda::sm90
