// Runs whole calls of the product of csrc/cuda/sm90 on the host until the input ends.
#include "cuda/sm90/product_body.h"
#include "hopper_cta.h"
#include "wire.h"

namespace {

using namespace modiff;
using namespace modiff::cuda;

struct Request : ProductRequest {  // tile -1: as chosen
  int64_t multiprocessors, seed;
};

// Everything but the weight is there, and may be written, at the end of the kernel before.
std::vector<std::pair<Buffer*, std::vector<char>>> left_before;

template <class Body>
void launch(const sm90::ProductArgs<sm90::TensorMap>& args, const Request& r) {
  const int blocks = sm90::block_count(args.schedule, static_cast<int>(r.multiprocessors));
  const auto kernel_before = [] {
    for (const auto& [buffer, bytes] : left_before) std::copy(bytes.begin(), bytes.end(), buffer->bytes.begin());
  };
  sm90::launch_on_host<Body>(args, blocks, sm90::in_clusters(args.schedule), static_cast<uint32_t>(r.seed),
                             kernel_before);
}

void launch_tile(int bits, int tile, const sm90::ProductArgs<sm90::TensorMap>& args, const Request& r) {
  if (bits == 8) {
    if (tile == 0) return launch<sm90::Product<8, 2, 160>>(args, r);
    if (tile == 1) return launch<sm90::Product<8, 1, 256>>(args, r);
    if (tile == 2) return launch<sm90::Product<8, 1, 128>>(args, r);
    return launch<sm90::Product<8, 1, 64>>(args, r);
  }
  if (bits == 4) {
    if (tile == 0) return launch<sm90::Product<4, 2, 160>>(args, r);
    return launch<sm90::Product<4, 1, 64>>(args, r);
  }
  if (tile == 0) return launch<sm90::Product<3, 2, 160>>(args, r);
  return launch<sm90::Product<3, 1, 64>>(args, r);
}

void answer(const Request& r) {
  ProductBuffers buffers;
  ProductCall call = buffers.read(r);
  auto& [codes, scale, zero_point, tap_sums, weight, weight_scale, bias, y_hat, skip, out, scratch] = buffers;
  if (const char* limit = sm90::limit_of(call)) sm90::fail(limit);

  if (r.tile >= 0)
    call.tiling = {90, sm90::kTiles[r.tile].rows, sm90::kTiles[r.tile].columns, static_cast<int>(r.splits)};
  const sm90::Tiling tiling = sm90::tiling_of(call, static_cast<int>(r.multiprocessors));
  const int64_t bytes = sm90::scratch_of(tiling).words * 4;
  scratch.fill(bytes);
  call.scratch = scratch.data();
  if (bytes > 0) std::memset(scratch.data(), 0, static_cast<size_t>(bytes));

  left_before.clear();
  for (Buffer* b : {&codes, &scale, &zero_point, &tap_sums, &weight_scale, &bias, &y_hat, &skip, &out, &scratch}) {
    left_before.emplace_back(b, b->bytes);
    std::fill(b->bytes.begin(), b->bytes.end(), static_cast<char>(0x5A));
  }
  launch_tile(call.weight_bits, tiling.tile, sm90::product_args(call, tiling), r);
  for (const Buffer* buffer : {&out, &y_hat}) buffer->write();
  std::fflush(stdout);
}

}  // namespace

int main() {
  for (Request request; std::fread(&request, sizeof(request), 1, stdin) == 1;) answer(request);
}
