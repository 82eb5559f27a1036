// The functions of csrc/common as a Python module, for tests/backends/cuda/test_common.py.
#include <pybind11/numpy.h>

#include "common/dtype.h"
#include "common/packing.h"
#include "common/rounding.h"

namespace py = pybind11;
using namespace modiff;

namespace common {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

int8_t code(float x, float scale, float zero_point, int bits) {
  return static_cast<int8_t>(to_int(code_of(x, div_rn(1.0f, scale), zero_point, half_range(bits))));
}

float scale_of_residual(float absmax, float clip_ratio, int bits) {
  return residual_scale(absmax, clip_ratio, half_range(bits));
}

// absmax [blocks] of one sample; its scale and the multipliers of the blocks.
std::pair<float, Array<float>> block_multipliers(const Array<float>& absmax, float clip_ratio, int bits) {
  uint32_t largest = 0;
  for (py::ssize_t i = 0; i < absmax.size(); ++i) largest = most(largest, magnitude(absmax.data()[i]));
  const float half = half_range(bits), scale = block_scale(bits_to_float(largest), clip_ratio, half);
  Array<float> multipliers(absmax.size());
  for (py::ssize_t i = 0; i < absmax.size(); ++i)
    multipliers.mutable_at(i) = block_multiplier(absmax.data()[i], clip_ratio, scale, half);
  return {scale, multipliers};
}

float scale_of_range(float low, float high, int bits) { return affine_scale(-low, high, half_range(bits)); }

int32_t zero_point_of_range(float low, float scale, int bits) {
  return to_int(affine_zero_point(-low, scale, half_range(bits)));
}

// packed [rows, bytes]; codes [rows, k].
Array<int8_t> unpack(const Array<uint8_t>& packed, int bits, int64_t k) {
  if (packed.ndim() != 2 || packed.shape(1) != packed_width(bits, k)) throw py::value_error("other bytes in a row");
  Array<int8_t> codes({packed.shape(0), py::ssize_t{k}});
  for (py::ssize_t row = 0; row < packed.shape(0); ++row)
    for (int64_t i = 0; i < k; ++i) codes.mutable_at(row, i) = unpack_code(packed.data(row, 0), bits, k, i);
  return codes;
}

// Rows of eight codes to rows of the four bytes of 4 bits or the three of 3 bits.
Array<uint8_t> pack_eights(const Array<int8_t>& codes, int bits) {
  if (codes.ndim() != 2 || codes.shape(1) != 8) throw py::value_error("rows of eight codes expected");
  Array<uint8_t> packed({codes.shape(0), py::ssize_t{bits}});
  for (py::ssize_t row = 0; row < codes.shape(0); ++row) {
    int8_t eight[8];
    std::memcpy(eight, codes.data(row, 0), sizeof(eight));
    uint8_t* bytes = packed.mutable_data(row, 0);
    if (bits == 4) {
      const uint32_t word = pack_nibbles(eight);
      std::memcpy(bytes, &word, sizeof(word));
    } else {
      const uint16_t low = pack_low_bits(eight);
      std::memcpy(bytes, &low, sizeof(low));
      bytes[2] = pack_high_bits(eight);
    }
  }
  return packed;
}

// Words of eight nibbles; codes [words, 8].
Array<int8_t> unpack_words(const Array<uint32_t>& words) {
  Array<int8_t> codes({words.size(), py::ssize_t{8}});
  for (py::ssize_t i = 0; i < words.size(); ++i) {
    uint32_t parts[2];
    unpack_eight_nibbles(words.at(i), parts[0], parts[1]);
    std::memcpy(codes.mutable_data(i, 0), parts, sizeof(parts));
  }
  return codes;
}

// Rows of 32 codes of 3 bits.
Array<int8_t> unpack_rows_of_planes(const Array<uint8_t>& packed) {
  Array<int8_t> codes({packed.shape(0), py::ssize_t{32}});
  for (py::ssize_t row = 0; row < packed.shape(0); ++row) {
    uint32_t planes[3], words[8];
    std::memcpy(planes, packed.data(row, 0), sizeof(planes));
    unpack_planes({planes[0], planes[1]}, planes[2], words);
    std::memcpy(codes.mutable_data(row, 0), words, sizeof(words));
  }
  return codes;
}

void define(py::module_ m) {
  m.def("half_bits_to_float", py::vectorize(half_bits_to_float));
  m.def("float_to_half_bits", py::vectorize(float_to_half_bits));
  m.def("bfloat16_bits_to_float", py::vectorize(bfloat16_bits_to_float));
  m.def("float_to_bfloat16_bits", py::vectorize(float_to_bfloat16_bits));
  m.def("code", py::vectorize(code));
  m.def("residual_scale", py::vectorize(scale_of_residual));
  m.def("block_multipliers", block_multipliers);
  m.def("affine_scale", py::vectorize(scale_of_range));
  m.def("affine_zero_point", py::vectorize(zero_point_of_range));
  m.def("packed_width", packed_width);
  m.def("unpack", unpack);
  m.def("pack_eights", pack_eights);
  m.def("unpack_words", unpack_words);
  m.def("unpack_planes", unpack_rows_of_planes);
}

}  // namespace common
