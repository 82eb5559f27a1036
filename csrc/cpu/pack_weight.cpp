#include <algorithm>
#include <cstring>

#include "cpu/product.h"
#include "cpu/parallel.h"

namespace modiff::cpu {
void pack_vnni(const int8_t* weight_q, const VnniLayout& layout, int8_t* packed) {
  std::memset(packed, 0, layout.total_bytes());
  auto* sums = reinterpret_cast<int32_t*>(packed + layout.weight_bytes());
  for (int64_t g = 0; g < layout.groups; ++g)
    for (int64_t n = 0; n < layout.n_group; ++n) {
      const int64_t panel = g * layout.panels + n / kPanel;
      int8_t* to = packed + panel * layout.panel_bytes() + n % kPanel * kDot;
      int32_t sum = 0;
      for (int64_t t = 0; t < layout.taps; ++t)
        for (int64_t c = 0; c < layout.c_group; ++c, ++weight_q) {
          to[(t * layout.c_padded + c / kDot * kDot) * kPanel + c % kDot] = *weight_q;
          sum += *weight_q;
        }
      sums[g * layout.panels * kPanel + n] = sum;
    }
}

void unpack_vnni(const int8_t* packed, const VnniLayout& layout, int8_t* weight_q) {
  const int64_t k = layout.taps * layout.c_group;
  parallel_tasks(layout.groups * layout.panels, [&](int64_t panel) {
    const int64_t first = panel % layout.panels * kPanel;  // output channel in the group
    const int64_t real = std::min(kPanel, layout.n_group - first);
    const int64_t n = panel / layout.panels * layout.n_group + first;
    const int8_t* from = packed + panel * layout.panel_bytes();
    for (int64_t t = 0; t < layout.taps; ++t)
      for (int64_t c = 0; c < layout.c_group; c += kDot, from += kPanel * kDot)
        for (int64_t i = 0; i < real; ++i)
          for (int64_t j = 0; j < std::min(kDot, layout.c_group - c); ++j)
            weight_q[(n + i) * k + t * layout.c_group + c + j] = from[i * kDot + j];
  });
}

}  // namespace modiff::cpu
