// The consumers: two warpgroups that multiply, then run the epilogue of their sums.
#pragma once
#include "cuda/sm90/finish_slices.h"

namespace modiff::cuda::sm90 {

template <class P>
struct Consumer {
  static constexpr int kBlocks = P::kBlocks, kSums = P::kSums, kSlices = P::kSlices;
  using Sums = int32_t[kBlocks][kSums];
  using Shared = typename P::Shared;

  template <class Cta, class Map>
  static MODIFF_HD void consume(Cta& cta, Shared& shared, const ProductArgs<Map>& args, int consumer) {
    const bool leader = cta.thread() % kWarp == 0;
    Ring<P::kStages> ring;
    Peer peer;
    cta.wait_for_kernels_before();
    for (int index = cta.uniform(static_cast<int>(cta.block())); index < work_count(args.schedule);
         index += cta.blocks()) {
      const Work work = work_of(args.schedule, index);
      Sums sums;
      int before = 0;  // the stage whose release is due
      int box = work.first_k_block % args.window.boxes;
      for (int k_block = work.first_k_block; k_block < work.end_k_block; ++k_block) {
        const bool last_box = ++box == args.window.boxes;
        if (last_box) box = 0;
        cta.wait(&shared.full[ring.stage], ring.parity);
        if (last_box && args.window.last_half) {
          multiply<kBlockK / 2>(cta, shared, ring.stage, consumer, k_block > work.first_k_block, sums);
        } else {
          multiply<kBlockK>(cta, shared, ring.stage, consumer, k_block > work.first_k_block, sums);
        }
        if (k_block > work.first_k_block) {
          cta.template mma_wait<1>(sums);
          if (leader) release(cta, shared, args.schedule, before);
        }
        before = ring.stage;
        ring.advance();
      }
      cta.template mma_wait<0>(sums);
      if (leader) release(cta, shared, args.schedule, before);
      const Schedule& s = args.schedule;
      if (s.splits == 1 || (trades_sums(s) ? exchange_sums(cta, shared, s.k_blocks % 2, consumer, sums, ring, peer)
                                           : reduce_splits(cta, shared, args, work, consumer, sums))) {
        finish(cta, shared, args, work, consumer, sums, ring);
      } else {
        pass_slices(cta, shared, args.slice, ring);
      }
    }
  }

 private:
  template <int depth, class Cta>
  static MODIFF_HD void multiply(Cta& cta, Shared& shared, int stage, int consumer, bool accumulate, Sums& sums) {
    const uint64_t codes = descriptor(cta.shared_address(shared.codes[stage]) +
                                      static_cast<uint32_t>(consumer * kBlocks * kMmaRows * kBlockK));
    const uint64_t weight = descriptor(cta.shared_address(shared.weight[stage]));
    cta.mma_begin();
    MODIFF_UNROLL for (int i = 0; i < depth / kMmaDepth * kBlocks; ++i) {
      const int k = i / kBlocks * kMmaDepth, block = i % kBlocks, rows = block * kMmaRows * kBlockK;
      cta.template mma<P::kColumns>(sums[block], codes + static_cast<uint64_t>((rows + k) / 16),
                                    weight + static_cast<uint64_t>(k / 16), k > 0 || accumulate);
    }
    cta.mma_commit();
  }

  template <class Cta, class Map>
  static MODIFF_HD void finish(Cta& cta, Shared& shared, const ProductArgs<Map>& args, const Work& work, int consumer,
                               const Sums& sums, Ring<P::kStages>& ring) {
    if (args.slice.policy == 0) return finish_any(cta, args.epilogue, work, consumer, sums);
    with_policy(args.slice, [&](auto policy) {
      SliceEpilogue<P, decltype(policy), Cta>::finish(cta, shared, args, work, consumer, sums, ring);
    });
  }

  // Of the cluster's other block: how many stages it is ahead of this one (its split may have a k-block more), and the
  // parities of `peer_empty`, a bit each.
  struct Peer {
    int ahead = 0;
    uint32_t parities = 0;
  };

  // Block 0 of a cluster finishes the rows of consumer 0, block 1 those of consumer 1: the other consumer sends its sums
  // to the block that has the other split. True in the consumer that finishes; it has the whole sums.
  // odd: how many k-blocks more the second split has.
  template <class Cta>
  static MODIFF_HD bool exchange_sums(Cta& cta, Shared& shared, int odd, int consumer, Sums& sums,
                                      Ring<P::kStages>& ring, Peer& peer) {
    const int thread = held(cta.thread()) % kWarpgroup, block = static_cast<int>(cta.block() % 2);
    peer.ahead = (peer.ahead + P::kStages + (block == 0 ? odd : -odd)) % P::kStages;
    MODIFF_UNROLL for (int first = 0; first < kBlocks * kSums; first += P::kStageSums) {
      const int end = least(first + P::kStageSums, kBlocks * kSums);
      if (consumer != block) {
        const int stage = (ring.stage + peer.ahead) % P::kStages;
        cta.wait_for_peer(&shared.peer_empty[stage], peer.parities >> stage & 1);
        peer.parities ^= 1u << stage;
        MODIFF_UNROLL for (int i = first; i < end; i += 4)
          cta.send(shared.codes[stage] + ((i - first) / 4 * kWarpgroup + thread) * 16, &shared.full[stage],
                   &sums[i / kSums][i % kSums]);
      }
      cta.wait_for_peer(&shared.full[ring.stage], ring.parity);
      if (consumer == block) {
        MODIFF_UNROLL for (int i = first; i < end; i += 4) {
          int32_t others[4];
          cta.load_received(others, shared.codes[ring.stage] + ((i - first) / 4 * kWarpgroup + thread) * 16);
          MODIFF_UNROLL for (int j = 0; j < 4; ++j)
            sums[i / kSums][i % kSums + j] += others[j];
        }
        cta.publish_stores();  // before TMA writes there
      }
      cta.warp_sync();
      if (cta.thread() % kWarp == 0) cta.arrive(&shared.empty[ring.stage]);
      ring.advance();
    }
    return consumer == block;
  }

  // Gives back what the producer read for an epilogue that another block runs.
  template <class Cta>
  static MODIFF_HD void pass_slices(Cta& cta, Shared& shared, const SlicePolicy& slice, Ring<P::kStages>& ring) {
    MODIFF_NO_UNROLL for (int i = P::slice_stages(slice.parts); i > 0; --i) {
      cta.wait(&shared.full[ring.stage], ring.parity);
      if (cta.thread() % kWarp == 0) cta.arrive(&shared.empty[ring.stage]);
      ring.advance();
    }
  }

  // Adds the sums of a split to those in scratch. True in the block that comes last to the tile; it has the whole sums.
  // Rows past the end are left out: of 64 pixels at 8 x 8 one consumer has none.
  template <class Cta, class Map>
  static MODIFF_HD bool reduce_splits(Cta& cta, Shared& shared, const ProductArgs<Map>& args, const Work& work,
                                      int consumer, int32_t (&sums)[kBlocks][kSums]) {
    const int thread = held(cta.thread()) % kWarpgroup;
    const int64_t rows = args.epilogue.rows - (int64_t{work.row_tile} * P::kRows + consumer * kBlocks * kMmaRows);
    const int64_t block = (int64_t{work.tile} * P::kConsumers + consumer) * kBlocks;
    int32_t* mine = held(args.sums + block * kSums * kWarpgroup + thread);
    MODIFF_UNROLL for (int i = 0; i < kBlocks * kSums; ++i) {
      if (i / kSums * kMmaRows + sum_row(thread, i % kSums) < rows) {
        cta.add(mine + i * kWarpgroup, sums[i / kSums][i % kSums]);
      }
    }
    cta.add_is_visible();
    cta.consumers_sync();
    if (thread == 0 && consumer == 0) {
      shared.last = cta.count_arrival(args.arrived + work.tile) + 1 == static_cast<uint32_t>(args.schedule.splits);
    }
    cta.consumers_sync();  // all read `last` before the first of these two barriers of another work item
    if (shared.last == 0) return false;
    cta.add_is_visible();
    MODIFF_UNROLL for (int i = 0; i < kBlocks * kSums; ++i) {
      if (i / kSums * kMmaRows + sum_row(thread, i % kSums) < rows) {
        sums[i / kSums][i % kSums] = cta.load_sum(mine + i * kWarpgroup);
      }
    }
    return true;
  }

  static constexpr int kFragments = kBlocks * kSlices * 2;

  // This thread's pairs of a fragment. Registers have no index, so the fragment is found by bisection; without `held`
  // the compiler would select every register from all fragments instead.
  template <int low, int high>
  static MODIFF_HD void pick_fragment(int fragment, const int32_t (&sums)[kBlocks][kSums], int32_t (&pairs)[4][2]) {
    if constexpr (high - low == 1) {
      const int first = low / 2 % kSlices * kSlice / 2 + low % 2 * 2;
      MODIFF_UNROLL for (int i = 0; i < kVector; ++i) {
        pairs[i / 2][i % 2] = held(sums[low / 2 / kSlices][first + i / 2 * 4 + i % 2]);
      }
    } else if (fragment < (low + high) / 2) {
      pick_fragment<low, (low + high) / 2>(fragment, sums, pairs);
    } else {
      pick_fragment<(low + high) / 2, high>(fragment, sums, pairs);
    }
  }

  // The epilogue of everything that has no policy, a fragment at a time: 32 columns of every other eight of 64 rows, a vector to a thread. A loop, so that the
  // epilogue's code is there once.
  template <class Cta>
  static MODIFF_HD void finish_any(Cta& cta, const EpilogueArgs& args, const Work& work, int consumer,
                                   const int32_t (&sums)[kBlocks][kSums]) {
    const int thread = held(cta.thread()) % kWarpgroup, lane = thread % kWarp;
    const int64_t first_row = int64_t{work.row_tile} * P::kRows + consumer * kBlocks * kMmaRows + sum_row(thread, 0);
    const int64_t first_column = int64_t{work.column_tile} * P::kColumns + lane % 4 * kVector;
    MODIFF_NO_UNROLL for (int fragment = 0; fragment < kFragments; ++fragment) {
      int32_t pairs[4][2];
      pick_fragment<0, kFragments>(fragment, sums, pairs);
      gather_vector(cta, lane, pairs);
      int32_t vector[kVector];
      MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
        vector[i] = pairs[i / 2][i % 2] >> P::kRaised;
      finish_vector(args, first_row + fragment / 2 / kSlices * kMmaRows + fragment % 2 * 8,
                    first_column + fragment / 2 % kSlices * kSlice, vector);
    }
  }
};

}  // namespace modiff::cuda::sm90
