// Binding of the CPU kernels to torch through its stable ABI: the only file here that includes torch headers. The ops
// live in the private namespace modiff_cpu; modiff_kernels/backends/cpu.py validates, shapes and documents the calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/build_info.h"
#include "common/problem.h"
#include "cpu/attention.h"
#include "cpu/product.h"
#include "cpu/parallel.h"
#include "cpu/quantize.h"

namespace modiff::cpu {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t num_threads() { return torch::stable::get_num_threads(); }

void parallel_for_raw(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

void* thread_scratch(int index, int64_t bytes) {
  constexpr int kBuffers = 4;
  constexpr int64_t kAlignment = 64;
  struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[kBuffers];
  Buffer& buffer = buffers[index];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = round_up(bytes, kAlignment);
    buffer.data = std::aligned_alloc(kAlignment, buffer.size);
    if (buffer.data == nullptr) std::abort();  // out of memory inside a parallel region: nothing can be reported
  }
  return buffer.data;
}

namespace {

#if defined(__x86_64__)
// Whether vpdpbusd has its form without AVX-512 here. Not of __builtin_cpu_supports: Clang learned the name late.
bool avx_vnni() {
#if MODIFF_AVX_VNNI
  unsigned eax, ebx, ecx, edx;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
#else
  return false;
#endif
}

// Whether tdpbssd runs: Linux gives a process the tile registers when it asks for them.
bool amx() {
#if MODIFF_AMX && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool tiles = edx >> 24 & 1, int8 = edx >> 25 & 1;
  return tiles && int8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Instruction sets in rising order of preference; the names in modiff_kernels/backends/cpu.py follow it.
enum Isa : int64_t { kPlain, kAvx2, kAvx512, kAvxVnni, kAvx512Vnni, kAvx512Amx };

// Bit i: instruction set i is available here.
int64_t isas() {
  static const int64_t available = [] {
    int64_t found = 1 << kPlain;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (avx2) found |= 1 << kAvx2;
    if (avx512) found |= 1 << kAvx512;
    if (avx_vnni() || vnni) found |= 1 << kAvxVnni;
    if (vnni) found |= 1 << kAvx512Vnni;
    if (vnni && amx()) found |= 1 << kAvx512Amx;
#endif
    return found;
  }();
  return available;
}

void check_isa(int64_t isa, int64_t least, const char* op) {
  STD_TORCH_CHECK(isa >= least && isa < 63 && (isas() >> isa & 1), "modiff_cpu::", op, ": instruction set ", isa,
                  " is not available here (bits ", isas(), "; from ", least, ")");
}

QuantizeFn quantize_for(int64_t isa) {
  check_isa(isa, kPlain, "quantize");
#if defined(__x86_64__)
  if (isa == kAvx512 || isa >= kAvx512Vnni) return &quantize_avx512;
  if (isa != kPlain) return &quantize_avx2;
#endif
  return &quantize_plain;
}

void run_product(const ProductProblem& p, int64_t isa) {
#if defined(__x86_64__)
  if (isa == kAvx2) return product_avx2(p);
  if (isa == kAvx512) return product_avx512(p);
  if (isa == kAvx512Vnni) return product_avx512_vnni(p);
#if MODIFF_AMX
  if (isa == kAvx512Amx) return product_avx512_amx(p);
#endif
#if MODIFF_AVX_VNNI
  if (avx_vnni()) return product_avx_vnni(p);
#endif
  product_avx512vl_vnni(p);
#endif
}

DType dtype_of(ScalarType t) {
  STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16,
                  "modiff_cpu: float32, float16 or bfloat16 expected");
  return t == ScalarType::Float ? DType::kFloat32 : t == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

const float* floats(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// Four dimensions are an NCHW image in channels_last memory; a Linear's input comes with fewer. Straight to the
// allocator: torch::stable::empty looks an operator up by name at every call.
Tensor empty(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  constexpr int64_t kMaxDim = 8;
  STD_TORCH_CHECK(dim <= kMaxDim, "modiff_cpu: tensors of up to 8 dimensions, got ", dim);
  int64_t strides[kMaxDim];
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  if (dim == 4) {
    strides[1] = 1;
    strides[3] = sizes[1];
    strides[2] = sizes[1] * sizes[3];
  }
  int32_t code = aoti_torch_dtype_float32();
  if (dtype == ScalarType::Char) code = aoti_torch_dtype_int8();
  if (dtype == ScalarType::Int) code = aoti_torch_dtype_int32();
  if (dtype == ScalarType::Half) code = aoti_torch_dtype_float16();
  if (dtype == ScalarType::BFloat16) code = aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  return empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}

Tensor empty_vector(int64_t size, ScalarType dtype) { return empty(&size, 1, dtype); }

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(const Tensor& input, int64_t prologue, std::optional<Tensor> gamma,
                                                    std::optional<Tensor> beta, std::optional<Tensor> shift,
                                                    int64_t num_groups, double eps, bool silu,
                                                    std::optional<Tensor> x_hat, bool affine, int64_t act_bits,
                                                    int64_t granularity, double clip_ratio, std::optional<Tensor> scale,
                                                    int64_t samples, int64_t rows, int64_t channels, int64_t isa) {
  QuantizeProblem p{};
  p.prologue = static_cast<Prologue>(prologue);
  p.samples = samples;
  p.rows = rows;
  p.channels = channels;
  p.input = input.const_data_ptr();
  p.input_dtype = dtype_of(input.scalar_type());
  p.gamma = floats(gamma);
  p.beta = floats(beta);
  p.norm_stride = gamma && gamma->dim() == 2 ? channels : 0;
  p.shift = floats(shift);
  p.num_groups = num_groups;
  p.eps = static_cast<float>(eps);
  p.silu = silu;
  p.x_hat = x_hat ? x_hat->mutable_data_ptr() : nullptr;
  p.x_hat_dtype = x_hat ? dtype_of(x_hat->scalar_type()) : DType::kFloat32;
  p.affine = affine;
  p.act_bits = static_cast<int>(act_bits);
  p.granularity = static_cast<Granularity>(granularity);
  p.clip_ratio = static_cast<float>(clip_ratio);
  p.given_scale = floats(scale);
  p.given_scale_count = scale ? scale->numel() : 0;

  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  if (p.prologue == Prologue::kGeglu) sizes.back() = channels;
  const int64_t granules = p.granularity == Granularity::kPerTensor  ? 1
                           : p.granularity == Granularity::kPerToken ? samples * rows
                                                                     : samples;
  Tensor codes = empty(sizes, ScalarType::Char);
  Tensor scale_out = empty_vector(granules, ScalarType::Float), absmax = empty_vector(granules, ScalarType::Float);
  Tensor zero_point = empty_vector(x_hat ? 0 : granules, ScalarType::Int);
  p.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  p.scale = static_cast<float*>(scale_out.mutable_data_ptr());
  p.absmax = static_cast<float*>(absmax.mutable_data_ptr());
  p.zero_point = x_hat ? nullptr : static_cast<int32_t*>(zero_point.mutable_data_ptr());
  const bool finite = input.numel() == 0 || quantize_for(isa)(p);
  STD_TORCH_CHECK(finite, "holds NaN or Inf");
  return {codes, scale_out, absmax, zero_point};
}

// geometry: samples, h, w, c_in, c_out, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
// groups
Tensor product(const Tensor& codes, const Tensor& scale, int64_t granularity, std::optional<Tensor> zero_point,
               const Tensor& weight, const Tensor& weight_scale, std::optional<Tensor> bias,
               std::optional<Tensor> y_hat, std::optional<Tensor> skip, bool write_out, ScalarType out_dtype,
               std::vector<int64_t> geometry, int64_t weight_bits, int64_t isa) {
  check_isa(isa, kAvx2, "product");
  STD_TORCH_CHECK(geometry.size() == 14, "modiff_cpu::product: 14 geometry values expected, got ", geometry.size());
  ProductProblem p{};
  int64_t* fields[] = {&p.samples,  &p.h,        &p.w,     &p.c_in,  &p.c_out,      &p.kernel_h,   &p.kernel_w,
                       &p.stride_h, &p.stride_w, &p.pad_h, &p.pad_w, &p.dilation_h, &p.dilation_w, &p.groups};
  for (size_t i = 0; i < geometry.size(); ++i) *fields[i] = geometry[i];
  p.out_h = (p.h + 2 * p.pad_h - p.dilation_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_w = (p.w + 2 * p.pad_w - p.dilation_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
  STD_TORCH_CHECK(p.kernel_h * p.kernel_w <= 49, "modiff_cpu::product: kernels up to 7x7, got ", p.kernel_h, "x",
                  p.kernel_w);
  const VnniLayout layout(p.c_in, p.c_out, p.kernel_h * p.kernel_w, p.groups);
  STD_TORCH_CHECK(weight.numel() == layout.total_bytes(), "modiff_cpu::product: weight of ", layout.total_bytes(),
                  " bytes (layout vnni_v1) expected, got ", weight.numel());
  STD_TORCH_CHECK(codes.numel() == p.samples * p.h * p.w * p.c_in, "modiff_cpu::product: ", codes.numel(),
                  " codes do not match the geometry");
  p.codes = static_cast<const int8_t*>(codes.const_data_ptr());
  p.scale = static_cast<const float*>(scale.const_data_ptr());
  p.granularity = static_cast<Granularity>(granularity);
  p.zero_point = zero_point ? static_cast<const int32_t*>(zero_point->const_data_ptr()) : nullptr;
  p.weight = static_cast<const int8_t*>(weight.const_data_ptr());
  p.weight_bits = static_cast<int>(weight_bits);
  p.weight_scale = static_cast<const float*>(weight_scale.const_data_ptr());
  p.bias = floats(bias);
  p.y_hat = y_hat ? y_hat->mutable_data_ptr() : nullptr;
  p.y_hat_dtype = y_hat ? dtype_of(y_hat->scalar_type()) : DType::kFloat32;
  p.skip = skip ? skip->const_data_ptr() : nullptr;
  p.skip_dtype = skip ? dtype_of(skip->scalar_type()) : DType::kFloat32;
  p.out_dtype = dtype_of(out_dtype);

  Tensor out;
  if (write_out) {
    std::vector<int64_t> sizes(codes.sizes().begin(), codes.sizes().end());
    if (sizes.size() == 4) {
      sizes = {p.samples, p.c_out, p.out_h, p.out_w};
    } else {
      sizes.back() = p.c_out;
    }
    out = empty(sizes, out_dtype);
    p.out = out.mutable_data_ptr();
  } else {
    out = empty_vector(0, out_dtype);
  }
  if (codes.numel() > 0) run_product(p, isa);
  return out;
}

// q [samples, queries, heads * width], k and v [samples, keys, heads * width]: float32, rows contiguous.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads, double scale, int64_t isa) {
  STD_TORCH_CHECK(isa == kAvx512 || isa >= kAvx512Vnni, "modiff_cpu::attention needs AVX-512, got instruction set ",
                  isa);
  check_isa(isa, kAvx512, "attention");
  for (const Tensor* t : {&q, &k, &v})
    STD_TORCH_CHECK(t->dim() == 3 && t->stride(2) == 1 && t->scalar_type() == ScalarType::Float,
                    "modiff_cpu::attention: float32 [samples, tokens, heads * width] with contiguous rows expected");
  AttentionProblem p{};
  p.samples = q.size(0);
  p.heads = heads;
  p.queries = q.size(1);
  p.keys = k.size(1);
  p.width = q.size(2) / heads;
  STD_TORCH_CHECK(p.keys > 0, "modiff_cpu::attention: no keys");
  p.scale = static_cast<float>(scale);
  p.q = static_cast<const float*>(q.const_data_ptr());
  p.k = static_cast<const float*>(k.const_data_ptr());
  p.v = static_cast<const float*>(v.const_data_ptr());
  p.q_sample = q.stride(0);
  p.k_sample = k.stride(0);
  p.v_sample = v.stride(0);
  p.q_row = q.stride(1);
  p.k_row = k.stride(1);
  p.v_row = v.stride(1);
  Tensor out = empty({p.samples, p.queries, q.size(2)}, ScalarType::Float);
  p.out = static_cast<float*>(out.mutable_data_ptr());
#if defined(__x86_64__)
#if MODIFF_AMX
  if (isa == kAvx512Amx)
    attention_avx512_amx(p);
  else
#endif
    (isa == kAvx512 ? attention_avx512 : attention_avx512_vnni)(p);
#endif
  return out;
}

VnniLayout layout_of(IntHeaderOnlyArrayRef sizes, int64_t groups) {
  return VnniLayout(sizes[3] * groups, sizes[0], sizes[1] * sizes[2], groups);
}

// weight_q: int8 [c_out, kernel_h, kernel_w, c_in / groups], contiguous.
Tensor pack(const Tensor& weight_q, int64_t groups) {
  STD_TORCH_CHECK(weight_q.dim() == 4 && weight_q.is_contiguous() && weight_q.scalar_type() == ScalarType::Char,
                  "modiff_cpu::pack_vnni: contiguous int8 [c_out, kernel_h, kernel_w, c_in / groups] expected");
  const VnniLayout layout = layout_of(weight_q.sizes(), groups);
  Tensor packed = empty_vector(layout.total_bytes(), ScalarType::Char);
  pack_vnni(static_cast<const int8_t*>(weight_q.const_data_ptr()), layout,
            static_cast<int8_t*>(packed.mutable_data_ptr()));
  return packed;
}

VnniLayout layout_of(const char* op, const Tensor& packed, const std::vector<int64_t>& sizes, int64_t groups) {
  const VnniLayout layout = layout_of(IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), groups);
  STD_TORCH_CHECK(packed.numel() == layout.total_bytes(), "modiff_cpu::", op, ": ", layout.total_bytes(),
                  " bytes expected, got ", packed.numel());
  return layout;
}

// Not `empty`: four sizes mean channels_last there, and these are row-major.
Tensor row_major(const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::empty(IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

Tensor unpack(const Tensor& packed, std::vector<int64_t> sizes, int64_t groups) {
  const VnniLayout layout = layout_of("unpack_vnni", packed, sizes, groups);
  Tensor weight_q = row_major(sizes, ScalarType::Char);
  unpack_vnni(static_cast<const int8_t*>(packed.const_data_ptr()), layout,
              static_cast<int8_t*>(weight_q.mutable_data_ptr()));
  return weight_q;
}

}  // namespace
}  // namespace modiff::cpu

STABLE_TORCH_LIBRARY(modiff_cpu, m) {
  m.def("isas() -> int");
  m.def("build_info() -> str");
  m.def(
      "quantize(Tensor input, int prologue, Tensor? gamma, Tensor? beta, Tensor? shift, int num_groups, float eps, "
      "bool silu, Tensor(a!)? x_hat, bool affine, int act_bits, int granularity, float clip_ratio, Tensor? scale, "
      "int samples, int rows, int channels, int isa) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "product(Tensor codes, Tensor scale, int granularity, Tensor? zero_point, Tensor weight, Tensor weight_scale, "
      "Tensor? bias, Tensor(a!)? y_hat, Tensor? skip, bool write_out, ScalarType out_dtype, int[] geometry, "
      "int weight_bits, int isa) -> Tensor");
  // product without y_hat: inductor fails on the one result of an op that could mutate and does not (torch 2.13).
  m.def(
      "product_plain(Tensor codes, Tensor scale, int granularity, Tensor? zero_point, Tensor weight, "
      "Tensor weight_scale, Tensor? bias, Tensor? y_hat, Tensor? skip, bool write_out, ScalarType out_dtype, "
      "int[] geometry, int weight_bits, int isa) -> Tensor");
  m.def("attention(Tensor q, Tensor k, Tensor v, int heads, float scale, int isa) -> Tensor");
  m.def("pack_vnni(Tensor weight_q, int groups) -> Tensor");
  m.def("unpack_vnni(Tensor packed, int[] sizes, int groups) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(modiff_cpu, CompositeExplicitAutograd, m) {
  m.impl("isas", TORCH_BOX(&modiff::cpu::isas));
  m.impl("build_info", TORCH_BOX(&modiff::build_info));
}

STABLE_TORCH_LIBRARY_IMPL(modiff_cpu, CPU, m) {
  m.impl("quantize", TORCH_BOX(&modiff::cpu::quantize));
  m.impl("product", TORCH_BOX(&modiff::cpu::product));
  m.impl("product_plain", TORCH_BOX(&modiff::cpu::product));
  m.impl("attention", TORCH_BOX(&modiff::cpu::attention));
  m.impl("pack_vnni", TORCH_BOX(&modiff::cpu::pack));
  m.impl("unpack_vnni", TORCH_BOX(&modiff::cpu::unpack));
}
