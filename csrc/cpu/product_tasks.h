// What the products of all instruction sets share: how a convolution is cut into tasks, and the epilogue. Included only
// by files compiled for one instruction set.
#pragma once
#include <algorithm>
#include <cstring>

#include "common/problem.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/product.h"

namespace modiff::cpu {
namespace {

constexpr int64_t kTaskPixels = 256;  // output pixels of a task, which reads a weight panel set from the L2 cache once
constexpr int64_t kSet = 4;           // panels of a share of the output channels are a multiple of this
constexpr int64_t kMaxRuns = 64;
constexpr int kMaxPixels = 32;  // of a block

// A run is a contiguous piece of K in the input of a task; the weights of all runs follow each other.
struct Runs {
  int64_t count;
  int64_t length;  // codes, a multiple of 4
  const int64_t* offset;
};

// Output pixels of some weight panels, whose sums a micro-kernel makes.
struct Block {
  const ProductProblem* p;
  const uint8_t* const* pixel;  // pointers into the input of the task
  const int64_t* output_pixel;  // flat output pixels
  Runs runs;
  const int8_t* weight;  // first panel
  int64_t panel_bytes;
  const int32_t* weight_sum;  // of the first panel's channels
  int64_t channel;            // first output channel
  int64_t channels;           // valid ones
  int32_t shift;              // of the codes in the input of the task

  Block(const ProductProblem& problem, const VnniLayout& layout, int64_t group, int64_t panel)
      : p(&problem),
        weight(problem.weight + (group * layout.panels + panel) * layout.panel_bytes()),
        panel_bytes(layout.panel_bytes()),
        weight_sum(reinterpret_cast<const int32_t*>(problem.weight + layout.weight_bytes()) +
                   (group * layout.panels + panel) * kPanel),
        channel(group * layout.n_group + panel * kPanel),
        channels(layout.n_group - panel * kPanel) {}
};

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

// A convolution cut into tasks: a block of output rows of one image, or several whole small images, times a range of
// output channels. What a task does is of the instruction set.
class Tasks {
 public:
  // products: multiply-adds of a core in a cycle.
  Tasks(const ProductProblem& problem, double products)
      : p_(problem), layout_(p_.c_in, p_.c_out, p_.kernel_h * p_.kernel_w, p_.groups), products_(products) {}

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

 protected:
  ~Tasks() = default;

  // Output rows [row0, row1) of samples [n0, n1), weight panels [panel0, panel1) of every group.
  virtual void task(int64_t n0, int64_t n1, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) = 0;

  // Codes that a task copies for this many output rows of an image.
  virtual int64_t input_codes(int64_t rows) const = 0;

  int zero_of(int64_t n) const {
    return p_.zero_point == nullptr ? 0 : p_.zero_point[p_.granularity == Granularity::kPerSample ? n : 0];
  }

  // The input of a task, and the pixels in it that its output pixels begin with.
  struct Input {
    const uint8_t* data;
    int64_t image_bytes, row_bytes, column_bytes;
  };

  // The output pixels of a task, some at a time.
  struct Walk {
    const ProductProblem& p;
    Input input;
    int64_t sample, first_row, rows;  // sample of the problem, row of the task
    int64_t row = 0, column = 0;
    const uint8_t* pixel[kMaxPixels] = {};
    int64_t output_pixel[kMaxPixels] = {};

    int64_t left_in_image() const { return (rows - row) * p.out_w - column; }

    void next(int count, int first = 0) {
      for (int m = first; m < first + count; ++m) {
        pixel[m] = input.data + row * input.row_bytes + column * input.column_bytes;
        output_pixel[m] = (sample * p.out_h + first_row + row) * p.out_w + column;
        if (++column < p.out_w) continue;
        column = 0;
        if (++row < rows) continue;
        row = 0;
        ++sample;
        input.data += input.image_bytes;
      }
    }
  };

  const ProductProblem& p_;
  VnniLayout layout_;

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

  // Rough cycles of a task: its products, the copy of its input, its weight from the L2 cache.
  double task_cycles(int64_t rows, int64_t panels) const {
    const double k = static_cast<double>(layout_.taps * layout_.c_padded * p_.groups);
    const double pixels = static_cast<double>(images_ * rows * p_.out_w),
                 channels = static_cast<double>(panels * kPanel);
    const double input = static_cast<double>(images_ * input_codes(rows));
    return pixels * channels * k / products_ + input / 32 + channels * k / 32 + 200;
  }

  double products_;
  int64_t images_ = 1, rows_ = 1, splits_ = 1;
};

}  // namespace
}  // namespace modiff::cpu
