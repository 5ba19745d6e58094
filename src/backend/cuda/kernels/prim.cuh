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
// Shared memory beyond 48 KiB, of which the launch gives as much as `count` of these take: one name for all kernels.
#define DYNAMIC(type, name, count) extern __shared__ type name[]
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

// Copies 16 or 4 bytes from global to shared memory while the thread goes on: there for itself after cp_wait, for others after a
// barrier behind that. cp_wait<N> leaves the N groups that were committed last on their way.
DEV void cp_async(SharedArray<U4> to, int i, const U4* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 : : "r"((uint32_t)__cvta_generic_to_shared(to + i)), "l"(from) : "memory");
}
DEV void cp_async(SharedArray<uint32_t> to, int i, const uint32_t* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
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
// The family of sm_100, and that of sm_110, multiply E2M1 under block scales by tcgen05: operands in shared memory, scales and sums in
// tensor memory, 128 lanes of 512 columns of 32 bits. One thread issues, the operations run on their own. An address has a lane in its
// upper half and a column in its lower.
#ifdef __CUDA_ARCH_FAMILY_SPECIFIC__
#define HAS_TCGEN (__CUDA_ARCH_FAMILY_SPECIFIC__ / 100 == 10 || __CUDA_ARCH_FAMILY_SPECIFIC__ / 100 == 11)
#else
#define HAS_TCGEN 0
#endif
#if HAS_TCGEN
// Tries until a wait is given up: each takes a microsecond at most.
constexpr int TRIES = 1 << 18;
DEV SharedArray<uint32_t> as_words(SharedArray<U4> a) { return (uint32_t*)a; }
DEV uint32_t shared_address(SharedArray<U4> a, int i) { return (uint32_t)__cvta_generic_to_shared(a + i); }
// All lanes of a warp together: takes columns and leaves their address in to[0]; waits while others have too many. What was taken is
// freed by the same warp.
template <int COLUMNS> DEV void tensor_alloc(SharedArray<uint32_t> to) {
    asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;"
                 : : "r"((uint32_t)__cvta_generic_to_shared(to)), "n"(COLUMNS) : "memory");
}
// The block takes no more.
DEV void tensor_relinquish() { asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" : : : "memory"); }
template <int COLUMNS> DEV void tensor_free(uint32_t at) {
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" : : "r"(at), "n"(COLUMNS) : "memory");
}
DEV void mbarrier_init(SharedArray<uint64_t> b, int i, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"((uint32_t)__cvta_generic_to_shared(b + i)), "r"(count) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}
// Whether the phase of this parity is over; waits a microsecond for it.
DEV bool mbarrier_passed(SharedArray<uint64_t> b, int i, int parity) {
    uint32_t passed;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(passed) : "r"((uint32_t)__cvta_generic_to_shared(b + i)), "r"(parity), "r"(1000) : "memory");
    return passed != 0;
}
// What this thread wrote to shared memory is there for operations that are issued behind a barrier after this.
DEV void async_fence() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }
// Around a barrier that orders tcgen05 instructions of different threads.
DEV void tensor_fence_before() { asm volatile("tcgen05.fence::before_thread_sync;" : : : "memory"); }
DEV void tensor_fence_after() { asm volatile("tcgen05.fence::after_thread_sync;" : : : "memory"); }
// One arrival, when all that this thread issued is done.
DEV void tensor_commit(SharedArray<uint64_t> b, int i) {
    asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];"
                 : : "r"((uint32_t)__cvta_generic_to_shared(b + i)) : "memory");
}
// 32 rows of 16 bytes of shared memory to four columns of tensor memory, in each of its quarters of 32 lanes.
DEV void tensor_copy(uint32_t to, uint64_t from) {
    asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" : : "r"(to), "l"(from) : "memory");
}
// d[128,N] = (scaled a)[128,64] · (scaled b)[N,64]^T of E2M1, with what it is if `add`: lane m and column n of d have row m of a and row
// n of b. Scales: a word of row r in lane r % 32 and column r / 32, in each quarter: E4M3 of each 16 columns, or MX: E8M0 of each 32 in the
// two bytes that the instruction's descriptor names.
template <bool MX> DEV void mma_scaled(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, uint32_t a_scales, uint32_t b_scales, bool add) {
    if constexpr (MX)
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %4, 0;\n"
                     "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32 [%0], %1, %2, %3, [%5], [%6], p;\n}"
                     : : "r"(d), "l"(a), "l"(b), "r"(instruction), "r"((uint32_t)add), "r"(a_scales), "r"(b_scales) : "memory");
    else
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %4, 0;\n"
                     "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 [%0], %1, %2, %3, [%5], [%6], p;\n}"
                     : : "r"(d), "l"(a), "l"(b), "r"(instruction), "r"((uint32_t)add), "r"(a_scales), "r"(b_scales) : "memory");
}
// Columns of this thread's lane; warp w reaches the lanes from 32·(w % 4) on.
DEV void tensor_load(uint32_t from, float (&v)[8]) {
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x8.b32 {%0,%1,%2,%3,%4,%5,%6,%7}, [%8];\n"
                 "tcgen05.wait::ld.sync.aligned;"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]), "=f"(v[4]), "=f"(v[5]), "=f"(v[6]), "=f"(v[7]) : "r"(from) : "memory");
}
DEV void tensor_load(uint32_t from, float (&v)[32]) {
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x32.b32 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, [%32];\n"
                 "tcgen05.wait::ld.sync.aligned;"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]), "=f"(v[4]), "=f"(v[5]), "=f"(v[6]), "=f"(v[7]),
                   "=f"(v[8]), "=f"(v[9]), "=f"(v[10]), "=f"(v[11]), "=f"(v[12]), "=f"(v[13]), "=f"(v[14]), "=f"(v[15]),
                   "=f"(v[16]), "=f"(v[17]), "=f"(v[18]), "=f"(v[19]), "=f"(v[20]), "=f"(v[21]), "=f"(v[22]), "=f"(v[23]),
                   "=f"(v[24]), "=f"(v[25]), "=f"(v[26]), "=f"(v[27]), "=f"(v[28]), "=f"(v[29]), "=f"(v[30]), "=f"(v[31])
                 : "r"(from) : "memory");
}
#endif
#else
#define HAS_NARROW 1
#define HAS_TCGEN 1
#include "../standin/device.h"
#endif

DEV int lane_index() { return thread_index() & 31; }
DEV int warp_index() { return thread_index() >> 5; }
