// The integer product on Hopper's tensor cores: TMA, wgmma s8 x s8 -> s32, the epilogue of all products.
//
//   sum[m, n] = sum_k code[m, k] * weight[n, k]           m output pixels, k = (tap, channel)
//
// Operands: A the codes (TMA, tiled or im2col), B the weight, accumulators int32 `sums` in registers, the rest as in
// epilogue.h. A thread block stays for many work items, each one tile of the output or one split of K of it
// (schedule.h). Shared memory: kStages stages of one k-block of A and B each, swizzled, packed weights beside them.
// Roles:
//
//   producer    one thread: waits for an `empty` stage, and lets TMA fill it with the codes' boxes and the weight's;
//               meanwhile asks for the lines of y_hat and skip that the epilogue will read
//   unpackers   4 and 3 bits: a warpgroup turns packed rows of a stage into swizzled int8
//   consumers   two warpgroups: wait for a `full` stage, multiply 64 kBlocks rows each by all columns, release the one
//               before; after the last k-block the epilogue, while the producer fills stages for the next work item
//
// With splits > 1 consumers add their sums to scratch; the block that comes last to a tile takes them back and runs the
// epilogue. Sums are integers, so their order does not matter. Limits: limit_of in tensor_map.h.
//
// The context is that of common/cta.h, and (hopper_cta.cuh on a GPU, hopper_cta.h of the emulator):
//   blocks(), shared_address(p), exchange(values, mask), warp_sync(), consumers_sync()
//   barrier_init, arrive, arrive_expecting(bytes), wait(parity), barriers_ready()
//   load_matrix, load_pixels                            TMA
//   shared_store(p, 16 bytes), publish_stores()         shared memory for wgmma
//   mma<N>, mma_begin, mma_commit, mma_wait<pending>    wgmma
//   add, count_arrival, add_is_visible, load_sum        scratch in global memory
//   prefetch, limit_registers, claim_registers
#pragma once
#include "common/cta.h"
#include "common/packing.h"
#include "cuda/common/epilogue.h"
#include "cuda/sm90/tiling.h"

namespace modiff::cuda::sm90 {

template <class Map>
struct ProductArgs {
  Map codes;
  Map weight;      // packed: whole rows, or low planes
  Map high_plane;  // of 3 bits
  Schedule schedule;
  Window window;
  Image image;
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

constexpr int kSharedBytes = 227 << 10;  // of a thread block, with capability 9.0

template <int bits, int blocks, int columns>
struct Product {
  static constexpr int kBits = bits, kBlocks = blocks, kColumns = columns;
  static constexpr bool kPacked = kBits != 8;
  static constexpr int kConsumers = 2, kConsumerWarps = kConsumers * kWarpgroup / kWarp;
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
  static constexpr int kSlice = 32;           // columns that the epilogue takes at a time

  struct alignas(1024) Shared {
    uint8_t codes[kStages][kCodesBytes];
    uint8_t weight[kStages][kWeightBytes];
    uint8_t packed[kPacked ? kStages : 1][kPacked ? kPackedBytes : 16];
    uint64_t full[kStages], empty[kStages], packed_full[kStages];
    uint32_t last;  // whether this block is the last one of a tile
  };
  static_assert(sizeof(Shared) <= kSharedBytes, "shared memory");
  static_assert(kStages >= 3 && kColumns % kSlice == 0 && kCodesBytes % 1024 == 0 && kWeightBytes % 1024 == 0, "tile");

  template <class Cta, class Map>
  static MODIFF_HD void run(Cta& cta, Shared& shared, const ProductArgs<Map>& args) {
    if (cta.thread() == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        cta.barrier_init(&shared.full[stage], kPacked ? 1 + kWarpgroup / kWarp : 1);
        cta.barrier_init(&shared.packed_full[stage], 1);
        cta.barrier_init(&shared.empty[stage], kConsumerWarps);
      }
      cta.barriers_ready();
    }
    cta.sync();
    const int warpgroup = cta.thread() / kWarpgroup;
    if (warpgroup >= kFirstConsumer) {
      cta.template claim_registers<kConsumerRegisters>();
      consume(cta, shared, args, warpgroup - kFirstConsumer);
    } else if (kPacked && warpgroup == 1) {
      cta.template limit_registers<kUnpackerRegisters>();
      unpack(cta, shared, args);
    } else {
      cta.template limit_registers<kProducerRegisters>();
      if (cta.thread() == 0) produce(cta, shared, args);
    }
  }

 private:
  template <class Cta, class Map>
  static MODIFF_HD void produce(Cta& cta, Shared& shared, const ProductArgs<Map>& args) {
    const Window& window = args.window;
    const int boxes = kBlockK / window.swizzle;
    Ring<kStages> ring;
    for (int index = static_cast<int>(cta.block()); index < work_count(args.schedule); index += cta.blocks()) {
      const Work work = work_of(args.schedule, index);
      const int row = work.row_tile * kRows, column = work.column_tile * kColumns;
      const Corner corner = corner_of(args.image, row);
      for (int k_block = work.first_k_block; k_block < work.end_k_block; ++k_block) {
        cta.wait(&shared.empty[ring.stage], ring.parity ^ 1);
        uint64_t* full = &shared.full[ring.stage];
        uint64_t* weight_full = kPacked ? &shared.packed_full[ring.stage] : full;
        cta.arrive_expecting(full, kCodesBytes + (kPacked ? 0 : kWeightBytes));
        if (kPacked) cta.arrive_expecting(weight_full, kPackedBytes);
        MODIFF_NO_UNROLL for (int i = 0; i < boxes; ++i) {
          const Box box = box_of(window, k_block * boxes + i);
          uint8_t* codes = shared.codes[ring.stage] + i * kRows * window.swizzle;
          if (args.image.tiled) {
            cta.load_matrix(args.codes, codes, full, box.channel, row);
          } else {
            cta.load_pixels(args.codes, codes, full, box.channel, corner, box.offset_w, box.offset_h);
          }
          if (kBits == 8) {
            uint8_t* weight = shared.weight[ring.stage] + i * kColumns * window.swizzle;
            cta.load_matrix(args.weight, weight, full, box.code, column);
          } else if (kBits == 4) {
            uint8_t* packed = shared.packed[ring.stage] + i * kColumns * window.swizzle / 2;
            cta.load_matrix(args.weight, packed, weight_full, box.code / 2, column);
          } else {
            uint8_t* packed = shared.packed[ring.stage];
            cta.load_matrix(args.weight, packed, weight_full, box.code / 4, column);
            cta.load_matrix(args.high_plane, packed + kLowBytes, weight_full, box.code / 8, column);
          }
        }
        ring.advance();
        if (args.schedule.splits == 1) prefetch_operands(cta, args.epilogue, work, k_block, row, column);
      }
    }
  }

  // Asks for what the epilogue of this work item reads, a few rows of it with every k-block.
  template <class Cta>
  static MODIFF_HD void prefetch_operands(Cta& cta, const EpilogueArgs& args, const Work& work, int k_block, int row,
                                          int column) {
    if (!args.whole) return;
    const int rows = static_cast<int>(least<int64_t>(kRows, args.rows - row));
    const int width = static_cast<int>(least<int64_t>(kColumns, args.columns - column));
    const int each = ceil_div(rows, work.end_k_block - work.first_k_block),
              first = (k_block - work.first_k_block) * each;
    const void* y_hat = args.y_hat;
    const void* skip = args.out != nullptr ? args.skip : nullptr;
    MODIFF_NO_UNROLL for (int i = first; i < least(first + each, rows); ++i) {
      const int64_t at = (int64_t{row} + i) * args.columns + column;
      prefetch_row(cta, y_hat, args.y_hat_dtype, at, width);
      prefetch_row(cta, skip, args.skip_dtype, at, width);
    }
  }

  template <class Cta>
  static MODIFF_HD void prefetch_row(Cta& cta, const void* base, DType dtype, int64_t at, int width) {
    const int size = dtype == DType::kFloat32 ? 4 : 2;
    if (base != nullptr) cta.prefetch(static_cast<const char*>(base) + at * size, width * size);
  }

  // Packed rows of a stage to int8, 16 codes of a row to a thread at a time: neighbouring threads read neighbouring
  // bytes, and eight of them write the eight 16-byte chunks of a row (or of two rows of 64 bytes).
  template <class Cta, class Map>
  static MODIFF_HD void unpack(Cta& cta, Shared& shared, const ProductArgs<Map>& args) {
    const int thread = cta.thread() % kWarpgroup, swizzle = args.window.swizzle;
    Ring<kStages> ring;
    for (int index = static_cast<int>(cta.block()); index < work_count(args.schedule); index += cta.blocks()) {
      const Work work = work_of(args.schedule, index);
      for (int k_block = work.first_k_block; k_block < work.end_k_block; ++k_block) {
        // The producer filled the packed rows after the stage was empty, so the place for int8 is empty too.
        cta.wait(&shared.packed_full[ring.stage], ring.parity);
        const uint8_t* packed = shared.packed[ring.stage];
        uint8_t* weight = shared.weight[ring.stage];
        const uint32_t base = cta.shared_address(weight);
        MODIFF_UNROLL for (int pass = 0; pass < kColumns * kBlockK / 16 / kWarpgroup; ++pass) {
          const int chunk = pass * kWarpgroup + thread;  // in the order of boxes, rows, codes
          uint32_t words[4];
          if (kBits == 4) {
            uint32_t nibbles[2];
            read_shared(nibbles, packed + chunk * 8);
            unpack_eight_nibbles(nibbles[0], words[0], words[1]);
            unpack_eight_nibbles(nibbles[1], words[2], words[3]);
          } else {
            uint32_t low[1];
            uint16_t high[1];
            read_shared(low, packed + chunk * 4);
            read_shared(high, packed + kLowBytes + chunk * 2);
            unpack_eight_planes(low[0] & 0xFFFFu, high[0] & 0xFFu, words[0], words[1]);
            unpack_eight_planes(low[0] >> 16, static_cast<uint32_t>(high[0]) >> 8, words[2], words[3]);
          }
          cta.shared_store(weight + (swizzled(base + static_cast<uint32_t>(chunk) * 16, swizzle) - base), words);
        }
        cta.publish_stores();
        cta.warp_sync();
        if (thread % kWarp == 0) cta.arrive(&shared.full[ring.stage]);
        ring.advance();
      }
    }
  }

  template <class T, int count>
  static MODIFF_HD void read_shared(T (&values)[count], const uint8_t* p) {
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

  template <class Cta, class Map>
  static MODIFF_HD void consume(Cta& cta, Shared& shared, const ProductArgs<Map>& args, int consumer) {
    const int swizzle = args.window.swizzle;
    const bool leader = cta.thread() % kWarp == 0;
    uint32_t offsets[kBlockK / kMmaDepth][2];  // of codes and weight
    MODIFF_UNROLL for (int i = 0; i < kBlockK / kMmaDepth; ++i) {
      offsets[i][0] = depth_offset(i, kRows, swizzle) / 16;
      offsets[i][1] = depth_offset(i, kColumns, swizzle) / 16;
    }
    Ring<kStages> ring;
    for (int index = static_cast<int>(cta.block()); index < work_count(args.schedule); index += cta.blocks()) {
      const Work work = work_of(args.schedule, index);
      int32_t sums[kBlocks][kSums];
      int before = 0;  // the stage whose release is due
      for (int k_block = work.first_k_block; k_block < work.end_k_block; ++k_block) {
        cta.wait(&shared.full[ring.stage], ring.parity);
        const uint32_t rows = cta.shared_address(shared.codes[ring.stage]);
        const uint64_t codes =
            descriptor(rows + static_cast<uint32_t>(consumer * kBlocks * kMmaRows * swizzle), swizzle);
        const uint64_t weight = descriptor(cta.shared_address(shared.weight[ring.stage]), swizzle);
        cta.mma_begin();
        MODIFF_UNROLL for (int i = 0; i < kBlockK / kMmaDepth; ++i) {
          MODIFF_UNROLL for (int block = 0; block < kBlocks; ++block) {
            const uint64_t next = static_cast<uint64_t>(block * kMmaRows * swizzle / 16);
            cta.template mma<kColumns>(sums[block], codes + next + offsets[i][0], weight + offsets[i][1],
                                       i > 0 || k_block > work.first_k_block);
          }
        }
        cta.mma_commit();
        if (k_block > work.first_k_block) {
          cta.template mma_wait<1>(sums);
          if (leader) cta.arrive(&shared.empty[before]);
        }
        before = ring.stage;
        ring.advance();
      }
      cta.template mma_wait<0>(sums);
      if (leader) cta.arrive(&shared.empty[before]);
      if (args.schedule.splits > 1 && !reduce_splits(cta, shared, args, work, consumer, sums)) continue;
      finish(cta, args.epilogue, work, consumer, sums);
    }
  }

  // Adds the sums of a split to those in scratch. True in the block that comes last to the tile; it has the whole sums.
  // Rows past the end are left out: of 64 pixels at 8 x 8 one consumer has none.
  template <class Cta, class Map>
  static MODIFF_HD bool reduce_splits(Cta& cta, Shared& shared, const ProductArgs<Map>& args, const Work& work,
                                      int consumer, int32_t (&sums)[kBlocks][kSums]) {
    const int thread = cta.thread() % kWarpgroup;
    const int64_t rows = args.epilogue.rows - (int64_t{work.row_tile} * kRows + consumer * kBlocks * kMmaRows);
    const int64_t block = (int64_t{work.tile} * kConsumers + consumer) * kBlocks;
    int32_t* mine = args.sums + block * kSums * kWarpgroup + thread;
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

  static constexpr int kSlices = kColumns / kSlice, kFragments = kBlocks * kSlices * 2;

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

  static MODIFF_HD int32_t held(int32_t value) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(value));
#endif
    return value;
  }

  // A fragment at a time: 32 columns of every other eight of 64 rows, a vector to a thread. A loop, so that the
  // epilogue's code is there once.
  template <class Cta>
  static MODIFF_HD void finish(Cta& cta, const EpilogueArgs& args, const Work& work, int consumer,
                               const int32_t (&sums)[kBlocks][kSums]) {
    const int thread = cta.thread() % kWarpgroup, lane = thread % kWarp;
    const int64_t first_row = int64_t{work.row_tile} * kRows + consumer * kBlocks * kMmaRows + sum_row(thread, 0);
    const int64_t first_column = int64_t{work.column_tile} * kColumns + lane % 4 * kVector;
    MODIFF_NO_UNROLL for (int fragment = 0; fragment < kFragments; ++fragment) {
      int32_t pairs[4][2];
      pick_fragment<0, kFragments>(fragment, sums, pairs);
      gather_vector(cta, lane, pairs);
      int32_t vector[kVector];
      MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
        vector[i] = pairs[i / 2][i % 2];
      finish_vector(args, first_row + fragment / 2 / kSlices * kMmaRows + fragment % 2 * 8,
                    first_column + fragment / 2 % kSlices * kSlice, vector);
    }
  }
};

// Everything but the maps, and the maps as plain numbers.
inline ProductArgs<TensorMap> product_args(const ProductCall& call, const Tiling& tiling) {
  const ProductProblem& p = call.problem;
  const Tile tile = kTiles[tiling.tile];
  ProductArgs<TensorMap> args{};
  args.codes = codes_map(p, tiling.window, tile.rows);
  args.weight = weight_map(call, tiling.window, tile.columns, call.weight_bits == 3 ? Plane::kLow : Plane::kWhole);
  if (call.weight_bits == 3) args.high_plane = weight_map(call, tiling.window, tile.columns, Plane::kHigh);
  args.schedule = tiling.schedule;
  args.window = tiling.window;
  args.image = image_of(p);
  const Scratch scratch = scratch_of(tiling);
  auto* words = static_cast<int32_t*>(call.scratch);
  args.epilogue = epilogue_args(call);
  args.arrived = reinterpret_cast<uint32_t*>(words + scratch.arrived);
  args.sums = words + scratch.sums;
  return args;
}

}  // namespace modiff::cuda::sm90
