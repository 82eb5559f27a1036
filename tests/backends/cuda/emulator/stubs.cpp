// The binding, and the host's part of the product of sm_90, on stubs of kernels, of CUDA and of its driver, as ops of
// torch for tensors of the CPU: modiff_stubs. Whoever is called notes down what with; the op `calls` has a line for each,
// in which tests/backends/cuda/test_binding.py names the values.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>

#include "cuda/stream.h"

#define modiff_cuda modiff_stubs
#define CUDA CPU
#define DeviceGuard DeviceIndex
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define current_stream(device, stream) (device) >= 0
#define get_device_index() get_device_index() + 1  // a tensor of the CPU has -1
#include "cuda/ops.cpp"

#include "cuda/sm90/product.cu"

namespace {

using namespace modiff;

std::ostringstream notes;

template <class... T>
int note(const char* name, T... values) {
  notes << name;
  ((notes << ' ' << (int64_t)values), ...);
  notes << '\n';
  return 0;
}

std::string calls() {
  const std::string all = notes.str();
  notes.str("");
  return all;
}

// Maps that can be told apart: the address, the bit that drivers up to 13.1 set wrongly, the number of the map.
CUresult fill(CUtensorMap* map, const void* base) {
  static cuuint64_t encoded = 0;
  map->opaque[0] = reinterpret_cast<cuuint64_t>(base);
  map->opaque[1] = cuuint64_t{1} << 21;
  map->opaque[2] = ++encoded;
  return CUDA_SUCCESS;
}

CUresult tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* dims,
               const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
               CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill_with) {
  note("tiled", type, rank, base, dims[0], dims[1], strides[0], box[0], box[1], steps[0], steps[1], swizzle, fill_with);
  return fill(map, base);
}

CUresult im2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* dims,
                const cuuint64_t* strides, const int* lower, const int* upper, cuuint32_t channels, cuuint32_t pixels,
                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill_with) {
  note("im2col", type, rank, base, dims[0], dims[1], dims[2], dims[3], strides[0], strides[1], strides[2], lower[0],
       lower[1], upper[0], upper[1], channels, pixels, steps[0], steps[1], steps[2], steps[3], swizzle, fill_with);
  return fill(map, base);
}

cudaError_t note_launch(int bits, const cuda::sm90::ProductArgs<CUtensorMap>& args, const cudaLaunchConfig_t& config) {
  int early = 0, cluster = 0;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = static_cast<int>(attribute.val.clusterDim.x);
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      early = attribute.val.programmaticStreamSerializationAllowed;
  }
  const cuuint64_t *codes = args.codes.opaque, *weight = args.weight.opaque;
  note("launch", bits, args.schedule.splits, codes[0], codes[1] >> 21, codes[2], weight[0], weight[1] >> 21, weight[2],
       args.high_plane.opaque[0], args.sums != nullptr, config.gridDim.x, cluster, early);
  return cudaSuccess;
}

}  // namespace

namespace modiff::cuda {

int64_t product_sm80_scratch(const ProductCall&, const Device&) { return 64; }
int product_sm80(const ProductCall& call, const Device&, Stream) {
  const ProductProblem& p = call.problem;
  return note("product", p.samples, p.h, p.w, p.c_in, p.c_out, p.out_h, p.out_w, p.codes, p.scale, p.zero_point,
              call.tap_sums, p.weight, p.weight_scale, call.bias.data, call.bias.dtype, p.y_hat, p.y_hat_dtype, p.skip,
              p.skip_dtype, p.out, p.out_dtype, call.weight_bits, call.code_bits, call.geglu, call.rows_per_scale,
              call.scratch != nullptr);
}

#define NOTE_QUANTIZE(name)                                                                                           \
  int quantize_##name(const QuantizeCall& call, Stream) {                                                             \
    const QuantizeProblem& p = call.problem;                                                                          \
    return note(#name, p.samples, p.rows, p.channels, p.input, p.input_dtype, call.gamma.data, call.gamma.dtype,      \
                call.beta.data, p.norm_stride, call.shift.data, call.shift_stride, p.num_groups,                      \
                std::lround(p.eps * 1e6), p.silu, p.x_hat, p.x_hat_dtype, p.affine, p.act_bits, p.granularity,        \
                std::lround(p.clip_ratio * 1e3), p.given_scale, p.given_scale_count, call.delayed, p.packed, p.codes, \
                p.scale, p.absmax, p.zero_point);                                                                     \
  }
NOTE_QUANTIZE(identity)
NOTE_QUANTIZE(group_norm)
NOTE_QUANTIZE(layer_norm)
NOTE_QUANTIZE(geglu)

namespace sm90 {
cudaError_t launch_8bit(int, const ProductArgs<CUtensorMap>& args, cudaLaunchConfig_t config, int) {
  return note_launch(8, args, config);
}
cudaError_t launch_packed(int, int bits, const ProductArgs<CUtensorMap>& args, cudaLaunchConfig_t config, int) {
  return note_launch(bits, args, config);
}
}  // namespace sm90

}  // namespace modiff::cuda

extern "C" {

const char* cudaGetErrorString(cudaError_t) { return "an error of the stub"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13010;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  note("clear", bytes);
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

STABLE_TORCH_LIBRARY_FRAGMENT(modiff_stubs, m) { m.def("calls() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(modiff_stubs, CompositeExplicitAutograd, m) { m.impl("calls", TORCH_BOX(&calls)); }
