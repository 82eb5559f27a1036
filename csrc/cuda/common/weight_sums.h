// The sums of a weight's codes that zero points are multiplied with in the epilogue (epilogue.h):
//
//   tap_sums[n, t] = sum of the codes of output channel n over the channels of tap t; without padding over all taps
//
//   weight      [N, taps * channels]   packed in kpack_v1
//   tap_sums    [N, T]                 int32, T as in epilogue.h
//
// A warp per sum, which reads eight codes per thread at a time. The weight is read once; next to the product, which
// reads it as often as it has rows of tiles, that is little.
#pragma once
#include "common/cta.h"
#include "common/packing.h"
#include "cuda/product.h"

namespace modiff::cuda {

// Sums per output channel that a call needs.
inline int64_t tap_sum_count(const ProductProblem& p) {
  return p.pad_h == 0 && p.pad_w == 0 ? 1 : p.kernel_h * p.kernel_w;
}

struct WeightSumsArgs {
  const uint8_t* weight;
  int32_t* sums;
  int64_t columns, taps;
  int64_t codes, k;  // of a sum, of a row
  int bits;
  bool whole;  // sums begin at multiples of eight codes, and rows at words
};

inline WeightSumsArgs weight_sums_args(const ProductCall& call, int32_t* tap_sums) {
  const ProductProblem& p = call.problem;
  WeightSumsArgs args{};
  args.weight = reinterpret_cast<const uint8_t*>(p.weight);
  args.sums = tap_sums;
  args.columns = p.c_out;
  args.taps = tap_sum_count(p);
  args.k = p.kernel_h * p.kernel_w * (p.c_in / p.groups);
  args.codes = args.k / args.taps;
  args.bits = call.weight_bits;
  args.whole = args.codes % 8 == 0 && reinterpret_cast<uintptr_t>(p.weight) % 8 == 0;
  return args;
}

// Eight codes of a row from `at`, a multiple of eight, on.
MODIFF_HD void load_eight_codes(const uint8_t* row, int bits, int64_t k, int64_t at, uint32_t (&words)[2]) {
  if (bits == 8) {
#if defined(__CUDA_ARCH__)
    const uint2 both = *reinterpret_cast<const uint2*>(row + at);
    words[0] = both.x;
    words[1] = both.y;
#else
    std::memcpy(words, row + at, sizeof(words));
#endif
  } else if (bits == 4) {
    uint32_t word;
#if defined(__CUDA_ARCH__)
    word = *reinterpret_cast<const uint32_t*>(row + at / 2);
#else
    std::memcpy(&word, row + at / 2, sizeof(word));
#endif
    unpack_eight_nibbles(word, words[0], words[1]);
  } else {
    const uint8_t* low = row + at / 4;
    unpack_eight_planes(low[0] | static_cast<uint32_t>(low[1]) << 8, row[k / 4 + at / 8], words[0], words[1]);
  }
}

MODIFF_HD int32_t sum_of_bytes(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __dp4a(static_cast<int>(word), 0x01010101, 0);
#else
  int32_t sum = 0;
  for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(word >> (8 * i));
  return sum;
#endif
}

struct WeightSums {
  static constexpr int kThreads = 128;
  static constexpr int kSums = kThreads / kWarp;  // of a block
  using Args = WeightSumsArgs;
  struct Shared {};

  template <class Cta>
  static MODIFF_HD void run(Cta& cta, Shared&, const Args& args) {
    const int64_t index = cta.block() * kSums + cta.thread() / kWarp;
    const bool there = index < args.columns * args.taps;
    const uint8_t* row = args.weight + index / args.taps * packed_width(args.bits, args.k);
    const int64_t first = index % args.taps * args.codes, end = there ? first + args.codes : first;
    int32_t sum = 0;
    for (int64_t at = first + cta.thread() % kWarp * 8; at < end; at += kWarp * 8) {
      if (args.whole) {
        uint32_t words[2];
        load_eight_codes(row, args.bits, args.k, at, words);
        sum += sum_of_bytes(words[0]) + sum_of_bytes(words[1]);
      } else {
        for (int64_t i = at; i < least(at + 8, end); ++i) sum += unpack_code(row, args.bits, args.k, i);
      }
    }
    sum = cta.warp_sum(sum);
    if (there && cta.thread() % kWarp == 0) args.sums[index] = sum;
  }
};

template <class Launch>
void sum_weights(const ProductCall& call, int32_t* tap_sums, Launch& launch) {
  const WeightSumsArgs args = weight_sums_args(call, tap_sums);
  launch.template run<WeightSums>(ceil_div(args.columns * args.taps, WeightSums::kSums), args);
}

// The same on a stream. Returns 0, or the cudaError_t of the launch.
int weight_tap_sums(const ProductCall& call, int32_t* tap_sums, Stream stream);

}  // namespace modiff::cuda
