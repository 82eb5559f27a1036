// The binding and the launchers (launch_sm80.cu, launch_sm90.cu) on stubs of CUDA and its driver, as ops of torch for
// tensors of the CPU: modiff_stubs. Whoever is called tells `told`: a launch, a tensor map, memory that is cleared.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <map>

#include "cuda/stream.h"

#define SEEN __attribute__((visibility("default")))
extern "C" {
using Told = int64_t (*)(const char* name, const int64_t* values);  // an error, or the number of a map
SEEN Told told = nullptr;
SEEN int modiff_device = 0;  // 0, 1: of capability 9.0, with 132 and 2 multiprocessors; 2: of 8.0
}

#define modiff_cuda modiff_stubs
#define CUDA CPU
#define DeviceGuard DeviceIndex
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define current_stream(device, stream) (device) >= 0
#define get_device_index() get_device_index() + 1 + modiff_device  // a tensor of the CPU has -1
#include "cuda/ops.cpp"

namespace {

cudaError_t last_error = cudaSuccess;
dim3 configured[2];  // grid, block
size_t configured_bytes;

// The number of the map, and the bit that drivers up to 13.1 set wrongly.
CUresult encode(CUtensorMap* map, const char* name, const int64_t* values) {
  map->opaque[0] = static_cast<cuuint64_t>(told(name, values));
  map->opaque[1] = cuuint64_t{1} << 21;
  return CUDA_SUCCESS;
}

CUresult tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* dims,
               const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave order,
               CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const int64_t values[] = {type,
                            rank,
                            (int64_t)base,
                            (int64_t)dims[0],
                            (int64_t)dims[1],
                            0,
                            0,
                            (int64_t)strides[0],
                            0,
                            0,
                            box[0],
                            box[1],
                            0,
                            0,
                            0,
                            0,
                            steps[0],
                            steps[1],
                            1,
                            1,
                            order,
                            swizzle,
                            fill};
  return encode(map, "tiled", values);
}

CUresult im2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* dims,
                const cuuint64_t* strides, const int* lower, const int* upper, cuuint32_t channels, cuuint32_t pixels,
                const cuuint32_t* steps, CUtensorMapInterleave order, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const int64_t values[] = {type,
                            rank,
                            (int64_t)base,
                            (int64_t)dims[0],
                            (int64_t)dims[1],
                            (int64_t)dims[2],
                            (int64_t)dims[3],
                            (int64_t)strides[0],
                            (int64_t)strides[1],
                            (int64_t)strides[2],
                            channels,
                            pixels,
                            lower[0],
                            lower[1],
                            upper[0],
                            upper[1],
                            steps[0],
                            steps[1],
                            steps[2],
                            steps[3],
                            order,
                            swizzle,
                            fill};
  return encode(map, "im2col", values);
}

std::map<const void*, const char*>& names() {
  static std::map<const void*, const char*> names;
  return names;
}

cudaError_t launch(const char* name, dim3 grid, dim3 block, size_t bytes, unsigned cluster, void** args) {
  const int64_t values[] = {grid.x,  block.x,          (int64_t)bytes,
                            cluster, (int64_t)args[0], grid.y * grid.z * block.y * block.z};
  return last_error = static_cast<cudaError_t>(told(name, values));
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[function] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t bytes, CUstream_st*) {
  configured[0] = grid;
  configured[1] = block;
  configured_bytes = bytes;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* bytes, void*) {
  *grid = configured[0];
  *block = configured[1];
  *bytes = configured_bytes;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<char*>(names().at(function)));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t bytes, cudaStream_t) {
  return launch(reinterpret_cast<const char*>(kernel), grid, block, bytes, 1, args);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  return launch(names().at(function), config->gridDim, config->blockDim, config->dynamicSmemBytes,
                config->attrs[0].val.clusterDim.x, args);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int bytes) {
  const int64_t values[] = {(int64_t)names().at(function), attribute, bytes};
  return static_cast<cudaError_t>(told("allow", values));
}
cudaError_t cudaGetLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the stub"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const bool multiprocessors = attribute == cudaDevAttrMultiProcessorCount;
  *value = multiprocessors                                  ? (device == 1 ? 2 : 132)
           : attribute != cudaDevAttrComputeCapabilityMajor ? 0
           : device == 2                                    ? 8
                                                            : 9;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13010;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  const int64_t values[] = {(int64_t)p, (int64_t)bytes};
  return static_cast<cudaError_t>(told("clear", values));
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool pixels = std::strcmp(name, "cuTensorMapEncodeIm2col") == 0;
  *entry = pixels ? reinterpret_cast<void*>(&im2col) : reinterpret_cast<void*>(&tiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
