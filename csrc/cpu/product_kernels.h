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

#include <type_traits>
#include <utility>

#include "cpu/product_tasks.h"

namespace modiff::cpu {
namespace {

constexpr int64_t kMaxSums = 24 * kPanel;  // largest MR * NR, times the channels of a panel

struct VectorBlock : Block {
  using Block::Block;
  int64_t span;  // of kBytes
  int32_t code_bytes;
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
void multiply(const VectorBlock& b, int32_t* sums) {
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

using MultiplyFn = void (*)(const VectorBlock&, int32_t*);

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

class Convolution final : public Tasks {
 public:
#ifdef MODIFF_DPBUSD
  static constexpr double kProducts = 2 * MODIFF_VECTOR_BYTES;  // two vpdpbusd
#else
  static constexpr double kProducts = MODIFF_VECTOR_BYTES;
#endif

  explicit Convolution(const ProductProblem& problem) : Tasks(problem, kProducts) {
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

 private:
  int64_t input_rows(int64_t rows) const { return (rows - 1) * p_.stride_h + (p_.kernel_h - 1) * p_.dilation_h + 1; }

  int64_t input_codes(int64_t rows) const override { return input_rows(rows) * padded_w_ * pixel_codes_; }

  void task(int64_t n0, int64_t n1, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) override {
    const int64_t image_h = input_rows(row1 - row0), first = row0 * p_.stride_h - p_.pad_h;
    const Kernel k = choose(n0, n1, first, image_h);
    const int64_t pixel_bytes = pixel_codes_ * k.code_bytes, image_bytes = image_h * padded_w_ * pixel_bytes;
    auto* image = static_cast<uint8_t*>(thread_scratch(3, (n1 - n0) * image_bytes + 64));
    for (int64_t n = n0; n < n1; ++n) fill(n, first, image_h, image + (n - n0) * image_bytes, k);

    const int64_t total = (n1 - n0) * (row1 - row0) * p_.out_w;
    alignas(64) int32_t sums[kMaxSums];
    for (int64_t g = 0; g < p_.groups; ++g) {
      for (int64_t panel = panel0; panel < panel1;) {
        const int nr = k.panel_set(panel1 - panel);
        const Input input{image + g * layout_.c_padded * k.code_bytes, image_bytes,
                          p_.stride_h * padded_w_ * pixel_bytes, p_.stride_w * pixel_bytes};
        Walk walk{p_, input, n0, row0, row1 - row0};
        VectorBlock b(p_, layout_, g, panel);
        b.pixel = walk.pixel;
        b.output_pixel = walk.output_pixel;
        b.runs = {run_count_, run_length_, run_offset_};
        b.shift = k.shift;
        b.span = k.span;
        b.code_bytes = k.code_bytes;
        for (int64_t done = 0; done < total;) {
          const int mr = static_cast<int>(std::min<int64_t>(k.pixels_of(nr), total - done));
          walk.next(mr);
          prefetch_epilogue(b, mr, nr);
          k.multiply_for(mr, nr)(b, sums);
          epilogue(b, mr, nr, sums);
          done += mr;
        }
        panel += nr;
      }
    }
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

  int64_t pixel_codes_, padded_w_, run_count_, run_length_;
  int64_t run_offset_[kMaxRuns];
};

}  // namespace
}  // namespace modiff::cpu
