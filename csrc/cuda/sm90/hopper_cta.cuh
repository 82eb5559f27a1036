// The context of product_body.h on a GPU: PTX of capability 9.0.
#pragma once
#include <cuda.h>

#include "common/cta.h"
#include "cuda/sm90/schedule.h"
#include "cuda/sm90/wgmma.cuh"

namespace modiff::cuda::sm90 {

struct HopperCta : DeviceCta {
  __device__ __forceinline__ int blocks() const { return static_cast<int>(gridDim.x); }
  __device__ __forceinline__ uint32_t shared_address(const void* p) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  }
  __device__ __forceinline__ void exchange(uint32_t (&values)[4], int mask) const {
    MODIFF_UNROLL for (int i = 0; i < 4; ++i)
      values[i] = __shfl_xor_sync(0xFFFFFFFFu, values[i], mask);
  }
  __device__ __forceinline__ void warp_sync() const { __syncwarp(); }
  // A value that all threads of a warp have, as the compiler's uniform registers know it.
  __device__ __forceinline__ int uniform(int value) const { return __shfl_sync(0xFFFFFFFFu, value, 0); }
  // True in one thread of a warp.
  __device__ __forceinline__ bool elect() const {
    uint32_t elected;
    asm volatile("{\n.reg .pred elected;\nelect.sync _|elected, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, elected;\n}\n"
                 : "=r"(elected));
    return elected != 0;
  }
  __device__ __forceinline__ void consumers_sync() const { asm volatile("bar.sync 1, 256;" ::: "memory"); }

  // Until the kernels before have ended and what they wrote is visible.
  __device__ __forceinline__ void wait_for_kernels_before() const { asm volatile("griddepcontrol.wait;" ::: "memory"); }

  // Barriers that count arrivals and bytes.
  __device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void barriers_ready() const {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __device__ __forceinline__ void arrive(uint64_t* barrier) const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
  }
  __device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) const {
    const uint32_t address = shared_address(barrier);
    uint32_t passed;
#if MODIFF_BOUNDED_SPIN
    // For first runs on a GPU: a barrier that nobody completes ends the kernel with an error after so many clocks (< 2^32).
    const uint32_t begin = static_cast<uint32_t>(clock());
#endif
    do {
#if MODIFF_BOUNDED_SPIN
      if (static_cast<uint32_t>(clock()) - begin > MODIFF_BOUNDED_SPIN) __trap();
#endif
      asm volatile(
          "{\n.reg .pred passed;\nmbarrier.try_wait.parity.shared::cta.b64 passed, [%1], %2;\n"
          "selp.u32 %0, 1, 0, passed;\n}\n"
          : "=r"(passed)
          : "r"(address), "r"(parity)
          : "memory");
    } while (passed == 0);
  }

  // The two blocks of a cluster. What the other one is told, and what is waited for of it, is visible to both.
  __device__ __forceinline__ void cluster_sync() const {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  }
  __device__ __forceinline__ uint32_t peer_address(const void* p) const {
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(p)), "r"(blockIdx.x % 2 ^ 1));
    return remote;
  }
  __device__ __forceinline__ void arrive_at_peer(uint64_t* barrier) const {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(peer_address(barrier))
                 : "memory");
  }
  __device__ __forceinline__ void wait_for_peer(uint64_t* barrier, uint32_t parity) const {
    wait(barrier, parity);
    // Once more for what the other block did before; a fence would wait for all of this thread's stores.
    const uint32_t address = shared_address(barrier);
    asm volatile(
        "{\n.reg .pred passed;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 passed, [%0], %1;\n}\n" ::"r"(address),
        "r"(parity)
        : "memory");
  }
  // Four words to the same place in the other block, whose barrier counts their bytes when they are there.
  __device__ __forceinline__ void send(void* to, uint64_t* barrier, const int32_t* words) const {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            peer_address(to)),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(peer_address(barrier))
        : "memory");
  }
  __device__ __forceinline__ void load_received(int32_t (&words)[4], const uint8_t* p) const {
    const int4 four = *reinterpret_cast<const int4*>(p);
    words[0] = four.x;
    words[1] = four.y;
    words[2] = four.z;
    words[3] = four.w;
  }

  __device__ __forceinline__ void prefetch_map(const CUtensorMap& map) const {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
  }
  // TMA. x, y: the first byte and row of the box; channel, corner: the first pixel's, before the tap's offsets. both:
  // also to the same place, and for the same barrier, of the cluster's other block.
  __device__ __forceinline__ void load_matrix(const CUtensorMap& map, void* to, uint64_t* barrier, int x, int y,
                                              bool both = false) const {
    if (both) {
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
          "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
          "l"(&map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"(uint16_t{3})
          : "memory");
      return;
    }
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(to)),
        "l"(&map), "r"(x), "r"(y), "r"(shared_address(barrier))
        : "memory");
  }
  __device__ __forceinline__ void load_pixels(const CUtensorMap& map, void* to, uint64_t* barrier, int channel,
                                              const Corner& corner, int offset_w, int offset_h, bool both) const {
    if (both) {
      asm volatile(
          "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
          "[%1, {%2, %3, %4, %5}], [%6], {%7, %8}, %9;" ::"r"(shared_address(to)),
          "l"(&map), "r"(channel), "r"(corner.w), "r"(corner.h), "r"(corner.n), "r"(shared_address(barrier)),
          "h"(static_cast<uint16_t>(offset_w)), "h"(static_cast<uint16_t>(offset_h)), "h"(uint16_t{3})
          : "memory");
      return;
    }
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
        "%5}], [%6], {%7, %8};" ::"r"(shared_address(to)),
        "l"(&map), "r"(channel), "r"(corner.w), "r"(corner.h), "r"(corner.n), "r"(shared_address(barrier)),
        "h"(static_cast<uint16_t>(offset_w)), "h"(static_cast<uint16_t>(offset_h))
        : "memory");
  }

  // Of one thread, which alone can wait: until TMA has read the sources of all groups of stores but `pending`.
  __device__ __forceinline__ void store_matrix(const CUtensorMap& map, const void* from, int x, int y) const {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(x),
                 "r"(y), "r"(shared_address(from))
                 : "memory");
  }
  __device__ __forceinline__ void store_commit() const { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
  template <int pending>
  __device__ __forceinline__ void store_wait() const {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
  }

  __device__ __forceinline__ void shared_store(uint8_t* p, const uint32_t* words) const {
    *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  // Four matrices of 8 x 8 two-byte values between shared memory and registers: lane i names row i % 8 of matrix i / 8,
  // and holds of every matrix the pair of columns 2 * (i % 4) of row i / 4.
  __device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const uint8_t* row) const {
    asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
  __device__ __forceinline__ void store_matrices(uint8_t* row, const uint32_t (&words)[4]) const {
    asm volatile("stmatrix.sync.aligned.x4.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
  // TMA and the tensor cores use another proxy than the stores above.
  __device__ __forceinline__ void publish_stores() const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }

  template <int columns>
  __device__ __forceinline__ void mma(int32_t (&sums)[columns / 2], uint64_t codes, uint64_t weight,
                                      bool accumulate) const {
    wgmma_s8(sums, codes, weight, accumulate);
  }
  __device__ __forceinline__ void mma_begin() const { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  __device__ __forceinline__ void mma_commit() const { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  // Until at most `pending` groups are under way; without any, the sums are there for the code that follows.
  template <int pending, int blocks, int count>
  __device__ __forceinline__ void mma_wait(int32_t (&sums)[blocks][count]) const {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
    if constexpr (pending == 0) {
      MODIFF_UNROLL for (int i = 0; i < blocks * count; ++i) {
        asm volatile("" : "+r"(sums[i / count][i % count])::"memory");
      }
    }
  }

  // Sums that blocks share.
  __device__ __forceinline__ void add(int32_t* p, int32_t value) const {
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
  }
  __device__ __forceinline__ void add_is_visible() const { __threadfence(); }
  // Releases what the block wrote before its last barrier, and acquires what blocks counted before have released.
  __device__ __forceinline__ uint32_t count_arrival(uint32_t* p) const {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(p) : "memory");
    return before;
  }
  __device__ __forceinline__ int32_t load_sum(const int32_t* p) const { return __ldcg(p); }

  // A warpgroup gives back registers, or takes those that others gave back.
  template <int registers>
  __device__ __forceinline__ void limit_registers() const {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
  }
  template <int registers>
  __device__ __forceinline__ void claim_registers() const {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
  }
};

template <class Body>
__global__ void __launch_bounds__(Body::kThreads, 1)
    product_kernel(const __grid_constant__ ProductArgs<CUtensorMap> args) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  HopperCta cta;
  if (cta.shared_address(bytes) % 1024 != 0) __trap();  // swizzles are those of whole addresses
  Body::run(cta, *reinterpret_cast<typename Body::Shared*>(bytes), args);
}

}  // namespace modiff::cuda::sm90
