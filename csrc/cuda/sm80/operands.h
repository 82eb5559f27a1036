// From global into shared memory: operand A, the rows of codes that a window meets (implicit GEMM, NHWC), and operand
// B, the rows of the weight. A k-block is 64 bytes of every row of a tile along K = (r, s, c), c fastest, which is
// flat: it may hold codes of several taps. Rows are copied in chunks of 16 bytes; those outside the image, and past the
// last row or K, are zeros. Chunks are swizzled against bank conflicts.
#pragma once
#include "common/packing.h"
#include "cuda/sm80/tile_config.h"

namespace modiff::cuda::sm80 {

constexpr int kChunk = 16;
constexpr int kChunks = kBlockKBytes / kChunk;  // of a row of a tile

// Place of a chunk of a tile in shared memory. Eight rows lie in four lines of 128 bytes; with this exclusive or the
// eight chunks that a phase of ldmatrix reads, one column of eight rows, lie in all eight groups of four banks.
MODIFF_HD int swizzled(int row, int chunk) { return row * kBlockKBytes + ((chunk ^ ((row >> 1) & 3)) * kChunk); }

// What the loaders read. Lengths along K and channels are in bytes: of codes, or of pairs of them (Operands::kNibbles).
struct OperandArgs {
  const uint8_t* codes;   // [samples, h, w, channels]
  const uint8_t* weight;  // [columns, row_bytes]
  int rows, columns;      // M, N
  int k, channels;
  int h, w, out_h, out_w, kernel_h, kernel_w;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int weight_bits;     // 4 or 3, for Operands::kUnpacked
  int64_t row_bytes;   // of the packed weight
  int64_t high_plane;  // 3 bits: where in a row the plane of bit 2 begins
};

// Each thread copies the chunks of one column of the tile, kApart rows apart, and keeps where their pixels are.
template <int kThreads, int kRows>
struct CodesLoader {
  static constexpr int kApart = kThreads / kChunks;
  static constexpr int kCount = kRows / kApart;
  static_assert(kRows % kApart == 0, "whole passes over the rows of a tile");

  int first[kCount];  // the pixel of the images under tap (0, 0), which may lie outside of its own
  int top[kCount], left[kCount];
  int channel, r, s;  // of this thread's chunk in the next k-block; r >= kernel_h past the end

  // The tile begins at output pixel `row`, the first k-block at byte `k`.
  MODIFF_HD CodesLoader(const OperandArgs& args, int thread, int row, int k) {
    k += thread % kChunks * kChunk;
    const int tap = k / args.channels;
    channel = k - tap * args.channels;
    r = tap / args.kernel_w;
    s = tap - r * args.kernel_w;
    MODIFF_UNROLL for (int i = 0; i < kCount; ++i) {
      const int pixel = row + thread / kChunks + i * kApart;
      const int line = pixel / args.out_w, sample = line / args.out_h;
      top[i] = (line - sample * args.out_h) * args.stride_h - args.pad_h;
      left[i] = (pixel - line * args.out_w) * args.stride_w - args.pad_w;
      first[i] = (sample * args.h + top[i]) * args.w + left[i];
      if (pixel >= args.rows) top[i] = kOutside;
    }
  }

  // Copies this thread's chunks of the next k-block.
  template <class Cta>
  MODIFF_HD void load(Cta& cta, const OperandArgs& args, int thread, uint8_t* tile) {
    const int down = r * args.dilation_h, right = s * args.dilation_w;
    const int beside = down * args.w + right;
    MODIFF_UNROLL for (int i = 0; i < kCount; ++i) {
      const int y = top[i] + down, x = left[i] + right;
      const bool there = r < args.kernel_h && static_cast<uint32_t>(y) < static_cast<uint32_t>(args.h) &&
                         static_cast<uint32_t>(x) < static_cast<uint32_t>(args.w);
      const uint8_t* from =
          there ? args.codes + (static_cast<int64_t>(first[i] + beside) * args.channels + channel) : args.codes;
      cta.template copy_async<kChunk>(tile + swizzled(thread / kChunks + i * kApart, thread % kChunks), from, there);
    }
    channel += kBlockKBytes;
    while (channel >= args.channels) {
      channel -= args.channels;
      if (++s == args.kernel_w) {
        s = 0;
        ++r;
      }
    }
  }

 private:
  static constexpr int kOutside = INT32_MIN / 2;
};

// Weights that are multiplied as they are in memory: the same mapping.
template <int kThreads, int kRows>
struct WeightLoader {
  static constexpr int kApart = kThreads / kChunks;
  static constexpr int kCount = kRows / kApart;
  static_assert(kRows % kApart == 0, "whole passes over the rows of a tile");

  int row, k;

  MODIFF_HD WeightLoader(const OperandArgs&, int thread, int column, int begin)
      : row(column + thread / kChunks), k(begin + thread % kChunks * kChunk) {}

  template <class Cta>
  MODIFF_HD void load(Cta& cta, const OperandArgs& args, int thread, uint8_t* tile) {
    MODIFF_UNROLL for (int i = 0; i < kCount; ++i) {
      const int n = row + i * kApart;
      const bool there = n < args.columns && k < args.k;
      const uint8_t* from = there ? args.weight + (n * args.row_bytes + k) : args.weight;
      cta.template copy_async<kChunk>(tile + swizzled(thread / kChunks + i * kApart, thread % kChunks), from, there);
    }
    k += kBlockKBytes;
  }
};

// Weights of 4 and 3 bits. A thread copies 32 codes of a row, 16 or 12 bytes, into a place of its own, and makes two
// chunks of bytes of them: what it waits for is its own, and unpacking is shared out evenly. A k-block ends at a
// multiple of 32 codes.
template <int kThreads, int kRows>
struct PackedLoader {
  static constexpr int kCodes = 32;
  static_assert(kThreads == kRows * kBlockKBytes / kCodes, "32 codes for every thread");

  int row, k;

  MODIFF_HD PackedLoader(const OperandArgs&, int thread, int column, int begin)
      : row(column + thread / 2), k(begin + thread % 2 * kCodes) {}

  template <class Cta>
  MODIFF_HD void load(Cta& cta, const OperandArgs& args, int, uint8_t* place) {
    const bool there = row < args.columns && k < args.k;
    const uint8_t* from = there ? args.weight + row * args.row_bytes : args.weight;
    const int at = there ? k : 0;
    if (args.weight_bits == 4) {
      cta.template copy_async<16>(place, from + at / 2, there);
    } else {
      const uint8_t* low = from + at / 4;
      cta.template copy_async<4>(place, low, there);
      cta.template copy_async<4>(place + 4, there ? low + 4 : low, there);
      cta.template copy_async<4>(place + 8, there ? from + (args.high_plane + at / 8) : from, there);
    }
    k += kBlockKBytes;
  }

  // Bytes of the 32 codes in `place`. Zeros of 3 bits stand for code -4, but they meet zeros: rows past the last
  // column are not stored, and codes past K are zeros.
  static MODIFF_HD void unpack(int bits, int thread, const uint8_t* place, uint8_t* tile) {
    uint32_t packed[4], bytes[8];
    load_words(place, packed);
    if (bits == 4) {
      MODIFF_UNROLL for (int i = 0; i < 4; ++i)
        unpack_eight_nibbles(packed[i], bytes[2 * i], bytes[2 * i + 1]);
    } else {
      unpack_planes({packed[0], packed[1]}, packed[2], bytes);
    }
    MODIFF_UNROLL for (int i = 0; i < 2; ++i) {
      store_words(tile + swizzled(thread / 2, thread % 2 * 2 + i), bytes + 4 * i);
    }
  }

 private:
  static MODIFF_HD void load_words(const uint8_t* from, uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__)
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    words[0] = four.x;
    words[1] = four.y;
    words[2] = four.z;
    words[3] = four.w;
#else
    std::memcpy(words, from, sizeof(words));
#endif
  }
  static MODIFF_HD void store_words(uint8_t* to, const uint32_t* words) {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
#else
    std::memcpy(to, words, kChunk);
#endif
  }
};

}  // namespace modiff::cuda::sm80
