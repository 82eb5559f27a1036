// Eight consecutive values of a row: what a thread loads and stores at a time. 16 bytes of a 2-byte dtype, twice that
// of float32, 8 bytes of codes. Where rows are no multiple of eight values, single elements, the missing ones 0.
#pragma once
#include <type_traits>

#include "common/dtype.h"
#include "common/problem.h"

namespace modiff::cuda {

constexpr int kVector = 8;

// The raw bits of eight values of T, in registers.
template <class T>
struct Raw {
  static constexpr int kWords = static_cast<int>(sizeof(T)) * kVector / 4;
  uint32_t word[kWords];
};

MODIFF_HD float value_of(const Raw<float>& raw, int i) { return bits_to_float(raw.word[i]); }
MODIFF_HD float value_of(const Raw<Half>& raw, int i) {
  return half_bits_to_float(static_cast<uint16_t>(raw.word[i / 2] >> (16 * (i % 2))));
}
MODIFF_HD float value_of(const Raw<BFloat16>& raw, int i) {
  return bfloat16_bits_to_float(static_cast<uint16_t>(raw.word[i / 2] >> (16 * (i % 2))));
}

MODIFF_HD void set_value(Raw<float>& raw, int i, float value) { raw.word[i] = float_to_bits(value); }
MODIFF_HD void set_half_word(uint32_t& word, int i, uint16_t bits) {
  const int shift = 16 * (i % 2);
  word = (word & ~(0xFFFFu << shift)) | static_cast<uint32_t>(bits) << shift;
}
MODIFF_HD void set_value(Raw<Half>& raw, int i, float value) {
  set_half_word(raw.word[i / 2], i, float_to_half_bits(value));
}
MODIFF_HD void set_value(Raw<BFloat16>& raw, int i, float value) {
  set_half_word(raw.word[i / 2], i, float_to_bfloat16_bits(value));
}

// Values 2i and 2i + 1.
MODIFF_HD void set_pair(Raw<float>& raw, int i, float first, float second) {
  set_value(raw, 2 * i, first);
  set_value(raw, 2 * i + 1, second);
}
MODIFF_HD void set_pair(Raw<Half>& raw, int i, float first, float second) {
  raw.word[i] = floats_to_half_pair(first, second);
}
MODIFF_HD void set_pair(Raw<BFloat16>& raw, int i, float first, float second) {
  raw.word[i] = floats_to_bfloat16_pair(first, second);
}

MODIFF_HD float element(const float* p) { return *p; }
MODIFF_HD float element(const Half* p) { return half_bits_to_float(p->bits); }
MODIFF_HD float element(const BFloat16* p) { return bfloat16_bits_to_float(p->bits); }
MODIFF_HD void set_element(float* p, float value) { *p = value; }
MODIFF_HD void set_element(Half* p, float value) { p->bits = float_to_half_bits(value); }
MODIFF_HD void set_element(BFloat16* p, float value) { p->bits = float_to_bfloat16_bits(value); }

// As many values of T as `to` holds, of 4 or 8 bytes, to which p is aligned.
template <class T, class To>
MODIFF_HD void load_aligned(const T* p, To& to) {
#if defined(__CUDA_ARCH__)
  using Word = std::conditional_t<sizeof(To) == 8, uint2, uint32_t>;
  const Word word = *reinterpret_cast<const Word*>(p);
  std::memcpy(&to, &word, sizeof(To));
#else
  std::memcpy(&to, p, sizeof(To));
#endif
}

// `whole`: p is aligned to 16 bytes and all eight values are there. Otherwise the first `count` are.
template <class T>
MODIFF_HD Raw<T> load_raw(const T* p, int count, bool whole) {
  Raw<T> raw;
  if (whole) {
#if defined(__CUDA_ARCH__)
    MODIFF_UNROLL for (int i = 0; i < Raw<T>::kWords; i += 4) {
      const uint4 part = reinterpret_cast<const uint4*>(p)[i / 4];
      raw.word[i] = part.x;
      raw.word[i + 1] = part.y;
      raw.word[i + 2] = part.z;
      raw.word[i + 3] = part.w;
    }
#else
    std::memcpy(raw.word, p, sizeof(raw.word));
#endif
    return raw;
  }
  MODIFF_UNROLL for (int i = 0; i < Raw<T>::kWords; ++i)
    raw.word[i] = 0;
  MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
    if (i < count) set_value(raw, i, element(p + i));
  }
  return raw;
}

// The first kValues values. `streaming`: it leaves the L2 cache first.
template <int kValues = kVector, class T>
MODIFF_HD void store_raw(T* p, const Raw<T>& raw, int count, bool whole, [[maybe_unused]] bool streaming) {
  constexpr int kWords = Raw<T>::kWords * kValues / kVector;
  if (whole) {
#if defined(__CUDA_ARCH__)
    if constexpr (kWords == 2) *reinterpret_cast<uint2*>(p) = make_uint2(raw.word[0], raw.word[1]);
    MODIFF_UNROLL for (int i = 0; i + 4 <= kWords; i += 4) {
      const uint4 part = make_uint4(raw.word[i], raw.word[i + 1], raw.word[i + 2], raw.word[i + 3]);
      if (streaming) {
        __stcs(reinterpret_cast<uint4*>(p) + i / 4, part);
      } else {
        __stwb(reinterpret_cast<uint4*>(p) + i / 4, part);  // an assignment may become four stores
      }
    }
#else
    std::memcpy(p, raw.word, kWords * sizeof(uint32_t));
#endif
    return;
  }
  MODIFF_UNROLL for (int i = 0; i < kValues; ++i) {
    if (i < count) set_element(p + i, value_of(raw, i));
  }
}

MODIFF_HD void store_codes(int8_t* p, const int8_t (&codes)[kVector], int count, bool whole) {
  if (whole) {
    uint32_t word[2] = {0, 0};
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
      word[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(codes[i])) << (8 * (i % 4));
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<uint2*>(p) = make_uint2(word[0], word[1]);
#else
    std::memcpy(p, word, sizeof(word));
#endif
    return;
  }
  MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
    if (i < count) p[i] = codes[i];
  }
}

// With erf.
MODIFF_HD float gelu(float x) { return mul_rn(mul_rn(0.5f, x), add_rn(1.0f, ::erff(mul_rn(x, 0.70710678118654752f)))); }

// A vector of parameters (gamma, beta, shift) in the dtype that the model has it in; null: not there.
struct Parameter {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  bool whole = false;  // aligned to 16 bytes
};

inline Parameter parameter_of(const void* data, DType dtype) {
  return {data, dtype, reinterpret_cast<uintptr_t>(data) % 16 == 0};
}

template <class T>
MODIFF_HD void load_values(const T* p, int count, bool whole, float (&values)[kVector]) {
  const Raw<T> raw = load_raw(p, count, whole);
  MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
    values[i] = value_of(raw, i);
}

// Eight values from parameter[at] on, those past `count` 0; `missing` where there is no parameter.
MODIFF_HD void load_parameters(const Parameter& parameter, int64_t at, int count, float missing,
                               float (&values)[kVector]) {
  const bool whole = count == kVector && parameter.whole;
  if (parameter.data == nullptr) {
    MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
      values[i] = missing;
  } else if (parameter.dtype == DType::kFloat32) {
    load_values(static_cast<const float*>(parameter.data) + at, count, whole, values);
  } else if (parameter.dtype == DType::kFloat16) {
    load_values(static_cast<const Half*>(parameter.data) + at, count, whole, values);
  } else {
    load_values(static_cast<const BFloat16*>(parameter.data) + at, count, whole, values);
  }
}

// parameter[at], or `missing` where there is no parameter.
MODIFF_HD float parameter_at(const Parameter& parameter, int64_t at, float missing) {
  if (parameter.data == nullptr) return missing;
  return parameter.dtype == DType::kFloat32   ? element(static_cast<const float*>(parameter.data) + at)
         : parameter.dtype == DType::kFloat16 ? element(static_cast<const Half*>(parameter.data) + at)
                                              : element(static_cast<const BFloat16*>(parameter.data) + at);
}

}  // namespace modiff::cuda
