// The maps of csrc/cuda/sm80 as a Python module, for tests/backends/cuda/test_product_maps.py.
#include <pybind11/stl.h>

#include "cuda/sm80/product_launch.h"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace modiff;
using namespace modiff::cuda;

namespace maps {

std::pair<int, int> tile_place(int tile, int tiles_m, int tiles_n) {
  const sm80::TilePlace place = sm80::tile_place(tile, tiles_m, tiles_n);
  return {place.m, place.n};
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
  m.def("swizzled", sm80::swizzled);
  m.def("tile_place", tile_place);
  m.def("choose", choose, "rows"_a, "columns"_a, "k"_a, "weight_bits"_a, "multiprocessors"_a);
  m.def("cycles", cycles);
}

}  // namespace maps
