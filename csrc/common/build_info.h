// What a library was built with. CMakeLists.txt sets the definitions for the binding file that includes this.
#pragma once

#include <cstdint>
#include <string>

namespace modiff {

// A JSON object of strings: `sources`, the hash of csrc that the library was built from; `compiler` of the host;
// `oldest_torch` that loads the library; and in the CUDA library `nvcc` and `architectures`, those of machine code
// (sm_*) and of PTX (compute_*).
inline std::string build_info() {
  constexpr uint64_t kTorch = TORCH_TARGET_VERSION;  // major and minor in the two highest bytes
  std::string info = "{\"sources\": \"" MODIFF_SOURCES "\", \"compiler\": \"" MODIFF_COMPILER "\"";
  info += ", \"oldest_torch\": \"" + std::to_string(kTorch >> 56) + "." + std::to_string(kTorch >> 48 & 0xff) + "\"";
#ifdef MODIFF_NVCC
  info += ", \"nvcc\": \"" MODIFF_NVCC "\", \"architectures\": \"" MODIFF_ARCHITECTURES "\"";
#endif
  return info + "}";
}

}  // namespace modiff
