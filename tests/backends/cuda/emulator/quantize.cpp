// Runs whole calls of `quantize` on the host until the input ends.
#include "cuda/common/quantize_launch.h"
#include "host_cta.h"
#include "wire.h"

namespace {

using modiff::Buffer;
using modiff::DType;
using namespace modiff::cuda;
using Launch = modiff::HostLaunch<modiff::HostCta>;

struct Request {
  int64_t prologue, samples, rows, channels, input_dtype, num_groups, silu, x_hat_dtype, affine, act_bits, granularity,
      packed, gamma_dtype, beta_dtype, shift_dtype, shift_stride, norm_stride, falling, own;
  double eps, clip_ratio;
};

void quantize(const QuantizeCall& call, Launch& launch) {
  const modiff::Prologue prologue = call.problem.prologue;
  if (prologue == modiff::Prologue::kGroupNorm) return quantize_with<modiff::Prologue::kGroupNorm>(call, launch);
  if (prologue == modiff::Prologue::kLayerNorm) return quantize_with<modiff::Prologue::kLayerNorm>(call, launch);
  if (prologue == modiff::Prologue::kGeglu) return quantize_with<modiff::Prologue::kGeglu>(call, launch);
  quantize_with<modiff::Prologue::kIdentity>(call, launch);
}

void answer(const Request& r, Launch& launch) {
  Buffer input, further, x_hat, gamma, beta, shift, given, codes, scale, third, scratch;
  for (Buffer* buffer : {&input, &further, &x_hat, &gamma, &beta, &shift, &given}) buffer->read();
  QuantizeCall call{};
  modiff::QuantizeProblem& p = call.problem;
  p.prologue = static_cast<modiff::Prologue>(r.prologue);
  p.samples = r.samples;
  p.rows = r.rows;
  p.channels = r.channels;
  p.input = input.data();
  p.input_dtype = static_cast<DType>(r.input_dtype);
  p.num_groups = r.num_groups;
  p.eps = static_cast<float>(r.eps);
  p.silu = r.silu != 0;
  p.x_hat = x_hat.data();
  p.x_hat_dtype = static_cast<DType>(r.x_hat_dtype);
  p.affine = r.affine != 0;
  p.act_bits = static_cast<int>(r.act_bits);
  p.granularity = static_cast<modiff::Granularity>(r.granularity);
  p.clip_ratio = static_cast<float>(r.clip_ratio);
  p.given_scale = static_cast<const float*>(given.data());
  p.given_scale_count = static_cast<int64_t>(given.bytes.size() / 4);
  p.packed = r.packed != 0;
  call.further = further.data();
  call.own = r.own;
  call.gamma = parameter_of(gamma.data(), static_cast<DType>(r.gamma_dtype));
  call.beta = parameter_of(beta.data(), static_cast<DType>(r.beta_dtype));
  call.shift = parameter_of(shift.data(), static_cast<DType>(r.shift_dtype));
  call.shift_stride = r.shift_stride;
  p.norm_stride = r.norm_stride;

  const QuantizeTiling tiling = tiling_of(p);
  codes.fill(p.samples * p.rows * (p.packed ? modiff::packed_width(p.act_bits, p.channels) : p.channels));
  scale.fill(tiling.granules * 4);
  third.fill(tiling.granules * 4);
  scratch.fill(scratch_of(p, tiling).bytes);
  p.codes = static_cast<int8_t*>(codes.data());
  p.scale = static_cast<float*>(scale.data());
  p.absmax = x_hat.there ? static_cast<float*>(third.data()) : nullptr;
  p.zero_point = x_hat.there ? nullptr : static_cast<int32_t*>(third.data());
  call.scratch = scratch.data();

  launch.falling = r.falling != 0;
  quantize(call, launch);
  for (const Buffer* buffer : {&codes, &scale, &third, &x_hat}) buffer->write();
  std::fflush(stdout);
}

}  // namespace

int main() {
  Launch launch;
  for (Request request; std::fread(&request, sizeof(request), 1, stdin) == 1;) answer(request, launch);
}
