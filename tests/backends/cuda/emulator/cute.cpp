// csrc/cuda/sm90/layout.h beside what CuTe, CUTLASS's library of layouts, says of wgmma's operands: a line for each
// comparison, with how many values differ of how many.
#include <cstdio>

#include <cute/tensor.hpp>

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "cuda/sm90/layout.h"

using namespace cute;
namespace sm90 = modiff::cuda::sm90;

void descriptors() {
  int count = 0, differ = 0;
  for (uint32_t address = 0; address < 227u << 10; address += 16, ++count) {
    GmmaDescriptor d;
    d.bitfield.layout_type_ = static_cast<uint8_t>(SM90::GMMA::LayoutType::B128);
    d.bitfield.start_address_ = static_cast<uint16_t>(address >> 4);
    d.bitfield.base_offset_ = 0;
    d.bitfield.stride_byte_offset_ = 8 * 128 / 16;
    d.bitfield.leading_byte_offset_ = 1;
    differ += d.desc_ != sm90::descriptor(address);
  }
  std::printf("descriptors %d %d\n", count, differ);
}

template <int columns>
void fragments() {
  const auto layout = SM90::GMMA::CLayout_64xN<columns>{};  // (thread, register) to row + 64 * column
  int differ = 0;
  for (int at = 0, thread = 0; at < 64 * columns; thread = ++at / (columns / 2)) {
    const int i = at % (columns / 2);
    differ += layout(thread, i) != sm90::sum_row(thread, i) + 64 * sm90::sum_column(thread, i);
  }
  std::printf("fragments %d %d\n", 64 * columns, differ);
}

// Places of the codes of a stage, and of the bytes of slices in rows of 64. The operand of the i-th wgmma along K begins
// 32 i bytes behind that of the first.
template <int rows, class Atom>
void tiles(Atom atom, int swizzle) {
  const auto layout = tile_to_shape(atom, make_shape(Int<rows>{}, Int<sm90::kBlockK>{}));
  int differ = 0;
  for (int at = 0; at < rows * sm90::kBlockK; ++at) {
    const int row = at / sm90::kBlockK, k = at % sm90::kBlockK;
    const int plain = k / swizzle * rows * swizzle + row * swizzle + k % swizzle;
    differ += layout(row, k) != static_cast<int>(sm90::swizzled(static_cast<uint32_t>(plain), swizzle));
  }
  std::printf("tiles %d %d\n", rows * sm90::kBlockK, differ);
}

void depths() {
  const auto layout = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<int8_t>{}, Shape<_64, Int<sm90::kBlockK>>{});
  int differ = 0;
  for (int k = 0; k < sm90::kBlockK; k += sm90::kMmaDepth) differ += layout(0, k) != k;
  std::printf("depths 4096 %d\n", differ);
}

template <int... sizes>
void compare() {
  (fragments<sizes>(), ...);
  (tiles<sizes>(SM90::GMMA::Layout_K_SW128_Atom<int8_t>{}, 128), ...);
  (tiles<sizes>(SM90::GMMA::Layout_K_SW64_Atom<int8_t>{}, 64), ...);
}

int main() {
  descriptors();
  depths();
  compare<64, 128, 160, 256>();
}
