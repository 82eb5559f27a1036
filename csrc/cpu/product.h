// Integer products (convolution and GEMM), weights in layout "vnni_v1".
#pragma once
#include "common/problem.h"

namespace modiff::cpu {

constexpr int64_t kPanel = 16;        // output channels that share one vector register
constexpr int64_t kDot = 4;           // input channels that one vpdpbusd multiplies and adds
constexpr int64_t kTileSlack = 1024;  // product_avx512_amx.cpp reads weights of 64 codes at a time, past the last too

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Layout vnni_v1, one flat int8 buffer: for each group, panels of 16 output channels, each [r][s][c/4][16][4] with zero
// padding of channels and output channels; then int32 sums over k of every (padded) output channel, and kTileSlack.
struct VnniLayout {
  int64_t c_group, n_group, c_padded, panels;  // per group
  int64_t taps;                                // kernel_h * kernel_w
  int64_t groups;
  VnniLayout(int64_t c_in, int64_t c_out, int64_t taps_, int64_t groups_)
      : c_group(c_in / groups_),
        n_group(c_out / groups_),
        c_padded(round_up(c_in / groups_, kDot)),
        panels(round_up(c_out / groups_, kPanel) / kPanel),
        taps(taps_),
        groups(groups_) {}
  int64_t panel_bytes() const { return taps * c_padded * kPanel; }
  int64_t weight_bytes() const { return groups * panels * panel_bytes(); }
  int64_t total_bytes() const { return weight_bytes() + groups * panels * kPanel * 4 + kTileSlack; }
};

// weight_q: [c_out, kernel_h, kernel_w, c_in / groups] int8 -> packed (VnniLayout::total_bytes()).
void pack_vnni(const int8_t* weight_q, const VnniLayout& layout, int8_t* packed);
void unpack_vnni(const int8_t* packed, const VnniLayout& layout, int8_t* weight_q);

#if defined(__x86_64__)
void product_avx2(const ProductProblem&);
void product_avx512(const ProductProblem&);
void product_avx_vnni(const ProductProblem&);
void product_avx512vl_vnni(const ProductProblem&);
void product_avx512_vnni(const ProductProblem&);
void product_avx512_amx(const ProductProblem&);
#endif

}  // namespace modiff::cpu
