// csrc/cuda/sm90/layout.h beside what CuTe, CUTLASS's library of layouts, says of wgmma's operands: a line for each
// comparison, with how many values differ of how many.
#include <cstdio>

#include <cute/tensor.hpp>

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "cuda/sm90/layout.h"

namespace {

using namespace cute;
namespace sm90 = modiff::cuda::sm90;

void compare(const char* what, long count, long differ) { std::printf("%s %ld %ld\n", what, count, differ); }

void descriptors(int swizzle, SM90::GMMA::LayoutType layout) {
  long count = 0, differ = 0;
  for (uint32_t address = 0; address < 227u << 10; address += 16, ++count) {
    GmmaDescriptor d;
    d.bitfield.layout_type_ = static_cast<uint8_t>(layout);
    d.bitfield.start_address_ = static_cast<uint16_t>(address >> 4);
    d.bitfield.base_offset_ = 0;
    d.bitfield.stride_byte_offset_ = static_cast<uint16_t>(8 * swizzle / 16);
    d.bitfield.leading_byte_offset_ = 1;
    differ += d.desc_ != sm90::descriptor(address, swizzle);
  }
  compare("descriptors", count, differ);
}

template <int columns>
void fragments() {
  const auto layout = SM90::GMMA::CLayout_64xN<columns>{};  // (thread, register) to row + 64 * column
  long differ = 0;
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < columns / 2; ++i)
      differ += layout(thread, i) != sm90::sum_row(thread, i) + 64 * sm90::sum_column(thread, i);
  compare("fragments", 64 * columns, differ);
}

// Places of the codes of a stage, and where the operands of the wgmmas along K begin.
template <int rows, class Atom>
void tiles(Atom atom, int swizzle) {
  const auto layout = tile_to_shape(atom, make_shape(Int<rows>{}, Int<sm90::kBlockK>{}));
  long differ = 0;
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < sm90::kBlockK; ++k) {
      const int plain = k / swizzle * rows * swizzle + row * swizzle + k % swizzle;
      differ += static_cast<uint32_t>(layout(row, k)) != sm90::swizzled(static_cast<uint32_t>(plain), swizzle);
    }
  }
  for (int i = 0; i < sm90::kBlockK / sm90::kMmaDepth; ++i)
    differ += static_cast<uint32_t>(layout(0, i * sm90::kMmaDepth)) != sm90::depth_offset(i, rows, swizzle);
  compare("tiles", rows * sm90::kBlockK, differ);
}

template <int rows>
void both_tiles() {
  tiles<rows>(SM90::GMMA::Layout_K_SW128_Atom<int8_t>{}, 128);
  tiles<rows>(SM90::GMMA::Layout_K_SW64_Atom<int8_t>{}, 64);
}

}  // namespace

int main() {
  descriptors(128, SM90::GMMA::LayoutType::B128);
  descriptors(64, SM90::GMMA::LayoutType::B64);
  fragments<64>();
  fragments<128>();
  fragments<160>();
  fragments<256>();
  both_tiles<64>();
  both_tiles<128>();
  both_tiles<160>();
  both_tiles<256>();
}
