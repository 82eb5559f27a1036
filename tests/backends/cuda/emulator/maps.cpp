// The maps of csrc/cuda/sm80 as a Python module, for tests/backends/cuda/test_product_maps.py.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "cuda/sm80/product_launch.h"
#include "host_tensor_cta.h"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace modiff;
using namespace modiff::cuda;

namespace maps {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Geometry = std::array<int64_t, kGeometry>;

constexpr int64_t kUnwritten = -7;

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

void check_lanes(const py::array& of, py::ssize_t values) {
  if (of.ndim() != 2 || of.shape(0) != kWarp || of.shape(1) != values) throw py::value_error("not a row for each lane");
}

// a [lane, 4] and b [lane, 2] of a warp; sums [lane, 4].
Array<int32_t> multiply(const Array<uint32_t>& a, const Array<uint32_t>& b, bool nibbles) {
  check_lanes(a, 4);
  check_lanes(b, 2);
  Array<int32_t> sums({kWarp, 4});
  if (nibbles) {
    run_warp<Multiply<true>>({a.data(), b.data(), sums.mutable_data()});
  } else {
    run_warp<Multiply<false>>({a.data(), b.data(), sums.mutable_data()});
  }
  return sums;
}

// rows [lane, 16 bytes]; words [lane, 4].
Array<uint32_t> load_matrices(const Array<uint8_t>& rows) {
  check_lanes(rows, 16);
  Array<uint32_t> words({kWarp, 4});
  run_warp<LoadMatrices>({rows.data(), words.mutable_data()});
  return words;
}

std::pair<int, int> tile_place(int tile, int tiles_m, int tiles_n) {
  const sm80::TilePlace place = sm80::tile_place(tile, tiles_m, tiles_n);
  return {place.m, place.n};
}

// Where in the image the chunks of the tile at `row` come from: [k-blocks, 64 rows, 4 chunks].
Array<int64_t> gather(const Geometry& geometry, int row, int k_blocks) {
  constexpr int kThreads = 128, kRows = 64, kTileChunks = kRows * sm80::kChunks;
  ProductCall call{};
  set_geometry(call.problem, geometry.data());
  call.weight_bits = call.code_bits = 8;
  std::vector<uint8_t> image(1), tile(kRows * sm80::kBlockKBytes);
  call.problem.codes = reinterpret_cast<const int8_t*>(image.data());
  const sm80::Tiling tiling = sm80::tiling_of(call, sm80::TileChoice{3, 1});
  const sm80::OperandArgs args = sm80::operand_args(call, tiling);
  Array<int64_t> sources({k_blocks, kRows, static_cast<int>(sm80::kChunks)});
  std::fill_n(sources.mutable_data(), sources.size(), kUnwritten);
  std::vector<int64_t> swizzled(kTileChunks);
  for (int thread = 0; thread < kThreads; ++thread) {
    sm80::CodesLoader<kThreads, kRows> loader(args, thread, row, 0);
    Recorder recorder{args.codes, tile.data(), swizzled.data()};
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
      std::fill(swizzled.begin(), swizzled.end(), kUnwritten);
      loader.load(recorder, args, thread, tile.data());
      for (int i = thread / sm80::kChunks; i < kRows; i += kThreads / sm80::kChunks) {
        const int chunk = thread % sm80::kChunks;
        sources.mutable_at(k_block, i, chunk) = swizzled[static_cast<size_t>(sm80::swizzled(i, chunk) / sm80::kChunk)];
      }
    }
  }
  return sources;
}

sm80::Operands operands_of(int weight_bits) {
  return weight_bits == 8 ? sm80::Operands::kBytes : sm80::Operands::kUnpacked;
}

// The tile's index and the splits.
std::pair<int, int> choose(int64_t rows, int64_t columns, int64_t k, int weight_bits, int multiprocessors) {
  const sm80::TileChoice best =
      sm80::choose_tile(rows, columns, k, weight_bits, operands_of(weight_bits), multiprocessors);
  return {best.tile, best.splits};
}

double cycles(int tile, int splits, int64_t rows, int64_t columns, int64_t k, int weight_bits, int multiprocessors) {
  return sm80::estimated_cycles({tile, splits}, rows, columns, k, weight_bits, operands_of(weight_bits),
                                multiprocessors);
}

void define(py::module_ m) {
  m.def("multiply", multiply, "a"_a, "b"_a, "nibbles"_a);
  m.def("load_matrices", load_matrices);
  m.def("swizzled", sm80::swizzled);
  m.def("tile_place", tile_place);
  m.def("gather", gather);
  m.def("choose", choose, "rows"_a, "columns"_a, "k"_a, "weight_bits"_a, "multiprocessors"_a);
  m.def("cycles", cycles);
}

}  // namespace maps
