// Runs whole calls of the product of csrc/cuda/sm80 on the host until the input ends.
#include "cuda/sm80/product_launch.h"
#include "host_tensor_cta.h"
#include "wire.h"

namespace {

using modiff::Buffer;
using modiff::DType;
using namespace modiff::cuda;
using Launch = modiff::HostLaunch<modiff::HostTensorCta>;

struct Request {
  int64_t geometry[14], weight_bits, code_bits, rows_per_scale, bias_dtype, y_hat_dtype, skip_dtype, out_dtype;
  int64_t write_out, tile, splits, falling;
  int64_t tiling[4];  // csrc/cuda/product.h, as the binding is told
};

void answer(const Request& r, Launch& launch) {
  Buffer codes, scale, zero_point, weight, weight_scale, bias, y_hat, skip, out, scratch;
  for (Buffer* buffer : {&codes, &scale, &zero_point, &weight, &weight_scale, &bias, &y_hat, &skip}) buffer->read();
  ProductCall call{};
  modiff::ProductProblem& p = call.problem;
  set_geometry(p, r.geometry);
  p.codes = static_cast<const int8_t*>(codes.data());
  p.scale = static_cast<const float*>(scale.data());
  p.zero_point = static_cast<const int32_t*>(zero_point.data());
  p.weight = static_cast<const int8_t*>(weight.data());
  p.weight_scale = static_cast<const float*>(weight_scale.data());
  p.y_hat = y_hat.data();
  p.y_hat_dtype = static_cast<DType>(r.y_hat_dtype);
  p.skip = skip.data();
  p.skip_dtype = static_cast<DType>(r.skip_dtype);
  p.out_dtype = static_cast<DType>(r.out_dtype);
  if (r.write_out != 0) {
    out.fill(p.samples * p.out_h * p.out_w * p.c_out * modiff::element_size(p.out_dtype));
    p.out = out.data();
  }
  call.bias = parameter_of(bias.data(), static_cast<DType>(r.bias_dtype));
  call.weight_bits = static_cast<int>(r.weight_bits);
  call.code_bits = static_cast<int>(r.code_bits);
  call.rows_per_scale = r.rows_per_scale;

  // A tile below 0: what is chosen for a GPU of as many multiprocessors as there are splits.
  const auto splits = static_cast<int>(r.splits);
  if (r.tile >= 0) call.tiling = {80, sm80::kTiles[r.tile].m, sm80::kTiles[r.tile].n, splits};
  if (r.tiling[0] != 0) {
    call.tiling = {static_cast<int>(r.tiling[0]), static_cast<int>(r.tiling[1]), static_cast<int>(r.tiling[2]),
                   static_cast<int>(r.tiling[3])};
  }
  const sm80::Tiling tiling = sm80::tiling_of(call, splits);
  scratch.fill(tiling.bytes);
  call.scratch = scratch.data();
  launch.falling = r.falling != 0;
  sm80::multiply(call, tiling, launch);
  for (const Buffer* buffer : {&out, &y_hat}) buffer->write();
  std::fflush(stdout);
}

}  // namespace

int main() {
  Launch launch;
  for (Request request; std::fread(&request, sizeof(request), 1, stdin) == 1;) answer(request, launch);
}
