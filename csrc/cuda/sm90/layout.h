// Where TMA and wgmma have the bytes of an operand in shared memory, and where wgmma has the sums in registers.
//
// A pipeline stage holds a k-block: 128 codes of K for every row of a tile, a box of rows of 128 bytes. In a box the
// 16-byte chunks of a row are permuted by the bits of the row above them in the address (PTX ISA, "Shared memory matrix
// layout", 128B swizzling), so that eight rows meet no bank twice. The epilogue's boxes have rows of 64 bytes.
#pragma once
#include "common/hd.h"

namespace modiff::cuda::sm90 {

constexpr int kBlockK = 128;   // codes of K in a stage
constexpr int kMmaRows = 64;   // of a wgmma, 16 to a warp
constexpr int kMmaDepth = 32;  // codes of K of a wgmma
constexpr int kWarpgroup = 128;

// An address in boxes whose rows have `swizzle` bytes, 64 or 128; boxes begin at multiples of 1024.
MODIFF_HD uint32_t swizzled(uint32_t address, int swizzle) {
  return address ^ ((address >> 3) & (swizzle == 128 ? 0x70u : 0x30u));
}

// The matrix descriptor of an operand at `address` of shared memory: K-major, 128B swizzling, groups of eight rows 1024
// bytes apart. The offset between groups of columns is not read with this layout; 1 is its customary value.
MODIFF_HD uint64_t descriptor(uint32_t address) {
  return (address & 0x3FFFFu) >> 4 | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

// Register i of the sums that a thread of a warpgroup holds of a [64, N] result.
MODIFF_HD int sum_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
MODIFF_HD int sum_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Four vectors of eight columns of a row are with four neighbouring lanes, a pair of each vector to a lane: pairs[v] is
// that of vector v. Afterwards lane q has vector q, pairs[p] its p-th pair. exchange(values, mask) swaps values with
// lane ^ mask.
template <class Cta>
MODIFF_HD void gather_vector(Cta& cta, int lane, int32_t (&pairs)[4][2]) {
  MODIFF_UNROLL for (int mask = 1; mask <= 2; mask *= 2) {
    const bool upper = (lane & mask) != 0;
    uint32_t values[4];
    MODIFF_UNROLL for (int i = 0; i < 4; ++i) {
      const int low = mask == 1 ? i / 2 * 2 : i / 2;
      values[i] = static_cast<uint32_t>(upper ? pairs[low][i % 2] : pairs[low + mask][i % 2]);
    }
    cta.exchange(values, mask);
    MODIFF_UNROLL for (int i = 0; i < 4; ++i) {
      const int low = mask == 1 ? i / 2 * 2 : i / 2;
      const int32_t value = static_cast<int32_t>(values[i]);
      pairs[low][i % 2] = upper ? value : pairs[low][i % 2];
      pairs[low + mask][i % 2] = upper ? pairs[low + mask][i % 2] : value;
    }
  }
}

}  // namespace modiff::cuda::sm90
