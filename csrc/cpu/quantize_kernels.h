// The fused quantisation passes, written once as loops that the compiler vectorises; quantize_{plain,avx2,avx512}.cpp
// include this file, each compiled for its instruction set, and choose the name of the entry point.
//
// Equations (granule = what one scale covers; b = act_bits; qmin = -2^(b-1), qmax = 2^(b-1) - 1):
//   residual form:  r = x - x_hat;  scale = max(clip_ratio * max|r| / (2^(b-1) - 0.5), 2^-100) or given
//                   q = clamp(rne(r * (1 / scale)), qmin, qmax);  x_hat += scale * q
//   plain form:     the same on x without x_hat, or affine: x ~ scale * (q - zero_point)
//   with x = input | silu?(group_norm(input + shift)) | layer_norm(input) | input[:C] * gelu(input[C:])
//
// Work is cut into chunks of rows. Each chunk goes through up to three phases (statistics, residual + range, codes); when
// there are enough samples one thread takes a sample through all phases while it is in its cache, otherwise each phase is
// one parallel loop over the chunks. With dynamic scales of a whole sample or tensor, the residuals wait in `residuals`
// (float32, as large as the chunk set in flight) so that norm and activation are computed once.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/problem.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/quantize.h"

namespace modiff::cpu {
namespace {

#if defined(__FMA__)
inline float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
inline float fma_(float a, float b, float c) { return a * b + c; }
#endif

constexpr float kMinScale = 0x1p-100f;  // keeps 1 / scale finite for an all-zero residual

// exp on [-87, 88] (clamped), relative error below 2e-7: 2^n * p(r), Cephes polynomial.
inline float exp_(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = __builtin_rintf(x * 1.44269504088896341f);
  float r = fma_(n, -0.693359375f, x);
  r = fma_(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fma_(p, r, 1.3981999507e-3f);
  p = fma_(p, r, 8.3334519073e-3f);
  p = fma_(p, r, 4.1665795894e-2f);
  p = fma_(p, r, 1.6666665459e-1f);
  p = fma_(p, r, 5.0000001201e-1f);
  p = fma_(p, r * r, r) + 1.0f;
  return p * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

inline float silu_(float x) { return x / (1.0f + exp_(-x)); }

// 0.5 x (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
inline float gelu_(float x) {
  const float z = x * 0.70710678118654752f;
  const float a = z < 0.0f ? -z : z;
  const float t = 1.0f / fma_(0.3275911f, a, 1.0f);
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
    half_ = static_cast<float>(1 << (p_.act_bits - 1));
    granules_ = p_.granularity == Granularity::kPerTensor   ? 1
                : p_.granularity == Granularity::kPerSample ? p_.samples
                                                            : p_.samples * p_.rows;
    // One pass is enough when the scale is known before, or is settled within the row.
    single_pass_ = p_.given_scale != nullptr || p_.granularity == Granularity::kPerToken;
  }

  bool run() {
    const int64_t threads = num_threads();
    const bool by_sample = p_.samples % threads == 0 || p_.samples >= 4 * threads;
    chunks_ = by_sample ? 1 : std::min<int64_t>(p_.rows, (2 * threads + p_.samples - 1) / p_.samples);
    const int64_t tasks = p_.samples * chunks_;
    const bool whole_tensor = !single_pass_ && p_.granularity == Granularity::kPerTensor;
    // Scratch of the calling thread, shared by all: statistics, coefficients, ranges, and residuals where they must wait.
    const int64_t c = p_.channels;
    const bool norm = p_.prologue == Prologue::kGroupNorm;
    const bool shared_residuals = !single_pass_ && (whole_tensor || chunks_ > 1);
    const int64_t stats = norm ? tasks * 2 * c : 0, coefficients = norm ? p_.samples * 2 * c : 0;
    const int64_t residuals = shared_residuals ? p_.samples * p_.rows * c : 0;
    const int64_t ranges = round_up16(tasks * static_cast<int64_t>(sizeof(Range)) / 4 + 1);
    float* shared = static_cast<float*>(
        thread_scratch(0, 4 * (round_up16(stats) + round_up16(coefficients) + residuals + ranges)));
    stats_ = shared;
    coefficients_ = stats_ + round_up16(stats);
    ranges_ = reinterpret_cast<Range*>(coefficients_ + round_up16(coefficients));
    float* shared_residual = coefficients_ + round_up16(coefficients) + ranges;
    for (int64_t i = 0; i < tasks; ++i) ranges_[i] = Range{};

    if (chunks_ == 1) {
      parallel_tasks(p_.samples, [&](int64_t n) {
        if (norm) {
          statistics(n, 0);
          coefficients_of(n);
        }
        if (single_pass_) return one_pass(n, 0);
        float* residual = shared_residuals
                              ? shared_residual + n * p_.rows * c
                              : static_cast<float*>(thread_scratch(1, p_.rows * c * static_cast<int64_t>(sizeof(float))));
        range_pass(n, 0, residual);
        if (!whole_tensor && settle(n, n, 1)) code_pass(n, 0, residual, code(n));
      });
    } else {
      if (norm) {
        parallel_tasks(tasks, [&](int64_t i) { statistics(i / chunks_, i % chunks_); });
        for (int64_t n = 0; n < p_.samples; ++n) coefficients_of(n);
      }
      parallel_tasks(tasks, [&](int64_t i) {
        const int64_t n = i / chunks_, k = i % chunks_;
        if (single_pass_) return one_pass(n, k);
        range_pass(n, k, shared_residual + (n * p_.rows + begin(k)) * c);
      });
    }
    if (single_pass_) return finish_single_pass();
    if (whole_tensor || chunks_ > 1) {
      bool finite = true;
      for (int64_t g = 0; g < granules_; ++g)
        finite &= whole_tensor ? settle(0, 0, tasks) : settle(g, g * chunks_, chunks_);
      if (!finite) return false;
      parallel_tasks(tasks, [&](int64_t i) {
        const int64_t n = i / chunks_, k = i % chunks_;
        code_pass(n, k, shared_residual + (n * p_.rows + begin(k)) * c, code(whole_tensor ? 0 : n));
      });
      return true;
    }
    bool finite = true;
    for (int64_t n = 0; n < p_.samples; ++n) finite &= ranges_[n].finite();
    return finite;
  }

 private:
  struct Rows {
    float *input, *x, *x_hat, *updated, *residual;
  };

  static int64_t round_up16(int64_t v) { return (v + 15) / 16 * 16; }
  int64_t begin(int64_t chunk) const { return chunk * p_.rows / chunks_; }
  int64_t end(int64_t chunk) const { return (chunk + 1) * p_.rows / chunks_; }

  // Per chunk and channel: sum and sum of squares of (value - first row of the sample), so that a large mean does not
  // cancel the variance.
  void statistics(int64_t n, int64_t chunk) {
    const int64_t c = p_.channels;
    float* sum = stats_ + (n * chunks_ + chunk) * 2 * c;
    float* square = sum + c;
    const Rows buffers = row_buffers();
    const float* origin = load_row(p_.input, p_.input_dtype, n * p_.rows * c, c, buffers.x);
    for (int64_t i = 0; i < 2 * c; ++i) sum[i] = 0.0f;
    for (int64_t l = begin(chunk); l < end(chunk); ++l) {
      const float* row = load_row(p_.input, p_.input_dtype, (n * p_.rows + l) * c, c, buffers.input);
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
    float* a = coefficients_ + n * 2 * c;
    float* b = a + c;
    const float* origin = load_row(p_.input, p_.input_dtype, n * p_.rows * c, c, row_buffers().input);
    const double rows = static_cast<double>(p_.rows);
    for (int64_t g = 0; g < p_.num_groups; ++g) {
      double mean = 0.0, m2 = 0.0;
      for (int pass = 0; pass < 2; ++pass) {
        for (int64_t i = g * per_group; i < (g + 1) * per_group; ++i) {
          double sum = 0.0, square = 0.0;
          for (int64_t k = 0; k < chunks_; ++k) {
            const float* stats = stats_ + (n * chunks_ + k) * 2 * c;
            sum += stats[i];
            square += stats[c + i];
          }
          const double shift = p_.shift ? p_.shift[n * c + i] : 0.0f;
          const double channel_mean = origin[i] + sum / rows + shift;
          if (pass == 0) {
            mean += channel_mean / static_cast<double>(per_group);
          } else {
            m2 += std::max(square - sum * sum / rows, 0.0) + rows * (channel_mean - mean) * (channel_mean - mean);
          }
        }
      }
      const double variance = m2 / (rows * static_cast<double>(per_group));
      const double rstd = 1.0 / std::sqrt(variance + static_cast<double>(p_.eps));
      for (int64_t i = g * per_group; i < (g + 1) * per_group; ++i) {
        const double gamma = p_.gamma ? p_.gamma[i] : 1.0f, beta = p_.beta ? p_.beta[i] : 0.0f;
        const double shift = p_.shift ? p_.shift[n * c + i] : 0.0f;
        a[i] = static_cast<float>(rstd * gamma);
        b[i] = static_cast<float>(beta + (shift - mean) * rstd * gamma);
      }
    }
  }

  // x of one row, as float32.
  const float* activation(int64_t n, int64_t l, const Rows& buffers) const {
    const int64_t c = p_.channels;
    const int64_t width = p_.prologue == Prologue::kGeglu ? 2 * c : c;
    const float* __restrict row = load_row(p_.input, p_.input_dtype, (n * p_.rows + l) * width, width, buffers.input);
    float* __restrict x = buffers.x;
    switch (p_.prologue) {
      case Prologue::kIdentity:
        return row;
      case Prologue::kGroupNorm: {
        const float* __restrict a = coefficients_ + n * 2 * c;
        const float* __restrict b = a + c;
        if (p_.silu) {
          for (int64_t i = 0; i < c; ++i) x[i] = silu_(fma_(a[i], row[i], b[i]));
        } else {
          for (int64_t i = 0; i < c; ++i) x[i] = fma_(a[i], row[i], b[i]);
        }
        return x;
      }
      case Prologue::kLayerNorm: {
        float sum = 0.0f, square = 0.0f;
        const float origin = row[0];
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < c; ++i) sum += row[i] - origin;
        const float mean = sum / static_cast<float>(c) + origin;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < c; ++i) square = fma_(row[i] - mean, row[i] - mean, square);
        const float rstd = 1.0f / std::sqrt(square / static_cast<float>(c) + p_.eps);
        for (int64_t i = 0; i < c; ++i) x[i] = (row[i] - mean) * rstd;
        if (p_.gamma)
          for (int64_t i = 0; i < c; ++i) x[i] *= p_.gamma[i];
        if (p_.beta)
          for (int64_t i = 0; i < c; ++i) x[i] += p_.beta[i];
        return x;
      }
      case Prologue::kGeglu:
        for (int64_t i = 0; i < c; ++i) x[i] = row[i] * gelu_(row[c + i]);
        return x;
    }
    return row;
  }

  // residual = x - x_hat (or x) of one row, and its range.
  void residual_row(int64_t n, int64_t l, const Rows& buffers, float* __restrict residual, Range& range) const {
    const int64_t c = p_.channels;
    const float* __restrict x = activation(n, l, buffers);
    if (p_.x_hat != nullptr) {
      const float* __restrict x_hat = load_row(p_.x_hat, p_.x_hat_dtype, (n * p_.rows + l) * c, c, buffers.x_hat);
      for (int64_t i = 0; i < c; ++i) residual[i] = x[i] - x_hat[i];
    } else {
      std::memcpy(residual, x, c * sizeof(float));
    }
    uint32_t bits = 0;
    for (int64_t i = 0; i < c; ++i) {
      const uint32_t magnitude = float_to_bits(residual[i]) & 0x7FFFFFFFu;
      bits = magnitude > bits ? magnitude : bits;
    }
    range.absmax_bits = std::max(range.absmax_bits, bits);
    if (p_.affine) {
      float lo = range.lo, hi = range.hi;
      for (int64_t i = 0; i < c; ++i) {
        lo = residual[i] < lo ? residual[i] : lo;
        hi = residual[i] > hi ? residual[i] : hi;
      }
      range.lo = lo;
      range.hi = hi;
    }
  }

  void range_pass(int64_t n, int64_t chunk, float* residual) {
    Range range;
    const Rows buffers = row_buffers();
    for (int64_t l = begin(chunk); l < end(chunk); ++l)
      residual_row(n, l, buffers, residual + (l - begin(chunk)) * p_.channels, range);
    ranges_[n * chunks_ + chunk] = range;
  }

  // Scale (and zero point) from a range.
  Code choose(const Range& range) const {
    Code code;
    code.zero_point = 0;
    if (p_.affine) {
      code.scale = std::max((range.hi - range.lo) / (2.0f * half_ - 1.0f), kMinScale);
      code.inv_scale = 1.0f / code.scale;
      const float zero = __builtin_rintf(-range.lo * code.inv_scale) - half_;
      code.zero_point = static_cast<int32_t>(std::min(std::max(zero, -half_), half_ - 1.0f));
    } else {
      code.scale = std::max(p_.clip_ratio * bits_to_float(range.absmax_bits) / (half_ - 0.5f), kMinScale);
      code.inv_scale = 1.0f / code.scale;
    }
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

  void write(int64_t g, const Code& code, const Range& range) {
    p_.scale[g] = code.scale;
    if (p_.absmax) p_.absmax[g] = bits_to_float(range.absmax_bits);
    if (p_.zero_point) p_.zero_point[g] = code.zero_point;
  }

  Code code(int64_t g) const {
    const float scale = p_.scale[g];
    return {scale, 1.0f / scale, p_.zero_point ? p_.zero_point[g] : 0};
  }

  void code_row(int64_t n, int64_t l, const Rows& buffers, const float* __restrict residual, const Code& code) const {
    const int64_t c = p_.channels, offset = (n * p_.rows + l) * c;
    int8_t* __restrict out = p_.codes + offset;
    const float lo = -half_, hi = half_ - 1.0f, inv_scale = code.inv_scale, scale = code.scale;
    if (p_.x_hat == nullptr) {
      const float zero = static_cast<float>(code.zero_point);
      for (int64_t i = 0; i < c; ++i) {
        float q = __builtin_rintf(residual[i] * inv_scale) + zero;
        q = q < lo ? lo : q;
        q = q > hi ? hi : q;
        out[i] = static_cast<int8_t>(static_cast<int32_t>(q));
      }
      return;
    }
    const float* __restrict old = load_row(p_.x_hat, p_.x_hat_dtype, offset, c, buffers.x_hat);
    float* __restrict updated = buffers.updated;
    for (int64_t i = 0; i < c; ++i) {
      float q = __builtin_rintf(residual[i] * inv_scale);
      q = q < lo ? lo : q;
      q = q > hi ? hi : q;
      out[i] = static_cast<int8_t>(static_cast<int32_t>(q));
      updated[i] = fma_(q, scale, old[i]);
    }
    store_row(p_.x_hat, p_.x_hat_dtype, offset, c, updated);
  }

  void code_pass(int64_t n, int64_t chunk, const float* residual, const Code& code) {
    const Rows buffers = row_buffers();
    for (int64_t l = begin(chunk); l < end(chunk); ++l)
      code_row(n, l, buffers, residual + (l - begin(chunk)) * p_.channels, code);
  }

  // Scale known before or settled per row: residual, codes and state in one go.
  void one_pass(int64_t n, int64_t chunk) {
    const Rows buffers = row_buffers();
    float* residual = buffers.residual;
    Range& range = ranges_[n * chunks_ + chunk];
    for (int64_t l = begin(chunk); l < end(chunk); ++l) {
      const int64_t g = scale_index(p_.granularity, n, l, p_.rows);
      if (p_.given_scale != nullptr) {
        const float scale = std::max(p_.given_scale[p_.given_scale_count == 1 ? 0 : g], kMinScale);
        Range row_range;
        residual_row(n, l, buffers, residual, row_range);
        range.merge(row_range);
        if (p_.granularity == Granularity::kPerToken) write(g, {scale, 1.0f / scale, 0}, row_range);
        code_row(n, l, buffers, residual, {scale, 1.0f / scale, 0});
      } else {
        Range row_range;
        residual_row(n, l, buffers, residual, row_range);
        range.merge(row_range);
        if (!row_range.finite()) continue;
        const Code code = choose(row_range);
        write(g, code, row_range);
        code_row(n, l, buffers, residual, code);
      }
    }
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
      const float scale = std::max(p_.given_scale[p_.given_scale_count == 1 ? 0 : g], kMinScale);
      write(g, {scale, 1.0f / scale, 0}, range);
    }
    return all.finite();
  }

  Rows row_buffers() const {
    const int64_t stride = round_up16(p_.channels * (p_.prologue == Prologue::kGeglu ? 2 : 1));
    auto* base = static_cast<float*>(thread_scratch(2, 5 * stride * static_cast<int64_t>(sizeof(float))));
    return {base, base + stride, base + 2 * stride, base + 3 * stride, base + 4 * stride};
  }

  const QuantizeProblem& p_;
  float half_;
  int64_t granules_, chunks_ = 1;
  bool single_pass_;
  float* stats_ = nullptr;         // [tasks, 2, channels]
  float* coefficients_ = nullptr;  // [samples, 2, channels]
  Range* ranges_ = nullptr;        // [tasks]
};

}  // namespace
}  // namespace modiff::cpu
