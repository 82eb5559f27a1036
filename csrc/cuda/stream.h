// torch's current stream of a device. The function that knows it stands in libtorch_cuda.so, which a CPU build of torch
// does not have: looked up in the library that torch itself has loaded, so that this one loads everywhere.
#pragma once
#include <dlfcn.h>

#include <cstdint>

namespace modiff::cuda {

// A stream of the CUDA runtime, cudaStream_t.
using Stream = void*;

// False if this torch has no CUDA, or does not tell.
inline bool current_stream(int32_t device, void** stream) {
  using Lookup = int32_t (*)(int32_t device, void** stream);
  static const Lookup lookup = [] {
    void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch == nullptr ? nullptr : reinterpret_cast<Lookup>(dlsym(torch, "aoti_torch_get_current_cuda_stream"));
  }();
  return lookup != nullptr && lookup(device, stream) == 0;
}

}  // namespace modiff::cuda
