// Attention over tokens in float32: out = softmax(scale * q k^T) v, one head of one sample (or a part of its queries) a
// task.
//
//   operand  shape                               layout
//   q        [samples, queries, heads * width]   rows contiguous, any row and sample stride
//   k, v     [samples, keys, heads * width]      likewise
//   out      [samples, queries, heads * width]   contiguous
//
// A task copies the keys of its head transposed, [width, keys], and the values [keys, width], both padded to whole
// vectors; then both products are the same one: rows of A, broadcast value by value, times rows of B. For blocks of
// kAttentionRows queries the scores stay in the L2 cache between the products and the softmax; the sum of the
// exponentials divides the output, not the scores. Bound: 4 * queries * keys * width flops a head at 64 flops a cycle
// and core. 6 * 4 accumulators of 32 registers keep both ports busy.
//
// Limit: kAttentionKeys keys.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "common/problem.h"
#include "cpu/attention.h"
#include "cpu/parallel.h"
#include "cpu/vector_math.h"

namespace modiff::cpu {
namespace {

constexpr int64_t kLanes = 16;
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;

int64_t round_up_lanes(int64_t v) { return (v + kLanes - 1) / kLanes * kLanes; }

// c[MR, NR * 16] = a[MR, depth] * b[depth, NR * 16].
template <int MR, int NR>
void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row) {
  __m512 acc[MR][NR];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) acc[m][n] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    __m512 row[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) row[n] = _mm512_loadu_ps(b + k * b_row + n * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      const __m512 value = _mm512_set1_ps(a[m * a_row + k]);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) acc[m][n] = _mm512_fmadd_ps(value, row[n], acc[m][n]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) _mm512_storeu_ps(c + m * c_row + n * kLanes, acc[m][n]);
}

using TileFn = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);
template <int NR>
constexpr TileFn kTiles[kTileRows] = {tile<1, NR>, tile<2, NR>, tile<3, NR>, tile<4, NR>, tile<5, NR>, tile<6, NR>};

TileFn tile_for(int64_t rows, int64_t vectors) {
  switch (vectors) {
    case 1:
      return kTiles<1>[rows - 1];
    case 2:
      return kTiles<2>[rows - 1];
    case 3:
      return kTiles<3>[rows - 1];
    default:
      return kTiles<4>[rows - 1];
  }
}

// c[rows, columns] = a[rows, depth] * b[depth, columns], columns a multiple of 16.
void multiply(const float* a, int64_t a_row, int64_t rows, const float* b, int64_t columns, int64_t depth, float* c) {
  for (int64_t n = 0; n < columns;) {
    const int64_t vectors = std::min<int64_t>((columns - n) / kLanes, kTileVectors);
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const int64_t count = std::min<int64_t>(rows - m, kTileRows);
      tile_for(count, vectors)(a + m * a_row, a_row, b + n, columns, depth, c + m * columns + n, columns);
    }
    n += vectors * kLanes;
  }
}

// scores = exp(scale * (scores - max)), zero past `keys`; returns the sum, NaN if a score is NaN or infinite.
float exponentials(float* __restrict scores, int64_t keys, int64_t padded, float scale) {
  float most = scores[0], sum = 0.0f;
  uint32_t bits = 0;  // of the largest magnitude: comparisons of floats do not see NaN
#pragma omp simd reduction(max : most, bits)
  for (int64_t i = 0; i < keys; ++i) {
    const uint32_t magnitude = float_to_bits(scores[i]) & 0x7FFFFFFFu;
    bits = magnitude > bits ? magnitude : bits;
    most = scores[i] > most ? scores[i] : most;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < keys; ++i) {
    const float e = exp_(scale * (scores[i] - most));
    scores[i] = e;
    sum += e;
  }
  for (int64_t i = keys; i < padded; ++i) scores[i] = 0.0f;
  return bits < 0x7F800000u ? sum : bits_to_float(0x7FC00000u);
}

struct Attention {
  const AttentionProblem& p;
  const int64_t padded_keys = round_up_lanes(p.keys), padded_width = round_up_lanes(p.width);

  // Queries [first, last) of head h of sample n.
  void task(int64_t n, int64_t h, int64_t first, int64_t last) const {
    float* keys =
        static_cast<float*>(thread_scratch(1, 4 * (p.width * padded_keys + p.keys * padded_width +
                                                   kAttentionRows * padded_keys + kAttentionRows * padded_width)));
    float* values = keys + p.width * padded_keys;
    float* scores = values + p.keys * padded_width;
    float* sums = scores + kAttentionRows * padded_keys;
    transpose(p.k + n * p.k_sample + h * p.width, keys);
    for (int64_t l = 0; l < p.keys; ++l) {
      float* row = values + l * padded_width;
      std::memcpy(row, p.v + n * p.v_sample + l * p.v_row + h * p.width, p.width * sizeof(float));
      for (int64_t i = p.width; i < padded_width; ++i) row[i] = 0.0f;
    }
    const float* q = p.q + n * p.q_sample + h * p.width;
    float* out = p.out + n * p.queries * p.heads * p.width + h * p.width;
    for (int64_t l = first; l < last; l += kAttentionRows) {
      const int64_t rows = std::min(kAttentionRows, last - l);
      multiply(q + l * p.q_row, p.q_row, rows, keys, padded_keys, p.width, scores);
      float total[kAttentionRows];
      for (int64_t m = 0; m < rows; ++m)
        total[m] = exponentials(scores + m * padded_keys, p.keys, padded_keys, p.scale);
      multiply(scores, padded_keys, rows, values, padded_width, p.keys, sums);
      for (int64_t m = 0; m < rows; ++m) {
        const float inverse = 1.0f / total[m];
        const float* __restrict from = sums + m * padded_width;
        float* __restrict to = out + (l + m) * p.heads * p.width;
        for (int64_t i = 0; i < p.width; ++i) to[i] = from[i] * inverse;
      }
    }
  }

  // [keys, width] to [width, padded_keys], in squares so that reads and writes stay within few lines.
  void transpose(const float* k, float* to) const {
    for (int64_t l0 = 0; l0 < padded_keys; l0 += kLanes)
      for (int64_t i0 = 0; i0 < p.width; i0 += kLanes)
        for (int64_t i = i0; i < std::min(i0 + kLanes, p.width); ++i)
          for (int64_t l = l0; l < l0 + kLanes; ++l) to[i * padded_keys + l] = l < p.keys ? k[l * p.k_row + i] : 0.0f;
  }
};

}  // namespace

void attention_avx512(const AttentionProblem& problem) {
  const Attention attention{problem};
  const int64_t heads = problem.samples * problem.heads,
                blocks = (problem.queries + kAttentionRows - 1) / kAttentionRows;
  // The queries of a head are split only where there are too few heads: every part copies keys and values again.
  const int64_t wanted = 2 * num_threads();
  const int64_t parts = heads >= wanted ? 1 : std::min(blocks, (wanted + heads - 1) / heads);
  parallel_tasks(heads * parts, [&](int64_t i) {
    const int64_t head = i / parts, part = i % parts;
    attention.task(head / problem.heads, head % problem.heads, part * blocks / parts * kAttentionRows,
                   std::min((part + 1) * blocks / parts * kAttentionRows, problem.queries));
  });
}

}  // namespace modiff::cpu
