// wgmma with signed bytes, m64nNk32: the instruction for every N that a tile has.
#pragma once
#include <cstdint>

namespace modiff::cuda::sm90 {

#define MODIFF_SUMS_4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define MODIFF_SUMS_16(i) MODIFF_SUMS_4(i), MODIFF_SUMS_4(i + 4), MODIFF_SUMS_4(i + 8), MODIFF_SUMS_4(i + 12)
#define MODIFF_SUMS_32(i) MODIFF_SUMS_16(i), MODIFF_SUMS_16(i + 16)
#define MODIFF_SUMS_64(i) MODIFF_SUMS_32(i), MODIFF_SUMS_32(i + 32)

// d (+)= codes * weight^T; `accumulate` 0: without what d holds.

__device__ __forceinline__ void wgmma_s8(int32_t (&d)[32], uint64_t codes, uint64_t weight, int accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, accumulate;\n}\n"
      : MODIFF_SUMS_32(0)
      : "l"(codes), "l"(weight), "r"(accumulate));
}

__device__ __forceinline__ void wgmma_s8(int32_t (&d)[64], uint64_t codes, uint64_t weight, int accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, accumulate;\n}\n"
      : MODIFF_SUMS_64(0)
      : "l"(codes), "l"(weight), "r"(accumulate));
}

__device__ __forceinline__ void wgmma_s8(int32_t (&d)[80], uint64_t codes, uint64_t weight, int accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %82, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n160k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}, "
      "%80, %81, accumulate;\n}\n"
      : MODIFF_SUMS_64(0), MODIFF_SUMS_16(64)
      : "l"(codes), "l"(weight), "r"(accumulate));
}

__device__ __forceinline__ void wgmma_s8(int32_t (&d)[128], uint64_t codes, uint64_t weight, int accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, accumulate;\n}\n"
      : MODIFF_SUMS_64(0), MODIFF_SUMS_64(64)
      : "l"(codes), "l"(weight), "r"(accumulate));
}

#undef MODIFF_SUMS_4
#undef MODIFF_SUMS_16
#undef MODIFF_SUMS_32
#undef MODIFF_SUMS_64

}  // namespace modiff::cuda::sm90
