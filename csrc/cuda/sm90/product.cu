// The products of capability 9.0 as csrc/cuda/product.h declares them.
#include "cuda/sm90/product_launch.h"

#ifndef MODIFF_DEPENDENT_LAUNCH  // 0: every launch begins after the end of the kernel before
#define MODIFF_DEPENDENT_LAUNCH 1
#endif

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
  args.slice = plain.slice;
  args.epilogue = plain.epilogue;
  args.arrived = plain.arrived;
  args.sums = plain.sums;
  cudaError_t error = sm90::encode(plain.codes, args.codes);
  bool early = call.weight_settled;
  if (error == cudaSuccess) error = sm90::encode(plain.weight, args.weight, &early);
  if (error == cudaSuccess && call.weight_bits == 3) error = sm90::encode(plain.high_plane, args.high_plane);
  for (int i = 0; i < 2; ++i)
    if (error == cudaSuccess && args.slice.loaded[i]) error = sm90::encode(plain.slices[i], args.slices[i]);
  if (error == cudaSuccess && plain.y_hat.base != nullptr) error = sm90::encode(plain.y_hat, args.y_hat);
  if (error == cudaSuccess && plain.out.base != nullptr) error = sm90::encode(plain.out, args.out);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {sm90::in_clusters(args.schedule) ? 2u : 1u, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(sm90::block_count(args.schedule, device.multiprocessors));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  const int64_t scratch = sm90::scratch_of(tiling).words * 4;
  if (error == cudaSuccess && scratch > 0)
    error = cudaMemsetAsync(call.scratch, 0, static_cast<size_t>(scratch), config.stream);
  if (error != cudaSuccess) return error;
  // Behind a memset there is no kernel to begin before the end of; in graphs, too, no such edge leaves it.
  config.numAttrs = MODIFF_DEPENDENT_LAUNCH && early && scratch == 0 ? 2 : 1;
  return call.weight_bits == 8 ? sm90::launch_8bit(tiling.tile, args, config, device.index)
                               : sm90::launch_packed(tiling.tile, call.weight_bits, args, config, device.index);
}

}  // namespace modiff::cuda
