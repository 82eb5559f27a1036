// The binding and the launchers of launch_*.cu on stubs of CUDA and its driver, as ops of torch for tensors of the CPU:
// modiff_stubs. `told` hears of launches (grid, block, shared memory, cluster, argument) and of maps, which it numbers.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <map>

#include "cuda/stream.h"

#define modiff_cuda modiff_stubs
#define CUDA CPU
#define DeviceGuard DeviceIndex
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define current_stream(device, stream) (device) >= 0
#define get_device_index() get_device_index() + 1 + modiff_device  // a tensor of the CPU has -1
#define SEEN __attribute__((visibility("default")))
extern "C" {
SEEN int64_t (*told)(const char* name, const int64_t* values) = nullptr;  // an error, or the number of a map
SEEN int modiff_device = 0;  // 0, 1: capability 9.0, with 132 and 2 multiprocessors; 2: 8.0
}
#include "cuda/ops.cpp"

namespace {

using Sizes = const cuuint64_t*;
using Steps = const cuuint32_t*;

// The number of the map, and the bit that drivers up to 13.1 set wrongly.
CUresult encode(CUtensorMap* map, const char* name, std::initializer_list<cuuint64_t> values) {
  map->opaque[0] = static_cast<cuuint64_t>(told(name, reinterpret_cast<const int64_t*>(values.begin())));
  map->opaque[1] = cuuint64_t{1} << 21;
  return CUDA_SUCCESS;
}

CUresult tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, cuuint64_t base, Sizes n, Sizes strides,
               Steps box, Steps steps, CUtensorMapInterleave order, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
               CUtensorMapFloatOOBfill fill) {
  return encode(map, "tiled", {type, rank, base, n[0],     n[1],     0, 0, strides[0], 0,       0,   box[0], box[1], 0,
                               0,    0,    0,    steps[0], steps[1], 1, 1, order,      swizzle, fill});
}

CUresult im2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, cuuint64_t base, Sizes n, Sizes strides,
                const int* lower, const int* upper, cuuint32_t channels, cuuint32_t pixels, Steps steps,
                CUtensorMapInterleave order, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  const auto wide = [](int value) { return static_cast<cuuint64_t>(value); };
  return encode(map, "im2col", {type,           rank,           base,           n[0],           n[1],     n[2],
                                n[3],           strides[0],     strides[1],     strides[2],     channels, pixels,
                                wide(lower[0]), wide(lower[1]), wide(upper[0]), wide(upper[1]), steps[0], steps[1],
                                steps[2],       steps[3],       order,          swizzle,        fill});
}

std::map<const void*, const char*>& names() {
  static std::map<const void*, const char*> names;
  return names;
}

struct Configuration {
  dim3 grid, block;
  size_t bytes;
} configured;
cudaError_t last_error = cudaSuccess;

cudaError_t launch(const char* name, dim3 grid, dim3 block, size_t bytes, unsigned cluster, bool early, void** args) {
  const int64_t values[] = {grid.x, block.x, int64_t(bytes), cluster, int64_t(args[0]), early};
  const bool flat = grid.y * grid.z * block.y * block.z == 1;
  return last_error = flat ? static_cast<cudaError_t>(told(name, values)) : cudaErrorInvalidConfiguration;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, ...) { names()[function] = name; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t bytes, CUstream_st*) {
  configured = {grid, block, bytes};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* bytes, void*) {
  std::tie(*grid, *block, *bytes) = std::tie(configured.grid, configured.block, configured.bytes);
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(const char** name, const void* function) {
  *name = names().at(function);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const char* name, dim3 grid, dim3 block, void** args, size_t bytes, cudaStream_t) {
  return launch(name, grid, block, bytes, 1, false, args);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  const bool early = config->numAttrs == 2 && config->attrs[1].val.programmaticStreamSerializationAllowed == 1 &&
                     config->attrs[1].id == cudaLaunchAttributeProgrammaticStreamSerialization;
  return launch(names().at(function), config->gridDim, config->blockDim, config->dynamicSmemBytes,
                config->attrs[0].val.clusterDim.x, early, args);
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the stub"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? (device == 1 ? 2 : 132)
           : attribute == cudaDevAttrComputeCapabilityMajor ? (device == 2 ? 8 : 9)
                                                            : 0;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13010;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool pixels = std::strcmp(name, "cuTensorMapEncodeIm2col") == 0;
  *entry = pixels ? reinterpret_cast<void*>(&im2col) : reinterpret_cast<void*>(&tiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
