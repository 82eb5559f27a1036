// The fused quantisation passes, written once as loops that the compiler vectorises; quantize_{plain,avx2,avx512}.cpp
// include this file, each compiled for its instruction set, and choose the name of the entry point.
//
// Equations (granule = what one scale covers; b = act_bits; qmin = -2^(b-1), qmax = 2^(b-1) - 1):
//   residual form:  r = x - x_hat;  scale = max(clip_ratio * max|r| / (2^(b-1) - 0.5), 2^-100) or given
//                   q = clamp(rne(r * (1 / scale)), qmin, qmax);  x_hat += scale * q
//   per block:      scale = max(clip_ratio * max|r| / ((2^(b-1) - 13/16) * M), 2^-100) per sample, M = 2^(8-b);
//                   m = clamp(ceil(clip_ratio * max|r_block| / ((2^(b-1) - 13/16) * scale)), 1, M) per block, that is
//                   16 rows of one channel (the last of a sample: up to 31);
//                   q = clamp(rne(r * (1 / (scale * m))), qmin, qmax) * m, which fits int8; x_hat += scale * q
//   plain form:     the same on x without x_hat, or affine: x ~ scale * (q - zero_point)
//   with x = input | silu?(group_norm(input + shift)) | layer_norm(input) | input[:C] * gelu(input[C:])
//
// Work is cut into chunks of rows. Each chunk goes through up to three phases (statistics, residual + range, codes);
// when there are enough samples one thread takes a sample through all phases while it is in its cache, otherwise each
// phase is one parallel loop over the chunks. Within a phase, blocks of rows of about kBlock values go through
// conversion, norm, activation, residual and rounding in loops over buffers that stay in the first-level cache. With
// dynamic scales of a whole sample or tensor, the second phase needs the residuals of the first: where an activation
// function made them they wait in float32 scratch, others are computed again, which costs less than storing them.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/problem.h"
#include "common/rounding.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/quantize.h"
#include "cpu/vector_math.h"

namespace modiff::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // values of a block: five float32 buffers of it are 20 KiB

// 1 / x for x in [1, 2^126], relative error below 2e-7: an integer estimate and three Newton steps, which together take
// less time than one division.
inline float reciprocal_(float x) {
  float y = bits_to_float(0x7EF311C7u - float_to_bits(x));
  y = y * fma_(-x, y, 2.0f);
  y = y * fma_(-x, y, 2.0f);
  return y * fma_(-x, y, 2.0f);
}

inline float silu_(float x) { return x * reciprocal_(1.0f + exp_(-x)); }

// 0.5 x (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
inline float gelu_(float x) {
  const float z = x * 0.70710678118654752f;
  const float a = z < 0.0f ? -z : z;
  const float t = reciprocal_(fma_(0.3275911f, a, 1.0f));
  float p = 1.061405429f;
  p = fma_(p, t, -1.453152027f);
  p = fma_(p, t, 1.421413741f);
  p = fma_(p, t, -0.284496736f);
  p = fma_(p, t, 0.254829592f);
  const float e = 1.0f - p * t * exp_(-a * a);
  return 0.5f * x * (1.0f + (z < 0.0f ? -e : e));
}

struct Range {
  uint32_t absmax_bits = 0;  // max of |r| as an integer: orders finite < inf < NaN
  float lo = 0.0f, hi = 0.0f;
  void merge(const Range& o) {
    absmax_bits = std::max(absmax_bits, o.absmax_bits);
    lo = std::min(lo, o.lo);
    hi = std::max(hi, o.hi);
  }
  bool finite() const { return absmax_bits < 0x7F800000u; }
};

struct Code {
  float scale, inv_scale;
  int32_t zero_point;
};

class Quantizer {
 public:
  explicit Quantizer(const QuantizeProblem& problem) : p_(problem) {
    half_ = half_range(p_.act_bits);
    granules_ = p_.granularity == Granularity::kPerTensor  ? 1
                : p_.granularity == Granularity::kPerToken ? p_.samples * p_.rows
                                                           : p_.samples;
    blocks_ = p_.granularity == Granularity::kPerBlock ? block_count(p_.rows, p_.act_bits) : 0;
    // One pass is enough when the scale is known before, or is settled within the row.
    single_pass_ = p_.given_scale != nullptr || p_.granularity == Granularity::kPerToken;
    const bool activation = p_.prologue == Prologue::kGeglu || (p_.prologue == Prologue::kGroupNorm && p_.silu);
    stored_ = !single_pass_ && activation;
    block_rows_ = p_.granularity == Granularity::kPerToken ? 1
                  : blocks_ > 0                            ? kBlockRows
                                                           : std::max<int64_t>(1, kBlock / p_.channels);
  }

  bool run() {
    // Of a thread: it takes 4 to 9 us for these, and a parallel region, of which a pass has up to three, 1 to 4 us.
    constexpr int64_t kLeastElements = 16384;
    const int64_t workers = std::max<int64_t>(1, p_.samples * p_.rows * p_.channels / kLeastElements);
    const int64_t threads = std::min(num_threads(), workers);
    const bool by_sample = p_.samples % threads == 0 || p_.samples >= 4 * threads;
    const int64_t most_chunks = blocks_ > 0 ? blocks_ : p_.rows;
    chunks_ = by_sample ? 1 : std::min<int64_t>(most_chunks, (2 * threads + p_.samples - 1) / p_.samples);
    const int64_t tasks = p_.samples * chunks_;
    const bool whole_tensor = !single_pass_ && p_.granularity == Granularity::kPerTensor;
    // Scratch of the calling thread, shared by all: statistics, coefficients, ranges, and residuals where they must
    // wait.
    const int64_t c = p_.channels;
    const bool norm = p_.prologue == Prologue::kGroupNorm;
    const bool layer_norm = p_.prologue == Prologue::kLayerNorm;
    const bool shared_residuals = stored_ && (whole_tensor || chunks_ > 1);
    const int64_t stats = norm ? tasks * 2 * c : layer_norm ? 2 * p_.samples * p_.rows : 0;
    const int64_t coefficients = norm ? p_.samples * 2 * c : layer_norm ? 2 * c : 0;
    const int64_t residuals = shared_residuals ? p_.samples * p_.rows * c : 0;
    const int64_t ranges = round_up16(tasks * static_cast<int64_t>(sizeof(Range)) / 4 + 1);
    const int64_t magnitudes = p_.samples * blocks_ * c;
    float* shared = static_cast<float*>(thread_scratch(
        0, 4 * (round_up16(stats) + round_up16(coefficients) + round_up16(magnitudes) + residuals + ranges)));
    stats_ = shared;
    coefficients_ = stats_ + round_up16(stats);
    magnitudes_ = reinterpret_cast<uint32_t*>(coefficients_ + round_up16(coefficients));
    float* after = reinterpret_cast<float*>(magnitudes_) + round_up16(magnitudes);
    ranges_ = reinterpret_cast<Range*>(after);
    float* shared_residual = after + ranges;
    for (int64_t i = 0; i < tasks; ++i) ranges_[i] = Range{};
    if (layer_norm)
      for (int64_t i = 0; i < c; ++i) {
        coefficients_[i] = p_.gamma ? p_.gamma[i] : 1.0f;
        coefficients_[c + i] = p_.beta ? p_.beta[i] : 0.0f;
      }

    if (chunks_ == 1) {
      parallel_tasks(p_.samples, workers, [&](int64_t n) {
        if (norm) {
          statistics(n, 0);
          coefficients_of(n);
        }
        if (single_pass_) return one_pass(n, 0);
        float* residual = nullptr;
        if (shared_residuals)
          residual = shared_residual + n * p_.rows * c;
        else if (stored_)
          residual = static_cast<float*>(thread_scratch(1, p_.rows * c * static_cast<int64_t>(sizeof(float))));
        range_pass(n, 0, residual);
        if (!whole_tensor && settle(n, n, 1)) code_pass(n, 0, residual, code(n));
      });
    } else {
      if (norm) {
        parallel_tasks(tasks, workers, [&](int64_t i) { statistics(i / chunks_, i % chunks_); });
        for (int64_t n = 0; n < p_.samples; ++n) coefficients_of(n);
      }
      parallel_tasks(tasks, workers, [&](int64_t i) {
        const int64_t n = i / chunks_, k = i % chunks_;
        if (single_pass_) return one_pass(n, k);
        range_pass(n, k, stored_ ? shared_residual + (n * p_.rows + begin(k)) * c : nullptr);
      });
    }
    if (single_pass_) return finish_single_pass();
    if (whole_tensor || chunks_ > 1) {
      bool finite = true;
      for (int64_t g = 0; g < granules_; ++g)
        finite &= whole_tensor ? settle(0, 0, tasks) : settle(g, g * chunks_, chunks_);
      if (!finite) return false;
      parallel_tasks(tasks, workers, [&](int64_t i) {
        const int64_t n = i / chunks_, k = i % chunks_;
        float* residual = stored_ ? shared_residual + (n * p_.rows + begin(k)) * c : nullptr;
        code_pass(n, k, residual, code(whole_tensor ? 0 : n));
      });
      return true;
    }
    bool finite = true;
    for (int64_t n = 0; n < p_.samples; ++n) finite &= ranges_[n].finite();
    return finite;
  }

 private:
  // The thread's buffers, each of one block. `spare`: for whatever one function needs.
  struct Buffers {
    float *input, *x_hat, *updated, *residual, *spare;
  };
  Buffers buffers() const {
    const int64_t rows = blocks_ > 0 ? 2 * kBlockRows - 1 : block_rows_;
    const int64_t stride = round_up16(rows * p_.channels * (p_.prologue == Prologue::kGeglu ? 2 : 1));
    auto* base = static_cast<float*>(thread_scratch(2, 5 * stride * static_cast<int64_t>(sizeof(float))));
    return {base, base + stride, base + 2 * stride, base + 3 * stride, base + 4 * stride};
  }

  static int64_t round_up16(int64_t v) { return (v + 15) / 16 * 16; }
  int64_t begin(int64_t chunk) const {
    return blocks_ > 0 && chunk < chunks_ ? chunk * blocks_ / chunks_ * kBlockRows : chunk * p_.rows / chunks_;
  }
  int64_t end(int64_t chunk) const { return begin(chunk + 1); }

  // x_hat is as large as the network's activations together, so it comes from far away: ask a pass (or a block) before.
  MODIFF_INLINE void prefetch_state(int64_t n, int64_t l, int64_t count) const {
    if (p_.x_hat == nullptr || l >= p_.rows) return;
    count = std::min(count, p_.rows - l);
    prefetch(p_.x_hat, p_.x_hat_dtype, (n * p_.rows + l) * p_.channels, count * p_.channels);
  }

  // Per chunk and channel: sum and sum of squares of (value - first row of the sample), so that a large mean does not
  // cancel the variance.
  void statistics(int64_t n, int64_t chunk) {
    const int64_t c = p_.channels;
    float* __restrict sum = stats_ + (n * chunks_ + chunk) * 2 * c;
    float* __restrict square = sum + c;
    const Buffers buffer = buffers();
    const float* __restrict origin = load_row(p_.input, p_.input_dtype, n * p_.rows * c, c, buffer.spare);
    for (int64_t i = 0; i < 2 * c; ++i) sum[i] = 0.0f;
    for (int64_t l = begin(chunk); l < end(chunk); ++l) {
      const float* __restrict row = load_row(p_.input, p_.input_dtype, (n * p_.rows + l) * c, c, buffer.input);
      prefetch_state(n, l, 1);
      for (int64_t i = 0; i < c; ++i) {
        const float d = row[i] - origin[i];
        sum[i] += d;
        square[i] = fma_(d, d, square[i]);
      }
    }
  }

  // Folds norm, gamma, beta and shift into x = a[c] * input + b[c].
  void coefficients_of(int64_t n) {
    const int64_t c = p_.channels, per_group = c / p_.num_groups;
    float* __restrict a = coefficients_ + n * 2 * c;
    float* __restrict b = a + c;
    auto* __restrict mean = static_cast<double*>(thread_scratch(1, 2 * c * static_cast<int64_t>(sizeof(double))));
    double* __restrict m2 = mean + c;  // sum of squares around the channel's own mean
    const float* __restrict origin = load_row(p_.input, p_.input_dtype, n * p_.rows * c, c, buffers().input);
    const double rows = static_cast<double>(p_.rows), inv_rows = 1.0 / rows;
    for (int64_t i = 0; i < c; ++i) mean[i] = m2[i] = 0.0;
    for (int64_t k = 0; k < chunks_; ++k) {
      const float* __restrict stats = stats_ + (n * chunks_ + k) * 2 * c;
      for (int64_t i = 0; i < c; ++i) {
        mean[i] += stats[i];
        m2[i] += stats[c + i];
      }
    }
    for (int64_t i = 0; i < c; ++i) {
      m2[i] = std::max(m2[i] - mean[i] * mean[i] * inv_rows, 0.0);
      mean[i] = origin[i] + mean[i] * inv_rows;
    }
    if (p_.shift)
      for (int64_t i = 0; i < c; ++i) mean[i] += p_.shift[n * c + i];
    for (int64_t g = 0; g < p_.num_groups; ++g) {
      double group_mean = 0.0, group_m2 = 0.0;
      const int64_t first = g * per_group, last = first + per_group;
      for (int64_t i = first; i < last; ++i) group_mean += mean[i];
      group_mean /= static_cast<double>(per_group);
      for (int64_t i = first; i < last; ++i) group_m2 += m2[i] + rows * (mean[i] - group_mean) * (mean[i] - group_mean);
      const double variance = group_m2 * inv_rows / static_cast<double>(per_group);
      const double rstd = 1.0 / std::sqrt(variance + static_cast<double>(p_.eps));
      for (int64_t i = first; i < last; ++i) {
        a[i] = static_cast<float>(rstd);
        b[i] = static_cast<float>(-group_mean * rstd);
      }
    }
    if (p_.shift)
      for (int64_t i = 0; i < c; ++i) b[i] = fma_(p_.shift[n * c + i], a[i], b[i]);
    if (p_.gamma) {
      const float* __restrict gamma = p_.gamma + n * p_.norm_stride;
      for (int64_t i = 0; i < c; ++i) {
        a[i] *= gamma[i];
        b[i] *= gamma[i];
      }
    }
    if (p_.beta)
      for (int64_t i = 0; i < c; ++i) b[i] += p_.beta[n * p_.norm_stride + i];
  }

  // Mean and 1 / sqrt(variance + eps) of `count` rows of a layer norm, from row l of all samples.
  void row_statistics(const float* input, int64_t l, int64_t count) {
    const int64_t c = p_.channels;
    for (int64_t k = 0; k < count; ++k) {
      const float* __restrict row = input + k * c;
      float sum = 0.0f, square = 0.0f;
      const float origin = row[0];
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < c; ++i) sum += row[i] - origin;
      const float mean = sum / static_cast<float>(c) + origin;
#pragma omp simd reduction(+ : square)
      for (int64_t i = 0; i < c; ++i) square += (row[i] - mean) * (row[i] - mean);
      stats_[2 * (l + k)] = mean;
      stats_[2 * (l + k) + 1] = 1.0f / std::sqrt(square / static_cast<float>(c) + p_.eps);
    }
  }

  // Calls body(row length, rows, width, value) with x of `count` rows from row l as value(row of input, k, i); lengths
  // and widths in values. again: in the second phase, which finds statistics made.
  template <class Body>
  void with_values(const float* input, int64_t n, int64_t l, int64_t count, bool again, const Body& body) {
    const int64_t c = p_.channels;
    switch (p_.prologue) {
      case Prologue::kIdentity:
        // One long row; with a literal 1 for `rows`, GCC 12 leaves the loop of range_rows scalar.
        return body(count * c, count > 0, 0, [](const float* row, int64_t, int64_t i) { return row[i]; });
      case Prologue::kGroupNorm: {
        const float* __restrict a = coefficients_ + n * 2 * c;
        const float* __restrict b = a + c;
        if (p_.silu)
          return body(c, count, c,
                      [a, b](const float* row, int64_t, int64_t i) { return silu_(fma_(a[i], row[i], b[i])); });
        return body(c, count, c, [a, b](const float* row, int64_t, int64_t i) { return fma_(a[i], row[i], b[i]); });
      }
      case Prologue::kLayerNorm: {
        if (!again) row_statistics(input, n * p_.rows + l, count);
        const float* __restrict gamma = coefficients_;
        const float* __restrict beta = gamma + c;
        const float* __restrict stats = stats_ + 2 * (n * p_.rows + l);
        return body(c, count, c, [gamma, beta, stats](const float* row, int64_t k, int64_t i) {
          return fma_((row[i] - stats[2 * k]) * stats[2 * k + 1], gamma[i], beta[i]);
        });
      }
      case Prologue::kGeglu:
        return body(c, count, 2 * c, [c](const float* row, int64_t, int64_t i) { return row[i] * gelu_(row[c + i]); });
    }
  }

  const float* input_rows(int64_t n, int64_t l, int64_t count, const Buffers& buffer) const {
    const int64_t width = p_.prologue == Prologue::kGeglu ? 2 * p_.channels : p_.channels;
    return load_row(p_.input, p_.input_dtype, (n * p_.rows + l) * width, count * width, buffer.input);
  }

  const float* state_rows(int64_t n, int64_t l, int64_t count, const Buffers& buffer) const {
    if (p_.x_hat == nullptr) return nullptr;
    const int64_t c = p_.channels;
    return load_row(p_.x_hat, p_.x_hat_dtype, (n * p_.rows + l) * c, count * c, buffer.x_hat);
  }

  // residual = x - x_hat (or x) of `count` rows from row l.
  void residual_rows(int64_t n, int64_t l, int64_t count, const Buffers& buffer, float* residual, bool again) {
    const float* input = input_rows(n, l, count, buffer);
    if (p_.prologue != Prologue::kGroupNorm && !again) prefetch_state(n, l + count, count);
    const float* x_hat = state_rows(n, l, count, buffer);
    with_values(input, n, l, count, again, [&](int64_t length, int64_t rows, int64_t width, const auto& value) {
      for (int64_t k = 0; k < rows; ++k) {
        const float* __restrict row = input + k * width;
        float* __restrict out = residual + k * length;
        if (x_hat != nullptr) {
          const float* __restrict old = x_hat + k * length;
          for (int64_t i = 0; i < length; ++i) out[i] = value(row, k, i) - old[i];
        } else {
          for (int64_t i = 0; i < length; ++i) out[i] = value(row, k, i);
        }
      }
    });
  }

  // The range of the residuals of `count` rows from row l, which are not kept.
  void range_rows(int64_t n, int64_t l, int64_t count, const Buffers& buffer, Range& range) {
    const float* input = input_rows(n, l, count, buffer);
    if (p_.prologue != Prologue::kGroupNorm) prefetch_state(n, l + count, count);
    const float* x_hat = state_rows(n, l, count, buffer);
    with_values(input, n, l, count, false, [&](int64_t length, int64_t rows, int64_t width, const auto& value) {
      for (int64_t k = 0; k < rows; ++k) {
        const float* __restrict row = input + k * width;
        const float* __restrict old = x_hat + k * length;
        uint32_t bits = 0;
#pragma omp simd reduction(max : bits)
        for (int64_t i = 0; i < length; ++i) {
          const uint32_t magnitude = float_to_bits(value(row, k, i) - old[i]) & 0x7FFFFFFFu;
          bits = magnitude > bits ? magnitude : bits;
        }
        range.absmax_bits = std::max(range.absmax_bits, bits);
      }
    });
  }

  // The range of `count` rows of residuals from row l.
  void measure_rows(int64_t n, int64_t l, int64_t count, const float* residual, Range& range) const {
    const int64_t c = p_.channels;
    if (blocks_ > 0) {
      measure_channels(residual, count, magnitudes_ + (n * blocks_ + l / kBlockRows) * c, range);
    } else {
      measure(residual, count * c, range);
    }
  }

  void measure(const float* __restrict residual, int64_t size, Range& range) const {
    uint32_t bits = 0;
#pragma omp simd reduction(max : bits)
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t magnitude = float_to_bits(residual[i]) & 0x7FFFFFFFu;
      bits = magnitude > bits ? magnitude : bits;
    }
    range.absmax_bits = std::max(range.absmax_bits, bits);
    if (!p_.affine) return;
    float lo = range.lo, hi = range.hi;
#pragma omp simd reduction(max : hi) reduction(min : lo)
    for (int64_t i = 0; i < size; ++i) {
      lo = residual[i] < lo ? residual[i] : lo;
      hi = residual[i] > hi ? residual[i] : hi;
    }
    range.lo = lo;
    range.hi = hi;
  }

  // The largest magnitude of every channel, as bits.
  void measure_channels(const float* __restrict residual, int64_t count, uint32_t* __restrict largest,
                        Range& range) const {
    const int64_t c = p_.channels;
    for (int64_t i = 0; i < c; ++i) largest[i] = float_to_bits(residual[i]) & 0x7FFFFFFFu;
    for (int64_t k = 1; k < count; ++k) {
      const float* __restrict row = residual + k * c;
      for (int64_t i = 0; i < c; ++i) largest[i] = std::max(largest[i], float_to_bits(row[i]) & 0x7FFFFFFFu);
    }
    uint32_t bits = range.absmax_bits;
#pragma omp simd reduction(max : bits)
    for (int64_t i = 0; i < c; ++i) bits = largest[i] > bits ? largest[i] : bits;
    range.absmax_bits = bits;
  }

  void range_pass(int64_t n, int64_t chunk, float* residual) {
    Range range;
    const Buffers buffer = buffers();
    for_blocks(chunk, [&](int64_t l, int64_t count) {
      if (!stored_ && p_.x_hat != nullptr && blocks_ == 0) return range_rows(n, l, count, buffer, range);
      float* rows = stored_ ? residual + (l - begin(chunk)) * p_.channels : buffer.residual;
      residual_rows(n, l, count, buffer, rows, false);
      measure_rows(n, l, count, rows, range);
    });
    ranges_[n * chunks_ + chunk] = range;
  }

  template <class Body>
  void for_blocks(int64_t chunk, const Body& body) const {
    for (int64_t l = begin(chunk), last = end(chunk), count; l < last; l += count) {
      const int64_t left = last - l;
      count = std::min(block_rows_, left);
      if (blocks_ > 0 && left < 2 * kBlockRows) count = left;  // the last block of a sample takes the rest
      body(l, count);
    }
  }

  // Scale (and zero point) from a range.
  Code choose(const Range& range) const {
    Code code;
    code.zero_point = 0;
    if (p_.affine) {
      code.scale = affine_scale(-range.lo, range.hi, half_);
      code.zero_point = static_cast<int32_t>(affine_zero_point(-range.lo, code.scale, half_));
    } else {
      const float absmax = bits_to_float(range.absmax_bits);
      code.scale =
          blocks_ > 0 ? block_scale(absmax, p_.clip_ratio, half_) : residual_scale(absmax, p_.clip_ratio, half_);
    }
    code.inv_scale = 1.0f / code.scale;
    return code;
  }

  // Merges `count` ranges from `first` and writes the results of granule g. False: not finite.
  bool settle(int64_t g, int64_t first, int64_t count) {
    Range range;
    for (int64_t i = 0; i < count; ++i) range.merge(ranges_[first + i]);
    if (!range.finite()) return false;
    write(g, choose(range), range);
    return true;
  }

  // Multiplier m and 1 / (scale * m) of the channels of a block.
  void choose_multipliers(const uint32_t* __restrict largest, float scale, float* __restrict multiplier,
                          float* __restrict inverse) const {
    for (int64_t i = 0; i < p_.channels; ++i) {
      multiplier[i] = block_multiplier(bits_to_float(largest[i]), p_.clip_ratio, scale, half_);
      inverse[i] = 1.0f / (scale * multiplier[i]);
    }
  }

  void write(int64_t g, const Code& code, const Range& range) {
    p_.scale[g] = code.scale;
    if (p_.absmax) p_.absmax[g] = bits_to_float(range.absmax_bits);
    if (p_.zero_point) p_.zero_point[g] = code.zero_point;
  }

  Code code(int64_t g) const {
    const float scale = p_.scale[g];
    return {scale, 1.0f / scale, p_.zero_point ? p_.zero_point[g] : 0};
  }

  // Codes of `count` rows with one scale, and x_hat.
  void code_rows(int64_t n, int64_t l, int64_t count, const Buffers& buffer, const float* __restrict residual,
                 const Code& code) const {
    const int64_t size = count * p_.channels, offset = (n * p_.rows + l) * p_.channels;
    int8_t* __restrict out = p_.codes + offset;
    const float half = half_, inv_scale = code.inv_scale, scale = code.scale;
    if (p_.x_hat == nullptr) {
      const float zero = static_cast<float>(code.zero_point);
      for (int64_t i = 0; i < size; ++i) {
        const float q = code_of(residual[i], inv_scale, zero, half);
        out[i] = static_cast<int8_t>(static_cast<int32_t>(q));
      }
      return;
    }
    // float32 state is updated in place, so `old` and `updated` may be one: `omp simd` instead of restrict.
    const float* old = load_row(p_.x_hat, p_.x_hat_dtype, offset, size, buffer.x_hat);
    float* updated = p_.x_hat_dtype == DType::kFloat32 ? static_cast<float*>(p_.x_hat) + offset : buffer.updated;
    if (blocks_ > 0) {
      const int64_t c = p_.channels;
      float* __restrict inverse = buffer.input;
      float* __restrict multiplier = buffer.spare;
      choose_multipliers(magnitudes_ + (n * blocks_ + l / kBlockRows) * c, scale, multiplier, inverse);
      for (int64_t k = 0; k < size; k += c) {
#pragma omp simd
        for (int64_t i = 0; i < c; ++i) {
          const float q = code_of(residual[k + i], inverse[i], 0.0f, half) * multiplier[i];
          out[k + i] = static_cast<int8_t>(static_cast<int32_t>(q));
          updated[k + i] = fma_(q, scale, old[k + i]);
        }
      }
      store_row(p_.x_hat, p_.x_hat_dtype, offset, size, updated);
      return;
    }
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float q = code_of(residual[i], inv_scale, 0.0f, half);
      out[i] = static_cast<int8_t>(static_cast<int32_t>(q));
      updated[i] = fma_(q, scale, old[i]);
    }
    store_row(p_.x_hat, p_.x_hat_dtype, offset, size, updated);
  }

  void code_pass(int64_t n, int64_t chunk, const float* residual, const Code& code) {
    const Buffers buffer = buffers();
    for_blocks(chunk, [&](int64_t l, int64_t count) {
      if (!stored_) residual_rows(n, l, count, buffer, buffer.residual, true);
      code_rows(n, l, count, buffer, stored_ ? residual + (l - begin(chunk)) * p_.channels : buffer.residual, code);
    });
  }

  // Scale known before, or settled per row (a block is then one row): residual, codes and state in one go.
  void one_pass(int64_t n, int64_t chunk) {
    const Buffers buffer = buffers();
    Range& range = ranges_[n * chunks_ + chunk];
    for_blocks(chunk, [&](int64_t l, int64_t count) {
      Range block;
      residual_rows(n, l, count, buffer, buffer.residual, false);
      measure_rows(n, l, count, buffer.residual, block);
      range.merge(block);
      const int64_t g = scale_index(p_.granularity, n, l, p_.rows);
      Code code;
      if (p_.given_scale != nullptr) {
        code = given(g);
      } else if (block.finite()) {
        code = choose(block);
      } else {
        return;
      }
      if (p_.granularity == Granularity::kPerToken) write(g, code, block);
      code_rows(n, l, count, buffer, buffer.residual, code);
    });
  }

  Code given(int64_t g) const {
    const float scale = std::max(p_.given_scale[p_.given_scale_count == 1 ? 0 : g], kMinScale);
    return {scale, 1.0f / scale, 0};
  }

  bool finish_single_pass() {
    Range all;
    for (int64_t i = 0; i < p_.samples * chunks_; ++i) all.merge(ranges_[i]);
    if (p_.granularity == Granularity::kPerToken) return all.finite();
    for (int64_t g = 0; g < granules_; ++g) {
      Range range = all;
      if (p_.granularity == Granularity::kPerSample) {
        range = Range{};
        for (int64_t k = 0; k < chunks_; ++k) range.merge(ranges_[g * chunks_ + k]);
      }
      write(g, given(g), range);
    }
    return all.finite();
  }

  const QuantizeProblem& p_;
  float half_;
  int64_t granules_, block_rows_, chunks_ = 1;
  bool single_pass_, stored_;       // stored_: residuals wait in scratch between the two phases
  int64_t blocks_;                  // of a sample, each with its own multipliers; 0: there are none
  uint32_t* magnitudes_ = nullptr;  // [samples, blocks, channels]: bits of the largest |residual|
  float* stats_ = nullptr;          // [tasks, 2, channels]
  float* coefficients_ = nullptr;   // [samples, 2, channels]
  Range* ranges_ = nullptr;         // [tasks]
};

}  // namespace
}  // namespace modiff::cpu
