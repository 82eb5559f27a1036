// The integer product on Hopper's tensor cores: TMA, wgmma s8 x s8 -> s32, the epilogue of all products.
//
//   sum[m, n] = sum_k code[m, k] * weight[n, k]           m output pixels, k = (tap, channel)
//
// Operands: A the codes (TMA, tiled or im2col), B the weight, accumulators int32 `sums` in registers, the rest as in
// epilogue.h. A thread block stays for many work items, each one tile of the output or one split of K of it
// (schedule.h). Shared memory: kStages stages of one k-block of A and B each, swizzled, packed weights beside them.
// Roles, a file each:
//
//   producer    one thread: waits for an `empty` stage, and lets TMA fill it with a k-block of the codes and the weight,
//               or with slices of y_hat and skip; in a cluster it tells the other block which stages are for its sums
//   unpackers   4 and 3 bits: a warpgroup turns packed rows of a stage into swizzled int8
//   consumers   two warpgroups: wait for a `full` stage, multiply 64 kBlocks rows each by all columns, release the one
//               before; after the last k-block the epilogue (finish_slices.h, or epilogue.h), while the producer fills
//               stages for the next work item
//
// Two splits are computed by the two blocks of a cluster: each sends half of its sums to the other, into stages of the
// pipeline, and finishes half of the rows. Where columns of tiles are even in number, two blocks of a cluster have tiles
// of the same rows: each loads half of the codes into the same stage of both (multicast), and a stage is empty when the
// consumers of both have released it. With more splits consumers add their sums to scratch; the block that comes
// last to a tile takes them back and runs the epilogue. Sums are integers, so their order does not matter. Limits:
// limit_of in tensor_map.h.
//
// A launch may begin before the kernel in front of it has ended (programmatic dependent launch): barriers, tensor maps
// and the weight of the first stages are made ready meanwhile. The weight is constant; everything else in global memory
// is touched behind griddepcontrol.wait, which returns when all kernels in front have ended and what they wrote is seen:
//   producer    waits between the weight of its first stages and its first codes, which the quantiser wrote
//   unpackers   know shared memory alone
//   consumers   wait first of all: they read scale, bias, sums by ordinary loads, and write y_hat, out, sums, which the
//               kernels in front may still read (memory that was freed comes back as `out`). They would be late enough
//               without, as sums need codes, but so no load can be moved up, and nothing has to be argued
// Every block has work, so a product ends after the kernels in front of it: what waits for it has waited for those. The
// quantisers are launched as ever, after the end of all before. So a weight is read early only if no kernel that began
// after the last ordinary launch writes it (ProductCall::weight_settled).
//
// Words, and those of CUTLASS and others:
//   codes, weight; sums       operands A and B, both K-major; accumulators C
//   k-block, stage            K tile (BLOCK_K = 128) and the place of one in shared memory
//   work item, split          output tile of a persistent kernel (its CTA tile), split-K
//   slice                     epilogue subtile
//   swizzle 128, 64           SWIZZLE_128B, _64B; eight rows of it are a swizzle atom
//   producer, consumers       the load warp, the math warpgroups ("cooperative" schedule)
//
// The context is that of common/cta.h, and (hopper_cta.cuh on a GPU, hopper_cta.h of the emulator):
//   blocks(), shared_address(p), exchange(values, mask), warp_sync(), consumers_sync(), uniform(value), elect()
//   wait_for_kernels_before(), prefetch_map(map)
//   barrier_init, arrive, arrive_expecting(bytes), wait(parity), barriers_ready()
//   load_matrix, load_pixels                            TMA, and of the thread that stores
//   store_matrix, store_commit, store_wait<pending>
//   load_matrices, store_matrices                       ldmatrix, stmatrix
//   cluster_sync(), arrive_at_peer, wait_for_peer, send, load_received, load_matrix and load_pixels for `both`
//                                                       the other block of a cluster, or none
//   shared_store(p, 16 bytes), publish_stores()         shared memory for wgmma and TMA
//   mma<N>, mma_begin, mma_commit, mma_wait<pending>    wgmma
//   add, count_arrival, add_is_visible, load_sum        scratch in global memory
//   limit_registers, claim_registers
#pragma once
#include "cuda/sm90/consumer.h"
#include "cuda/sm90/producer.h"
#include "cuda/sm90/unpacker.h"

namespace modiff::cuda::sm90 {

template <int bits, int blocks, int columns>
struct Product : ProductTile<bits, blocks, columns> {
  using P = ProductTile<bits, blocks, columns>;

  template <class Cta, class Map>
  static MODIFF_HD void run(Cta& cta, typename P::Shared& shared, const ProductArgs<Map>& args) {
    if (cta.thread() == 0) {
      for (int stage = 0; stage < P::kStages; ++stage) {
        cta.barrier_init(&shared.full[stage], P::kPacked ? 1 + P::kWarpgroupWarps : 1);
        cta.barrier_init(&shared.packed_full[stage], 1);
        cta.barrier_init(&shared.empty[stage],
                         P::kConsumers * P::kWarpgroupWarps * (shares_codes(args.schedule) ? 2 : 1));
        cta.barrier_init(&shared.peer_empty[stage], 1);
      }
      cta.barriers_ready();
    }
    cta.cluster_sync();
    const int warp = cta.uniform(cta.thread() / kWarp), warpgroup = warp / P::kWarpgroupWarps;
    if (warpgroup >= P::kFirstConsumer) {
      cta.template claim_registers<P::kConsumerRegisters>();
      Consumer<P>::consume(cta, shared, args, warpgroup - P::kFirstConsumer);
    } else if (P::kPacked && warpgroup == 1) {
      cta.template limit_registers<P::kUnpackerRegisters>();
      if constexpr (P::kPacked) unpack<P>(cta, shared, args);
    } else {
      cta.template limit_registers<P::kProducerRegisters>();
      if (warp == 0 && cta.elect()) {
        if (shares_codes(args.schedule)) {
          produce<P, true>(cta, shared, args);
        } else {
          produce<P, false>(cta, shared, args);
        }
      }
    }
  }
};

// Everything but the maps, and the maps as plain numbers.
inline ProductArgs<TensorMap> product_args(const ProductCall& call, const Tiling& tiling) {
  const ProductProblem& p = call.problem;
  const Tile tile = kTiles[tiling.tile];
  ProductArgs<TensorMap> args{};
  args.codes = codes_map(p, shares_codes(tiling.schedule) ? tile.rows / 2 : tile.rows);
  args.weight = weight_map(call, tile.columns, call.weight_bits == 3 ? Plane::kLow : Plane::kWhole);
  if (call.weight_bits == 3) args.high_plane = weight_map(call, tile.columns, Plane::kHigh);
  args.schedule = tiling.schedule;
  args.window = tiling.window;
  args.image = image_of(p);
  const Scratch scratch = scratch_of(tiling);
  auto* words = static_cast<int32_t*>(call.scratch);
  args.epilogue = epilogue_args(call);
  args.slice = slice_policy(args.epilogue);
  const void* read[2] = {p.y_hat == nullptr ? p.skip : p.y_hat, p.skip};
  for (int i = 0; i < 2; ++i) {
    if (args.slice.loaded[i])
      args.slices[i] = slices_map(read[i], args.epilogue.rows, args.epilogue.columns, tile.rows);
  }
  if (args.slice.policy != 0 && p.y_hat != nullptr)
    args.y_hat = slices_map(p.y_hat, args.epilogue.rows, args.epilogue.columns, kStoreRows);
  if (args.slice.policy != 0 && p.out != nullptr)
    args.out = slices_map(p.out, args.epilogue.rows, args.epilogue.columns, kStoreRows);
  args.arrived = reinterpret_cast<uint32_t*>(words + scratch.arrived);
  args.sums = words + scratch.sums;
  return args;
}

}  // namespace modiff::cuda::sm90
