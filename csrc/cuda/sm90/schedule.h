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

#ifndef MODIFF_MULTICAST  // 0: every block loads all of its codes
#define MODIFF_MULTICAST 1
#endif

// The two blocks of a cluster compute work items i and i + 1 at the same time: two splits of a tile, whose sums they
// trade, or two tiles of the same rows, of which each loads half of the codes, for both.
MODIFF_HD bool trades_sums(const Schedule& s) { return s.splits == 2; }
MODIFF_HD bool shares_codes(const Schedule& s) { return MODIFF_MULTICAST && s.splits == 1 && s.column_tiles % 2 == 0; }
MODIFF_HD bool in_clusters(const Schedule& s) { return trades_sums(s) || shares_codes(s); }

MODIFF_HD int work_count(const Schedule& s) { return s.row_tiles * s.column_tiles * s.splits; }

// At most one block for each multiprocessor, in clusters an even number.
MODIFF_HD int block_count(const Schedule& s, int multiprocessors) {
  const int blocks = least(work_count(s), multiprocessors);
  return in_clusters(s) ? most(2, blocks / 2 * 2) : blocks;
}

// Blocks take the work items block, block + blocks, ... at about the same time. Splits of a tile are neighbours, so are tiles that
// share codes; tiles
// go down kBand tiles of rows before they go to the next column, so that the work items of a wave share rows and
// columns in the L2 cache.
constexpr int kBand = 8;

MODIFF_HD Work work_of(const Schedule& s, int index) {
  const int wide = shares_codes(s) ? 2 : 1, columns = s.column_tiles / wide;
  const int split = index % s.splits, tile = index / s.splits / wide;
  const int band = tile / (kBand * columns), within = tile % (kBand * columns);
  const int height = least(kBand, s.row_tiles - band * kBand);
  Work work;
  work.row_tile = band * kBand + within % height;
  work.column_tile = within / height * wide + index % wide;
  work.first_k_block = s.k_blocks * split / s.splits;
  work.end_k_block = s.k_blocks * (split + 1) / s.splits;
  work.tile = work.row_tile * s.column_tiles + work.column_tile;
  return work;
}

// A k-block is a box of kBlockK codes of one tap. The last box of a tap may reach past its channels: the codes there are
// 0, because TMA fills with 0 what lies outside the image's channels, whatever the weight's bytes are; and of a box whose
// second half is all zeros the first half alone is multiplied. So 320 channels are two whole k-blocks and one half.
struct Window {
  int channels;  // of a tap
  int taps, kernel_w, dilation_h, dilation_w;
  int boxes;       // of a tap
  bool last_half;  // of the last box of a tap the second half is zeros
};

// The boxes in order, by additions.
struct Walk {
  int box, tap_w;                   // of the tap, of the line of taps
  int channel, offset_h, offset_w;  // first one in the image; of the tap
  int code;                         // first one in the weight's row

  MODIFF_HD static Walk begin(const Window& w, int k_block) {
    const int tap = k_block / w.boxes, tap_h = tap / w.kernel_w;
    Walk walk;
    walk.box = k_block - tap * w.boxes;
    walk.tap_w = tap - tap_h * w.kernel_w;
    walk.channel = walk.box * kBlockK;
    walk.offset_h = tap_h * w.dilation_h;
    walk.offset_w = walk.tap_w * w.dilation_w;
    walk.code = tap * w.channels + walk.channel;
    return walk;
  }

  MODIFF_HD void advance(const Window& w) {
    channel += kBlockK;
    code += kBlockK;
    if (++box < w.boxes) return;
    code += w.channels - channel;
    box = channel = 0;
    offset_w += w.dilation_w;
    if (++tap_w < w.kernel_w) return;
    tap_w = offset_w = 0;
    offset_h += w.dilation_h;
  }
};

inline Window window_of(const ProductProblem& p) {
  Window w{};
  w.channels = static_cast<int>(p.c_in);
  w.taps = static_cast<int>(p.kernel_h * p.kernel_w);
  w.kernel_w = static_cast<int>(p.kernel_w);
  w.dilation_h = static_cast<int>(p.dilation_h);
  w.dilation_w = static_cast<int>(p.dilation_w);
  w.boxes = ceil_div(w.channels, kBlockK);
  w.last_half = w.channels - (w.boxes - 1) * kBlockK <= kBlockK / 2;
  return w;
}

MODIFF_HD int k_block_count(const Window& w) { return w.taps * w.boxes; }

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
