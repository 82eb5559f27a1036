// Attention over tokens, out = softmax(scale * q k^T) v, with products of integers: a head of a sample, or a part of its
// queries, a task. A file attention_<instruction set>.cpp includes this one.
//
//   operand  shape                               dtype  layout
//   q        [samples, queries, heads * width]   f32    rows contiguous, any row and sample stride
//   k, v     [samples, keys, heads * width]      f32    likewise
//   out      [samples, queries, heads * width]   f32    contiguous
//
// vpdpwssd does 32 multiply-adds of 16 bits where a float instruction does 16, and int16 keeps more bits than bfloat16;
// vpdpbusd does 64 of 8 bits. An error in a score multiplies a weight, and grows with the scores of a network; one in a
// weight or a value is averaged over the keys. So scores are made of 16 bits, and the output of 8:
//   scores   Rows of q, and all keys less their mean, which moves every score of a query alike, become codes of a
//            Euclidean norm up to kRowNorm: no sum of their products leaves int32, by Cauchy and Schwarz. Its upper half
//            times a factor of the query is the score in steps of 1 / kOctave powers of two. Where |q| times the largest
//            |k| passes kWide, sums are floats, and what rounding lost of both rows is multiplied as well.
//   weights  2^(score - most) of a part of kPart keys, `most` that of the part up to an eighth of a power of two, are
//            codes from 0 to 255, computed in 16 bits.
//   values   codes up to kMaxValue of a scale per part and channel.
// A part's sums are added to floats, scaled by the part's own most; the sum of the codes of the weights divides the
// output. SQNR to float64 is 40 dB, of which values have 44 and weights 43.
//
// Both products are the same one: rows of A, broadcast four bytes at a time, times groups of rows of B. Sums of
// kRegisterRows rows by up to kVectors vectors stay in registers. A task copies keys [width / 2, keys, 2] and values
// [keys / 4, width, 4] of its head, padded to whole vectors; the scores of kQueries queries and kKeys keys stay in the
// second-level cache. Bound: queries * keys * width multiply-adds a head at 32 a cycle and core (Zen 4), as many at 64,
// and a third of a cycle a score for its exponential. Without VNNI a vpmaddwd and a vpaddd, as many as in float32, and a
// vpmaddubsw before them for bytes, for which weights have 7 bits.
//
// With AMX (MODIFF_TILES) both products are those of tiles of bytes, 1024 multiply-adds a cycle. A code of a score is
// 256 times an upper byte and a lower one, both with sign: the product of the upper bytes and a 256th of the two mixed
// ones are the upper half of a sum, where what the lower bytes are worth, half a unit at width 40, is left out. Keys are
// copied as tiles, [keys / 32, 2, 2, width / 4, 16, 4]. Wide scores have no such form.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/problem.h"
#include "cpu/attention.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#ifdef MODIFF_TILES
#include "cpu/tiles.h"
#endif

namespace modiff::cpu {
namespace {

constexpr int64_t kLanes = 16, kWords = 32, kPart = 128;  // int32 and int16 of a register; keys
constexpr int64_t kQueries = 96, kKeys = 4 * kPart;       // of a block
constexpr int kRegisterRows = 6, kVectors = 4;            // 24 sums, 4 of B and a broadcast in 32 registers
constexpr float kRowNorm = 32000.0f, kMaxValue = 127.0f;
#ifdef __AVX512VNNI__
constexpr int kWeightBits = 8;
#else
constexpr int kWeightBits = 7;  // two products with values fit int16
#endif
constexpr int kOctave = 128, kEighth = kOctave / 8;  // steps of a score
constexpr int kZeroOctave = kWeightBits + 1;
constexpr float kWide = 122.0f;  // powers of two; the factor of a query fits int16
constexpr float kLow = 4096.0f;  // steps of the low codes in one of the others; low * other fits int32 to width 1024
constexpr float kNone = -1e30f;  // below all scores
#ifdef MODIFF_TILES
constexpr int64_t kKeysUnit = kTileBytes;  // weights of a query and rows of values, of which more are 0
#else
constexpr int64_t kKeysUnit = kLanes;
#endif

int64_t round_to(int64_t v, int64_t step) { return (v + step - 1) / step * step; }

// 2^x for x <= 0, a multiple of an eighth.
float power_of_two(float x) {
  static constexpr float eighths[] = {1.0f,        1.09050773f, 1.18920712f, 1.29683955f,
                                      1.41421356f, 1.54221083f, 1.68179283f, 1.83400809f};
  const auto n = static_cast<int32_t>(8.0f * std::max(x, -126.0f));
  return eighths[n & 7] * bits_to_float(static_cast<uint32_t>((n >> 3) + 127) << 23);
}

bool is_finite(float v) { return (float_to_bits(v) & 0x7F800000u) != 0x7F800000u; }

// sum + products of pairs, in the register of sum: GCC copies the result of the intrinsic, and spills.
MODIFF_INLINE void dot(__m512i& sum, __m512i a, __m512i b, int16_t) {
#ifdef __AVX512VNNI__
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

// Of four: those of a without sign.
MODIFF_INLINE void dot(__m512i& sum, __m512i a, __m512i b, uint8_t) {
#ifdef __AVX512VNNI__
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
#endif
}

// The upper halves of two registers of int32, to permutex2var_epi16.
MODIFF_INLINE __m512i odd_words() {
  alignas(64) static constexpr int16_t index[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                  33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_load_si512(index);
}

// A product: a [rows, depth], b [depth / group, columns, group] with groups of as many rows as fill four bytes, b_row
// columns apart; to c: the upper halves of the sums, or floats, or added to it times a factor per row and one per column.
template <class A, class B, class C>
struct Product {
  const A* a;
  const B* b;
  int64_t a_row, b_row, depth;
  C* c;
  int64_t c_row;
  const float *row_factor, *column_factor;  // null: c is written
};

// Not inlined: GCC keeps the sums in memory then.
template <class A, class B, class C, int MR, int NR>
__attribute__((noinline)) void tile(const Product<A, B, C>& p, int64_t first, int64_t column) {
  constexpr int64_t kGroup = 4 / sizeof(A);
  __m512i acc[MR][NR];
  const A* row[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    row[m] = p.a + (first + m) * p.a_row;
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) acc[m][n] = _mm512_setzero_si512();
  }
  const B* b = p.b + kGroup * column;
  for (int64_t k = 0; k < p.depth; k += kGroup, b += kGroup * p.b_row) {
    __m512i columns[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) columns[n] = _mm512_loadu_si512(b + n * kGroup * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      int32_t group;
      std::memcpy(&group, row[m] + k, sizeof(group));
      const __m512i value = _mm512_set1_epi32(group);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) dot(acc[m][n], value, columns[n], A());
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    C* to = p.c + (first + m) * p.c_row + column;
    if constexpr (std::is_same_v<C, int16_t>) {
#pragma GCC unroll 8
      for (int n = 0; n + 1 < NR; n += 2)
        _mm512_storeu_si512(to + n * kLanes, _mm512_permutex2var_epi16(acc[m][n], odd_words(), acc[m][n + 1]));
      if (NR % 2 != 0)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (NR - 1) * kLanes),
                            _mm512_cvtepi32_epi16(_mm512_srai_epi32(acc[m][NR - 1], 16)));
    } else {
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) {
        __m512 sum = _mm512_cvtepi32_ps(acc[m][n]);
        if (p.row_factor != nullptr) {
          sum = _mm512_mul_ps(sum, _mm512_loadu_ps(p.column_factor + column + n * kLanes));
          sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(p.row_factor[first + m]), _mm512_loadu_ps(to + n * kLanes));
        }
        _mm512_storeu_ps(to + n * kLanes, sum);
      }
    }
  }
}

template <class A, class B, class C>
using TileFn = void (*)(const Product<A, B, C>&, int64_t, int64_t);

template <class A, class B, class C, int... I>
TileFn<A, B, C> tile_for(int64_t rows, int64_t vectors, std::integer_sequence<int, I...>) {
  static constexpr TileFn<A, B, C> tiles[] = {&tile<A, B, C, I / kVectors + 1, I % kVectors + 1>...};
  return tiles[(rows - 1) * kVectors + vectors - 1];
}

template <class A, class B, class C>
void multiply(const Product<A, B, C>& p, int64_t rows, int64_t columns) {
  for (int64_t n = 0; n < columns;) {
    const int64_t vectors = std::min<int64_t>((columns - n) / kLanes, kVectors);
    for (int64_t m = 0; m < rows; m += kRegisterRows) {
      const int64_t count = std::min<int64_t>(rows - m, kRegisterRows);
      tile_for<A, B, C>(count, vectors, std::make_integer_sequence<int, kRegisterRows * kVectors>())(p, m, n);
    }
    n += vectors * kLanes;
  }
}

MODIFF_INLINE __m512i words(int value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }

int largest_of(__m512i v) {
  const __m256i half = _mm256_max_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i most = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i least = _mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(INT16_MAX), most));  // without sign
  return INT16_MAX - _mm_extract_epi16(least, 0);
}

// rint(2^(kWeightBits + t)), t <= -1 step of 1 / kOctave, given kZeroOctave octaves higher, which makes shifts of them.
// 2^f = 1 + f (0.6602 + 0.3398 f) to 0.3 % on an octave: the step of a code is 0.4 %.
MODIFF_INLINE __m512i weight_codes(__m512i t) {
  const __m512i f = _mm512_and_si512(_mm512_slli_epi16(t, 8), words(0x7FFF));                 // of 2^15
  const __m512i slope = _mm512_add_epi16(_mm512_mulhrs_epi16(f, words(5567)), words(10817));  // of 2^14
  const __m512i power = _mm512_add_epi16(_mm512_mulhrs_epi16(f, slope), words(1 << 14));
  // A shift by more than 15, which a negative one is, gives 0.
  const __m512i octave = _mm512_sllv_epi16(words(1), _mm512_srai_epi16(t, 7));
  return _mm512_mulhrs_epi16(power, octave);
}

float norm_of(const float* row, const float* mean, int64_t width) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) squares += (row[i] - mean[i]) * (row[i] - mean[i]);
  return std::sqrt(squares);
}

// Codes of a row less `mean`, or what rounding lost of them in steps of 1 / kLow.
template <bool kIsLow = false>
void row_codes(const float* row, const float* mean, float inverse, int64_t width, int16_t* to) {
  for (int64_t i = 0; i < width; ++i) {
    const float value = (row[i] - mean[i]) * inverse, code = __builtin_rintf(value);
    to[i] = static_cast<int16_t>(kIsLow ? __builtin_rintf((value - code) * kLow) : code);
  }
  if (width % 2 != 0) to[width] = 0;
}

float inverse_of(float norm) { return norm > 0.0f ? kRowNorm / norm : 0.0f; }

struct Head {
  const AttentionProblem& p;
  const int64_t n, h;
  const int64_t keys = round_to(p.keys, kLanes), depth = round_to(p.width, 2), width = round_to(p.width, kLanes);
  const int64_t block = round_to(std::min(keys, kKeys), kKeysUnit);
  float *scores, *sums, *value_scale, *mean, *zeros;  // scores of int16 where they are not wide
  int16_t *key_codes, *low_keys, *queries, *low_queries, *lines;
  int8_t* values;
  uint8_t* weights;
  float largest_key = 0.0f;  // Euclidean norm
  bool finite = true, has_low = false;
#ifdef MODIFF_TILES
  const int64_t steps = (p.width + kTileBytes - 1) / kTileBytes, step = round_to((p.width + steps - 1) / steps, 4);
  int8_t *key_tiles, *query_bytes, *line_bytes;  // upper bytes, then lower ones
  Tiles tiles;
#endif

  Head(const AttentionProblem& problem, int64_t n, int64_t h) : p(problem), n(n), h(h) {
    const int64_t parts = (keys + kPart - 1) / kPart;
    char* next = nullptr;
    const auto place = [&](auto*& to, int64_t count) {  // first on nullptr, for the size of all
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(next);
      next += round_to(count * static_cast<int64_t>(sizeof(*to)), 64);
    };
    const auto place_all = [&] {
      place(scores, kQueries * block + kLanes);  // and half a register of int16, of what is no score
      place(sums, kQueries * width);
      place(value_scale, parts * width);
      place(mean, width);
      place(zeros, width);
      place(key_codes, keys * depth);
      place(low_keys, keys * depth);
      place(queries, kQueries * depth);
      place(low_queries, kQueries * depth);
      place(lines, kLanes * depth);
      place(values, round_to(keys, kKeysUnit) * width);
      place(weights, kQueries * block + kLanes);
#ifdef MODIFF_TILES
      place(key_tiles, 2 * round_to(keys, kWords) * steps * step);
      place(query_bytes, 2 * kQueries * steps * step);
      place(line_bytes, 2 * kLanes * steps * step);
#endif
    };
    place_all();
    next = static_cast<char*>(thread_scratch(1, reinterpret_cast<intptr_t>(next)));
    place_all();
    std::fill_n(zeros, width, 0.0f);
    copy_keys();
    copy_values();
  }

  const float* key(int64_t l) const { return p.k + n * p.k_sample + l * p.k_row + h * p.width; }
  const float* value(int64_t l) const { return p.v + n * p.v_sample + l * p.v_row + h * p.width; }

  void copy_keys() {
    std::fill_n(mean, width, 0.0f);
    for (int64_t l = 0; l < p.keys; ++l)
      for (int64_t i = 0; i < p.width; ++i) mean[i] += key(l)[i];
    for (int64_t i = 0; i < p.width; ++i) mean[i] /= static_cast<float>(p.keys);
    for (int64_t l = 0; l < p.keys; ++l) {
      const float norm = norm_of(key(l), mean, p.width);
      largest_key = std::max(largest_key, norm);
      finite &= is_finite(norm);
    }
    copy_rows<false>(key_codes);
  }

  template <bool kIsLow>
  void copy_rows(int16_t* to) {
    const float inverse = inverse_of(largest_key);
    for (int64_t l0 = 0; l0 < keys; l0 += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) {
        if (l0 + l < p.keys)
          row_codes<kIsLow>(key(l0 + l), mean, inverse, p.width, lines + l * depth);
        else
          std::fill_n(lines + l * depth, depth, 0);
      }
      for (int64_t i = 0; i < depth; i += 2)
        for (int64_t l = 0; l < kLanes; ++l) std::memcpy(to + i * keys + 2 * (l0 + l), lines + l * depth + i, 4);
#ifdef MODIFF_TILES
      if (!kIsLow) copy_tiles(l0);
#endif
    }
  }

#ifdef MODIFF_TILES
  // Upper and lower bytes of a row of codes, padded with zeros.
  void split(const int16_t* __restrict row, int8_t* __restrict upper, int8_t* __restrict lower) const {
    for (int64_t i = 0; i < p.width; ++i) {
      upper[i] = static_cast<int8_t>((row[i] + 128) >> 8);
      lower[i] = static_cast<int8_t>(row[i]);
    }
    std::memset(upper + p.width, 0, steps * step - p.width);
    std::memset(lower + p.width, 0, steps * step - p.width);
  }

  // Keys l0 to l0 + 15, which are `lines`, in the order in which packs_epi32 takes them from two tiles.
  void copy_tiles(int64_t l0) {
    const int64_t depth = steps * step, bytes = kLanes * depth;
    for (int64_t l = 0; l < kLanes; ++l)
      split(lines + l * this->depth, line_bytes + l * depth, line_bytes + bytes + l * depth);
    int8_t* to = key_tiles + 2 * (l0 / kWords * kWords) * depth;
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t key = l0 % kWords + l, tile = key / 4 % 2, column = key / 8 * 4 + key % 4;
        const int8_t* from = line_bytes + half * bytes + l * depth;
        int8_t* at = to + (2 * tile + half) * bytes + 4 * column;
        for (int64_t i = 0; i < depth; i += 4) std::memcpy(at + i * kLanes, from + i, 4);
      }
  }

  // int16 scores of up to kQueries queries and a block of keys from b on.
  void tile_scores(int64_t b, int64_t rows, int64_t count) {
    const int64_t depth = steps * step, bytes = kLanes * depth;
    const TileShape sums{kTileRows, kTileBytes}, query{kTileRows, step}, key{static_cast<int>(step / 4), kTileBytes};
    tiles.shape({sums, sums, sums, sums, query, query, key, key});
    alignas(64) int32_t products[4][kTileRows * kLanes];  // upper and mixed ones of two tiles of keys
    for (int64_t l = 0; l < count; l += kWords)
      for (int64_t m = 0; m < rows; m += kTileRows) {
        asm volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory
        const int8_t *a = query_bytes + m * depth, *k = key_tiles + 2 * (b + l) * depth;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < depth; i += step) {
          _tile_loadd(4, a + i, depth);
          _tile_loadd(5, a + kQueries * depth + i, depth);
          _tile_loadd(6, k + i * kLanes, kTileBytes);
          _tile_loadd(7, k + bytes + i * kLanes, kTileBytes);
          _tile_dpbssd(0, 4, 6);
          _tile_dpbssd(1, 4, 7);
          _tile_dpbssd(1, 5, 6);
          _tile_loadd(6, k + 2 * bytes + i * kLanes, kTileBytes);
          _tile_loadd(7, k + 3 * bytes + i * kLanes, kTileBytes);
          _tile_dpbssd(2, 4, 6);
          _tile_dpbssd(3, 4, 7);
          _tile_dpbssd(3, 5, 6);
        }
        _tile_stored(0, products[0], kTileBytes);
        _tile_stored(1, products[1], kTileBytes);
        _tile_stored(2, products[2], kTileBytes);
        _tile_stored(3, products[3], kTileBytes);
        auto* to = reinterpret_cast<int16_t*>(scores) + m * block + l;
        const auto sum = [&](int tile, int64_t row) {
          const __m512i mixed = _mm512_load_si512(products[2 * tile + 1] + row * kLanes);
          return _mm512_add_epi32(_mm512_load_si512(products[2 * tile] + row * kLanes), _mm512_srai_epi32(mixed, 8));
        };
        for (int64_t i = 0; i < kTileRows; ++i)
          _mm512_storeu_si512(to + i * block, _mm512_packs_epi32(sum(0, i), sum(1, i)));
      }
  }

  // Adds the products of weights from key e of the block on and of values from key l on, of a part.
  void tile_sums(int64_t e, int64_t l, int64_t rows, int64_t part, const float* row_factor,
                 const float* column_factor) {
    alignas(64) int32_t products[4][kTileRows * kLanes];
    for (int64_t m = 0; m < rows; m += kTileRows)
      for (int64_t n = 0; n < width; n += 4 * kLanes) {
        const int64_t vectors = std::min<int64_t>((width - n) / kLanes, 4);
        asm volatile("" ::: "memory");
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < part; k += kTileBytes) {
          const int8_t* v = values + (l + k) * width + 4 * n;
          _tile_loadd(4, weights + m * block + e + k, block);
          _tile_loadd(5, v, 4 * width);
          _tile_dpbusd(0, 4, 5);
          if (vectors > 1) {
            _tile_loadd(6, v + kTileBytes, 4 * width);
            _tile_dpbusd(1, 4, 6);
          }
          if (vectors > 2) {
            _tile_loadd(7, v + 2 * kTileBytes, 4 * width);
            _tile_dpbusd(2, 4, 7);
          }
          if (vectors > 3) {
            _tile_loadd(5, v + 3 * kTileBytes, 4 * width);
            _tile_dpbusd(3, 4, 5);
          }
        }
        _tile_stored(0, products[0], kTileBytes);
        if (vectors > 1) _tile_stored(1, products[1], kTileBytes);
        if (vectors > 2) _tile_stored(2, products[2], kTileBytes);
        if (vectors > 3) _tile_stored(3, products[3], kTileBytes);
        for (int64_t i = 0; i < std::min<int64_t>(kTileRows, rows - m); ++i)
          for (int64_t j = 0; j < vectors; ++j) {
            float* to = sums + (m + i) * width + n + j * kLanes;
            const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(products[j] + i * kLanes)),
                                             _mm512_loadu_ps(column_factor + n + j * kLanes));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(row_factor[m + i]), _mm512_loadu_ps(to)));
          }
      }
  }
#endif

  void copy_values() {
    for (int64_t l0 = 0; l0 < keys; l0 += kPart) {
      float* __restrict scale = value_scale + l0 / kPart * width;
      const int64_t end = std::min(l0 + kPart, p.keys);
      std::fill_n(scale, width, 0.0f);
      for (int64_t l = l0; l < end; ++l) {
        const float* __restrict row = value(l);
        for (int64_t i = 0; i < p.width; ++i) {  // as bits: comparisons of floats do not see NaN
          const uint32_t magnitude = float_to_bits(row[i]) & 0x7FFFFFFFu, most = float_to_bits(scale[i]);
          scale[i] = bits_to_float(magnitude > most ? magnitude : most);
        }
      }
      for (int64_t i = 0; i < p.width; ++i) finite &= is_finite(scale[i]);
      float* __restrict inverse = sums;  // not in use yet
      for (int64_t i = 0; i < p.width; ++i) {
        inverse[i] = scale[i] > 0.0f ? kMaxValue / scale[i] : 0.0f;
        scale[i] /= kMaxValue;
      }
      for (int64_t l = l0; l < std::min(l0 + kPart, keys); l += 4) {
        const float* row[4];
        for (int64_t j = 0; j < 4; ++j) row[j] = l + j < p.keys ? value(l + j) : zeros;
        const float* __restrict a = row[0], * __restrict b = row[1], * __restrict c = row[2], * __restrict d = row[3];
        auto* __restrict to = reinterpret_cast<uint32_t*>(values + l * width);
        const auto code = [&](float v, int64_t i) {
          return static_cast<uint32_t>(static_cast<int32_t>(__builtin_rintf(v * inverse[i]))) & 0xFFu;
        };
        for (int64_t i = 0; i < p.width; ++i)
          to[i] = code(a[i], i) | code(b[i], i) << 8 | code(c[i], i) << 16 | code(d[i], i) << 24;
        for (int64_t i = p.width; i < width; ++i) to[i] = 0;
      }
    }
    std::memset(values + keys * width, 0, (round_to(keys, kKeysUnit) - keys) * width);
  }

  // Up to kQueries queries from `first` on.
  void attend(int64_t first, int64_t rows) {
    float range[kQueries], most[kQueries], total[kQueries], factor[kKeys / kPart][kQueries], largest = 0.0f;
    const float* q = p.q + n * p.q_sample + first * p.q_row + h * p.width;
    for (int64_t m = 0; m < rows; ++m) {
      const float* row = q + m * p.q_row;
      const float norm = norm_of(row, zeros, p.width);
      row_codes(row, zeros, inverse_of(norm), p.width, queries + m * depth);
#ifdef MODIFF_TILES
      split(queries + m * depth, query_bytes + m * steps * step, query_bytes + (kQueries + m) * steps * step);
#endif
      range[m] = norm * largest_key * p.scale * 1.44269504f;  // no score, as a power of two, is larger
      largest = std::max(largest, std::fabs(range[m]));
      most[m] = kNone;
      total[m] = 0.0f;
    }
    const bool is_wide = largest > kWide;
    if (is_wide) {
      if (!std::exchange(has_low, true)) copy_rows<true>(low_keys);
      for (int64_t m = 0; m < rows; ++m) {
        const float* row = q + m * p.q_row;
        row_codes<true>(row, zeros, inverse_of(norm_of(row, zeros, p.width)), p.width, low_queries + m * depth);
      }
    }
    std::fill_n(sums, rows * width, 0.0f);
    for (int64_t b = 0; b < keys; b += kKeys) {
      const int64_t count = std::min(kKeys, keys - b);
      multiply_scores(is_wide, b, rows, count);
      for (int64_t m = 0; m < rows; ++m) {
        if (is_wide)
          weigh<true>(m, b, count, range[m], most[m], total[m], factor);
        else
          weigh<false>(m, b, count, range[m], most[m], total[m], factor);
      }
#ifdef MODIFF_TILES
      const TileShape full{kTileRows, kTileBytes};
      tiles.shape({full, full, full, full, full, full, full, full});
#endif
      for (int64_t e = 0; e < count; e += kPart) {
        const float* scale = value_scale + (b + e) / kPart * width;
        const int64_t part = std::min(kPart, count - e);
#ifdef MODIFF_TILES
        tile_sums(e, b + e, rows, part, factor[e / kPart], scale);
#else
        multiply(Product<uint8_t, int8_t, float>{weights + e, values + (b + e) * width, block, width, part, sums, width,
                                                 factor[e / kPart], scale},
                 rows, width);
#endif
      }
    }
    for (int64_t m = 0; m < rows; ++m) {
      const float inverse = finite && is_finite(range[m]) ? 1.0f / total[m] : bits_to_float(0x7FC00000u);
      const float* __restrict from = sums + m * width;
      float* __restrict to = p.out + ((n * p.queries + first + m) * p.heads + h) * p.width;
      for (int64_t i = 0; i < p.width; ++i) to[i] = from[i] * inverse;
    }
  }

  // Of a block of keys from b on.
  void multiply_scores(bool is_wide, int64_t b, int64_t rows, int64_t count) {
    if (!is_wide) {
#ifdef MODIFF_TILES
      tile_scores(b, rows, count);
#else
      multiply(Product<int16_t, int16_t, int16_t>{queries, key_codes + 2 * b, depth, keys, depth,
                                                  reinterpret_cast<int16_t*>(scores), block, nullptr, nullptr},
               rows, count);
#endif
      return;
    }
    Product<int16_t, int16_t, float> product{queries, key_codes + 2 * b, depth,  keys, depth, scores,
                                             block,   nullptr,           nullptr};
    multiply(product, rows, count);
    float one[kQueries], step[kKeys];
    std::fill_n(one, kQueries, 1.0f);
    std::fill_n(step, kKeys, 1.0f / kLow);
    product.row_factor = one;
    product.column_factor = step;
    product.a = low_queries;
    multiply(product, rows, count);
    product.a = queries;
    product.b = low_keys + 2 * b;
    multiply(product, rows, count);
  }

  // The weights of a block of keys for query m, and the factors that make them multiples of 2^(score - most); `most` of
  // all keys so far, which the sums and their total follow.
  template <bool kIsWide>
  void weigh(int64_t m, int64_t b, int64_t count, float range, float& most, float& total, float (*factor)[kQueries]) {
    float own[kKeys / kPart], all[kKeys / kPart];
    const float before = most;
    for (int64_t e = 0, i = 0; e < count; e += kPart, ++i) {
      const int64_t part = std::min(kPart, count - e), valid = std::min(part, p.keys - b - e);
      all[i] = static_cast<float>(valid == kPart ? part_weights<kIsWide>(m, e, range, kPart, kPart, own[i])
                                                 : part_weights<kIsWide>(m, e, range, valid, part, own[i]));
      most = std::max(most, own[i]);
    }
    if (most > before) {
      const float smaller = power_of_two(before - most);
      total *= smaller;
      for (int64_t i = 0; i < width; ++i) sums[m * width + i] *= smaller;
    }
    for (int64_t i = 0; i < (count + kPart - 1) / kPart; ++i) {
      factor[i][m] = power_of_two(own[i] - most);
      total += all[i] * factor[i][m];
    }
  }

  // Codes of the weights of a part, `own` the eighth above the largest score; returns their sum.
  template <bool kIsWide>
  MODIFF_INLINE int64_t part_weights(int64_t m, int64_t e, float range, int64_t valid, int64_t count,
                                     float& own) const {
    constexpr int kRegisters = kPart / kWords;
    __m512i s[kRegisters], top = words(INT16_MIN), sum = _mm512_setzero_si512();
    float origin = 0.0f;
    if constexpr (kIsWide) {
      origin = wide_scores(scores + m * block + e, range, valid, count, s);
    } else {
      // Upper halves of sums are at most kRowNorm^2 / 2^16, which stands for `range`.
      const float one = 65536.0f * 32768.0f * kOctave / (kRowNorm * kRowNorm);
      const __m512i to_steps = words(_mm_cvtss_si32(_mm_set_ss(range * one)));
      const auto* from = reinterpret_cast<const int16_t*>(scores) + m * block + e;
#pragma GCC unroll 8
      for (int j = 0; j < kRegisters && j * kWords < count; ++j)
        s[j] = _mm512_mulhrs_epi16(_mm512_loadu_si512(from + j * kWords), to_steps);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kRegisters && j * kWords < count; ++j) {
      if (valid < (j + 1) * kWords)
        s[j] = _mm512_mask_mov_epi16(words(INT16_MIN), (1u << (valid - j * kWords)) - 1, s[j]);
      top = _mm512_max_epi16(top, s[j]);
    }
    const int most = (largest_of(top) + kEighth - 1) & -kEighth;
    own = origin + static_cast<float>(most) / kOctave;
    const __m512i zero = words(most + 1 - kZeroOctave * kOctave);
    uint8_t* to = weights + m * block + e;
#pragma GCC unroll 8
    for (int j = 0; j < kRegisters && j * kWords < count; ++j) {
      const __m512i codes = weight_codes(_mm512_subs_epi16(s[j], zero));
      sum = _mm512_add_epi16(sum, codes);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j * kWords), _mm512_cvtepi16_epi8(codes));
    }
    if constexpr (kKeysUnit > kLanes) std::memset(to + count, 0, round_to(count, kKeysUnit) - count);
    return _mm512_reduce_add_epi32(_mm512_madd_epi16(sum, words(1)));
  }

  // Scores from float sums, in steps above what is returned, the eighth above the largest.
  static float wide_scores(const float* from, float range, int64_t valid, int64_t count, __m512i* to) {
    const __m512 one = _mm512_set1_ps(range / (kRowNorm * kRowNorm));
    __m512 top = _mm512_set1_ps(kNone);
    for (int64_t i = 0; i < valid; i += kLanes) {
      const auto there = static_cast<__mmask16>((1u << std::min(valid - i, kLanes)) - 1);
      top = _mm512_mask_max_ps(top, there, top, _mm512_mul_ps(_mm512_loadu_ps(from + i), one));
    }
    const float origin = std::ceil(8.0f * _mm512_reduce_max_ps(top)) / 8.0f;
    const auto steps = [&](const float* at) {
      const __m512 score = _mm512_fmsub_ps(_mm512_loadu_ps(at), one, _mm512_set1_ps(origin));
      return _mm512_cvtsepi32_epi16(
          _mm512_cvtps_epi32(_mm512_max_ps(_mm512_mul_ps(score, _mm512_set1_ps(kOctave)), _mm512_set1_ps(INT16_MIN))));
    };
    for (int64_t i = 0; i < count; i += kWords)  // reads past count, as above
      to[i / kWords] = _mm512_inserti64x4(_mm512_castsi256_si512(steps(from + i)), steps(from + i + kLanes), 1);
    return origin;
  }
};

void attend(const AttentionProblem& p) {
  const int64_t heads = p.samples * p.heads;
  // The queries of a head are split only where there are too few heads, for every part copies keys and values again:
  // into so few that the threads have equal shares.
  const int64_t threads = num_threads(), most = heads >= 2 * threads ? 1 : std::min(threads, p.queries / kRegisterRows);
  int64_t parts = 1;
  while (parts < most && heads * parts % threads != 0) ++parts;
  parallel_tasks(heads * parts, [&](int64_t i) {
    const int64_t head = i / parts, part = i % parts;
    Head own(p, head / p.heads, head % p.heads);
    const int64_t end = (part + 1) * p.queries / parts;
    for (int64_t l = part * p.queries / parts; l < end; l += kQueries) own.attend(l, std::min(kQueries, end - l));
  });
}

}  // namespace
}  // namespace modiff::cpu
