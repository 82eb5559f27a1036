// The maps of csrc/cuda/sm80 on arrays, for tests/backends/cuda/test_product_maps.py, which calls them through ctypes.
#include "cuda/sm80/product_launch.h"
#include "host_tensor_cta.h"

using namespace modiff;
using namespace modiff::cuda;

namespace {

// One warp that does what `Work` says with one argument.
template <class Work>
struct OneWarp {
  static constexpr int kThreads = kWarp;
  using Args = typename Work::Args;
  struct Shared {};
  template <class Cta>
  static void run(Cta& cta, Shared&, const Args& args) {
    Work::run(cta, args);
  }
};

template <class Work>
void run_warp(const typename Work::Args& args) {
  HostLaunch<HostTensorCta> launch;
  launch.run<OneWarp<Work>>(1, args);
}

template <bool kS4>
struct Multiply {
  struct Args {
    const uint32_t *a, *b;  // [lane, 4], [lane, 2]
    int32_t* sums;          // [lane, 4]
  };
  template <class Cta>
  static void run(Cta& cta, const Args& args) {
    uint32_t a[1][4], b[1][2];
    int32_t sums[1][1][4] = {};
    std::copy(args.a + cta.thread() * 4, args.a + cta.thread() * 4 + 4, a[0]);
    std::copy(args.b + cta.thread() * 2, args.b + cta.thread() * 2 + 2, b[0]);
    cta.template multiply<kS4>(sums, a, b);
    std::copy(sums[0][0], sums[0][0] + 4, args.sums + cta.thread() * 4);
  }
};

struct LoadMatrices {
  struct Args {
    const uint8_t* rows;  // [lane, 16]
    uint32_t* words;      // [lane, 4]
  };
  template <class Cta>
  static void run(Cta& cta, const Args& args) {
    uint32_t r[4];
    cta.load_matrices(args.rows + cta.thread() * 16, r);
    std::copy(r, r + 4, args.words + cta.thread() * 4);
  }
};

// Notes down where copies come from instead of copying: offsets from `base`, or -1.
struct Recorder {
  const uint8_t* base;
  uint8_t* tile;
  int64_t* sources;  // by chunk of the tile

  template <int kBytes>
  void copy_async(void* to, const void* from, bool there) {
    sources[(static_cast<uint8_t*>(to) - tile) / kBytes] = there ? static_cast<const uint8_t*>(from) - base : -1;
  }
};

}  // namespace

extern "C" {

int swizzled_place(int row, int chunk) { return sm80::swizzled(row, chunk); }

void place_of_tile(int tile, int tiles_m, int tiles_n, int* place) {
  const sm80::TilePlace at = sm80::tile_place(tile, tiles_m, tiles_n);
  place[0] = at.m;
  place[1] = at.n;
}

void multiply_fragments_of(const uint32_t* a, const uint32_t* b, int32_t* sums, int nibbles) {
  if (nibbles) {
    run_warp<Multiply<true>>({a, b, sums});
  } else {
    run_warp<Multiply<false>>({a, b, sums});
  }
}

void load_matrices_of(const uint8_t* rows, uint32_t* words) { run_warp<LoadMatrices>({rows, words}); }

// sources [steps, 64 rows, 4 chunks]: where in the image the chunks of the tile at `row` come from.
void gather(const int64_t* geometry, int row, int steps, int64_t* sources) {
  constexpr int kThreads = 128, kRows = 64, kTileChunks = kRows * sm80::kChunks;
  ProductCall call{};
  set_geometry(call.problem, geometry);
  call.weight_bits = call.code_bits = 8;
  std::vector<uint8_t> image(1), tile(kRows * sm80::kStepBytes);
  call.problem.codes = reinterpret_cast<const int8_t*>(image.data());
  const sm80::ProductPlan plan = sm80::plan_of(call, sm80::TileChoice{2, 1});
  const sm80::OperandArgs args = sm80::operand_args(call, plan);
  std::vector<int64_t> swizzled(kTileChunks);
  for (int thread = 0; thread < kThreads; ++thread) {
    sm80::CodesLoader<kThreads, kRows> loader(args, thread, row, 0);
    Recorder recorder{args.codes, tile.data(), nullptr};
    for (int step = 0; step < steps; ++step) {
      recorder.sources = swizzled.data();
      loader.load(recorder, args, thread, tile.data());
      for (int i = thread / sm80::kChunks; i < kRows; i += kThreads / sm80::kChunks) {
        const int chunk = thread % sm80::kChunks;
        sources[(step * kRows + i) * sm80::kChunks + chunk] =
            swizzled[static_cast<size_t>(sm80::swizzled(i, chunk) / sm80::kChunk)];
      }
    }
  }
}

// choice [2]: the tile's index and the splits.
void choose(int64_t rows, int64_t columns, int64_t k, int weight_bits, int multiprocessors, int* choice) {
  const auto operands = weight_bits == 8 ? sm80::Operands::kBytes : sm80::Operands::kUnpacked;
  const sm80::TileChoice best = sm80::choose_tile(rows, columns, k, weight_bits, operands, multiprocessors);
  choice[0] = best.tile;
  choice[1] = best.splits;
}

double cycles(int tile, int splits, int64_t rows, int64_t columns, int64_t k, int weight_bits, int multiprocessors) {
  const auto operands = weight_bits == 8 ? sm80::Operands::kBytes : sm80::Operands::kUnpacked;
  return sm80::estimated_cycles({tile, splits}, rows, columns, k, weight_bits, operands, multiprocessors);
}
}
