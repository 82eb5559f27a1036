// The unpackers: a warpgroup that turns the packed rows of a stage into swizzled int8. Those of 4 bits are 2^kRaised times
// as large as the codes, which saves the extension of signs; so are the sums until the epilogue.
#pragma once
#include <type_traits>

#include "cuda/sm90/product_tile.h"

namespace modiff::cuda::sm90 {

template <int count>
MODIFF_HD void read_shared(uint32_t* words, const uint8_t* p) {
#if defined(__CUDA_ARCH__)
  using Words = std::conditional_t<count == 4, uint4, std::conditional_t<count == 2, uint2, uint32_t>>;
  const Words read = *reinterpret_cast<const Words*>(p);
  std::memcpy(words, &read, sizeof(read));
#else
  std::memcpy(words, p, count * sizeof(*words));
#endif
}

// 32 codes of a row to a thread at a time: neighbouring threads read neighbouring bytes, and eight of them write the even
// 16-byte chunks of two rows, which swizzling puts into different banks, then the odd ones. All loads are under way at
// once.
template <class P, class Cta>
MODIFF_HD void unpack_stage(Cta& cta, const uint8_t* packed, uint8_t* weight, const PlaneConstants& constants) {
  constexpr int kCodes = 32, kPasses = P::kColumns * kBlockK / kCodes / kWarpgroup;
  const int thread = cta.thread() % kWarpgroup;
  uint32_t read[kPasses][P::kBits];
  MODIFF_UNROLL for (int i = 0; i < kPasses; ++i) {
    const int unit = i * kWarpgroup + thread;  // in the order of rows, codes
    if constexpr (P::kBits == 4) {
      read_shared<4>(read[i], packed + unit * 16);
    } else {
      read_shared<2>(read[i], packed + unit * 8);
      read_shared<1>(read[i] + 2, packed + P::kLowBytes + unit * 4);
    }
  }
  // Rows of later passes have the same places in their spans of 1024 bytes.
  const uint32_t to = swizzled(static_cast<uint32_t>(thread * kCodes), kBlockK);
  static_assert(kWarpgroup * kCodes % 1024 == 0, "passes");
  MODIFF_UNROLL for (int i = 0; i < kPasses; ++i) {
    uint32_t words[8];
    if constexpr (P::kBits == 4) {
      MODIFF_UNROLL for (int j = 0; j < 4; ++j)
        raise_eight_nibbles(read[i][j], words[2 * j], words[2 * j + 1]);
    } else {
      unpack_planes({read[i][0], read[i][1]}, read[i][2], words, constants);
    }
    cta.shared_store(weight + i * kWarpgroup * kCodes + to, words);
    cta.shared_store(weight + i * kWarpgroup * kCodes + (to ^ 16), words + 4);
  }
}

template <class P, class Cta, class Map>
MODIFF_HD void unpack(Cta& cta, typename P::Shared& shared, const ProductArgs<Map>& args) {
  const int others = P::sum_stages(args.schedule) + P::slice_stages(args.slice.parts);
  const PlaneConstants constants = {in_register(PlaneConstants{}.negative), in_register(PlaneConstants{}.mask)};
  Ring<P::kStages> ring;
  for (int index = static_cast<int>(cta.block()); index < work_count(args.schedule); index += cta.blocks()) {
    const Work work = work_of(args.schedule, index);
    const int stages = work.end_k_block - work.first_k_block + others;
    MODIFF_NO_UNROLL for (int i = 0; i < stages; ++i) {
      // The producer filled the packed rows after the stage was empty, so the place for int8 is empty too.
      cta.wait(&shared.packed_full[ring.stage], ring.parity);
      if (i < stages - others) {
        unpack_stage<P>(cta, shared.packed[ring.stage], shared.weight[ring.stage], constants);
        cta.publish_stores();
      }
      cta.warp_sync();
      if (cta.thread() % kWarp == 0) cta.arrive(&shared.full[ring.stage]);
      ring.advance();
    }
  }
}

}  // namespace modiff::cuda::sm90
