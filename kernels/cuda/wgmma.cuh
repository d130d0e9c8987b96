/* wgmma: products of a warpgroup, d [64 x N] (+)= A [64 x 16] B [16 x N] in float32; one call takes 16 of the reduced
 * dimension.
 *
 *   wgmma_n64_shared, wgmma_n128_shared, wgmma_n256_shared    A and B in shared memory, each [row][k]
 *   wgmma_n64, wgmma_n128, wgmma_n256                         A in registers, B in shared memory as [n][k] or [k][n]
 *
 *   d[4 i + 2 h + c] of a thread: row  16 warp + lane / 4 + 8 h,  column  8 i + 2 (lane mod 4) + c
 *
 * Tiles in shared memory lie in the swizzle of mma.cuh, their blocks on multiples of 1024 bytes.
 * Device code only, sm_90a. */
#ifndef LR_KERNELS_CUDA_WGMMA_CUH
#define LR_KERNELS_CUDA_WGMMA_CUH

#include "kernels/cuda/act.h"

#include <stdint.h>

namespace lr::LR_CUDA_ACT
{

/* Descriptor of a swizzled tile. `lead_bytes`: between two 64-column blocks (read only where the columns are the
 * non-reduced dimension); groups of 8 rows are 1024 bytes apart. */
static __device__ __forceinline__ uint64_t tile_descriptor(uint32_t shared, uint32_t lead_bytes)
{
    return static_cast<uint64_t>((shared & 0x3ffffu) >> 4) | static_cast<uint64_t>(lead_bytes >> 4) << 16 |
           static_cast<uint64_t>(1024u >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

static __device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N> static __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* The descriptor `bytes` behind `tile`, which its halves make without carries: addresses end below 2^18. */
static __device__ __forceinline__ uint64_t descriptor_at(uint64_t tile, uint32_t bytes)
{
    const uint32_t low = static_cast<uint32_t>(tile) + (bytes >> 4), high = static_cast<uint32_t>(tile >> 32);
    return static_cast<uint64_t>(high) << 32 | low;
}

/* The accumulators of an instruction: by number, and as operands from d[i] on. */
#define WGMMA_D_32                                                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_D_64                                                                                                     \
    WGMMA_D_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                    \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_D_128                                                                                                    \
    WGMMA_D_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                    \
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                      \
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "          \
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_OUT_4(d, i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define WGMMA_OUT_16(d, i)                                                                                             \
    WGMMA_OUT_4(d, i), WGMMA_OUT_4(d, (i) + 4), WGMMA_OUT_4(d, (i) + 8), WGMMA_OUT_4(d, (i) + 12)
#define WGMMA_OUT_32(d, i) WGMMA_OUT_16(d, i), WGMMA_OUT_16(d, (i) + 16)
#define WGMMA_OUT_64(d, i) WGMMA_OUT_32(d, i), WGMMA_OUT_32(d, (i) + 32)
#define WGMMA_OUT_128(d, i) WGMMA_OUT_64(d, i), WGMMA_OUT_64(d, (i) + 64)

/* ---- A and B in shared memory ------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void wgmma_n64_shared(float (&d)[32], uint64_t a, uint64_t b, bool accumulate)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." LR_CUDA_MMA "." LR_CUDA_MMA " "
                 "{" WGMMA_D_32 "}, "
                 "%32, %33, p, 1, 1, 0, 0;\n"
                 "}\n"
                 : WGMMA_OUT_32(d, 0)
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

static __device__ __forceinline__ void wgmma_n128_shared(float (&d)[64], uint64_t a, uint64_t b, bool accumulate)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." LR_CUDA_MMA "." LR_CUDA_MMA " "
                 "{" WGMMA_D_64 "}, "
                 "%64, %65, p, 1, 1, 0, 0;\n"
                 "}\n"
                 : WGMMA_OUT_64(d, 0)
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

static __device__ __forceinline__ void wgmma_n256_shared(float (&d)[128], uint64_t a, uint64_t b, bool accumulate)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32." LR_CUDA_MMA "." LR_CUDA_MMA " "
                 "{" WGMMA_D_128 "}, "
                 "%128, %129, p, 1, 1, 0, 0;\n"
                 "}\n"
                 : WGMMA_OUT_128(d, 0)
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

/* ---- A in registers ----------------------------------------------------------------------------------------------- */

/* d [64 x 64] (+)= A B with A [64 x 16] in registers. B lies in shared memory as [n][k], or as [k][n] if TRANSPOSED. */
template <int TRANSPOSED>
static __device__ __forceinline__ void wgmma_n64(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                                    bool accumulate)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." LR_CUDA_MMA "." LR_CUDA_MMA " "
                 "{" WGMMA_D_32 "}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n"
                 "}\n"
                 : WGMMA_OUT_32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
                   "n"(TRANSPOSED));
}

/* d [64 x 128] (+)= A B, as above. */
template <int TRANSPOSED>
static __device__ __forceinline__ void wgmma_n128(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                                    bool accumulate)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." LR_CUDA_MMA "." LR_CUDA_MMA " "
                 "{" WGMMA_D_64 "}, "
                 "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n"
                 "}\n"
                 : WGMMA_OUT_64(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
                   "n"(TRANSPOSED));
}

/* d [64 x 256] += A B with A [64 x 16] in registers and B in shared memory as [k][n]. */
static __device__ __forceinline__ void wgmma_n256(float (&d)[128], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.eq.u32 p, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32." LR_CUDA_MMA "." LR_CUDA_MMA " "
                 "{" WGMMA_D_128 "}, "
                 "{%128, %129, %130, %131}, %132, p, 1, 1, 1;\n"
                 "}\n"
                 : WGMMA_OUT_128(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef WGMMA_D_32
#undef WGMMA_D_64
#undef WGMMA_D_128
#undef WGMMA_OUT_4
#undef WGMMA_OUT_16
#undef WGMMA_OUT_32
#undef WGMMA_OUT_64
#undef WGMMA_OUT_128

} // namespace lr::LR_CUDA_ACT

#endif
