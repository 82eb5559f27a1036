// Runs calls of the products of csrc/cuda/sm90 on the host: reads them from standard input and answers on standard
// output until the input ends. tests/backends/cuda/hopper_emulation.py is the other side; buffers have their exact
// sizes, so that the sanitizers find every access beside them.
#include <cstdio>

#include "cuda/common/weight_sums.h"
#include "cuda/sm90/product_body.h"
#include "hopper_cta.h"
#include "host_cta.h"

namespace {

using namespace modiff;
using namespace modiff::cuda;

struct Request {
  int64_t samples, h, w, c_in, c_out, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
      out_h, out_w;
  int64_t weight_bits, rows_per_scale, epilogue, y_hat_dtype, skip_dtype, out_dtype, bias_dtype;
  int64_t tile, splits, multiprocessors, falling, seed;  // tile -1: as planned
};

void read_exactly(void* data, size_t size) {
  if (std::fread(data, 1, size, stdin) != size) std::abort();
}

struct Buffer {
  std::unique_ptr<uint8_t[]> bytes;  // aligned to 16
  int64_t size = -1;

  void read() {
    read_exactly(&size, sizeof(size));
    if (size < 0) return;
    bytes.reset(new uint8_t[static_cast<size_t>(size)]);
    read_exactly(bytes.get(), static_cast<size_t>(size));
  }
  void fill(int64_t count) {
    size = count;
    bytes.reset(new uint8_t[static_cast<size_t>(size)]);
    std::memset(bytes.get(), 0xFF, static_cast<size_t>(size));
  }
  void write() const {
    if (size > 0) std::fwrite(bytes.get(), 1, static_cast<size_t>(size), stdout);
  }
  void* data() const { return bytes.get(); }
};

template <class Body>
void launch(const sm90::ProductArgs<sm90::TensorMap>& args, const Request& r, sm90::Grid& grid) {
  const int blocks = least(sm90::unit_count(args.schedule), static_cast<int>(r.multiprocessors));
  sm90::launch_on_host<Body>(args, blocks, r.falling != 0, static_cast<uint32_t>(r.seed), grid);
}

void launch_tile(int bits, int tile, const sm90::ProductArgs<sm90::TensorMap>& args, const Request& r,
                 sm90::Grid& grid) {
  if (bits == 8) {
    if (tile == 0) return launch<sm90::Product<8, 2, 160>>(args, r, grid);
    if (tile == 1) return launch<sm90::Product<8, 1, 256>>(args, r, grid);
    if (tile == 2) return launch<sm90::Product<8, 1, 128>>(args, r, grid);
    return launch<sm90::Product<8, 1, 64>>(args, r, grid);
  }
  if (bits == 4) {
    if (tile == 0) return launch<sm90::Product<4, 2, 160>>(args, r, grid);
    return launch<sm90::Product<4, 1, 64>>(args, r, grid);
  }
  if (tile == 0) return launch<sm90::Product<3, 2, 160>>(args, r, grid);
  return launch<sm90::Product<3, 1, 64>>(args, r, grid);
}

void answer(const Request& r, HostLaunch& sums_launch) {
  Buffer codes, scale, zero_point, weight, weight_scale, bias, y_hat, skip, out, scratch;
  for (Buffer* buffer : {&codes, &scale, &zero_point, &weight, &weight_scale, &bias, &y_hat, &skip, &out})
    buffer->read();
  ProductCall call{};
  ConvProblem& p = call.problem;
  p.samples = r.samples;
  p.h = r.h;
  p.w = r.w;
  p.c_in = r.c_in;
  p.c_out = r.c_out;
  p.kernel_h = r.kernel_h;
  p.kernel_w = r.kernel_w;
  p.stride_h = r.stride_h;
  p.stride_w = r.stride_w;
  p.pad_h = r.pad_h;
  p.pad_w = r.pad_w;
  p.dilation_h = r.dilation_h;
  p.dilation_w = r.dilation_w;
  p.groups = 1;
  p.out_h = r.out_h;
  p.out_w = r.out_w;
  p.codes = static_cast<const int8_t*>(codes.data());
  p.scale = static_cast<const float*>(scale.data());
  p.zero_point = static_cast<const int32_t*>(zero_point.data());
  p.weight = static_cast<const int8_t*>(weight.data());
  p.weight_scale = static_cast<const float*>(weight_scale.data());
  p.epilogue = static_cast<Epilogue>(r.epilogue);
  p.y_hat = y_hat.data();
  p.y_hat_dtype = static_cast<DType>(r.y_hat_dtype);
  p.skip = skip.data();
  p.skip_dtype = static_cast<DType>(r.skip_dtype);
  p.out = out.data();
  p.out_dtype = static_cast<DType>(r.out_dtype);
  call.bias = parameter_of(bias.data(), static_cast<DType>(r.bias_dtype));
  call.weight_bits = static_cast<int>(r.weight_bits);
  call.rows_per_scale = r.rows_per_scale;
  if (const char* limit = sm90::limit_of(call)) sm90::fail(limit);

  const sm90::Plan plan = r.tile < 0 ? sm90::plan_of(call, static_cast<int>(r.multiprocessors))
                                     : sm90::plan_of_tile(call, static_cast<int>(r.tile), static_cast<int>(r.splits));
  const int64_t tap_sums = p.c_out * tap_sum_count(p);
  const sm90::Scratch words = sm90::scratch_of(call, plan, tap_sums);
  scratch.fill(words.words * 4);
  call.scratch = scratch.data();
  if (plan.schedule.splits > 1) std::memset(scratch.data(), 0, static_cast<size_t>(words.tap_sums) * 4);
  if (p.zero_point != nullptr) sum_weights(call, static_cast<int32_t*>(call.scratch) + words.tap_sums, sums_launch);

  sm90::Grid grid{};
  launch_tile(call.weight_bits, plan.tile, sm90::product_args(call, plan, tap_sums), r, grid);
  y_hat.write();
  out.write();
  std::fwrite(&grid.prefetched, sizeof(grid.prefetched), 1, stdout);
  std::fflush(stdout);
}

}  // namespace

int main() {
  HostLaunch sums_launch;
  for (Request request; std::fread(&request, sizeof(request), 1, stdin) == 1;) answer(request, sums_launch);
}
