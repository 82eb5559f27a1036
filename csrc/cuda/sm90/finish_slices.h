// The epilogue whose dtypes and operands are known at compile time, as common/epilogue.h has it for all: slices of 32
// columns of the tile, which TMA brings through stages of the pipeline.
//
// A stage holds two slices of kRows rows of 64 bytes, with 64B swizzling, in the order of columns, and for the same
// columns y_hat before `out`. A warp works on its own 16 rows of every slice: ldmatrix gives a thread the values that
// wgmma gives it the sums of, stmatrix puts the results in their place, and from there they leave by 16 bytes a thread.
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
  if (bias && (!args.bias.whole || (args.bias.dtype != DType::kFloat32 && args.bias.dtype != out))) return {};
  if (args.columns >= 1 << 24 || !args.whole || args.geglu || args.zero_point != nullptr || !narrow || (skip && args.skip_dtype != out)) return {};
  const bool half = out == DType::kFloat16, state_is_out = state && args.y_hat_dtype == out;
  if (state && half && !state_is_out) return {};
  const int pair = state_is_out ? (half ? 0 : 1) : state ? 2 : half ? 3 : 4;
  const bool own = !state_is_out || skip;  // `out` has a slice
  return {1 + 2 * pair + skip, state + own, {state || skip, state && skip}};
}

// Pairs of neighbouring columns of a slice, those of a thread of a warp: group * 8 + lane % 4 * 2.
struct Columns {
  float scale[kSlice / 8][2], bias[kSlice / 8][2];
};

// A pair of float32, which is aligned, and one of 2-byte values.
MODIFF_HD void load_pair(const float* p, float (&pair)[2]) {
#if defined(__CUDA_ARCH__)
  const float2 both = *reinterpret_cast<const float2*>(p);
  pair[0] = both.x;
  pair[1] = both.y;
#else
  std::memcpy(pair, p, sizeof(pair));
#endif
}
template <class T>
MODIFF_HD void load_pair(const T* p, float (&pair)[2]) {
  Raw<T> raw;
#if defined(__CUDA_ARCH__)
  raw.word[0] = *reinterpret_cast<const uint32_t*>(p);
#else
  std::memcpy(raw.word, p, 4);
#endif
  pair[0] = value_of(raw, 0);
  pair[1] = value_of(raw, 1);
}

// Of a slice of which `left` columns are inside; `first` is this thread's first one. What is read past the end is not
// used.
template <class T>
MODIFF_HD void load_pairs(const void* base, uint32_t first, int left, float (&pairs)[kSlice / 8][2]) {
  MODIFF_UNROLL for (int group = 0; group < kSlice / 8; ++group) {
    load_pair(static_cast<const T*>(base) + (group * 8 < left ? first + static_cast<uint32_t>(group * 8) : first),
              pairs[group]);
  }
}

template <class Policy>
MODIFF_HD Columns load_columns(const EpilogueArgs& args, uint32_t first, int left) {
  Columns columns{};
  load_pairs<float>(args.weight_scale, first, left, columns.scale);
  if constexpr (!Policy::kState) {
    const bool there = args.bias.data != nullptr, wide = args.bias.dtype == DType::kFloat32;
    if (there && wide) load_pairs<float>(args.bias.data, first, left, columns.bias);
    if (there && !wide) load_pairs<typename Policy::Out>(args.bias.data, first, left, columns.bias);
  }
  return columns;
}

template <class P, class Policy, class Cta>
struct SliceEpilogue {
  using State = typename Policy::State;
  using Out = typename Policy::Out;
  static constexpr int kBlocks = P::kBlocks, kParts = Policy::kParts, kPairs = kSlice / 16;

  static MODIFF_HD void finish(Cta& cta, typename P::Shared& shared, const EpilogueArgs& args, const Work& work,
                               int consumer, const int32_t (&sums)[kBlocks][P::kSums], Ring<P::kStages>& ring) {
    const int thread = held(cta.thread()) % kWarpgroup, lane = thread % kWarp;
    const int tile_row = consumer * kBlocks * kMmaRows + thread / kWarp * 16;  // the warp's first one
    const int first_row = work.row_tile * P::kRows + tile_row + lane / 4, rows = static_cast<int>(args.rows);
    const int first_column = work.column_tile * P::kColumns + lane % 4 * kVector, rows_left = rows - first_row;
    float scale[kBlocks][2];
    MODIFF_UNROLL for (int i = 0; i < kBlocks * 2; ++i) {
      const int row = least(first_row + row_of(i), rows - 1);
      scale[i / 2][i % 2] = mul_rn(args.scale[quotient(row, args.rows_per_scale)], 1.0f / (1 << P::kRaised));
    }
    const int64_t at = int64_t{first_row} * args.columns + first_column;
    State* const y_hat_at = held(static_cast<State*>(args.y_hat) + at);
    // Without an `out` y_hat is stored twice.
    Out* const out_at = held(static_cast<Out*>(args.out == nullptr ? args.y_hat : args.out) + at);
    const uint32_t columns32 = static_cast<uint32_t>(args.columns);
    // Bytes in a slice: of this lane's row of matrices (the next 16 columns are 32 away, XORed), and of its vector.
    const uint32_t matrix = swizzled(static_cast<uint32_t>((tile_row + lane % 16) * 64 + lane / 16 * 16), 64);
    const uint32_t vector = swizzled(static_cast<uint32_t>((tile_row + lane / 4) * 64 + lane % 4 * 16), 64);
    const auto first_pair = static_cast<uint32_t>(work.column_tile * P::kColumns + lane % 4 * 2);
    const int inside = static_cast<int>(args.columns) - work.column_tile * P::kColumns;
    Columns columns = load_columns<Policy>(args, first_pair, inside);
    MODIFF_UNROLL for (int slice = 0; slice < P::kSlices; ++slice) {
      const int place = slice * kParts % P::kStageSlices, next = (slice + 1) * kSlice;
      if (place == 0) cta.wait(&shared.full[ring.stage], ring.parity);
      uint8_t* state = shared.codes[ring.stage] + place * P::kSliceBytes;
      uint8_t* out = state + (kParts - 1) * P::kSliceBytes;
      make_slice(cta, state, out, matrix, columns, scale, slice, sums);
      if (slice + 1 < P::kSlices && next < inside)
        columns = load_columns<Policy>(args, first_pair + static_cast<uint32_t>(next), inside - next);
      cta.warp_sync();
      Raw<State> states[kBlocks * 2];
      Raw<Out> outs[kBlocks * 2];
      MODIFF_UNROLL for (int i = 0; i < kBlocks * 2; ++i) {
        const uint32_t bytes = vector + static_cast<uint32_t>(row_of(i) * 64);
        if (Policy::kState) states[i] = load_raw(reinterpret_cast<const State*>(state + bytes), kVector, true);
        if (Policy::kOut) outs[i] = load_raw(reinterpret_cast<const Out*>(out + bytes), kVector, true);
      }
      if (place + kParts == P::kStageSlices || slice + 1 == P::kSlices) {
        cta.publish_stores();  // before TMA writes here again
        cta.warp_sync();
        if (lane == 0) cta.arrive(&shared.empty[ring.stage]);
        ring.advance();
      }
      MODIFF_UNROLL for (int i = 0; i < kBlocks * 2; ++i) {
        const uint32_t to = static_cast<uint32_t>(row_of(i)) * columns32;
        if (row_of(i) >= rows_left || lane % 4 * kVector >= inside - slice * kSlice) continue;
        // The state is read again a step later; the L2 cache is for what the next op reads.
        if constexpr (Policy::kState) store_raw(y_hat_at + to + slice * kSlice, states[i], kVector, true, true);
        if constexpr (Policy::kOut) {
          store_raw(out_at + to + slice * kSlice, outs[i], kVector, true, false);
        } else {
          store_raw(reinterpret_cast<State*>(out_at) + to + slice * kSlice, states[i], kVector, true, false);
        }
      }
    }
  }

 private:
  static MODIFF_HD constexpr int row_of(int i) { return i / 2 * kMmaRows + i % 2 * 8; }

  // y_hat and `out` of the warp's rows of a slice, in shared memory.
  static MODIFF_HD void make_slice(Cta& cta, uint8_t* state, uint8_t* out, uint32_t matrix, const Columns& columns,
                                   const float (&scale)[kBlocks][2], int slice,
                                   const int32_t (&sums)[kBlocks][P::kSums]) {
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
            value[j] = mul_rn(static_cast<float>(sums[block][sum + j]),
                              mul_rn(scale[block][m % 2], columns.scale[group][j]));
            value[j] = Policy::kState ? add_rn(value_of(old[pair], m * 2 + j), value[j])
                                      : add_rn(value[j], columns.bias[group][j]);
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
