// How the products of csrc/cuda share out a call, as a Python module, for tests/backends/cuda/test_maps.py.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "cuda/sm80/product_launch.h"
#include "cuda/sm90/product_body.h"
#include "cuda/tiles.h"
#include "hopper_cta.h"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace modiff;
using namespace modiff::cuda;

namespace {

using Geometry = std::array<int64_t, kGeometry>;

ProductCall call_of(const Geometry& geometry, int bits) {
  ProductCall call{};
  ProductProblem& p = call.problem;
  set_geometry(p, geometry.data());
  p.codes = reinterpret_cast<const int8_t*>(uintptr_t{4096});
  p.weight = p.codes;
  call.weight_bits = bits;
  return call;
}

// Row tile, column tile, tile, first k-block and the one behind the last of every work item.
std::vector<std::array<int, 5>> works(int row_tiles, int column_tiles, int splits, int k_blocks) {
  const sm90::Schedule schedule{row_tiles, column_tiles, splits, k_blocks};
  std::vector<std::array<int, 5>> found;
  for (int i = 0; i < sm90::work_count(schedule); ++i) {
    const sm90::Work work = sm90::work_of(schedule, i);
    found.push_back({work.row_tile, work.column_tile, work.tile, work.first_k_block, work.end_k_block});
  }
  return found;
}

// Rows and columns of the tile, row_tiles, column_tiles, splits, k-blocks; bytes of scratch.
py::dict tiling(const Geometry& geometry, int bits, int multiprocessors) {
  const ProductCall call = call_of(geometry, bits);
  const sm90::Tiling tiling = sm90::tiling_of(call, multiprocessors);
  const sm90::Schedule& s = tiling.schedule;
  const sm90::Tile tile = sm90::kTiles[tiling.tile];
  return py::dict("rows"_a = int{tile.rows}, "columns"_a = int{tile.columns}, "row_tiles"_a = int{s.row_tiles},
                  "column_tiles"_a = int{s.column_tiles}, "splits"_a = int{s.splits}, "k_blocks"_a = int{s.k_blocks},
                  "scratch"_a = sm90::scratch_of(tiling).words * 4);
}

using TilingFields = std::tuple<int, int, int, int>;  // csrc/cuda/product.h ProductTiling

const char* why_not_tiling(const Geometry& geometry, int bits, int code_bits, const TilingFields& tiling,
                           int capability) {
  ProductCall call = call_of(geometry, bits);
  call.code_bits = code_bits;
  call.tiling = {std::get<0>(tiling), std::get<1>(tiling), std::get<2>(tiling), std::get<3>(tiling)};
  return tiling_problem(call, capability);
}

// Why the kernels do not take a call whose codes and weight lie so many bytes behind an aligned address, or null.
const char* limit(const Geometry& geometry, int bits, int codes_offset, int weight_offset) {
  ProductCall call = call_of(geometry, bits);
  call.problem.codes += codes_offset;
  call.problem.weight += weight_offset;
  return sm90::limit_of(call);
}

// What TMA does not allow in the maps of a call with float16 state, skip and output, with any tile, or null.
const char* problem_of_maps(const Geometry& geometry, int bits) {
  ProductCall call = call_of(geometry, bits);
  ProductProblem& p = call.problem;
  p.y_hat = p.out = reinterpret_cast<void*>(uintptr_t{8192});
  p.skip = p.y_hat;
  p.y_hat_dtype = p.skip_dtype = p.out_dtype = DType::kFloat16;
  for (int tile = 0; tile < sm90::kTileCount; ++tile) {
    const auto args = sm90::product_args(call, sm90::tiling_of_tile(call, tile, 1));
    for (const sm90::TensorMap* map :
         {&args.codes, &args.weight, &args.high_plane, &args.slices[0], &args.slices[1], &args.y_hat, &args.out}) {
      if (map->base == nullptr) continue;
      if (const char* problem = sm90::map_problem(*map)) return problem;
    }
  }
  return nullptr;
}

std::pair<int, int> tile_place(int tile, int tiles_m, int tiles_n) {
  const sm80::TilePlace place = sm80::tile_place(tile, tiles_m, tiles_n);
  return {place.m, place.n};
}

// The tile's index and the splits.
std::pair<int, int> choose(int64_t rows, int64_t columns, int64_t k, int weight_bits, int multiprocessors) {
  const auto operands = weight_bits == 8 ? sm80::Operands::kBytes : sm80::Operands::kUnpacked;
  const sm80::TileChoice best = sm80::choose_tile(rows, columns, k, weight_bits, operands, multiprocessors);
  return {best.tile, best.splits};
}

}  // namespace

PYBIND11_MODULE(maps, m) {
  m.def("works", works);
  m.def("swizzled_sm90", py::vectorize(sm90::swizzled));
  m.def("tiling", tiling);
  m.def("limit", limit, "geometry"_a, "bits"_a, "codes_offset"_a = 0, "weight_offset"_a = 0);
  m.def("problem_of_maps", problem_of_maps);
  m.def("why_not_tiling", why_not_tiling);
  m.def("swizzled_sm80", sm80::swizzled);
  m.def("tile_place", tile_place);
  m.def("choose", choose);
}
