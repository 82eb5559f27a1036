// Runs whole calls of the product of csrc/cuda/sm80 on the host until the input ends.
#include "cuda/sm80/product_launch.h"
#include "host_tensor_cta.h"
#include "wire.h"

namespace {

using modiff::Buffer;
using modiff::DType;
using namespace modiff::cuda;
using Launch = modiff::HostLaunch<modiff::HostTensorCta>;

struct Request : modiff::ProductRequest {
  int64_t seed;
};

void answer(const Request& r, Launch& launch) {
  modiff::ProductBuffers buffers;
  auto& [codes, scale, zero_point, tap_sums, weight, weight_scale, bias, y_hat, skip, out, scratch] = buffers;
  ProductCall call = buffers.read(r);
  // A tile below 0: what is chosen for a GPU of as many multiprocessors as there are splits.
  const auto splits = static_cast<int>(r.splits);
  if (r.tile >= 0 && call.tiling.architecture == 0)
    call.tiling = {80, sm80::kTiles[r.tile].m, sm80::kTiles[r.tile].n, splits};
  const sm80::Tiling tiling = sm80::tiling_of(call, splits);
  scratch.fill(tiling.bytes);
  call.scratch = scratch.data();
  launch.seed = static_cast<uint32_t>(r.seed);
  sm80::multiply(call, tiling, launch);
  for (const Buffer* buffer : {&out, &y_hat}) buffer->write();
  std::fflush(stdout);
}

}  // namespace

int main() {
  Launch launch;
  for (Request request; std::fread(&request, sizeof(request), 1, stdin) == 1;) answer(request, launch);
}
