// What a thread block computes, and in which order: work items, k-blocks, and the pixels that TMA starts from.
#pragma once
#include "common/problem.h"
#include "cuda/sm90/layout.h"

namespace modiff::cuda::sm90 {

// The output has row_tiles * column_tiles tiles, each of `k_blocks` along K that are shared out among `splits` work
// items.
struct Schedule {
  int row_tiles, column_tiles, splits;
  int k_blocks;
};

struct Work {
  int row_tile, column_tile;
  int first_k_block, end_k_block;
  int tile;  // row_tile * column_tiles + column_tile
};

MODIFF_HD int work_count(const Schedule& s) { return s.row_tiles * s.column_tiles * s.splits; }

// Blocks take the work items block, block + blocks, ... at about the same time. Splits of a tile are neighbours; tiles
// go down kBand tiles of rows before they go to the next column, so that the work items of a wave share rows and
// columns in the L2 cache.
constexpr int kBand = 8;

MODIFF_HD Work work_of(const Schedule& s, int index) {
  const int split = index % s.splits, tile = index / s.splits;
  const int band = tile / (kBand * s.column_tiles), within = tile % (kBand * s.column_tiles);
  const int height = least(kBand, s.row_tiles - band * kBand);
  Work work;
  work.row_tile = band * kBand + within % height;
  work.column_tile = within / height;
  work.first_k_block = s.k_blocks * split / s.splits;
  work.end_k_block = s.k_blocks * (split + 1) / s.splits;
  work.tile = work.row_tile * s.column_tiles + work.column_tile;
  return work;
}

// K is walked in boxes of `swizzle` codes of one tap, kBlockK / swizzle of them to a k-block. The last box of a tap may
// reach past its channels, and the last k-block past the last tap: the codes there are 0, because TMA fills with 0 what
// lies outside the image's channels, whatever the weight's bytes are.
struct Window {
  int channels;  // of a tap
  int taps, kernel_w, dilation_h, dilation_w;
  int swizzle;
  int boxes;  // of a tap
};

struct Box {
  int channel;             // first one in the image, past the end in the padding
  int offset_h, offset_w;  // of the tap
  int code;                // first one in the weight's row
};

MODIFF_HD Box box_of(const Window& w, int index) {
  int tap = index / w.boxes, channel = index % w.boxes * w.swizzle;
  if (tap >= w.taps) {
    tap = 0;
    channel = w.boxes * w.swizzle;
  }
  Box box;
  box.channel = channel;
  box.offset_h = tap / w.kernel_w * w.dilation_h;
  box.offset_w = tap % w.kernel_w * w.dilation_w;
  box.code = channel < w.channels ? tap * w.channels + channel : 0;
  return box;
}

// One box of 128 codes unless two of 64 have fewer zeros past a tap's channels (320 = 5 * 64). Planes of 3 bits need
// boxes of 128: a box of a plane has 16 bytes at least.
inline Window window_of(const ProductProblem& p, int weight_bits) {
  Window w{};
  w.channels = static_cast<int>(p.c_in);
  w.taps = static_cast<int>(p.kernel_h * p.kernel_w);
  w.kernel_w = static_cast<int>(p.kernel_w);
  w.dilation_h = static_cast<int>(p.dilation_h);
  w.dilation_w = static_cast<int>(p.dilation_w);
  const bool narrow = weight_bits != 3 && ceil_div(w.channels, 64) % 2 == 1 && w.taps > 1;
  w.swizzle = narrow ? 64 : 128;
  w.boxes = ceil_div(w.channels, w.swizzle);
  return w;
}

MODIFF_HD int k_block_count(const Window& w) { return ceil_div(w.taps * w.boxes, kBlockK / w.swizzle); }

// Rows of the result are the output pixels of all samples in order. A pixel's window begins here in the input.
struct Image {
  bool tiled;  // a matrix of rows of channels: 1x1, stride 1, no padding
  int out_h, out_w, stride_h, stride_w, pad_h, pad_w;
};

struct Corner {
  int w, h, n;
};

inline bool is_matrix(const ProductProblem& p) {
  return p.kernel_h == 1 && p.kernel_w == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0;
}

inline Image image_of(const ProductProblem& p) {
  return {is_matrix(p),
          static_cast<int>(p.out_h),
          static_cast<int>(p.out_w),
          static_cast<int>(p.stride_h),
          static_cast<int>(p.stride_w),
          static_cast<int>(p.pad_h),
          static_cast<int>(p.pad_w)};
}

MODIFF_HD Corner corner_of(const Image& image, int row) {
  const int line = row / image.out_w;
  Corner corner;
  corner.w = row % image.out_w * image.stride_w - image.pad_w;
  corner.h = line % image.out_h * image.stride_h - image.pad_h;
  corner.n = line / image.out_h;
  return corner;
}

}  // namespace modiff::cuda::sm90
