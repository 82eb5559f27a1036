// The products of capability 9.0 as csrc/cuda/product.h declares them.
#include "cuda/sm90/product_launch.h"

namespace modiff::cuda {
namespace {

// tiling_of takes microseconds, twice in a call.
const sm90::Tiling& tiling_for(const ProductCall& call, const Device& device) {
  const ProductProblem& p = call.problem;
  const std::array<int64_t, 13> key = {p.samples * p.out_h * p.out_w,  // all that a tiling depends on
                                       p.c_in,
                                       p.c_out,
                                       p.kernel_h,
                                       p.kernel_w,
                                       p.dilation_h,
                                       p.dilation_w,
                                       call.weight_bits,
                                       device.multiprocessors,
                                       call.tiling.architecture,
                                       call.tiling.rows,
                                       call.tiling.columns,
                                       call.tiling.splits};
  return kept<sm90::Tiling>(key, [&] { return sm90::tiling_of(call, device.multiprocessors); });
}

}  // namespace

const char* product_sm90_limit(const ProductCall& call) { return sm90::limit_of(call); }

int64_t product_sm90_scratch(const ProductCall& call, const Device& device) {
  return sm90::scratch_of(tiling_for(call, device)).words * 4;
}

int product_sm90(const ProductCall& call, const Device& device, Stream stream) {
  if (sm90::limit_of(call) != nullptr) return cudaErrorInvalidValue;
  const sm90::Tiling& tiling = tiling_for(call, device);
  const sm90::ProductArgs<sm90::TensorMap> plain = sm90::product_args(call, tiling);
  sm90::ProductArgs<CUtensorMap> args{};
  args.schedule = plain.schedule;
  args.window = plain.window;
  args.image = plain.image;
  args.epilogue = plain.epilogue;
  args.arrived = plain.arrived;
  args.sums = plain.sums;
  cudaError_t error = sm90::encode(plain.codes, args.codes);
  if (error == cudaSuccess) error = sm90::encode(plain.weight, args.weight);
  if (error == cudaSuccess && call.weight_bits == 3) error = sm90::encode(plain.high_plane, args.high_plane);
  const auto on = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess && tiling.schedule.splits > 1)
    error = cudaMemsetAsync(call.scratch, 0, static_cast<size_t>(sm90::scratch_of(tiling).words) * 4, on);
  if (error != cudaSuccess) return error;
  return call.weight_bits == 8 ? sm90::launch_8bit(tiling.tile, args, device, on)
                               : sm90::launch_packed(tiling.tile, call.weight_bits, args, device, on);
}

}  // namespace modiff::cuda
