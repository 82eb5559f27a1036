// The context of a thread block. A kernel body is a function template on it, so that the same body runs on a GPU and,
// in tests, on the host (tests/backends/cuda/emulator/host_cta.h), where sanitizers see it. A context has:
//
//   int thread(), int64_t block()      indices of the caller
//   void sync()                        barrier of the whole block
//   T warp_max(T), T warp_sum(T)       over the 32 threads of a warp, all of which call it; the same in every lane, and
//                                      sums in the same order in every run (T: uint32_t; float and int32_t)
//   void atomic_max(uint32_t*, v)      in global memory
//
// A body is a struct with `kThreads`, `Args` (passed by value), `Shared` (one per block, uninitialised) and
// `static void run(cta, shared, args)`, in which every thread meets the same barriers.
#pragma once
#include "common/hd.h"

namespace modiff {

constexpr int kWarp = 32;

#if defined(__CUDACC__)

struct DeviceCta {
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int64_t block() const { return blockIdx.x; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ uint32_t warp_max(uint32_t value) const {
    MODIFF_UNROLL for (int lane = kWarp / 2; lane > 0; lane /= 2)
      value = most(value, __shfl_xor_sync(0xFFFFFFFFu, value, lane));
    return value;
  }
  __device__ __forceinline__ float warp_sum(float value) const {
    MODIFF_UNROLL for (int lane = kWarp / 2; lane > 0; lane /= 2)
      value = __fadd_rn(value, __shfl_xor_sync(0xFFFFFFFFu, value, lane));
    return value;
  }
  __device__ __forceinline__ int32_t warp_sum(int32_t value) const { return __reduce_add_sync(0xFFFFFFFFu, value); }
  __device__ __forceinline__ void atomic_max(uint32_t* address, uint32_t value) const { atomicMax(address, value); }
};

template <class Body>
__global__ void __launch_bounds__(Body::kThreads) kernel(const __grid_constant__ typename Body::Args args) {
  __shared__ typename Body::Shared shared;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // A product may begin, up to its wait for this kernel's end (cuda/sm90/product_body.h): once no block of this one is
  // left to be placed, and where a multiprocessor is free.
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  DeviceCta cta;
  Body::run(cta, shared, args);
}

#endif

}  // namespace modiff
