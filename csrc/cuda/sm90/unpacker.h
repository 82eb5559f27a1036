// The unpackers: a warpgroup that turns the packed rows of a stage into swizzled int8, 2^kRaised times as large as the
// codes, which saves the extension of signs; so are the sums until the epilogue.
#pragma once
#include "cuda/sm90/product_tile.h"

namespace modiff::cuda::sm90 {

template <class T, int count>
MODIFF_HD void read_shared(T (&values)[count], const uint8_t* p) {
#if defined(__CUDA_ARCH__)
  static_assert(count <= 2, "one load");
  if (count == 2) {
    const uint2 both = *reinterpret_cast<const uint2*>(p);
    values[0] = static_cast<T>(both.x);
    values[count - 1] = static_cast<T>(both.y);
  } else {
    values[0] = *reinterpret_cast<const T*>(p);
  }
#else
  std::memcpy(values, p, sizeof(values));
#endif
}

// 16 codes of a row to a thread at a time: neighbouring threads read neighbouring bytes, and eight of them write the
// eight 16-byte chunks of a row. The loads of several chunks are under way at once.
template <class P, class Cta>
MODIFF_HD void unpack_stage(Cta& cta, const uint8_t* packed, uint8_t* weight) {
  constexpr int kPasses = P::kColumns * kBlockK / 16 / kWarpgroup, kAhead = kPasses % 5 == 0 ? 5 : 4;
  static_assert(kPasses % kAhead == 0, "passes");
  const int thread = cta.thread() % kWarpgroup;
  MODIFF_UNROLL for (int first = 0; first < kPasses; first += kAhead) {
    uint32_t low[kAhead][2];
    uint16_t high[kAhead][1];
    MODIFF_UNROLL for (int i = 0; i < kAhead; ++i) {
      const int chunk = (first + i) * kWarpgroup + thread;  // in the order of rows, codes
      if constexpr (P::kBits == 4) {
        read_shared(low[i], packed + chunk * 8);
      } else {
        uint32_t both[1];
        read_shared(both, packed + chunk * 4);
        low[i][0] = both[0];
        read_shared(high[i], packed + P::kLowBytes + chunk * 2);
      }
    }
    MODIFF_UNROLL for (int i = 0; i < kAhead; ++i) {
      uint32_t words[4];
      if constexpr (P::kBits == 4) {
        raise_eight_nibbles(low[i][0], words[0], words[1]);
        raise_eight_nibbles(low[i][1], words[2], words[3]);
      } else {
        raise_eight_planes(low[i][0], high[i][0], words[0], words[1]);
        raise_eight_planes(low[i][0] >> 16, static_cast<uint32_t>(high[i][0]) >> 8, words[2], words[3]);
      }
      const int chunk = (first + i) * kWarpgroup + thread;
      cta.shared_store(weight + swizzled(static_cast<uint32_t>(chunk) * 16, kBlockK), words);
    }
  }
}

template <class P, class Cta, class Map>
MODIFF_HD void unpack(Cta& cta, typename P::Shared& shared, const ProductArgs<Map>& args) {
  const int slices = P::slice_stages(args.slice.parts);
  Ring<P::kStages> ring;
  for (int index = static_cast<int>(cta.block()); index < work_count(args.schedule); index += cta.blocks()) {
    const Work work = work_of(args.schedule, index);
    const int stages = work.end_k_block - work.first_k_block + slices;
    MODIFF_NO_UNROLL for (int i = 0; i < stages; ++i) {
      // The producer filled the packed rows after the stage was empty, so the place for int8 is empty too.
      cta.wait(&shared.packed_full[ring.stage], ring.parity);
      if (i < stages - slices) {
        unpack_stage<P>(cta, shared.packed[ring.stage], shared.weight[ring.stage]);
        cta.publish_stores();
      }
      cta.warp_sync();
      if (cta.thread() % kWarp == 0) cta.arrive(&shared.full[ring.stage]);
      ring.advance();
    }
  }
}

}  // namespace modiff::cuda::sm90
