// The producer: one thread, which waits for an empty stage and lets TMA fill it. A work item's k-blocks come first, then
// the sums of the cluster's other block, then the slices that its epilogue reads, in the same ring. So those are there when the sums are, and the k-blocks of the
// next work item while the epilogue runs. The weight of the first stages is asked for while the kernel before may run.
#pragma once
#include "cuda/sm90/product_tile.h"

namespace modiff::cuda::sm90 {

// The weight of a k-block, from `code` of its rows on. Without packed weights, this announces its codes, too.
template <class P, class Cta, class Map>
MODIFF_HD void load_weight(Cta& cta, typename P::Shared& shared, const ProductArgs<Map>& args, int stage, int code,
                           int column) {
  uint64_t* full = P::kPacked ? &shared.packed_full[stage] : &shared.full[stage];
  cta.arrive_expecting(full, P::kPacked ? P::kPackedBytes : P::kCodesBytes + P::kWeightBytes);
  if constexpr (P::kPacked) {
    cta.load_matrix(args.weight, shared.packed[stage], full, code / (P::kBits == 4 ? 2 : 4), column);
    if (P::kBits == 3) cta.load_matrix(args.high_plane, shared.packed[stage] + P::kLowBytes, full, code / 8, column);
  } else {
    cta.load_matrix(args.weight, shared.weight[stage], full, code, column);
  }
}

// kShared: the cluster's blocks share codes; this one loads half of them for both.
template <class P, bool kShared, class Cta, class Map>
MODIFF_HD void produce(Cta& cta, typename P::Shared& shared, const ProductArgs<Map>& args) {
  cta.prefetch_map(args.codes);
  int asked = 0;  // k-blocks, the weight of which is under way
  {
    const Work work = work_of(args.schedule, static_cast<int>(cta.block()));
    const int stages = least(P::kStages, work.end_k_block - work.first_k_block);
    Walk walk = Walk::begin(args.window, work.first_k_block);
    MODIFF_NO_UNROLL for (; asked < stages; ++asked) {
      load_weight<P>(cta, shared, args, asked, walk.code, work.column_tile * P::kColumns);
      walk.advance(args.window);
    }
  }
  cta.wait_for_kernels_before();
  const int half = kShared ? static_cast<int>(cta.block() % 2) * P::kRows / 2 : 0;  // first row
  Ring<P::kStages> ring;
  for (int index = static_cast<int>(cta.block()); index < work_count(args.schedule); index += cta.blocks()) {
    const Work work = work_of(args.schedule, index);
    const int row = work.row_tile * P::kRows, column = work.column_tile * P::kColumns;
    const Corner corner = corner_of(args.image, row + half);
    Walk walk = Walk::begin(args.window, work.first_k_block);
    const auto load_codes = [&] {
      uint64_t* full = &shared.full[ring.stage];
      if (P::kPacked) cta.arrive_expecting(full, P::kCodesBytes);
      uint8_t* codes = shared.codes[ring.stage] + half * kBlockK;
      if (args.image.tiled) {
        cta.load_matrix(args.codes, codes, full, walk.channel, row + half, kShared);
      } else {
        cta.load_pixels(args.codes, codes, full, walk.channel, corner, walk.offset_w, walk.offset_h, kShared);
      }
      walk.advance(args.window);
      ring.advance();
    };
    int k_block = work.first_k_block;
    MODIFF_NO_UNROLL for (; asked > 0; --asked, ++k_block)
      load_codes();
    MODIFF_NO_UNROLL for (; k_block < work.end_k_block; ++k_block) {
      cta.wait(&shared.empty[ring.stage], ring.parity ^ 1);
      load_weight<P>(cta, shared, args, ring.stage, walk.code, column);
      load_codes();
    }
    MODIFF_NO_UNROLL for (int i = 0; i < P::sum_stages(args.schedule); ++i) {
      cta.wait(&shared.empty[ring.stage], ring.parity ^ 1);
      if (P::kPacked) cta.arrive(&shared.packed_full[ring.stage]);
      const int sums = least(P::kStageSums, P::kBlocks * P::kSums - i * P::kStageSums);
      cta.arrive_expecting(&shared.full[ring.stage], sums * kWarpgroup * 4);
      cta.arrive_at_peer(&shared.peer_empty[ring.stage]);
      ring.advance();
    }
    const int halves = args.slice.parts / 2, slices = P::kSlices * args.slice.parts;
    MODIFF_NO_UNROLL for (int slice = 0; slice < slices; slice += P::kStageSlices) {
      cta.wait(&shared.empty[ring.stage], ring.parity ^ 1);
      uint64_t* full = &shared.full[ring.stage];
      if (P::kPacked) cta.arrive(&shared.packed_full[ring.stage]);
      const bool first = args.slice.loaded[0], second = args.slice.loaded[halves] && slice + 1 < slices;
      cta.arrive_expecting(full, (first + second) * P::kSliceBytes);
      uint8_t* to = shared.codes[ring.stage];
      const int x = (column + (slice >> halves) * kSlice) * 2;  // a stage has y_hat and skip, or two of one
      if (first) cta.load_matrix(args.slices[0], to, full, x, row);
      to += P::kSliceBytes;
      if (second && halves == 0) cta.load_matrix(args.slices[0], to, full, x + kSlice * 2, row);
      if (second && halves == 1) cta.load_matrix(args.slices[1], to, full, x, row);
      ring.advance();
    }
  }
  // The other block's consumers must not find this one's barriers gone.
  MODIFF_NO_UNROLL for (int i = 0; kShared && i < P::kStages; ++i) {
    cta.wait(&shared.empty[ring.stage], ring.parity ^ 1);
    ring.advance();
  }
}

}  // namespace modiff::cuda::sm90
