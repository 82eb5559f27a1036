// What TMA is told about a tensor, as plain numbers: encoded for the driver by tensor_map.cuh, and read by the tests'
// model of TMA. Elements are bytes.
#pragma once
#include <cstring>
#include <type_traits>

#include "cuda/kept.h"
#include "cuda/product.h"
#include "cuda/sm90/schedule.h"

namespace modiff::cuda::sm90 {

struct TensorMap {
  const void* base;
  int64_t dims[4];     // innermost first: {bytes, rows}, or {c, w, h, n} with im2col
  int64_t strides[3];  // in bytes, of dims[1] on
  int box[2];          // bytes and rows (pixels, with im2col) of a box
  // im2col: the first pixel of windows is walked over [lower, extent + upper) of w and h, element_strides apart.
  int lower[2], upper[2], element_strides[2];
  int swizzle;  // bytes of a row that it permutes, 0: none
  int im2col;   // 0 or 1
};

// The bytes of a map, all of which have a meaning.
inline std::array<int64_t, sizeof(TensorMap) / 8> key_of(const TensorMap& map) {
  static_assert(std::has_unique_object_representations_v<TensorMap>, "padding is not the same in equal maps");
  std::array<int64_t, sizeof(TensorMap) / 8> key;
  std::memcpy(key.data(), &map, sizeof(map));
  return key;
}

inline TensorMap matrix_map(const void* base, int64_t bytes, int64_t rows, int box_bytes, int box_rows, int swizzle) {
  TensorMap map{};
  map.base = base;
  map.dims[0] = bytes;
  map.dims[1] = rows;
  map.strides[0] = bytes;
  map.box[0] = box_bytes;
  map.box[1] = box_rows;
  map.swizzle = swizzle;
  return map;
}

// The codes, `rows` rows of a tile to a box.
inline TensorMap codes_map(const ProductProblem& p, const Window& window, int rows) {
  if (is_matrix(p)) return matrix_map(p.codes, p.c_in, p.samples * p.h * p.w, window.swizzle, rows, window.swizzle);
  TensorMap map{};
  map.base = p.codes;
  map.im2col = 1;
  const int64_t dims[4] = {p.c_in, p.w, p.h, p.samples};
  for (int i = 0; i < 4; ++i) map.dims[i] = dims[i];
  map.strides[0] = p.c_in;
  map.strides[1] = p.c_in * p.w;
  map.strides[2] = p.c_in * p.w * p.h;
  map.box[0] = window.swizzle;
  map.box[1] = rows;
  map.lower[0] = static_cast<int>(-p.pad_w);
  map.lower[1] = static_cast<int>(-p.pad_h);
  map.upper[0] = static_cast<int>(p.pad_w - (p.kernel_w - 1) * p.dilation_w);
  map.upper[1] = static_cast<int>(p.pad_h - (p.kernel_h - 1) * p.dilation_h);
  map.element_strides[0] = static_cast<int>(p.stride_w);
  map.element_strides[1] = static_cast<int>(p.stride_h);
  map.swizzle = window.swizzle;
  return map;
}

// What a map of the weight covers: whole rows of 8 and 4 bits, or a plane of 3 bits, low (two bits) or high (one); and
// the bytes that hold `codes` codes in it.
enum class Plane { kWhole, kLow, kHigh };

MODIFF_HD constexpr int plane_bytes(int codes, int bits, Plane plane) {
  return plane == Plane::kLow ? codes / 4 : plane == Plane::kHigh ? codes / 8 : codes * bits / 8;
}

// The weight, `columns` output channels to a box. Both planes of 3 bits stand in one row: the map of the high one
// begins at the first row's high plane, and reaches past the last row's end no more than the low one.
inline TensorMap weight_map(const ProductCall& call, const Window& window, int columns, Plane plane) {
  const ProductProblem& p = call.problem;
  const int64_t k = p.kernel_h * p.kernel_w * p.c_in, pitch = k * call.weight_bits / 8;
  const int64_t first = plane == Plane::kHigh ? k / 4 : 0;
  const int64_t bytes = plane == Plane::kLow ? k / 4 : plane == Plane::kHigh ? k / 8 : pitch;
  TensorMap map = matrix_map(reinterpret_cast<const char*>(p.weight) + first, bytes, p.c_out,
                             plane_bytes(window.swizzle, call.weight_bits, plane), columns,
                             call.weight_bits == 8 ? window.swizzle : 0);
  map.strides[0] = pitch;
  return map;
}

// Why these kernels cannot run a call, or null. The limits are those of TMA and of 32-bit coordinates; sm80 has none.
inline const char* limit_of(const ProductCall& call) {
  const ProductProblem& p = call.problem;
  const int64_t k = p.kernel_h * p.kernel_w * p.c_in;
  if (p.groups != 1) return "groups is not 1";
  if (p.c_in % 16 != 0) return "the input channels are no multiple of 16";
  if (call.weight_bits == 4 && k % 32 != 0) return "4-bit rows (channels * kernel) are no multiple of 32 codes";
  if (call.weight_bits == 3 && k % 128 != 0) return "3-bit rows (channels * kernel) are no multiple of 128 codes";
  if (reinterpret_cast<uintptr_t>(p.codes) % 16 != 0) return "the codes are not aligned to 16 bytes";
  if (reinterpret_cast<uintptr_t>(p.weight) % 16 != 0) return "the weight is not aligned to 16 bytes";
  const int64_t largest = int64_t{1} << 30;
  const int64_t rows = p.samples * p.out_h * p.out_w;
  if (rows > largest || p.samples * p.h * p.w > largest || p.c_out > largest || k > largest)
    return "more than 2^30 rows, columns or codes of a row";
  if (is_matrix(p)) return nullptr;
  if (p.c_in * p.w * p.h >= int64_t{1} << 40) return "an image has 2^40 bytes or more";
  if (p.stride_h > 8 || p.stride_w > 8) return "a stride is greater than 8";
  const int64_t reach_h = (p.kernel_h - 1) * p.dilation_h, reach_w = (p.kernel_w - 1) * p.dilation_w;
  if (p.pad_h > 127 || p.pad_w > 127) return "the padding is greater than 127";
  if (reach_h - p.pad_h > 128 || reach_w - p.pad_w > 128) return "the kernel reaches more than 128 pixels inwards";
  return nullptr;
}

}  // namespace modiff::cuda::sm90
