// The other side of tests/backends/cuda/emulation.py: calls come on standard input, answers go to standard output.
// Buffers have their exact sizes, so that the sanitizers find every access beside them.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/common/vectors.h"
#include "cuda/product.h"

namespace modiff {

inline void read_exactly(void* data, size_t size) {
  if (std::fread(data, 1, size, stdin) != size) std::abort();
}

// A buffer as the request has it: its size (-1: null), then its bytes.
struct Buffer {
  std::vector<char> bytes;
  bool there = false;

  void read() {
    int64_t size = 0;
    read_exactly(&size, sizeof(size));
    there = size >= 0;
    if (!there) return;
    bytes = std::vector<char>(static_cast<size_t>(size));
    if (size > 0) read_exactly(bytes.data(), bytes.size());
  }
  void fill(int64_t size) {
    bytes.assign(static_cast<size_t>(size), static_cast<char>(0xFF));
    there = true;
  }
  void write() const {
    if (!bytes.empty()) std::fwrite(bytes.data(), 1, bytes.size(), stdout);
  }
  void* data() { return there ? bytes.data() : nullptr; }
};

// What the requests of both products begin with, and their buffers.
struct ProductRequest {
  int64_t geometry[14], weight_bits, rows_per_scale, bias_dtype, y_hat_dtype, skip_dtype, out_dtype, geglu, tile,
      splits;
};

struct ProductBuffers {
  Buffer codes, scale, zero_point, tap_sums, weight, weight_scale, bias, y_hat, skip, out, scratch;

  // The call of a request, without `out` and `scratch`.
  cuda::ProductCall read(const ProductRequest& r) {
    for (Buffer* buffer : {&codes, &scale, &zero_point, &tap_sums, &weight, &weight_scale, &bias, &y_hat, &skip})
      buffer->read();
    cuda::ProductCall call{};
    ProductProblem& p = call.problem;
    cuda::set_geometry(p, r.geometry);
    p.codes = static_cast<const int8_t*>(codes.data());
    p.scale = static_cast<const float*>(scale.data());
    p.zero_point = static_cast<const int32_t*>(zero_point.data());
    call.tap_sums = static_cast<const int32_t*>(tap_sums.data());
    p.weight = static_cast<const int8_t*>(weight.data());
    p.weight_scale = static_cast<const float*>(weight_scale.data());
    p.y_hat = y_hat.data();
    p.y_hat_dtype = static_cast<DType>(r.y_hat_dtype);
    p.skip = skip.data();
    p.skip_dtype = static_cast<DType>(r.skip_dtype);
    p.out_dtype = static_cast<DType>(r.out_dtype);
    call.bias = cuda::parameter_of(bias.data(), static_cast<DType>(r.bias_dtype));
    call.weight_bits = static_cast<int>(r.weight_bits);
    call.geglu = r.geglu != 0;
    call.rows_per_scale = r.rows_per_scale;
    return call;
  }
};

}  // namespace modiff
