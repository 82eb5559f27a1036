// Tensor maps for the driver. Its functions are looked up through the runtime, so that this library needs no libcuda.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/sm90/tensor_map.h"

namespace modiff::cuda::sm90 {

struct MapEncoder {
  decltype(&cuTensorMapEncodeTiled) tiled;
  decltype(&cuTensorMapEncodeIm2col) im2col;
  bool misread;  // see encode
};

// Null functions where the driver has none.
inline const MapEncoder& map_encoder() {
  static const MapEncoder encoder = [] {
    MapEncoder found{};
    cudaDriverEntryPointQueryResult result;
    void* entry = nullptr;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result) ==
            cudaSuccess &&
        result == cudaDriverEntryPointSuccess)
      found.tiled = reinterpret_cast<decltype(found.tiled)>(entry);
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeIm2col", &entry, 12000, cudaEnableDefault, &result) ==
            cudaSuccess &&
        result == cudaDriverEntryPointSuccess)
      found.im2col = reinterpret_cast<decltype(found.im2col)>(entry);
    int version = 0;
    found.misread = cudaDriverGetVersion(&version) == cudaSuccess && version <= 13010;
    return found;
  }();
  return encoder;
}

inline cudaError_t encode_anew(const TensorMap& map, CUtensorMap& encoded) {
  const MapEncoder& encoder = map_encoder();
  if (encoder.tiled == nullptr || encoder.im2col == nullptr) return cudaErrorNotSupported;
  const cuuint32_t rank = map.im2col ? 4 : 2;
  cuuint64_t dims[4], strides[3];
  for (int i = 0; i < 4; ++i) dims[i] = static_cast<cuuint64_t>(map.dims[i]);
  for (int i = 0; i < 3; ++i) strides[i] = static_cast<cuuint64_t>(map.strides[i]);
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(map.box[0]), static_cast<cuuint32_t>(map.box[1])};
  const CUtensorMapSwizzle mode = map.swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                  : map.swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                      : CU_TENSOR_MAP_SWIZZLE_NONE;
  void* base = const_cast<void*>(map.base);
  CUresult done;
  if (map.im2col) {
    const cuuint32_t steps[4] = {1, static_cast<cuuint32_t>(map.element_strides[0]),
                                 static_cast<cuuint32_t>(map.element_strides[1]), 1};
    done = encoder.im2col(&encoded, CU_TENSOR_MAP_DATA_TYPE_UINT8, rank, base, dims, strides, map.lower, map.upper,
                          box[0], box[1], steps, CU_TENSOR_MAP_INTERLEAVE_NONE, mode,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  } else {
    const cuuint32_t steps[2] = {1, 1};
    done = encoder.tiled(&encoded, CU_TENSOR_MAP_DATA_TYPE_UINT8, rank, base, dims, strides, box, steps,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  }
  if (done != CUDA_SUCCESS) return cudaErrorInvalidValue;
  // Drivers up to 13.1 set a bit in maps of less than 128 KiB that misleads the hardware; CUTLASS clears it too
  // (copy_traits_sm90_tma.hpp).
  const int64_t bytes = map.strides[rank - 2] * map.dims[rank - 1];
  if (encoder.misread && bytes < 131072) encoded.opaque[1] &= ~(cuuint64_t{1} << 21);
  return cudaSuccess;
}

// The layers of a network come back with the same tensors, so a map is encoded once. known: set to false when it is.
inline cudaError_t encode(const TensorMap& map, CUtensorMap& encoded, bool* known = nullptr) {
  using Encoded = std::pair<cudaError_t, CUtensorMap>;
  const Encoded& found = kept<Encoded>(key_of(map), [&] {
    Encoded made{};
    if (known != nullptr) *known = false;
    made.first = encode_anew(map, made.second);
    return made;
  });
  encoded = found.second;
  return found.first;
}

}  // namespace modiff::cuda::sm90
