// The context of a block that multiplies on tensor cores through mma.sync. Besides common/cta.h it has, with the names
// of PTX in brackets:
//
//   void copy_async<bytes>(to, from, there)   16 or 4 bytes from global into shared memory, zeros unless `there`; until
//                                             waited for they are not there, even for this thread      [cp.async]
//   void commit()                             ends a group of copies of this thread, perhaps an empty one
//   void wait<n>()                            until all but the last n groups of this thread have arrived
//   void sync_warp()                          barrier of a warp
//   void load_matrices(row, r)                r[i] = bytes 4 * (lane % 4) to + 3 of the 16 bytes at the `row` of lane
//                                             8 * i + lane / 4                               [ldmatrix.m8n8.x4]
//   void multiply<S4>(sums, a, b)             sums[m][n] += a[m] * b[n]^T for all m, n: 16 x 8 sums of 32 bytes of
//                                             codes, int8 or (S4) nibbles       [mma.m16n8k32 s8, mma.m16n8k64 s4]
//
// Fragments of multiply, of which a thread holds 4-byte words (PTX ISA, "Matrix Fragments for mma.m16n8k32" and
// "... m16n8k64"); in words of bytes they are the same for int8 and nibbles:
//
//   a[i]      row lane / 4 + 8 * (i % 2), bytes 4 * (lane % 4) + 16 * (i / 2) to + 3
//   b[i]      column lane / 4,            bytes 4 * (lane % 4) + 16 * i to + 3
//   sums[i]   row lane / 4 + 8 * (i / 2), column 2 * (lane % 4) + i % 2
#pragma once
#include "common/cta.h"

namespace modiff::cuda {

#if defined(__CUDACC__)

struct TensorCta : DeviceCta {
  template <int kBytes>
  __device__ __forceinline__ void copy_async(void* to, const void* from, bool there) const {
    const int size = there ? kBytes : 0;
    if constexpr (kBytes == 16) {  // past the L1 cache: no other thread of the block reads these bytes
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(size)
                   : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                   "r"(size)
                   : "memory");
    }
  }
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kLeft>
  __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
  }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
  __device__ __forceinline__ void load_matrices(const void* row, uint32_t (&r)[4]) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
  template <bool kS4, int kM, int kN>
  __device__ __forceinline__ void multiply(int32_t (&sums)[kM][kN][4], const uint32_t (&a)[kM][4],
                                           const uint32_t (&b)[kN][2]) const {
    MODIFF_UNROLL for (int m = 0; m < kM; ++m) {
      MODIFF_UNROLL for (int n = 0; n < kN; ++n) {
        int32_t (&d)[4] = sums[m][n];
        if constexpr (kS4) {
          asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
              "{%0, %1, %2, %3};"
              : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
              : "r"(a[m][0]), "r"(a[m][1]), "r"(a[m][2]), "r"(a[m][3]), "r"(b[n][0]), "r"(b[n][1]));
        } else {
          asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
              "{%0, %1, %2, %3};"
              : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
              : "r"(a[m][0]), "r"(a[m][1]), "r"(a[m][2]), "r"(a[m][3]), "r"(b[n][0]), "r"(b[n][1]));
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  }
};

#endif

}  // namespace modiff::cuda
