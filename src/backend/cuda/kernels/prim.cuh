// What differs between a GPU and the CPU that stands in for one: the only file with inline PTX and intrinsics. The CPU's
// definitions are in standin/device.h.
#pragma once
#include <stdint.h>
#ifdef __CUDACC__
#define DEV __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define KERNEL(name, threads, params) extern "C" __global__ void __launch_bounds__(threads) name params
// The same, with registers for this many blocks on a multiprocessor; left to itself the compiler spills some for one more.
#define KERNEL_OF(blocks, name, threads, params) extern "C" __global__ void __launch_bounds__(threads, blocks) name params
#define SHARED(type, name, count) __shared__ type name[count]
template <class T> using SharedArray = T*;
struct alignas(16) U4 { uint32_t x, y, z, w; };

DEV int thread_index() { return threadIdx.x; }
DEV int block_x() { return blockIdx.x; }
DEV int block_y() { return blockIdx.y; }
DEV int block_z() { return blockIdx.z; }
DEV int grid_x() { return gridDim.x; }
DEV void block_sync() { __syncthreads(); }
DEV void warp_sync() { __syncwarp(); }
template <class T> DEV T shfl_xor(T v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
template <class T> DEV T shfl(T v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }

// Constant for the launch: through the read-only path.
template <class T> DEV T ld(const T* p) { return __ldg(p); }
DEV U4 ld(const U4* p) {
    U4 v;
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
// Read once: kept out of L1.
DEV U4 ld_stream(const U4* p) {
    U4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
DEV uint32_t ld_stream(const uint32_t* p) {
    uint32_t v;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
DEV uint8_t ld_stream(const uint8_t* p) { return __ldg(p); }
// What this launch may have written.
template <class T> DEV T get(const T* p) { return *p; }
template <class T> DEV void st(T* p, T v) { *p = v; }

// Copies 16 bytes from global to shared memory while the thread goes on: there for itself after cp_wait, for others after a
// barrier behind that. cp_wait<N> leaves the N groups that were committed last on their way.
DEV void cp_async(SharedArray<U4> to, int i, const U4* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 : : "r"((uint32_t)__cvta_generic_to_shared(to + i)), "l"(from) : "memory");
}
DEV void cp_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int N> DEV void cp_wait() { asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory"); }

DEV uint32_t rotr(uint32_t u, int r) { return __funnelshift_r(u, u, r); }
// Byte i of the result is that byte of b:a (a has bytes 0 to 3) which digit i of the selector names.
DEV uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
DEV uint32_t bits_of(float f) { return __float_as_uint(f); }
DEV float float_of(uint32_t u) { return __uint_as_float(u); }
DEV uint64_t bits_of(double d) { return (uint64_t)__double_as_longlong(d); }
DEV double double_of(uint64_t u) { return __longlong_as_double((long long)u); }
// Two floats to BF16, nearest even; `low` into the low half.
DEV uint32_t to_bf16x2(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
DEV uint32_t to_bf16(float f) { return to_bf16x2(f, 0.0f) & 0xffff; }
// a · b of BF16 pairs; -0 is added, so that a product keeps its sign.
DEV uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    return d;
}
// d[16,8] += a[16,16] · b[16,8]: lane 4g+t holds rows g and g+8, columns 2t and 2t+1 of d.
DEV void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The family of sm_120 multiplies E2M1 and E4M3 under block scales.
#ifdef __CUDA_ARCH_FAMILY_SPECIFIC__
#define HAS_NARROW (__CUDA_ARCH_FAMILY_SPECIFIC__ / 100 == 12)
#else
#define HAS_NARROW 0
#endif
#if HAS_NARROW
// d[16,8] += (scaled a)[16,64] · (scaled b)[64,8] of E2M1, eight codes a word, the first lowest: lane 4g+t holds, of a, columns
// 8t..8t+7 of rows g and g+8, then the same 32 columns on; of b the two runs of column g; of d as above. Scales: E4M3 of each 16
// columns, a word for a row: rows g and g+8 of a in lanes 4g + 2·PART and the next, column g of b in lane 4g + PART. MX: E8M0 of
// each 32 in bytes 2·PART and the next, in lanes 4g and 4g + 1, and 4g. What other lanes have there does not count.
template <bool MX, int PART> DEV void mma_e2m1(float (&d)[4], const U4& a, uint32_t b0, uint32_t b1, uint32_t a_scales, uint32_t b_scales) {
    if constexpr (MX)
        asm("mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12,0}, {%11}, {%12,0};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(a_scales), "r"(b_scales), "n"(2 * PART));
    else
        asm("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {0,%12}, {%11}, {0,%12};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(a_scales), "r"(b_scales), "n"(PART));
}
// d[16,8] += (scaled a)[16,32] · (scaled b)[32,8] of E4M3, four codes a word, the first lowest: lane 4g+t holds, of a, columns
// 4t..4t+3 of rows g and g+8, then the same 16 columns on; of b the two runs of column g; of d as above. Scales: E8M0 of the 32
// columns in byte PART, of rows g and g+8 of a in lanes 4g and 4g + 1, of column g of b in lane 4g.
template <int PART> DEV void mma_e4m3(float (&d)[4], const U4& a, uint32_t b0, uint32_t b1, uint32_t a_scales, uint32_t b_scales) {
    asm("mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12,0}, {%11}, {%12,0};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(a_scales), "r"(b_scales), "n"(PART));
}
#endif
#else
#define HAS_NARROW 1
#include "../standin/device.h"
#endif

DEV int lane_index() { return thread_index() & 31; }
DEV int warp_index() { return thread_index() >> 5; }
