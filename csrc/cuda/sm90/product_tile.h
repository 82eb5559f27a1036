// What the roles of a thread block share: arguments, the tile and its shared memory.
#pragma once
#include "common/cta.h"
#include "common/packing.h"
#include "cuda/common/epilogue.h"
#include "cuda/sm90/tiling.h"

namespace modiff::cuda::sm90 {

// The epilogue that is known when the kernel is compiled: slices of y_hat and skip come through stages of the pipeline,
// and results are made in their place (finish_slices.h). policy 0: the one of common/epilogue.h for everything else.
struct SlicePolicy {
  int policy;
  int parts;       // slices for 32 columns: y_hat, and what becomes `out` if that differs from y_hat
  bool loaded[2];  // which of them are read
};

template <class Map>
struct ProductArgs {
  Map codes;
  Map weight;      // packed: whole rows, or low planes
  Map high_plane;  // of 3 bits
  Map slices[2];   // by parts, as they are read
  Map y_hat, out;  // as they are written, 16 rows of a slice to a box
  Schedule schedule;
  Window window;
  Image image;
  SlicePolicy slice;
  EpilogueArgs epilogue;
  uint32_t* arrived;  // with splits
  int32_t* sums;
};

// Stages are taken in turn; the parity of a barrier's phases changes with every round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  MODIFF_HD void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A warp gives a stage back to the producer, and to that of the other block if both fill it.
template <class Cta, class Shared>
MODIFF_HD void release(Cta& cta, Shared& shared, const Schedule& schedule, int stage) {
  cta.arrive(&shared.empty[stage]);
  if (shares_codes(schedule)) cta.arrive_at_peer(&shared.empty[stage]);
}

// A value of which the compiler does not know where it is from: what is computed from it stays where it is needed, and
// takes no registers meanwhile.
template <class T>
MODIFF_HD T held(T value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
#endif
  return value;
}

// A constant that stays in a register of its own: the assembler does not know that no lane's number reaches 32, and would
// make it anew for each use.
MODIFF_HD uint32_t in_register(uint32_t value) {
#if defined(__CUDA_ARCH__)
  asm("{\n.reg .u32 zero;\nmov.u32 zero, %%laneid;\nshr.u32 zero, zero, 5;\nadd.u32 %0, %0, zero;\n}\n" : "+r"(value));
#endif
  return value;
}

constexpr int kSharedBytes = 227 << 10;  // of a thread block, with capability 9.0

template <int bits, int blocks, int columns>
struct ProductTile {
  static constexpr int kBits = bits, kBlocks = blocks, kColumns = columns;
  static constexpr bool kPacked = kBits != 8;
  static constexpr int kRaised = kBits == 4 ? 4 : 0;  // sums are those of the codes times 2^kRaised
  static constexpr int kConsumers = 2, kWarpgroupWarps = kWarpgroup / kWarp;
  static constexpr int kRows = kConsumers * kBlocks * kMmaRows;
  static constexpr int kFirstConsumer = kPacked ? 2 : 1;  // warpgroup
  static constexpr int kThreads = (kFirstConsumer + kConsumers) * kWarpgroup;
  // Registers of a thread by role; together 65536 at most, multiples of eight.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kUnpackerRegisters = 40;
  static constexpr int kConsumerRegisters = kPacked ? 224 : 240;

  static constexpr int kCodesBytes = kRows * kBlockK, kWeightBytes = kColumns * kBlockK;
  static constexpr int kPackedBytes = kPacked ? kColumns * kBlockK * kBits / 8 : 0;
  static constexpr int kLowBytes = kColumns * kBlockK / 4;  // of the low planes of 3 bits; the high ones follow
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kStages = (kSharedBytes - kBarrierBytes) / (kCodesBytes + kWeightBytes + kPackedBytes);
  static constexpr int kSums = kColumns / 2;  // registers of a thread for 64 rows
  static constexpr int kSlices = kColumns / kSlice;
  static constexpr int kSliceBytes = kRows * kSlice * 2;  // of 2-byte values
  static constexpr int kStageSlices = kCodesBytes / kSliceBytes;

  struct alignas(1024) Shared {
    uint8_t codes[kStages][kCodesBytes];
    uint8_t weight[kStages][kWeightBytes];
    uint8_t packed[kPacked ? kStages : 1][kPacked ? kPackedBytes : 16];
    uint64_t full[kStages], empty[kStages], packed_full[kStages];
    uint64_t peer_empty[kStages];  // that of the cluster's other block, for sums
    uint32_t last;                 // whether this block is the last one of a tile
  };
  static_assert(sizeof(Shared) <= kSharedBytes, "shared memory");
  static_assert(kStages >= 3 && kColumns % kSlice == 0 && kCodesBytes % 1024 == 0 && kWeightBytes % 1024 == 0, "tile");
  static_assert(kWarpgroup * (2 * kConsumerRegisters + kProducerRegisters + (kPacked ? kUnpackerRegisters : 0)) <=
                    65536,
                "registers of a multiprocessor");
  static_assert(kConsumerRegisters <= 255 && kConsumerRegisters - kBlocks * kSums >= 64, "registers beside the sums");
  static_assert(kStageSlices == 2 && kSliceBytes % 1024 == 0, "slices");

  // Half of a tile's sums, those of a consumer, pass from one block of a cluster to the other through stages.
  static constexpr int kStageSums = kCodesBytes / (kWarpgroup * 4);  // of a thread
  static constexpr int kSumStages = (kBlocks * kSums + kStageSums - 1) / kStageSums;
  static MODIFF_HD int sum_stages(const Schedule& schedule) { return trades_sums(schedule) ? kSumStages : 0; }

  // How many stages the slices of a tile take.
  static MODIFF_HD int slice_stages(int parts) { return ceil_div(kSlices * parts, kStageSlices); }
};

}  // namespace modiff::cuda::sm90
