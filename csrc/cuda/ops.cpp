// Binding of the CUDA kernels to torch through its stable ABI, compiled by the host compiler: the only file here that
// includes torch headers. The ops live in the private namespace modiff_cuda; modiff_kernels/backends/cuda validates,
// shapes and documents the calls.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "common/build_info.h"
#include "common/packing.h"
#include "cuda/common/quantize.h"
#include "cuda/tiles.h"
#include "cuda/product.h"
#include "cuda/stream.h"

namespace modiff::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(ScalarType t) {
  STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16,
                  "modiff_cuda: float32, float16 or bfloat16 expected");
  return t == ScalarType::Float ? DType::kFloat32 : t == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

// What is no tensor comes as a float64 tensor of the CPU, made once per kind of call: torch takes about a quarter of a
// microsecond to convert a number, and less for a whole tensor.
const double* form_of(const Tensor& form, int count, const char* op) {
  STD_TORCH_CHECK(form.numel() == count && form.scalar_type() == ScalarType::Double && form.is_cpu(),
                  "modiff_cuda::", op, ": ", count, " values in a float64 tensor of the CPU expected as the form, got ",
                  form.numel());
  return static_cast<const double*>(form.const_data_ptr());
}

Parameter parameter(const std::optional<Tensor>& t) {
  return t ? parameter_of(t->const_data_ptr(), dtype_of(t->scalar_type())) : Parameter{};
}

// Four dimensions are an NCHW image in channels_last memory. Straight to the allocator: torch::stable::empty looks an
// operator up by name at every call.
Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, int32_t device) {
  const size_t dim = sizes.size();
  std::vector<int64_t> strides(dim);
  int64_t stride = 1;
  for (size_t i = dim; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  if (dim == 4) strides = {strides[0], 1, sizes[1] * sizes[3], sizes[1]};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dim), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

Stream stream_of(int32_t device) {
  Stream stream = nullptr;
  STD_TORCH_CHECK(current_stream(device, &stream),
                  "modiff_cuda: this torch has no CUDA (libtorch_cuda.so is not loaded)");
  return stream;
}

int launch(const QuantizeCall& call, Stream stream) {
  switch (call.problem.prologue) {
    case Prologue::kIdentity:
      return quantize_identity(call, stream);
    case Prologue::kGroupNorm:
      return quantize_group_norm(call, stream);
    case Prologue::kLayerNorm:
      return quantize_layer_norm(call, stream);
    case Prologue::kGeglu:
      return quantize_geglu(call, stream);
  }
  return cudaErrorInvalidValue;
}

// Codes, scales, and absmax (residual form) or zero points (plain form).
std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& input, std::optional<Tensor> further,
                                            std::optional<Tensor> gamma, std::optional<Tensor> beta,
                                            std::optional<Tensor> shift, std::optional<Tensor> x_hat,
                                            std::optional<Tensor> scale, const Tensor& form) {
  QuantizeCall call{};
  QuantizeProblem& p = call.problem;
  set_form(call, form_of(form, kQuantizeForm, "quantize"));
  p.input = input.const_data_ptr();
  p.input_dtype = dtype_of(input.scalar_type());
  call.further = further ? further->const_data_ptr() : nullptr;
  call.own = p.channels - (further ? further->size(1) : 0);
  call.gamma = parameter(gamma);
  call.beta = parameter(beta);
  p.norm_stride = gamma && gamma->dim() == 2 ? gamma->stride(0) : 0;
  call.shift = parameter(shift);
  call.shift_stride = shift ? shift->stride(0) : 0;
  p.x_hat = x_hat ? x_hat->mutable_data_ptr() : nullptr;
  p.x_hat_dtype = x_hat ? dtype_of(x_hat->scalar_type()) : DType::kFloat32;
  p.given_scale = scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
  p.given_scale_count = scale ? scale->numel() : 0;

  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const QuantizeTiling tiling = tiling_of(p);
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  int64_t& width = sizes.size() == 4 ? sizes[1] : sizes.back();
  width = p.packed ? packed_width(p.act_bits, p.channels) : p.channels;
  Tensor codes = empty(sizes, p.packed ? aoti_torch_dtype_uint8() : aoti_torch_dtype_int8(), device);
  Tensor scale_out = empty({tiling.granules}, aoti_torch_dtype_float32(), device);
  Tensor third = empty({tiling.granules}, x_hat ? aoti_torch_dtype_float32() : aoti_torch_dtype_int32(), device);
  p.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  p.scale = static_cast<float*>(scale_out.mutable_data_ptr());
  p.absmax = x_hat ? static_cast<float*>(third.mutable_data_ptr()) : nullptr;
  p.zero_point = x_hat ? nullptr : static_cast<int32_t*>(third.mutable_data_ptr());
  std::optional<Tensor> scratch;
  if (const int64_t bytes = scratch_of(p, tiling).bytes; bytes > 0) {
    scratch = empty({bytes}, aoti_torch_dtype_uint8(), device);
    call.scratch = scratch->mutable_data_ptr();
  }

  Stream stream = stream_of(device);
  const auto error = static_cast<cudaError_t>(launch(call, stream));
  STD_TORCH_CHECK(error == cudaSuccess, "modiff_cuda::quantize (prologue ", static_cast<int>(p.prologue), ", ",
                  p.samples, " samples of ", p.rows, " rows of ", p.channels, " channels) on cuda:", device, ": ",
                  cudaGetErrorString(error));
  return {codes, scale_out, third};
}

// The properties of a device, asked for once.
const Device& device_of(int32_t index) {
  static std::array<Device, 64> devices;
  static std::array<std::once_flag, 64> asked;
  const auto at = static_cast<size_t>(index);
  STD_TORCH_CHECK(at < devices.size(), "modiff_cuda: cuda:", index, "; devices up to cuda:63 are known");
  std::call_once(asked[at], [&] {
    int major = 0, minor = 0, multiprocessors = 0;
    for (const auto& [value, attribute] :
         {std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
          std::pair{&multiprocessors, cudaDevAttrMultiProcessorCount}}) {
      const cudaError_t error = cudaDeviceGetAttribute(value, attribute, index);
      STD_TORCH_CHECK(error == cudaSuccess, "modiff_cuda: cuda:", index,
                      " does not tell its properties: ", cudaGetErrorString(error));
    }
    devices[at] = {index, 10 * major + minor, multiprocessors};
  });
  return devices[at];
}

// Which kernels solve a call, and the scratch they need.
struct Kernels {
  int (*run)(const ProductCall& call, const Device& device, Stream stream);
  int64_t scratch;
};

Kernels kernels_of(const ProductCall& call, const Device& device) {
#if MODIFF_SM90
  if (device.capability == 90 && call.tiling.architecture != 80 && call.code_bits == 8 &&
      product_sm90_limit(call) == nullptr)
    return {product_sm90, product_sm90_scratch(call, device)};
#endif
  STD_TORCH_CHECK(call.tiling.architecture != 90, "modiff_cuda::product: this library has no kernels of sm_90");
  return {product_sm80, product_sm80_scratch(call, device)};
}

// All tilings of a call as tilings_of orders them, one after the other. A tensor has no part in it, nor has a GPU.
std::vector<int64_t> tiles(std::vector<int64_t> geometry, int64_t weight_bits, int64_t code_bits, int64_t capability,
                           int64_t multiprocessors) {
  STD_TORCH_CHECK(geometry.size() == kGeometry, "modiff_cuda::tiles: ", kGeometry, " geometry values expected, got ",
                  geometry.size());
  ProductCall call{};
  set_geometry(call.problem, geometry.data());
  call.weight_bits = static_cast<int>(weight_bits);
  call.code_bits = static_cast<int>(code_bits);
  std::vector<int64_t> values;
  for (const ProductTiling& tiling : tilings_of(call, static_cast<int>(capability), static_cast<int>(multiprocessors)))
    values.insert(values.end(), {tiling.architecture, tiling.rows, tiling.columns, tiling.splits});
  return values;
}

// Codes are int8, or uint8: 4-bit codes in kpack_v1. Codes and weight are aligned to 16 bytes.
Tensor product(const Tensor& codes, const Tensor& scale, std::optional<Tensor> zero_point,
               std::optional<Tensor> tap_sums, const Tensor& weight, const Tensor& weight_scale,
               std::optional<Tensor> bias, std::optional<Tensor> y_hat, std::optional<Tensor> skip,
               const Tensor& form) {
  ProductCall call{};
  ProductProblem& p = call.problem;
  const bool write_out = set_form(call, form_of(form, kProductForm, "product"));
  call.code_bits = codes.scalar_type() == ScalarType::Byte ? 4 : 8;
  STD_TORCH_CHECK(codes.numel() * 8 == p.samples * p.h * p.w * p.c_in * call.code_bits,
                  "modiff_cuda::product: ", codes.numel(), " codes do not match the geometry");
  STD_TORCH_CHECK(p.samples * p.h * p.w < kMostPixels, "modiff_cuda::product: ", p.samples, " images of ", p.h, " x ",
                  p.w, " pixels; less than 2^31 are counted");
  p.codes = static_cast<const int8_t*>(codes.const_data_ptr());
  p.scale = static_cast<const float*>(scale.const_data_ptr());
  p.zero_point = zero_point ? static_cast<const int32_t*>(zero_point->const_data_ptr()) : nullptr;
  call.tap_sums = tap_sums ? static_cast<const int32_t*>(tap_sums->const_data_ptr()) : nullptr;
  p.weight = static_cast<const int8_t*>(weight.const_data_ptr());
  p.weight_scale = static_cast<const float*>(weight_scale.const_data_ptr());
  p.y_hat = y_hat ? y_hat->mutable_data_ptr() : nullptr;
  p.y_hat_dtype = y_hat ? dtype_of(y_hat->scalar_type()) : DType::kFloat32;
  p.skip = skip ? skip->const_data_ptr() : nullptr;
  p.skip_dtype = skip ? dtype_of(skip->scalar_type()) : DType::kFloat32;
  call.bias = parameter(bias);
  call.rows_per_scale = p.samples * p.out_h * p.out_w / scale.numel();

  const int32_t device = codes.get_device_index();
  const char* problem = tiling_problem(call, device_of(device).capability);
  STD_TORCH_CHECK(problem == nullptr, "modiff_cuda::product: no tiles of ", call.tiling.rows, " x ",
                  call.tiling.columns, " outputs and ", call.tiling.splits, " splits of K by the kernels of sm_",
                  call.tiling.architecture, ": ", problem);
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<int64_t> sizes{0};
  if (write_out) {
    sizes.assign(codes.sizes().begin(), codes.sizes().end());
    if (sizes.size() == 4) {
      sizes = {p.samples, p.c_out, p.out_h, p.out_w};
    } else {
      sizes.back() = call.geglu ? p.c_out / 2 : p.c_out;
    }
  }
  const int32_t dtype = p.out_dtype == DType::kFloat32   ? aoti_torch_dtype_float32()
                        : p.out_dtype == DType::kFloat16 ? aoti_torch_dtype_float16()
                                                         : aoti_torch_dtype_bfloat16();
  Tensor out = empty(sizes, dtype, device);
  if (write_out) p.out = out.mutable_data_ptr();
  const Kernels kernels = kernels_of(call, device_of(device));
  std::optional<Tensor> scratch;
  if (kernels.scratch > 0) {
    scratch = empty({kernels.scratch}, aoti_torch_dtype_uint8(), device);
    call.scratch = scratch->mutable_data_ptr();
  }
  const auto error = static_cast<cudaError_t>(kernels.run(call, device_of(device), stream_of(device)));
  STD_TORCH_CHECK(error == cudaSuccess, "modiff_cuda::product (", p.samples, " x ", p.h, " x ", p.w, " x ", p.c_in,
                  " codes, ", p.c_out, " columns, kernel ", p.kernel_h, " x ", p.kernel_w, ", ", call.weight_bits,
                  "-bit weights, ", call.code_bits, "-bit codes) on cuda:", device, ": ", cudaGetErrorString(error));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(modiff_cuda, m) {
  m.def("build_info() -> str");
  m.def(
      "quantize(Tensor input, Tensor? further, Tensor? gamma, Tensor? beta, Tensor? shift, Tensor(a!)? x_hat, "
      "Tensor? scale, Tensor form) -> (Tensor, Tensor, Tensor)");
  m.def(
      "product(Tensor codes, Tensor scale, Tensor? zero_point, Tensor? tap_sums, Tensor weight, Tensor weight_scale, "
      "Tensor? bias, Tensor(a!)? y_hat, Tensor? skip, Tensor form) -> Tensor");
  m.def("tiles(int[] geometry, int weight_bits, int code_bits, int capability, int multiprocessors) -> int[]");
}

// A call without tensors has no device: this key is what a torch without CUDA dispatches it to.
STABLE_TORCH_LIBRARY_IMPL(modiff_cuda, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("tiles", TORCH_BOX(&tiles));
}

STABLE_TORCH_LIBRARY_IMPL(modiff_cuda, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("product", TORCH_BOX(&product));
}

}  // namespace modiff::cuda
