/* The tensor-core instructions of every device since sm_80, one inline function each: mma.sync, ldmatrix, cp.async; and
 * the layouts that go with them.
 *
 *   tile in shared memory: blocks of 64 columns of 16-bit numbers (rows of 128 bytes) in the 128-byte swizzle; the
 *   16-byte piece p of row r lies at piece p ^ (r mod 8), so that eight rows of one piece meet all the banks
 *
 *   d [16 x 8] += a [16 x 16] b [16 x 8], a lane's registers (g = lane / 4, q = lane mod 4):
 *
 *   a[0]: row g      columns 2q, 2q+1      a[2]: row g      columns 2q+8, 2q+9      (two numbers a register)
 *   a[1]: row g + 8  columns 2q, 2q+1      a[3]: row g + 8  columns 2q+8, 2q+9
 *   b[0]: rows 2q, 2q+1  column g          b[1]: rows 2q+8, 2q+9  column g
 *   d[0], d[1]: row g  columns 2q, 2q+1    d[2], d[3]: row g + 8
 *
 * Device code only, sm_80 and later. */
#ifndef LR_KERNELS_CUDA_MMA_CUH
#define LR_KERNELS_CUDA_MMA_CUH

#include "kernels/cuda/act.h"

#include <stdint.h>

namespace lr::LR_CUDA_ACT
{

static __device__ __forceinline__ uint32_t shared_address(const void *pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/* Byte offset of the 16-byte piece `piece` (0..7) of row `row` in a swizzled block. */
static __device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t piece)
{
    return row * 128u + ((piece ^ (row & 7u)) << 4);
}

/* A barrier among `n_threads` threads; id 0 is __syncthreads. */
static __device__ __forceinline__ void named_barrier(uint32_t id, uint32_t n_threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

/* ---- copies to shared memory ------------------------------------------------------------------------------------- */

/* 16 bytes from global to shared memory, of which the first n_bytes are read and the others are zero. */
static __device__ __forceinline__ void copy_async_part(uint32_t shared, const void *global, int n_bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(n_bytes)
                 : "memory");
}

/* 16 bytes; zeros where `valid` is false (nothing is read then). */
static __device__ __forceinline__ void copy_async(uint32_t shared, const void *global, bool valid)
{
    copy_async_part(shared, global, valid ? 16 : 0);
}

static __device__ __forceinline__ void copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N> static __device__ __forceinline__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* ---- matrices ---------------------------------------------------------------------------------------------------- */

/* Four 8x8 blocks of 16-bit numbers: lane l gives the address of row l mod 8 of block l / 8. Of block i lane l gets
 * row l / 4, columns 2 (l mod 4) and the next, in r[i]. */
static __device__ __forceinline__ void load_matrix(uint32_t (&r)[4], uint32_t shared)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

/* Four 8x8 blocks of 16-bit numbers, transposed: lane l gives the address of row l mod 8 of block l / 8. */
static __device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t shared)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

/* An 8x8 block of 16-bit numbers, held as load_matrix gives it, transposed. */
static __device__ __forceinline__ uint32_t transpose_matrix(uint32_t r)
{
    uint32_t transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
    return transposed;
}

/* d [16 x 8] += a [16 x 16] b [16 x 8] in float32. */
static __device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32." LR_CUDA_MMA "." LR_CUDA_MMA
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* ---- numbers ----------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

} // namespace lr::LR_CUDA_ACT

#endif
