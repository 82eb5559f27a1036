// NHWC implicit-GEMM convolution (and GEMM): int8 codes times int8 weights, exact int32 sums, the epilogue of modulation
// on sums that have not left the first-level cache. One blocked loop over a micro-kernel per instruction set; a file
// product_<instruction set>.cpp defines MODIFF_VECTOR_BYTES (64 or 32) and, if there is one, MODIFF_DPBUSD, and includes
// this one.
//
//   operand   shape                              dtype   layout
//   codes     [samples, h, w, c_in]              int8    contiguous
//   weight    panels of 16 output channels       int8    vnni_v1 (product.h)
//   y_hat     [samples, out_h, out_w, c_out]     f32/f16/bf16, read and written
//   skip, out like y_hat                         f32/f16/bf16
//
// A task is a block of output rows of one image, or several whole small images, times a range of output channels. It
// copies the input it needs into a padded image (first-level or second-level cache), then for every set of weight panels
// walks blocks of MR output pixels: MR * NR vectors of sums stay in registers over the whole of K. Padding holds the
// code of x = 0, so (shift + zero_point) * sum_k(weight) leaves the sum at the borders too, where image = code + shift.
//
// Instructions for a vector of products (32 on 256 bits), beside NR weight loads and MR broadcasts per MR * NR of them:
//   kVnni    code + 128, unsigned       1      vpdpbusd
//   kBytes   code + shift <= 127        2 1/8  vpmaddubsw, vpaddw; every `span` of them vpmaddwd, vpaddd into memory
//   kPairs   the same, where span is 1  3      vpmaddubsw, vpmaddwd, vpaddd
//   kWords   any code, as int16         4      2 vpmaddwd, 2 vpaddd
// Without vpdpbusd a task looks at its codes: vpmaddubsw saturates at int16, so `span` of its sums, of two products each,
// are added before they are widened, as many as fit: 8 for codes of 4 bits and weights of 8, or the other way round; 1
// for codes of 7 bits; 0 for more, which take kWords.
//
// Limits: any kernel, stride, padding, dilation, groups; weights of 8, 4 and 3 bits are int8 here. Speed wants
// c_in / groups >= 16 and c_out / groups >= 16.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
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
constexpr int64_t kSet = 4;                // panels of a share of the output channels are a multiple of this

// A run is a contiguous piece of K in the padded image; the weights of all runs follow each other.
struct Runs {
  int64_t count;
  int64_t length;  // codes, a multiple of 4
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
  int64_t span;               // of kBytes
  int32_t shift, code_bytes;  // image = code + shift
};

enum Arithmetic { kVnni, kBytes, kPairs, kWords };

#if MODIFF_VECTOR_BYTES == 64
using Vector = __m512i;
inline Vector zeros() { return _mm512_setzero_si512(); }
inline Vector load(const void* from) { return _mm512_loadu_si512(from); }
inline Vector load_words(const int8_t* from) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from)); }
inline void store(int32_t* to, Vector v) { _mm512_store_si512(to, v); }
inline Vector broadcast(int32_t v) { return _mm512_set1_epi32(v); }
inline Vector broadcast(int64_t v) { return _mm512_set1_epi64(v); }
inline Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
inline Vector multiply_bytes(Vector a, Vector b) { return _mm512_maddubs_epi16(a, b); }
inline Vector multiply_words(Vector a, Vector b) { return _mm512_madd_epi16(a, b); }
// Sums of neighbours of a, then of b.
inline Vector pair_sums(Vector a, Vector b) {
  const Vector even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const Vector odd = _mm512_or_si512(even, broadcast(1));
  return add(_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b));
}
constexpr int kMaxVectors = 4;                // of weights in a pass
constexpr int kPixels[] = {0, 14, 12, 8, 6};  // for 1 to 4 vectors: sums + weights + 3 others <= 32 registers
#else
using Vector = __m256i;
inline Vector zeros() { return _mm256_setzero_si256(); }
inline Vector load(const void* from) { return _mm256_loadu_si256(static_cast<const Vector*>(from)); }
inline Vector load_words(const int8_t* from) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from)); }
inline void store(int32_t* to, Vector v) { _mm256_store_si256(reinterpret_cast<Vector*>(to), v); }
inline Vector broadcast(int32_t v) { return _mm256_set1_epi32(v); }
inline Vector broadcast(int64_t v) { return _mm256_set1_epi64x(v); }
inline Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
inline Vector multiply_bytes(Vector a, Vector b) { return _mm256_maddubs_epi16(a, b); }
inline Vector multiply_words(Vector a, Vector b) { return _mm256_madd_epi16(a, b); }
inline Vector pair_sums(Vector a, Vector b) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xD8); }
constexpr int kMaxVectors = 2;
constexpr int kPixels[] = {0, 6, 6};  // 16 registers
#endif

constexpr int kLanes = MODIFF_VECTOR_BYTES / 4;

// Vectors of sums for a panel: kWords has two sums per channel, one per pair of codes.
template <Arithmetic A>
constexpr int kPanelVectors = kPanel / kLanes * (A == kWords ? 2 : 1);

// Panels of a set, which share a pass over K where they fit into the registers; else a panel takes several passes.
template <Arithmetic A>
constexpr int kMaxPanels = std::max(1, kMaxVectors / kPanelVectors<A>);

template <Arithmetic A>
constexpr int pixels_of(int panels) {
  return kPixels[std::min(kMaxVectors, panels * kPanelVectors<A>)];
}

// Codes of one pixel at k: four, in every lane of their size.
template <Arithmetic A>
MODIFF_INLINE Vector load_codes(const uint8_t* row, int64_t k) {
  std::conditional_t<A == kWords, int64_t, int32_t> four;
  constexpr int64_t kSize = A == kWords ? 2 : 1;
  std::memcpy(&four, row + k * kSize, sizeof(four));
  return broadcast(four);
}

// sum + product, in the register of sum and here: GCC draws the broadcasts of all pixels before the first product, and
// copies sums, where 16 registers leave no room for either.
#define MODIFF_ADD(instruction, sum, product) asm volatile(instruction " %1, %0, %0" : "+v"(sum) : "v"(product))

template <Arithmetic A>
MODIFF_INLINE void multiply_add(Vector& sum, Vector codes, Vector weight) {
#ifdef MODIFF_DPBUSD
  sum = MODIFF_DPBUSD(sum, codes, weight);
#else
  if constexpr (A == kWords) {
    MODIFF_ADD("vpaddd", sum, multiply_words(codes, weight));
  } else {
    const Vector pairs = multiply_bytes(codes, weight);
    if constexpr (A == kBytes) MODIFF_ADD("vpaddw", sum, pairs);
    if constexpr (A == kPairs) MODIFF_ADD("vpaddd", sum, multiply_words(pairs, broadcast(0x00010001)));
  }
#endif
}

// sums[MR][NR][16] = codes of MR pixels times NR weight panels. Kept apart from the epilogue so that the accumulators
// have the registers to themselves.
template <Arithmetic A, int MR, int NR>
void multiply(const Block& b, int32_t* sums) {
  constexpr int kVectors = NR * kPanelVectors<A>, kPass = std::min(kVectors, kMaxVectors);
  constexpr int kVectorWeights = A == kWords ? MODIFF_VECTOR_BYTES / 2 : MODIFF_VECTOR_BYTES;
  if (A == kBytes) std::memset(sums, 0, MR * NR * kPanel * sizeof(int32_t));
  for (int first = 0; first < kVectors; first += kPass) {
    Vector acc[MR][kPass];
    for (int m = 0; m < MR; ++m)
      for (int n = 0; n < kPass; ++n) acc[m][n] = zeros();
    const int8_t* weight = b.weight + first * kVectorWeights;
    for (int64_t r = 0; r < b.runs.count; ++r) {
      const uint8_t* row[MR];
      for (int m = 0; m < MR; ++m) row[m] = b.pixel[m] + b.runs.offset[r] * b.code_bytes;
      for (int64_t k = 0; k < b.runs.length;) {
        const int64_t end = A == kBytes ? std::min(k + kDot * b.span, b.runs.length) : b.runs.length;
        for (; k < end; k += kDot, weight += kPanel * kDot) {
          Vector w[kPass];
#pragma GCC unroll 4
          for (int n = 0; n < kPass; ++n) {
            const int8_t* from = weight + n / kPanelVectors<A> * b.panel_bytes + n % kPanelVectors<A> * kVectorWeights;
            if constexpr (A == kWords)
              w[n] = load_words(from);
            else
              w[n] = load(from);
          }
#pragma GCC unroll 16
          for (int m = 0; m < MR; ++m) {
            const Vector codes = load_codes<A>(row[m], k);
#pragma GCC unroll 4
            for (int n = 0; n < kPass; ++n) multiply_add<A>(acc[m][n], codes, w[n]);
          }
        }
        if constexpr (A == kBytes) {
          const Vector ones = broadcast(0x00010001);
#pragma GCC unroll 16
          for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
            for (int n = 0; n < kPass; ++n) {
              int32_t* to = sums + (m * kPass + n) * kLanes;
              store(to, add(load(to), multiply_words(acc[m][n], ones)));
              acc[m][n] = zeros();
            }
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      int32_t* to = sums + m * NR * kPanel;
      if constexpr (A == kWords) {
        for (int n = 0; n < kPass; n += 2) store(to + (first + n) / 2 * kLanes, pair_sums(acc[m][n], acc[m][n + 1]));
      } else if constexpr (A != kBytes) {
        for (int n = 0; n < kPass; ++n) store(to + n * kLanes, acc[m][n]);
      }
    }
  }
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

// A panel's channels of one pixel, in one or two registers. Passed by reference: by value they are no part of the ABI.
using Floats = float __attribute__((vector_size(kPanel * 4)));
using Ints = int32_t __attribute__((vector_size(kPanel * 4)));

MODIFF_INLINE void load_floats(Floats& to, const void* base, DType dtype, int64_t offset, int64_t count) {
  alignas(64) float buffer[kPanel] = {};
  const float* row = load_row(base, dtype, offset, count, buffer);
  if (count == kPanel) {
    std::memcpy(&to, row, sizeof(to));
  } else {
    if (row != buffer) std::memcpy(buffer, row, count * sizeof(float));
    std::memcpy(&to, buffer, sizeof(to));
  }
}

MODIFF_INLINE void store_floats(void* base, DType dtype, int64_t offset, int64_t count, const Floats& value) {
  alignas(64) float buffer[kPanel];
  std::memcpy(buffer, &value, sizeof(value));
  store_row(base, dtype, offset, count, buffer);
}

// Panel n of the set, of which `count` channels exist.
MODIFF_INLINE void finish(const Block& b, int pixels, int panels, int n, int64_t count, const int64_t* granule,
                          const int32_t* sums) {
  const ProductProblem& p = *b.p;
  const int64_t channel = b.channel + n * kPanel;
  Floats weight_scale, bias = {}, other;
  load_floats(weight_scale, p.weight_scale, DType::kFloat32, channel, count);
  if (p.bias != nullptr) load_floats(bias, p.bias, DType::kFloat32, channel, count);
  Ints weight_sum, sum;
  std::memcpy(&weight_sum, b.weight_sum + n * kPanel, sizeof(weight_sum));
  for (int m = 0; m < pixels; ++m) {
    const int64_t offset = b.output_pixel[m] * p.c_out + channel;
    std::memcpy(&sum, sums + (m * panels + n) * kPanel, sizeof(sum));
    sum -= weight_sum * (b.shift + (p.zero_point != nullptr ? p.zero_point[granule[m]] : 0));
    Floats value = __builtin_convertvector(sum, Floats) * weight_scale * p.scale[granule[m]];
    if (p.y_hat != nullptr) {
      load_floats(other, p.y_hat, p.y_hat_dtype, offset, count);
      value += other;
      store_floats(p.y_hat, p.y_hat_dtype, offset, count, value);
    } else {
      value += bias;
    }
    if (p.out == nullptr) continue;
    if (p.skip != nullptr) {
      load_floats(other, p.skip, p.skip_dtype, offset, count);
      value += other;
    }
    store_floats(p.out, p.out_dtype, offset, count, value);
  }
}

void epilogue(const Block& b, int pixels, int panels, const int32_t* sums) {
  const int64_t rows = b.p->out_h * b.p->out_w;
  int64_t granule[kMaxPixels];
  for (int m = 0; m < pixels; ++m)
    granule[m] = b.p->granularity == Granularity::kPerTensor   ? 0
                 : b.p->granularity == Granularity::kPerSample ? b.output_pixel[m] / rows
                                                               : b.output_pixel[m];
  for (int n = 0; n < panels; ++n) {
    const int64_t count = std::min(kPanel, b.channels - n * kPanel);
    if (count == kPanel)
      finish(b, pixels, panels, n, kPanel, granule, sums);
    else
      finish(b, pixels, panels, n, count, granule, sums);
  }
}

using MultiplyFn = void (*)(const Block&, int32_t*);

template <Arithmetic A, int NR, int... MR>
constexpr MultiplyFn pick(int mr, std::integer_sequence<int, MR...>) {
  constexpr MultiplyFn table[] = {&multiply<A, MR + 1, NR>...};
  return table[mr - 1];
}

template <Arithmetic A, int NR = 1>
MultiplyFn multiply_for(int pixels, int panels) {
  if constexpr (NR < kMaxPanels<A>)
    if (panels > NR) return multiply_for<A, NR + 1>(pixels, panels);
  return pick<A, NR>(pixels, std::make_integer_sequence<int, pixels_of<A>(NR)>());
}

// What a task does with its codes.
struct Kernel {
  MultiplyFn (*multiply_for)(int pixels, int panels);
  int (*pixels_of)(int panels);
  int max_panels;
  int64_t span;
  int32_t shift, code_bytes;

  int panel_set(int64_t left) const {
    if (max_panels == 4 && (left == 5 || left == 6)) return 3;
    return static_cast<int>(std::min<int64_t>(left, max_panels));
  }
};

template <Arithmetic A>
Kernel kernel(int64_t span, int shift) {
  return {&multiply_for<A>, &pixels_of<A>, kMaxPanels<A>, span, shift, A == kWords ? 2 : 1};
}

void copy_codes(const int8_t* from, uint8_t* image, int64_t first, int64_t count, const Kernel& k) {
  if (k.code_bytes == 2) {
    auto* to = reinterpret_cast<int16_t*>(image) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  } else {
    uint8_t* to = image + first;
    const auto shift = static_cast<uint8_t>(k.shift);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(from[i]) + shift;
  }
}

void set_codes(uint8_t* image, int64_t first, int64_t count, int code, const Kernel& k) {
  if (k.code_bytes == 2)
    std::fill_n(reinterpret_cast<int16_t*>(image) + first, count, static_cast<int16_t>(code));
  else
    std::memset(image + first, code + k.shift, count);
}

class Convolution {
 public:
  explicit Convolution(const ProductProblem& problem)
      : p_(problem), layout_(p_.c_in, p_.c_out, p_.kernel_h * p_.kernel_w, p_.groups) {
    pixel_codes_ = layout_.groups * layout_.c_padded;
    // Columns of the padded image that any output reads.
    padded_w_ = (p_.out_w - 1) * p_.stride_w + (p_.kernel_w - 1) * p_.dilation_w + 1;
    const bool contiguous_row = p_.groups == 1 && p_.dilation_w == 1;
    run_count_ = p_.kernel_h * (contiguous_row ? 1 : p_.kernel_w);
    run_length_ = contiguous_row ? p_.kernel_w * layout_.c_padded : layout_.c_padded;
    int64_t i = 0;
    for (int64_t r = 0; r < p_.kernel_h; ++r)
      for (int64_t s = 0; s < (contiguous_row ? 1 : p_.kernel_w); ++s)
        run_offset_[i++] = (r * p_.dilation_h * padded_w_ + s * p_.dilation_w) * pixel_codes_;
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
      task(n, std::min(n + images_, p_.samples), row, std::min(row + rows_, p_.out_h), kSet * (split * sets / splits_),
           std::min(kSet * ((split + 1) * sets / splits_), layout_.panels));
    });
  }

 private:
  int64_t panel_sets() const { return (layout_.panels + kSet - 1) / kSet; }

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
        const int64_t panels = std::min(kSet * ((sets + splits - 1) / splits), layout_.panels);
        const double longest = (tasks + threads - 1) / threads * task_cycles(some_rows, panels);
        if (best != 0 && longest >= 0.97 * best) continue;
        best = longest;
        rows_ = some_rows;
        splits_ = splits;
      }
    }
  }

  // Rough cycles of a task: two vpdpbusd a cycle, or half as many products without it, the copy of its input, its weight from the L2 cache.
  double task_cycles(int64_t rows, int64_t panels) const {
    const double k = static_cast<double>(run_count_ * run_length_ * p_.groups);
    const double pixels = static_cast<double>(images_ * rows * p_.out_w),
                 channels = static_cast<double>(panels * kPanel);
    const int64_t input_rows = (rows - 1) * p_.stride_h + (p_.kernel_h - 1) * p_.dilation_h + 1;
    const double input = static_cast<double>(images_ * input_rows * padded_w_ * pixel_codes_);
#ifdef MODIFF_DPBUSD
    constexpr int kProducts = 2 * MODIFF_VECTOR_BYTES;
#else
    constexpr int kProducts = MODIFF_VECTOR_BYTES;
#endif
    return pixels * channels * k / kProducts + input / 32 + channels * k / 32 + 200;
  }

  void task(int64_t n0, int64_t n1, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) {
    const int64_t image_h = (row1 - row0 - 1) * p_.stride_h + (p_.kernel_h - 1) * p_.dilation_h + 1;
    const int64_t first = row0 * p_.stride_h - p_.pad_h;
    const Kernel k = choose(n0, n1, first, image_h);
    const int64_t pixel_bytes = pixel_codes_ * k.code_bytes, image_bytes = image_h * padded_w_ * pixel_bytes;
    auto* image = static_cast<uint8_t*>(thread_scratch(3, (n1 - n0) * image_bytes + 64));
    for (int64_t n = n0; n < n1; ++n) fill(n, first, image_h, image + (n - n0) * image_bytes, k);

    const int64_t per_image = (row1 - row0) * p_.out_w, total = (n1 - n0) * per_image;
    const uint8_t* pixel[kMaxPixels];
    int64_t output_pixel[kMaxPixels];
    alignas(64) int32_t sums[kMaxSums];
    for (int64_t g = 0; g < p_.groups; ++g) {
      for (int64_t panel = panel0; panel < panel1;) {
        const int nr = k.panel_set(panel1 - panel);
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
        b.span = k.span;
        b.shift = k.shift;
        b.code_bytes = k.code_bytes;
        int64_t n = 0, row = 0, column = 0;
        for (int64_t done = 0; done < total;) {
          const int mr = static_cast<int>(std::min<int64_t>(k.pixels_of(nr), total - done));
          for (int m = 0; m < mr; ++m) {
            pixel[m] = image + n * image_bytes + (row * p_.stride_h * padded_w_ + column * p_.stride_w) * pixel_bytes +
                       g * layout_.c_padded * k.code_bytes;
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
          k.multiply_for(mr, nr)(b, sums);
          epilogue(b, mr, nr, sums);
          done += mr;
        }
        panel += nr;
      }
    }
  }

  int zero_of(int64_t n) const {
    return p_.zero_point == nullptr ? 0 : p_.zero_point[p_.granularity == Granularity::kPerSample ? n : 0];
  }

  // The micro-kernel for input rows [first, first + count) of samples [n0, n1).
  Kernel choose([[maybe_unused]] int64_t n0, [[maybe_unused]] int64_t n1, [[maybe_unused]] int64_t first,
                [[maybe_unused]] int64_t count) const {
#ifdef MODIFF_DPBUSD
    return kernel<kVnni>(0, 128);
#else
    const int64_t begin = std::max<int64_t>(first, 0), end = std::min(first + count, p_.h);
    int low = 127, high = -128;
    const auto span = [&] { return (1 << 14) / (std::max(high - low, 1) << (p_.weight_bits - 1)); };
    for (int64_t n = n0; n < n1; ++n) {
      low = std::min(low, zero_of(n));
      high = std::max(high, zero_of(n));
      for (int64_t y = begin; y < end && span() > 0; ++y) {
        const int8_t* row = p_.codes + (n * p_.h + y) * p_.w * p_.c_in;
        int8_t least = 0, most = 0;
#pragma omp simd reduction(min : least) reduction(max : most)
        for (int64_t i = 0; i < p_.w * p_.c_in; ++i) {
          least = row[i] < least ? row[i] : least;
          most = row[i] > most ? row[i] : most;
        }
        low = std::min<int>(low, least);
        high = std::max<int>(high, most);
      }
    }
    return span() > 1 ? kernel<kBytes>(span(), -low) : span() == 1 ? kernel<kPairs>(1, -low) : kernel<kWords>(0, 0);
#endif
  }

  // Copies input rows [first, first + count) of sample n, with borders, channels padded to a multiple of 4 per group.
  void fill(int64_t n, int64_t first, int64_t count, uint8_t* image, const Kernel& k) const {
    const int zero = zero_of(n);
    const int64_t row_codes = padded_w_ * pixel_codes_;
    const int64_t left = std::min(p_.pad_w, padded_w_), middle = std::min(p_.w, padded_w_ - left);
    const bool dense = layout_.c_padded == layout_.c_group;
    for (int64_t y = 0; y < count; ++y) {
      uint8_t* row = image + y * row_codes * k.code_bytes;
      const int64_t source_y = first + y, begin = left * pixel_codes_, end = begin + middle * pixel_codes_;
      if (source_y < 0 || source_y >= p_.h) {
        set_codes(row, 0, row_codes, zero, k);
        continue;
      }
      const int8_t* source = p_.codes + (n * p_.h + source_y) * p_.w * p_.c_in;
      set_codes(row, 0, begin, zero, k);
      set_codes(row, end, row_codes - end, zero, k);
      if (dense) {
        copy_codes(source, row, begin, end - begin, k);
        continue;
      }
      set_codes(row, begin, end - begin, zero, k);
      for (int64_t x = 0; x < middle; ++x)
        for (int64_t g = 0; g < p_.groups; ++g)
          copy_codes(source + x * p_.c_in + g * layout_.c_group, row, begin + x * pixel_codes_ + g * layout_.c_padded,
                     layout_.c_group, k);
    }
  }

  const ProductProblem& p_;
  VnniLayout layout_;
  int64_t pixel_codes_, padded_w_, run_count_, run_length_;
  int64_t run_offset_[kMaxRuns];
  int64_t images_ = 1, rows_ = 1, splits_ = 1;
};

}  // namespace
}  // namespace modiff::cpu
