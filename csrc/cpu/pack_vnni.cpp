#include <cstring>

#include "cpu/lowbit_conv2d.h"

namespace modiff::cpu {
namespace {

// Calls body(packed index, row-major index of weight_q) for every real weight.
template <class Body>
void for_each_weight(const VnniLayout& layout, const Body& body) {
  for (int64_t g = 0; g < layout.groups; ++g)
    for (int64_t n = 0; n < layout.n_group; ++n)
      for (int64_t t = 0; t < layout.taps; ++t)
        for (int64_t c = 0; c < layout.c_group; ++c) {
          const int64_t panel = g * layout.panels + n / kPanel;
          const int64_t block = t * (layout.c_padded / kDot) + c / kDot;
          body(panel * layout.panel_bytes() + (block * kPanel + n % kPanel) * kDot + c % kDot,
               ((g * layout.n_group + n) * layout.taps + t) * layout.c_group + c);
        }
}

}  // namespace

void pack_vnni(const int8_t* weight_q, const VnniLayout& layout, int8_t* packed) {
  std::memset(packed, 0, layout.total_bytes());
  for_each_weight(layout, [&](int64_t to, int64_t from) { packed[to] = weight_q[from]; });
  auto* sums = reinterpret_cast<int32_t*>(packed + layout.weight_bytes());
  const int64_t k = layout.taps * layout.c_group;
  for (int64_t g = 0; g < layout.groups; ++g)
    for (int64_t n = 0; n < layout.n_group; ++n) {
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += weight_q[(g * layout.n_group + n) * k + i];
      sums[g * layout.panels * kPanel + n] = sum;
    }
}

void unpack_vnni(const int8_t* packed, const VnniLayout& layout, int8_t* weight_q) {
  for_each_weight(layout, [&](int64_t from, int64_t to) { weight_q[to] = packed[from]; });
}

}  // namespace modiff::cpu
