// What a thread holds of its rows, and the activation x that its prologue makes of it, in float32:
//
//   identity     x = h
//   group norm   x = silu?(a[n, c] * h + b[n, c])             a, b: norm_statistics.h
//   layer norm   x = (h - mean) / deviation * gamma[c] + beta[c]
//   GEGLU        x = h[c] * gelu(h[C + c]), gelu with erf
//
// No product is left open to fusion with what follows: the passes of a call compute the same x.
#pragma once
#include <type_traits>

#include "common/packing.h"
#include "cuda/common/quantize_tiling.h"

namespace modiff::cuda {

struct NoState {};  // plain form

template <>
struct Raw<NoState> {};

template <class State>
constexpr bool kHasState = !std::is_same_v<State, NoState>;

template <Prologue P, class In, class State>
struct Loaded {
  Raw<In> h;
  Raw<std::conditional_t<P == Prologue::kGeglu, In, NoState>> gate;
  Raw<State> old;
};

// Where a vector of row `row` (of all samples) begins, and the next row is: in one tensor or the other.
template <class In>
struct Source {
  const In* at;
  int64_t stride;

  template <class Args>
  MODIFF_HD Source(const Args& args, int64_t row, int64_t column) {
    const bool is_own = column < args.own;
    stride = is_own ? args.own : args.channels - args.own;
    at = static_cast<const In*>(is_own ? args.input : args.further) + row * stride +
         (is_own ? column : column - args.own);
  }
};

// `count` values from channel `column` of row `row` (of all samples) on. Loads only: nothing waits here.
template <Prologue P, class In, class State>
MODIFF_HD Loaded<P, In, State> load_vector(const QuantizeArgs& args, int64_t row, int64_t column, int count) {
  const bool whole = args.whole && count == kVector;
  const int64_t offset = row * args.channels + column;
  const In* input = static_cast<const In*>(args.input) + offset;
  if constexpr (P == Prologue::kGeglu) input += row * args.channels;
  if constexpr (P == Prologue::kIdentity || P == Prologue::kGroupNorm) input = Source<In>(args, row, column).at;
  Loaded<P, In, State> loaded;
  loaded.h = load_raw(input, count, whole);
  if constexpr (P == Prologue::kGeglu) loaded.gate = load_raw(input + args.channels, count, whole);
  if constexpr (kHasState<State>) loaded.old = load_raw(static_cast<const State*>(args.x_hat) + offset, count, whole);
  return loaded;
}

// Factor and offset of the channels of a vector.
struct Affine {
  float a[kVector], b[kVector];
};

template <Prologue P>
MODIFF_HD Affine load_affine(const QuantizeArgs& args, int64_t sample, int64_t column, int count) {
  Affine f{};
  if constexpr (P == Prologue::kGroupNorm) {
    const float* a = args.coefficient + sample * args.channels + column;
    const float* b = a + args.samples * args.channels;
    const bool whole = args.whole && count == kVector;
    const Raw<float> raw_a = load_raw(a, count, whole), raw_b = load_raw(b, count, whole);
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
      f.a[i] = value_of(raw_a, i);
      f.b[i] = value_of(raw_b, i);
    }
  }
  if constexpr (P == Prologue::kLayerNorm) {
    load_parameters(args.gamma, column, count, 1.0f, f.a);
    load_parameters(args.beta, column, count, 0.0f, f.b);
  }
  return f;
}

// The GPU's approximations, good to a few units in the last place of 1 + |x|: two instructions instead of twenty.
MODIFF_HD float silu(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(x, __fadd_rn(1.0f, __expf(-x)));
#else
  return x / (1.0f + ::expf(-x));
#endif
}

// x of value i of a vector; mean and inverse deviation are of its row (layer norm).
template <Prologue P, class In, class State>
MODIFF_HD float activation(const Loaded<P, In, State>& loaded, int i, const Affine& f, float mean, float inverse,
                           bool apply_silu) {
  const float h = value_of(loaded.h, i);
  if constexpr (P == Prologue::kGroupNorm) {
    const float x = fma_rn(f.a[i], h, f.b[i]);
    return apply_silu ? silu(x) : x;
  } else if constexpr (P == Prologue::kLayerNorm) {
    return add_rn(mul_rn(mul_rn(sub_rn(h, mean), inverse), f.a[i]), f.b[i]);
  } else if constexpr (P == Prologue::kGeglu) {
    return mul_rn(h, gelu(value_of(loaded.gate, i)));
  } else {
    return h;
  }
}

template <class S>
MODIFF_HD float old_value(const S& loaded, int i) {
  if constexpr (std::is_same_v<decltype(loaded.old), Raw<NoState>>) {
    return 0.0f;
  } else {
    return value_of(loaded.old, i);
  }
}

// The largest value of a block in every thread. `warps`: a word for each warp, free again after the next barrier.
template <class Cta>
MODIFF_HD uint32_t block_max(Cta& cta, uint32_t* warps, int threads, uint32_t value) {
  value = cta.warp_max(value);
  if (cta.thread() % kWarp == 0) warps[cta.thread() / kWarp] = value;
  cta.sync();
  uint32_t largest = 0;
  for (int warp = 0; warp < threads / kWarp; ++warp) largest = most(largest, warps[warp]);
  return largest;
}

// Eight codes, those past `count` 0, in kpack_v1. Bytes: they are few, and rows begin anywhere.
MODIFF_HD void store_packed(const QuantizeArgs& args, int64_t row, int64_t column, int count,
                            const int8_t (&codes)[kVector]) {
  uint8_t* out = reinterpret_cast<uint8_t*>(args.codes) + row * packed_width(args.packed_bits, args.channels);
  if (args.packed_bits == 4) {
    const uint32_t word = pack_nibbles(codes);
    MODIFF_UNROLL for (int i = 0; i < kVector / 2; ++i) {
      if (2 * i < count) out[column / 2 + i] = static_cast<uint8_t>(word >> (8 * i));
    }
    return;
  }
  const uint16_t low = pack_low_bits(codes);
  out[column / 4] = static_cast<uint8_t>(low);
  if (count > 4) out[column / 4 + 1] = static_cast<uint8_t>(low >> 8);
  out[ceil_div(args.channels, 4) + column / 8] = pack_high_bits(codes);
}

// Codes and state of one vector. residual[i] is what is quantised; the code is multiplied by multiplier[i]
// (per_block).
template <class In, class State, Prologue P>
MODIFF_HD void store_vector(const QuantizeArgs& args, int64_t row, int64_t column, int count,
                            Loaded<P, In, State>& loaded, const float (&residual)[kVector], float scale,
                            const float (&inverse)[kVector], const float (&multiplier)[kVector], float zero_point) {
  const bool whole = args.whole && count == kVector;
  const int64_t offset = row * args.channels + column;
  int8_t codes[kVector];
  MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
    const float code = mul_rn(code_of(residual[i], inverse[i], zero_point, args.half), multiplier[i]);
    codes[i] = static_cast<int8_t>(to_int(code));
    if constexpr (kHasState<State>) set_value(loaded.old, i, fma_rn(scale, code, value_of(loaded.old, i)));
  }
  if (args.packed_bits == 0) {
    store_codes(args.codes + offset, codes, count, whole);
  } else {
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
      codes[i] = i < count ? codes[i] : int8_t{0};
    store_packed(args, row, column, count, codes);
  }
  // The state is read again a step later; the L2 cache is for the codes, which the product reads now.
  if constexpr (kHasState<State>) store_raw(static_cast<State*>(args.x_hat) + offset, loaded.old, count, whole, true);
}

}  // namespace modiff::cuda
