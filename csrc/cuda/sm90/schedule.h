// What a thread block computes, and in which order: units of work, steps along K, and the pixels that TMA starts from.
#pragma once
#include "common/problem.h"
#include "cuda/sm90/layout.h"

namespace modiff::cuda::sm90 {

// The result is cut into tiles, the steps of K of a tile into `splits` parts. A unit is a part of a tile.
struct Schedule {
  int row_tiles, column_tiles, splits;
  int steps;  // along K
};

struct Unit {
  int row_tile, column_tile;
  int first_step, end_step;
  int tile;  // row_tile * column_tiles + column_tile
};

MODIFF_HD int unit_count(const Schedule& s) { return s.row_tiles * s.column_tiles * s.splits; }

// Blocks take the units block, block + blocks, ... at about the same time. Parts of a tile are neighbours; tiles go
// down kBand tiles of rows before they go to the next column, so that the units of a wave share rows and columns in the
// L2 cache.
constexpr int kBand = 8;

MODIFF_HD Unit unit_of(const Schedule& s, int index) {
  const int part = index % s.splits, tile = index / s.splits;
  const int band = tile / (kBand * s.column_tiles), within = tile % (kBand * s.column_tiles);
  const int height = least(kBand, s.row_tiles - band * kBand);
  Unit unit;
  unit.row_tile = band * kBand + within % height;
  unit.column_tile = within / height;
  unit.first_step = s.steps * part / s.splits;
  unit.end_step = s.steps * (part + 1) / s.splits;
  unit.tile = unit.row_tile * s.column_tiles + unit.column_tile;
  return unit;
}

// K is walked in boxes of `span` codes of one tap, kStep / span of them to a step. The last box of a tap may reach past
// its channels, and the last step past the last tap: the codes there are 0, because TMA fills with 0 what lies
// outside the image's channels, whatever the weight's bytes are.
struct Window {
  int channels;  // of a tap
  int taps, kernel_w, dilation_h, dilation_w;
  int span;
  int boxes;  // of a tap
};

struct Box {
  int channel;             // first one in the image, past the end in the padding
  int offset_h, offset_w;  // of the tap
  int code;                // first one in the weight's row
};

MODIFF_HD Box box_of(const Window& w, int index) {
  int tap = index / w.boxes, channel = index % w.boxes * w.span;
  if (tap >= w.taps) {
    tap = 0;
    channel = w.boxes * w.span;
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
  w.span = narrow ? 64 : 128;
  w.boxes = ceil_div(w.channels, w.span);
  return w;
}

MODIFF_HD int step_count(const Window& w) { return ceil_div(w.taps * w.boxes, kStep / w.span); }

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
