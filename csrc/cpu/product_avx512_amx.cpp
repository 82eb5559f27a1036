// Products on the tile registers of AMX, for convolutions without groups. A register holds 16 rows of 64 bytes: 16
// pixels by 64 codes, or 64 codes by the 16 channels of a panel (16 rows of layout vnni_v1), or 16 pixels by a panel of
// sums. Operands, tasks and epilogue are those of product_kernels.h and product_tasks.h; tdpbssd multiplies signed bytes,
// so the codes need no shift.
//
//   tiles    0 1 / 2 3     sums of up to 2 x 16 pixels and 2 panels
//            4 / 5         codes of the first and the second 16 pixels
//            6   7         weights of the two panels
//
// The pixels of a tile lie at one distance, while a row of a padded image ends after every out_w of them. So the input of
// a task holds, for every output pixel of a row, the kernel_w * c codes that one row of the kernel multiplies, a multiple
// of 64 bytes: rows follow each other without a gap, and the rows of the kernel share them. Where strides forbid that,
// or kernel_w * c is small, a pixel has the codes of the whole kernel. A 1x1 convolution and a GEMM read the codes where
// they are. A tile ends with its image.
//
// Bounds: tdpbssd takes 16 cycles for 16,384 multiply-adds; the load of a tile takes 8 from the first-level cache, and
// there are as many loads as products.
#include "cpu/product_tasks.h"
#include "cpu/tiles.h"

namespace modiff::cpu {
namespace {

constexpr int64_t kBlockPanels = 20;      // that share an epilogue: whole rows of y_hat, for most layers
constexpr int64_t kBlockBytes = 1 << 20;  // of their weights, which stay in the second-level cache
constexpr int64_t kLeastChannels = 16;    // with fewer, copying codes to tiles takes longer than vpdpbusd

// Of `pixels` pixels, in one or two tiles.
void shape(Tiles& tiles, int pixels) {
  const int first = std::min(pixels, kTileRows), second = pixels - first;
  const TileShape one{first, kTileBytes}, two{second, kTileBytes}, weights{kTileRows, kTileBytes};
  tiles.shape({one, one, two, two, one, two, weights, weights});
}

// sums[pixel][panel][16] of MT tiles of pixels and NT panels, from `panel` of the block, which has `panels`.
template <int MT, int NT>
void multiply(const Block& b, int64_t pixel_bytes, int panel, int panels, int32_t* sums) {
  asm volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory
  _tile_zero(0);
  if constexpr (NT == 2) _tile_zero(1);
  if constexpr (MT == 2) _tile_zero(2);
  if constexpr (MT == 2 && NT == 2) _tile_zero(3);
  for (int64_t r = 0; r < b.runs.count; ++r) {
    const uint8_t* codes = b.pixel[0] + b.runs.offset[r];
    [[maybe_unused]] const uint8_t* more_codes = b.pixel[(MT - 1) * kTileRows] + b.runs.offset[r];
    const int8_t* weight = b.weight + panel * b.panel_bytes + r * b.runs.length * kPanel;
    for (int64_t k = 0; k < b.runs.length; k += kTileBytes) {
      _tile_loadd(4, codes + k, pixel_bytes);
      _tile_loadd(6, weight + k * kPanel, kTileBytes);
      _tile_dpbssd(0, 4, 6);
      if constexpr (NT == 2) {
        _tile_loadd(7, weight + b.panel_bytes + k * kPanel, kTileBytes);
        _tile_dpbssd(1, 4, 7);
      }
      if constexpr (MT == 2) {
        _tile_loadd(5, more_codes + k, pixel_bytes);
        _tile_dpbssd(2, 5, 6);
        if constexpr (NT == 2) _tile_dpbssd(3, 5, 7);
      }
    }
  }
  const int64_t pitch = panels * kPanel;
  sums += panel * kPanel;
  _tile_stored(0, sums, pitch * sizeof(int32_t));
  if constexpr (NT == 2) _tile_stored(1, sums + kPanel, pitch * sizeof(int32_t));
  sums += kTileRows * pitch;
  if constexpr (MT == 2) _tile_stored(2, sums, pitch * sizeof(int32_t));
  if constexpr (MT == 2 && NT == 2) _tile_stored(3, sums + kPanel, pitch * sizeof(int32_t));
}

class TiledConvolution final : public Tasks {
 public:
  static constexpr double kProducts = 512;  // about half of what tdpbssd could do

  explicit TiledConvolution(const ProductProblem& problem) : Tasks(problem, kProducts) {
    const int64_t row_run = p_.kernel_w * layout_.c_padded;
    rows_of_pixel_ = p_.stride_h == 1 && row_run >= kTileBytes ? 1 : p_.kernel_h;
    run_count_ = p_.kernel_h / rows_of_pixel_;
    run_length_ = rows_of_pixel_ * row_run;
    in_place_ = p_.kernel_h * p_.kernel_w == 1 && p_.stride_h * p_.stride_w == 1 && p_.pad_h + p_.pad_w == 0 &&
                p_.c_in % kTileBytes == 0;
    pixel_bytes_ = round_up(run_length_, kTileBytes);
    for (int64_t r = 0; r < run_count_; ++r) run_offset_[r] = r * p_.dilation_h * p_.out_w * pixel_bytes_;
  }

 private:
  int64_t input_rows(int64_t rows) const { return rows + (run_count_ - 1) * p_.dilation_h; }

  int64_t input_codes(int64_t rows) const override {
    return in_place_ ? 0 : input_rows(rows) * p_.out_w * pixel_bytes_;
  }

  void task(int64_t n0, int64_t n1, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) override {
    const int64_t image_bytes = input_rows(row1 - row0) * p_.out_w * pixel_bytes_;
    Input input{nullptr, image_bytes, p_.out_w * pixel_bytes_, pixel_bytes_};
    if (in_place_) {
      input.image_bytes = p_.h * p_.w * p_.c_in;
      input.data = reinterpret_cast<const uint8_t*>(p_.codes + (n0 * p_.h + row0) * p_.w * p_.c_in);
    } else {
      auto* image = static_cast<int8_t*>(thread_scratch(3, (n1 - n0) * image_bytes));
      for (int64_t n = n0; n < n1; ++n) fill(n, row0, input_rows(row1 - row0), image + (n - n0) * image_bytes);
      input.data = reinterpret_cast<const uint8_t*>(image);
    }
    // Whether the pixels of the task's images lie at one distance.
    const bool one_piece = (row1 - row0) * input.row_bytes == input.image_bytes;
    const int64_t total = (n1 - n0) * (row1 - row0) * p_.out_w;
    alignas(64) int32_t sums[kBlockPanels * kPanel * kMaxPixels];
    Tiles tiles;
    int shaped = 0;
    const int64_t most = std::clamp<int64_t>(kBlockBytes / layout_.panel_bytes() & ~1, 2, kBlockPanels);
    for (int64_t panel = panel0; panel < panel1; panel += most) {
      const int panels = static_cast<int>(std::min(panel1 - panel, most));
      Walk walk{p_, input, n0, row0, row1 - row0};
      Block b(p_, layout_, 0, panel);
      b.pixel = walk.pixel;
      b.output_pixel = walk.output_pixel;
      b.runs = {run_count_, run_length_, run_offset_};
      b.shift = 0;
      for (int64_t left = total; left > 0;) {
        const auto tile = [&] {
          const int64_t most = one_piece ? left : walk.left_in_image();
          return static_cast<int>(std::min<int64_t>(most, kTileRows));
        };
        int pixels = tile();
        walk.next(pixels);
        left -= pixels;
        if (pixels == kTileRows && left > 0) {
          const int more = tile();
          walk.next(more, pixels);
          left -= more;
          pixels += more;
        }
        prefetch_epilogue(b, pixels, panels);
        if (pixels != shaped) shape(tiles, pixels);
        shaped = pixels;
        for (int i = 0; i < panels; i += 2) {
          const auto multiply_pair = pixels > kTileRows ? multiply<2, 2> : multiply<1, 2>;
          const auto multiply_last = pixels > kTileRows ? multiply<2, 1> : multiply<1, 1>;
          (i + 1 < panels ? multiply_pair : multiply_last)(b, pixel_bytes_, i, panels, sums);
        }
        epilogue(b, pixels, panels, sums);
      }
    }
  }

  // Writes `count` rows of sample n, from the one that output row row0 begins with, expanded to output pixels.
  void fill(int64_t n, int64_t row0, int64_t count, int8_t* image) const {
    const int64_t row_stride = run_count_ == 1 ? p_.stride_h : 1;
    for (int64_t y = 0; y < count; ++y)
      for (int64_t x = 0; x < p_.out_w; ++x, image += pixel_bytes_) {
        int8_t* to = image;
        for (int64_t r = 0; r < rows_of_pixel_; ++r) {
          fill_row(n, row0 * p_.stride_h - p_.pad_h + y * row_stride + r * p_.dilation_h, x, to);
          to += p_.kernel_w * layout_.c_padded;
        }
        std::memset(to, 0, image + pixel_bytes_ - to);
      }
  }

  // The codes that one row of the kernel multiplies for output column x.
  void fill_row(int64_t n, int64_t source_y, int64_t x, int8_t* to) const {
    const int zero = zero_of(n);
    const int64_t length = p_.kernel_w * layout_.c_padded, first = x * p_.stride_w - p_.pad_w;
    if (source_y < 0 || source_y >= p_.h) {
      std::memset(to, zero, length);
      return;
    }
    const int8_t* row = p_.codes + (n * p_.h + source_y) * p_.w * p_.c_in;
    if (first >= 0 && first + p_.kernel_w <= p_.w && p_.dilation_w == 1 && p_.c_in == layout_.c_padded) {
      std::memcpy(to, row + first * p_.c_in, length);
      return;
    }
    std::memset(to, zero, length);
    for (int64_t s = 0; s < p_.kernel_w; ++s) {
      const int64_t source_x = first + s * p_.dilation_w;
      if (source_x >= 0 && source_x < p_.w) std::memcpy(to + s * layout_.c_padded, row + source_x * p_.c_in, p_.c_in);
    }
  }

  int64_t rows_of_pixel_;  // of the kernel
  int64_t run_count_, run_length_, pixel_bytes_;
  int64_t run_offset_[kMaxRuns];
  bool in_place_;
};

}  // namespace

void product_avx512_amx(const ProductProblem& problem) {
  if (problem.groups == 1 && problem.c_in >= kLeastChannels)
    TiledConvolution(problem).run();
  else
    product_avx512_vnni(problem);
}

}  // namespace modiff::cpu
