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
  double form[kQuantizeForm];
  int64_t shift_stride, norm_stride, seed, own;
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
  set_form(call, r.form);
  p.input = input.data();
  p.input_dtype = input.dtype;
  p.x_hat = x_hat.data();
  p.x_hat_dtype = x_hat.dtype;
  p.given_scale = static_cast<const float*>(given.data());
  p.given_scale_count = static_cast<int64_t>(given.bytes.size() / 4);
  call.further = further.data();
  call.own = r.own;
  call.gamma = gamma.parameter();
  call.beta = beta.parameter();
  call.shift = shift.parameter();
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

  launch.seed = static_cast<uint32_t>(r.seed);
  quantize(call, launch);
  for (const Buffer* buffer : {&codes, &scale, &third, &x_hat}) buffer->write();
  std::fflush(stdout);
}

}  // namespace

int main() {
  Launch launch;
  for (Request request; std::fread(&request, sizeof(request), 1, stdin) == 1;) answer(request, launch);
}
