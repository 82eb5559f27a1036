// NHWC implicit-GEMM convolution (and GEMM) on AVX-512 VNNI: int8 codes times int8 weights, exact int32 sums, the
// epilogue of modulation in the registers that hold the sums.
//
//   operand   shape                              dtype   layout
//   codes     [samples, h, w, c_in]              int8    contiguous
//   weight    panels of 16 output channels       int8    vnni_v1 (product.h)
//   y_hat     [samples, out_h, out_w, c_out]     f32/f16/bf16, read and written
//   skip, out like y_hat                         f32/f16/bf16
//
// vpdpbusd multiplies unsigned by signed bytes, so codes are stored as code + 128 and (128 + zero_point) *
// sum_k(weight) is subtracted from the sum; padding holds the code of x = 0, which makes the subtraction right at the
// borders too.
//
// A task is a block of output rows of one image, or several whole small images, times a range of output channels. It
// copies the input it needs into a padded byte image (first-level or second-level cache), then for every set of NR
// weight panels walks blocks of MR output pixels: MR * NR accumulators stay in registers over the whole of K. Per four
// values of K: NR weight loads, MR broadcasts, MR * NR vpdpbusd. MR * NR = 24 of 32 registers keeps both multiply ports
// busy (latency 5, 2 a cycle) and leaves room for operands.
//
// Limits: any kernel, stride, padding, dilation, groups; weights of 8, 4 and 3 bits are int8 here. Speed wants
// c_in / groups >= 16 and c_out / groups >= 16.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/problem.h"
#include "cpu/convert.h"
#include "cpu/product.h"
#include "cpu/parallel.h"

namespace modiff::cpu {
namespace {

constexpr int kMaxPixels = 14;        // largest MR
constexpr int64_t kTaskPixels = 256;  // output pixels of a task, which reads a weight panel set from the L2 cache once
constexpr int64_t kMaxRuns = 64;
constexpr int64_t kMaxSums = 24 * kPanel;  // largest MR * NR, times the channels of a panel

// A run is a contiguous piece of K in the padded image; the weights of all runs follow each other.
struct Runs {
  int64_t count;
  int64_t length;  // bytes, a multiple of 4
  const int64_t* offset;
};

struct Block {
  const ProductProblem* p;
  const uint8_t* const* pixel;  // MR pointers into the padded image
  const int64_t* output_pixel;  // MR flat output pixels
  Runs runs;
  const int8_t* weight;  // first panel
  int64_t panel_bytes;
  const int32_t* weight_sum;  // of the first panel's channels
  int64_t channel;            // first output channel
  int64_t channels;           // valid ones
};

// sums[MR][NR][16] = codes of MR pixels times NR weight panels. Kept apart from the epilogue so that the accumulators
// have the registers to themselves.
template <int MR, int NR>
void multiply(const Block& b, int32_t* sums) {
  __m512i acc[MR][NR];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) acc[m][n] = _mm512_setzero_si512();
  const int8_t* weight = b.weight;
  const int64_t panel_bytes = b.panel_bytes;
  for (int64_t r = 0; r < b.runs.count; ++r) {
    const int64_t offset = b.runs.offset[r];
    const uint8_t* row[MR];
    for (int m = 0; m < MR; ++m) row[m] = b.pixel[m] + offset;
    for (int64_t k = 0; k < b.runs.length; k += kDot) {
      __m512i w[NR];
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) w[n] = _mm512_loadu_si512(weight + n * panel_bytes);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        int32_t four;
        std::memcpy(&four, row[m] + k, 4);
        const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) acc[m][n] = _mm512_dpbusd_epi32(acc[m][n], a, w[n]);
      }
      weight += kPanel * kDot;
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) _mm512_store_si512(sums + (m * NR + n) * kPanel, acc[m][n]);
}

inline __m512 load16(const void* base, DType dtype, int64_t offset, __mmask16 mask) {
  if (dtype == DType::kFloat32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(base) + offset);
  const __m256i raw = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(base) + offset);
  if (dtype == DType::kFloat16) return _mm512_cvtph_ps(raw);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

inline void store16(void* base, DType dtype, int64_t offset, __mmask16 mask, __m512 value) {
  if (dtype == DType::kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(base) + offset, mask, value);
    return;
  }
  __m256i raw;
  if (dtype == DType::kFloat16) {
    raw = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    raw = _mm512_cvtepi32_epi16(rounded);
  }
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(base) + offset, mask, raw);
}

// Asks for the lines that the epilogue of this block will read, while multiply() still has arithmetic to do: the state
// of a network does not fit into the caches, and rows of a few lines each are no pattern that the hardware prefetches.
MODIFF_INLINE void prefetch_epilogue(const Block& b, int pixels, int panels) {
  const ProductProblem& p = *b.p;
  const int64_t count = std::min<int64_t>(b.channels, panels * kPanel);
  for (int m = 0; m < pixels; ++m) {
    const int64_t offset = b.output_pixel[m] * p.c_out + b.channel;
    if (p.y_hat != nullptr) prefetch(p.y_hat, p.y_hat_dtype, offset, count);
    if (p.skip != nullptr) prefetch(p.skip, p.skip_dtype, offset, count);
  }
}

void epilogue(const Block& b, int pixels, int panels, const int32_t* sums) {
  const ProductProblem& p = *b.p;
  const int64_t rows = p.out_h * p.out_w;
  int64_t granule[kMaxPixels];
  for (int m = 0; m < pixels; ++m)
    granule[m] = p.granularity == Granularity::kPerTensor   ? 0
                 : p.granularity == Granularity::kPerSample ? b.output_pixel[m] / rows
                                                            : b.output_pixel[m];
  for (int n = 0; n < panels; ++n) {
    const int64_t left = b.channels - n * kPanel, channel = b.channel + n * kPanel;
    const __mmask16 mask = left >= kPanel ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1u);
    const __m512 weight_scale = _mm512_maskz_loadu_ps(mask, p.weight_scale + channel);
    const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(mask, p.bias + channel) : _mm512_setzero_ps();
    const __m512i weight_sum = _mm512_loadu_si512(b.weight_sum + n * kPanel);
    __m512i correction = _mm512_slli_epi32(weight_sum, 7);  // (128 + zero_point) * weight_sum
    for (int m = 0; m < pixels; ++m) {
      if (p.zero_point != nullptr)
        correction = _mm512_mullo_epi32(_mm512_set1_epi32(128 + p.zero_point[granule[m]]), weight_sum);
      const int64_t offset = b.output_pixel[m] * p.c_out + channel;
      const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + (m * panels + n) * kPanel), correction);
      const __m512 scale = _mm512_set1_ps(p.scale[granule[m]]);
      __m512 value = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), weight_scale), scale);
      value = _mm512_add_ps(value, p.y_hat != nullptr ? load16(p.y_hat, p.y_hat_dtype, offset, mask) : bias);
      if (p.y_hat != nullptr) store16(p.y_hat, p.y_hat_dtype, offset, mask, value);
      if (p.out == nullptr) continue;
      if (p.skip != nullptr) value = _mm512_add_ps(value, load16(p.skip, p.skip_dtype, offset, mask));
      store16(p.out, p.out_dtype, offset, mask, value);
    }
  }
}

using MultiplyFn = void (*)(const Block&, int32_t*);

template <int NR, int... MR>
constexpr MultiplyFn pick(int mr, std::integer_sequence<int, MR...>) {
  MultiplyFn table[] = {&multiply<MR + 1, NR>...};
  return table[mr - 1];
}

// Pixels per block for a set of 1, 2, 3, 4 panels: MR * NR accumulators + NR weights + 1 broadcast <= 32 registers.
constexpr int kPixels[] = {0, 14, 12, 8, 6};

MultiplyFn multiply_for(int pixels, int panels) {
  switch (panels) {
    case 1:
      return pick<1>(pixels, std::make_integer_sequence<int, kPixels[1]>());
    case 2:
      return pick<2>(pixels, std::make_integer_sequence<int, kPixels[2]>());
    case 3:
      return pick<3>(pixels, std::make_integer_sequence<int, kPixels[3]>());
    default:
      return pick<4>(pixels, std::make_integer_sequence<int, kPixels[4]>());
  }
}

int panel_set(int64_t left) { return left >= 4 && left != 5 && left != 6 ? 4 : left > 4 ? 3 : static_cast<int>(left); }

// bytes ^ 0x80 turns code into code + 128.
void copy_codes(const int8_t* from, uint8_t* to, int64_t count) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(from + i), flip));
  if (i < count) {
    const __mmask64 mask = ~uint64_t{0} >> (64 - (count - i));
    _mm512_mask_storeu_epi8(to + i, mask, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, from + i), flip));
  }
}

class Convolution {
 public:
  explicit Convolution(const ProductProblem& problem)
      : p_(problem), layout_(p_.c_in, p_.c_out, p_.kernel_h * p_.kernel_w, p_.groups) {
    pixel_bytes_ = layout_.groups * layout_.c_padded;
    // Columns of the padded image that any output reads.
    padded_w_ = (p_.out_w - 1) * p_.stride_w + (p_.kernel_w - 1) * p_.dilation_w + 1;
    const bool contiguous_row = p_.groups == 1 && p_.dilation_w == 1;
    run_count_ = p_.kernel_h * (contiguous_row ? 1 : p_.kernel_w);
    run_length_ = contiguous_row ? p_.kernel_w * layout_.c_padded : layout_.c_padded;
    int64_t i = 0;
    for (int64_t r = 0; r < p_.kernel_h; ++r)
      for (int64_t s = 0; s < (contiguous_row ? 1 : p_.kernel_w); ++s)
        run_offset_[i++] = (r * p_.dilation_h * padded_w_ + s * p_.dilation_w) * pixel_bytes_;
  }

  void run() {
    const int64_t pixels = p_.out_h * p_.out_w;
    images_ = std::max<int64_t>(1, std::min(p_.samples, kTaskPixels / std::max<int64_t>(pixels, 1)));
    rows_ = images_ > 1 ? p_.out_h : std::max<int64_t>(1, std::min(p_.out_h, kTaskPixels / p_.out_w));
    if (p_.out_w == 1 && p_.kernel_h == 1) rows_ = std::min(p_.out_h, kTaskPixels);
    const int64_t image_blocks = (p_.samples + images_ - 1) / images_;
    if (image_blocks * ((p_.out_h + rows_ - 1) / rows_) < 2 * num_threads()) split_further(image_blocks);
    const int64_t row_blocks = (p_.out_h + rows_ - 1) / rows_, blocks = image_blocks * row_blocks;
    const int64_t sets = panel_sets();
    parallel_tasks(blocks * splits_, [&](int64_t i) {
      const int64_t split = i % splits_, b = i / splits_;
      const int64_t n = b / row_blocks * images_, row = b % row_blocks * rows_;
      task(n, std::min(n + images_, p_.samples), row, std::min(row + rows_, p_.out_h), 4 * (split * sets / splits_),
           std::min<int64_t>(4 * ((split + 1) * sets / splits_), layout_.panels));
    });
  }

 private:
  int64_t panel_sets() const { return (layout_.panels + 3) / 4; }

  // Too few blocks of rows to occupy the threads: splits the output channels, at multiples of four panels, and the rows
  // of an image such that the busiest thread takes least. Every split of the channels copies the input again, every
  // split of the rows reads the weight again.
  void split_further(int64_t image_blocks) {
    const int64_t sets = panel_sets(), threads = num_threads(), rows = rows_;
    const int64_t most_row_blocks = images_ > 1 ? 1 : std::min(p_.out_h, 2 * threads);
    double best = 0;
    for (int64_t row_blocks = (p_.out_h + rows - 1) / rows; row_blocks <= most_row_blocks; row_blocks *= 2) {
      const int64_t some_rows = (p_.out_h + row_blocks - 1) / row_blocks;
      for (int64_t splits = 1; splits <= std::min(sets, 2 * threads); ++splits) {
        const int64_t tasks = image_blocks * ((p_.out_h + some_rows - 1) / some_rows) * splits;
        const int64_t panels = std::min(4 * ((sets + splits - 1) / splits), layout_.panels);
        const double longest = (tasks + threads - 1) / threads * task_cycles(some_rows, panels);
        if (best != 0 && longest >= 0.97 * best) continue;
        best = longest;
        rows_ = some_rows;
        splits_ = splits;
      }
    }
  }

  // Rough cycles of a task: two products of 64 codes a cycle, the copy of its input, its weight from the L2 cache.
  double task_cycles(int64_t rows, int64_t panels) const {
    const double k = static_cast<double>(run_count_ * run_length_ * p_.groups);
    const double pixels = static_cast<double>(images_ * rows * p_.out_w),
                 channels = static_cast<double>(panels * kPanel);
    const int64_t input_rows = (rows - 1) * p_.stride_h + (p_.kernel_h - 1) * p_.dilation_h + 1;
    const double input = static_cast<double>(images_ * input_rows * padded_w_ * pixel_bytes_);
    return pixels * channels * k / 128 + input / 32 + channels * k / 32 + 200;
  }

  void task(int64_t n0, int64_t n1, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) {
    const int64_t image_h = (row1 - row0 - 1) * p_.stride_h + (p_.kernel_h - 1) * p_.dilation_h + 1;
    const int64_t image_bytes = image_h * padded_w_ * pixel_bytes_;
    auto* image = static_cast<uint8_t*>(thread_scratch(3, (n1 - n0) * image_bytes + 64));
    for (int64_t n = n0; n < n1; ++n) fill(n, row0 * p_.stride_h - p_.pad_h, image_h, image + (n - n0) * image_bytes);

    const int64_t per_image = (row1 - row0) * p_.out_w, total = (n1 - n0) * per_image;
    const uint8_t* pixel[kMaxPixels];
    int64_t output_pixel[kMaxPixels];
    alignas(64) int32_t sums[kMaxSums];
    for (int64_t g = 0; g < p_.groups; ++g) {
      for (int64_t panel = panel0; panel < panel1;) {
        const int nr = panel_set(panel1 - panel);
        Block b;
        b.p = &p_;
        b.pixel = pixel;
        b.output_pixel = output_pixel;
        b.runs = {run_count_, run_length_, run_offset_};
        b.panel_bytes = layout_.panel_bytes();
        b.weight = p_.weight + (g * layout_.panels + panel) * b.panel_bytes;
        b.weight_sum = reinterpret_cast<const int32_t*>(p_.weight + layout_.weight_bytes()) +
                       (g * layout_.panels + panel) * kPanel;
        b.channel = g * layout_.n_group + panel * kPanel;
        b.channels = layout_.n_group - panel * kPanel;
        int64_t n = 0, row = 0, column = 0;
        for (int64_t done = 0; done < total;) {
          const int mr = static_cast<int>(std::min<int64_t>(kPixels[nr], total - done));
          for (int m = 0; m < mr; ++m) {
            pixel[m] = image + n * image_bytes + (row * p_.stride_h * padded_w_ + column * p_.stride_w) * pixel_bytes_ +
                       g * layout_.c_padded;
            output_pixel[m] = ((n0 + n) * p_.out_h + row0 + row) * p_.out_w + column;
            if (++column == p_.out_w) {
              column = 0;
              if (++row == row1 - row0) {
                row = 0;
                ++n;
              }
            }
          }
          prefetch_epilogue(b, mr, nr);
          multiply_for(mr, nr)(b, sums);
          epilogue(b, mr, nr, sums);
          done += mr;
        }
        panel += nr;
      }
    }
  }

  // Copies input rows [first, first + count) of sample n, with borders, channels padded to a multiple of 4 per group.
  void fill(int64_t n, int64_t first, int64_t count, uint8_t* image) const {
    const int zero = p_.zero_point == nullptr ? 0 : p_.zero_point[p_.granularity == Granularity::kPerSample ? n : 0];
    const auto border = static_cast<uint8_t>(zero + 128);
    const int64_t row_bytes = padded_w_ * pixel_bytes_;
    const int64_t left = std::min(p_.pad_w, padded_w_), middle = std::min(p_.w, padded_w_ - left);
    const bool dense = layout_.c_padded == layout_.c_group;
    for (int64_t y = 0; y < count; ++y) {
      uint8_t* row = image + y * row_bytes;
      const int64_t source_y = first + y;
      if (source_y < 0 || source_y >= p_.h) {
        std::memset(row, border, row_bytes);
        continue;
      }
      const int8_t* source = p_.codes + (n * p_.h + source_y) * p_.w * p_.c_in;
      std::memset(row, border, left * pixel_bytes_);
      std::memset(row + (left + middle) * pixel_bytes_, border, (padded_w_ - left - middle) * pixel_bytes_);
      if (dense) {
        copy_codes(source, row + left * pixel_bytes_, middle * pixel_bytes_);
        continue;
      }
      std::memset(row + left * pixel_bytes_, border, middle * pixel_bytes_);
      for (int64_t x = 0; x < middle; ++x)
        for (int64_t g = 0; g < p_.groups; ++g)
          copy_codes(source + x * p_.c_in + g * layout_.c_group, row + (left + x) * pixel_bytes_ + g * layout_.c_padded,
                     layout_.c_group);
    }
  }

  const ProductProblem& p_;
  VnniLayout layout_;
  int64_t pixel_bytes_, padded_w_, run_count_, run_length_;
  int64_t run_offset_[kMaxRuns];
  int64_t images_ = 1, rows_ = 1, splits_ = 1;
};

}  // namespace

void product_avx512(const ProductProblem& problem) { Convolution(problem).run(); }

}  // namespace modiff::cpu
