// The integer product of all ops (cuda/product.h) as an implicit GEMM: m = output pixel, k = (r, s, c), c fastest. A
// Linear is an image of one column with a 1x1 window.
//
// Operands: A the codes, B the weight (operands.h), accumulators int32 `sums` in registers, epilogue.h for the rest.
// Fragments of the operands come from shared memory one step of 32 bytes of K before they are multiplied, also across
// k-blocks, where a tile says so (kReadAhead).
// Block: one tile of the output, or of one split of K of it. Warp: kWarpM x kWarpN of the tile, by mma.sync of 16 x 8.
// Shared memory: kStages stages of one k-block of A and B each, filled by cp.async kStages - 1 k-blocks ahead; weights
// of 4 and 3 bits have a place for packed bytes in every stage, and two unpacked k-blocks beside them. A k-block:
//
//   wait for its own copies | unpack own weights | barrier | start the copies of k-block + kStages - 1 | read, multiply
//
// One barrier per k-block is enough: it makes its bytes visible to all, and whoever has passed it has read the k-block
// before, whose stage the new copies take. Unpacked weights alternate between two places for the same reason.
//
// Sums leave through shared memory, a warp at a time and 32 rows at once, so that a thread gets eight neighbours of a
// row for the epilogue (cuda/common/epilogue.h), or stores them as the sums of its split.
#pragma once
#include "cuda/common/epilogue.h"
#include "cuda/sm80/operands.h"
#include "cuda/sm80/tensor_cta.h"

namespace modiff::cuda::sm80 {

struct ProductArgs {
  OperandArgs operands;
  EpilogueArgs epilogue;
  int tiles_m, tiles_n;
  int k_blocks, k_blocks_per_split, splits;
  int32_t* partial;         // [splits, rows, partial_columns] with splits > 1
  int64_t partial_columns;  // columns, up to a multiple of eight
};

// Tile number `tile` of the output: kBand tiles of rows at a time, column after column, so that blocks which run
// together share weights and codes in the L2 cache.
constexpr int kBand = 8;

struct TilePlace {
  int m, n;
};

MODIFF_HD TilePlace tile_place(int tile, int tiles_m, int tiles_n) {
  const int per_band = kBand * tiles_n;
  const int first = tile / per_band * kBand, inside = tile % per_band;
  const int size = least(tiles_m - first, kBand);
  return {first + inside % size, inside / size};
}

template <class T, Operands kOperands>
struct Product {
  static constexpr int kThreads = T::kThreads, kResident = T::kResident;
  using Args = ProductArgs;

  static constexpr bool kUnpack = kOperands == Operands::kUnpacked, kS4 = kOperands == Operands::kNibbles;
  static constexpr int kStages = T::kStages;
  static constexpr int kMmaM = T::kWarpM / 16, kMmaN = T::kWarpN / 8;  // mma tiles of a warp
  static constexpr int kTileM = T::kM * kBlockKBytes, kTileN = T::kN * kBlockKBytes;
  // Of weights: a place per stage, then, with weights that are unpacked, two tiles of bytes.
  static constexpr int kPlaceN = kUnpack ? kThreads * kChunk : kTileN;
  static constexpr int kWeightBytes = kStages * kPlaceN + (kUnpack ? 2 * kTileN : 0);

  static constexpr int kPassRows = 32, kPassMma = kPassRows / 16;
  static constexpr int kPitch = T::kWarpN + 8;  // of a staged row: pairs of sums of four rows lie in different banks
  static_assert(kMmaM % kPassMma == 0 && kMmaN % 2 == 0, "passes of 32 rows, ldmatrix of two columns of mma");

  struct Ring {
    alignas(128) uint8_t codes[kStages][kTileM];
    alignas(128) uint8_t weights[kWeightBytes];
  };
  struct Staging {
    alignas(16) int32_t sums[kThreads / kWarp][kPassRows][kPitch];
  };
  union Shared {
    Ring ring;
    Staging staging;
  };

  using Sums = int32_t[kMmaM][kMmaN][4];
  struct Fragments {
    uint32_t a[kMmaM][4], b[kMmaN][2];
  };

  template <class Cta>
  static MODIFF_HD void run(Cta& cta, Shared& shared, const Args& args) {
    const int block = static_cast<int>(cta.block()), tiles = args.tiles_m * args.tiles_n;
    const TilePlace place = tile_place(block % tiles, args.tiles_m, args.tiles_n);
    const int split = block / tiles;
    Sums sums;
    multiply_tile(cta, shared.ring, args, place, split, sums);
    cta.sync();
    finish_tile(cta, shared.staging, args, place, split, sums);
  }

 private:
  using Weights = std::conditional_t<kUnpack, PackedLoader<kThreads, T::kN>, WeightLoader<kThreads, T::kN>>;

  static MODIFF_HD int warp_row(int thread) { return thread / kWarp / (T::kN / T::kWarpN) * T::kWarpM; }
  static MODIFF_HD int warp_column(int thread) { return thread / kWarp % (T::kN / T::kWarpN) * T::kWarpN; }

  template <class Cta>
  static MODIFF_HD void multiply_tile(Cta& cta, Ring& ring, const Args& args, TilePlace place, int split, Sums& sums) {
    const int thread = cta.thread();
    const int begin = split * args.k_blocks_per_split;
    const int k_blocks = least(args.k_blocks_per_split, args.k_blocks - begin);
    CodesLoader<kThreads, T::kM> codes(args.operands, thread, place.m * T::kM, begin * kBlockKBytes);
    Weights weights(args.operands, thread, place.n * T::kN, begin * kBlockKBytes);
    const auto load = [&](int stage, bool there) {
      if (there) {
        codes.load(cta, args.operands, thread, ring.codes[stage]);
        weights.load(cta, args.operands, thread, ring.weights + stage * kPlaceN + (kUnpack ? thread * kChunk : 0));
      }
      cta.commit();  // an empty group, too: groups are counted
    };

    MODIFF_UNROLL for (int m = 0; m < kMmaM; ++m) {
      MODIFF_UNROLL for (int n = 0; n < kMmaN; ++n) {
        MODIFF_UNROLL for (int i = 0; i < 4; ++i)
          sums[m][n][i] = 0;
      }
    }
    MODIFF_UNROLL for (int k_block = 0; k_block < kStages - 1; ++k_block)
      load(k_block, k_block < k_blocks);
    int stage = 0;
    Fragments fragments[2];
    MODIFF_NO_UNROLL for (int k_block = 0; k_block < k_blocks; ++k_block) {
      const uint8_t* tile_n = ring.weights + stage * kPlaceN;
      cta.template wait<kStages - 2>();
      if constexpr (kUnpack) {
        uint8_t* unpacked = ring.weights + kStages * kPlaceN + k_block % 2 * kTileN;
        Weights::unpack(args.operands.weight_bits, thread, tile_n + thread * kChunk, unpacked);
        tile_n = unpacked;
      }
      cta.sync();
      load(stage == 0 ? kStages - 1 : stage - 1, k_block + kStages - 1 < k_blocks);
      MODIFF_UNROLL for (int step = 0; step < kSteps; ++step) {
        read(cta, ring.codes[stage], tile_n, step, fragments[T::kReadAhead ? step % 2 : 0]);
        if (!T::kReadAhead || step > 0 || k_block > 0)
          multiply(cta, fragments[T::kReadAhead ? (step + 1) % 2 : 0], sums);
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    if (T::kReadAhead) multiply(cta, fragments[(kSteps + 1) % 2], sums);
    cta.template wait<0>();  // of the empty groups alone
  }

  static constexpr int kSteps = kChunks / 2;  // of 32 bytes of K

  template <class Cta>
  static MODIFF_HD void read(Cta& cta, const uint8_t* tile_m, const uint8_t* tile_n, int step, Fragments& to) {
    const int thread = cta.thread(), lane = thread % kWarp, chunk = 2 * step;
    const int row = warp_row(thread) + lane % 16, column = warp_column(thread) + lane % 8 + lane / 16 * 8;
    MODIFF_UNROLL for (int m = 0; m < kMmaM; ++m) {
      cta.load_matrices(tile_m + swizzled(row + m * 16, chunk + lane / 16), to.a[m]);
    }
    MODIFF_UNROLL for (int n = 0; n < kMmaN; n += 2) {
      uint32_t two[4];
      cta.load_matrices(tile_n + swizzled(column + n * 8, chunk + lane / 8 % 2), two);
      MODIFF_UNROLL for (int i = 0; i < 4; ++i)
        to.b[n + i / 2][i % 2] = two[i];
    }
  }

  template <class Cta>
  static MODIFF_HD void multiply(Cta& cta, const Fragments& of, Sums& sums) {
    cta.template multiply<kS4>(sums, of.a, of.b);
  }

  template <class Cta>
  static MODIFF_HD void finish_tile(Cta& cta, Staging& staging, const Args& args, TilePlace place, int split,
                                    const Sums& sums) {
    const int thread = cta.thread(), lane = thread % kWarp;
    auto& staged = staging.sums[thread / kWarp];
    MODIFF_UNROLL for (int pass = 0; pass < kMmaM / kPassMma; ++pass) {
      cta.sync_warp();
      MODIFF_UNROLL for (int m = 0; m < kPassMma; ++m) {
        MODIFF_UNROLL for (int n = 0; n < kMmaN; ++n) {
          MODIFF_UNROLL for (int i = 0; i < 4; ++i) {
            staged[m * 16 + lane / 4 + i / 2 * 8][n * 8 + lane % 4 * 2 + i % 2] = sums[pass * kPassMma + m][n][i];
          }
        }
      }
      cta.sync_warp();
      const int64_t row = place.m * T::kM + warp_row(thread) + pass * kPassRows;
      const int64_t column = place.n * T::kN + warp_column(thread);
      MODIFF_NO_UNROLL for (int i = lane; i < kPassRows * (T::kWarpN / kVector); i += kWarp) {
        const int down = i / (T::kWarpN / kVector), right = i % (T::kWarpN / kVector) * kVector;
        int32_t vector[kVector];
        MODIFF_UNROLL for (int j = 0; j < kVector; ++j)
          vector[j] = staged[down][right + j];
        finish(args, split, row + down, column + right, vector);
      }
    }
  }

  static MODIFF_HD void finish(const Args& args, int split, int64_t row, int64_t column,
                               const int32_t (&sums)[kVector]) {
    if (args.splits == 1) return finish_vector(args.epilogue, row, column, sums);
    if (row >= args.epilogue.rows || column >= args.partial_columns) return;
    store_sums(args.partial + (split * args.epilogue.rows + row) * args.partial_columns + column, sums);
  }

  static MODIFF_HD void store_sums(int32_t* to, const int32_t (&sums)[kVector]) {
#if defined(__CUDA_ARCH__)
    reinterpret_cast<int4*>(to)[0] = make_int4(sums[0], sums[1], sums[2], sums[3]);
    reinterpret_cast<int4*>(to)[1] = make_int4(sums[4], sums[5], sums[6], sums[7]);
#else
    std::memcpy(to, sums, sizeof(sums));
#endif
  }
};

// Adds the sums of all splits, in order, and does the epilogue of eight neighbours of a row per thread.
struct FinishSplits {
  static constexpr int kThreads = 128;
  using Args = ProductArgs;
  struct Shared {};

  static int64_t blocks(const Args& args) {
    return ceil_div(args.epilogue.rows * (args.partial_columns / kVector), kThreads);
  }

  template <class Cta>
  static MODIFF_HD void run(Cta& cta, Shared&, const Args& args) {
    const int64_t vectors = args.partial_columns / kVector, index = cta.block() * kThreads + cta.thread();
    const int64_t row = index / vectors, column = index % vectors * kVector;
    if (row >= args.epilogue.rows) return;
    int32_t sums[kVector] = {};
    const int32_t* from = args.partial + row * args.partial_columns + column;
    for (int split = 0; split < args.splits; ++split, from += args.epilogue.rows * args.partial_columns) {
      int32_t part[kVector];
      load_sums(from, part);
      MODIFF_UNROLL for (int i = 0; i < kVector; ++i)
        sums[i] += part[i];
    }
    finish_vector(args.epilogue, row, column, sums);
  }

 private:
  static MODIFF_HD void load_sums(const int32_t* from, int32_t (&sums)[kVector]) {
#if defined(__CUDA_ARCH__)
    MODIFF_UNROLL for (int i = 0; i < kVector; i += 4) {
      const int4 four = reinterpret_cast<const int4*>(from)[i / 4];
      sums[i] = four.x;
      sums[i + 1] = four.y;
      sums[i + 2] = four.z;
      sums[i + 3] = four.w;
    }
#else
    std::memcpy(sums, from, sizeof(sums));
#endif
  }
};

}  // namespace modiff::cuda::sm80
