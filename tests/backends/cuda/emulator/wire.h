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

// A buffer as the request has it: its size (-1: null) and dtype, then its bytes.
struct Buffer {
  std::vector<char> bytes;
  DType dtype;
  bool there = false;

  void read() {
    int64_t head[2];
    read_exactly(head, sizeof(head));
    there = head[0] >= 0;
    dtype = static_cast<DType>(head[1]);
    if (!there) return;
    bytes = std::vector<char>(static_cast<size_t>(head[0]));
    if (head[0] > 0) read_exactly(bytes.data(), bytes.size());
  }
  void fill(int64_t size) {
    bytes.assign(static_cast<size_t>(size), static_cast<char>(0xFF));
    there = true;
  }
  void write() const {
    if (!bytes.empty()) std::fwrite(bytes.data(), 1, bytes.size(), stdout);
  }
  void* data() { return there ? bytes.data() : nullptr; }
  cuda::Parameter parameter() { return cuda::parameter_of(data(), dtype); }
};

// What the requests of both products begin with, and their buffers.
struct ProductRequest {
  double form[cuda::kProductForm];
  int64_t tile, splits, code_bits;
};

struct ProductBuffers {
  Buffer codes, scale, zero_point, tap_sums, weight, weight_scale, bias, y_hat, skip, out, scratch;

  // The call of a request, without `scratch`.
  cuda::ProductCall read(const ProductRequest& r) {
    for (Buffer* buffer : {&codes, &scale, &zero_point, &tap_sums, &weight, &weight_scale, &bias, &y_hat, &skip})
      buffer->read();
    cuda::ProductCall call{};
    ProductProblem& p = call.problem;
    const bool write_out = cuda::set_form(call, r.form);
    p.codes = static_cast<const int8_t*>(codes.data());
    p.scale = static_cast<const float*>(scale.data());
    p.zero_point = static_cast<const int32_t*>(zero_point.data());
    call.tap_sums = static_cast<const int32_t*>(tap_sums.data());
    p.weight = static_cast<const int8_t*>(weight.data());
    p.weight_scale = static_cast<const float*>(weight_scale.data());
    p.y_hat = y_hat.data();
    p.y_hat_dtype = y_hat.dtype;
    p.skip = skip.data();
    p.skip_dtype = skip.dtype;
    call.bias = bias.parameter();
    call.code_bits = static_cast<int>(r.code_bits);
    const int64_t rows = p.samples * p.out_h * p.out_w;
    call.rows_per_scale = rows * 4 / static_cast<int64_t>(scale.bytes.size());
    if (write_out) out.fill(rows * p.c_out * element_size(p.out_dtype) / (call.geglu ? 2 : 1));
    p.out = out.data();
    return call;
  }
};

}  // namespace modiff
