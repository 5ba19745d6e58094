// What check.cc runs: every kernel, and beside them primitives of prim.cuh that a warp runs alone, registers from and to memory.
#include "../kernels/all.cu"

// e^-x and ln(1 + x) for x from 0 on, ln for at most 1: their kernels promise the bits of a libm that errs by less than one in the
// last place, which a check of what they go into does not see.
KERNEL(primitive_libm, 32, (const float* x, float* exponentials, float* logarithms)) {
    const int at = block_x() * 32 + thread_index();
    const float v = ld(x + at);
    st(exponentials + at, exp_libm(-v));
    st(logarithms + at, log1p_libm(v < 1.0f ? v : 1.0f));
}

#if HAS_NARROW
#define PRIMITIVE_MMA(name, ...)                                                                                      \
    KERNEL(name, 32, (const U4* a, const uint32_t* b, const uint32_t* scales, const float* c, float* d)) {            \
        const int lane = thread_index();                                                                              \
        float v[4];                                                                                                   \
        UNROLL for (int i = 0; i < 4; i++) v[i] = ld(c + lane * 4 + i);                                               \
        __VA_ARGS__(v, ld(a + lane), ld(b + lane * 2), ld(b + lane * 2 + 1), ld(scales + lane * 2),                   \
                    ld(scales + lane * 2 + 1));                                                                       \
        UNROLL for (int i = 0; i < 4; i++) st(d + lane * 4 + i, v[i]);                                                \
    }
PRIMITIVE_MMA(primitive_mma_nvfp4_0, mma_e2m1<false, 0>)
PRIMITIVE_MMA(primitive_mma_nvfp4_1, mma_e2m1<false, 1>)
PRIMITIVE_MMA(primitive_mma_mxfp4_0, mma_e2m1<true, 0>)
PRIMITIVE_MMA(primitive_mma_mxfp4_1, mma_e2m1<true, 1>)
PRIMITIVE_MMA(primitive_mma_mxfp8_0, mma_e4m3<0>)
PRIMITIVE_MMA(primitive_mma_mxfp8_1, mma_e4m3<1>)
PRIMITIVE_MMA(primitive_mma_mxfp8_2, mma_e4m3<2>)
PRIMITIVE_MMA(primitive_mma_mxfp8_3, mma_e4m3<3>)
#endif

#if HAS_TCGEN
// `image` to shared memory, eight columns of tensor memory from two copies of 32 rows, and all lanes of them back.
KERNEL(primitive_tensor_copy, 128, (const U4* image, int units, uint64_t first, uint64_t second, float* out)) {
    SHARED(U4, memory, 1024);
    SHARED(uint64_t, done, 1);
    SHARED(uint32_t, columns, 1);
    for (int i = thread_index(); i < units; i += 128) memory[i] = ld(image + i);
    if (warp_index() == 0) tensor_alloc<32>(columns), tensor_relinquish();
    if (thread_index() == 0) mbarrier_init(done, 0, 1);
    async_fence();
    tensor_fence_before();
    block_sync();
    tensor_fence_after();
    const uint32_t to = columns[0];
    if (thread_index() == 0) {
        const uint64_t base = shared_address(memory, 0) >> 4;
        tensor_copy(to, first + base), tensor_copy(to + 4, second + base), tensor_commit(done, 0);
    }
    while (!mbarrier_passed(done, 0, 0)) {}
    tensor_fence_after();
    float v[8];
    tensor_load(to + ((uint32_t)(warp_index() * 32) << 16), v);
    UNROLL for (int i = 0; i < 8; i++) st(out + thread_index() * 8 + i, v[i]);
    tensor_fence_before();
    block_sync();
    if (warp_index() == 0) tensor_fence_after(), tensor_free<32>(to);
}
// Two products into the same sums, the second added to the first, each with scales from the image; 32·`wide` columns of the result.
#define PRIMITIVE_TCGEN(name, MX)                                                                                          \
    KERNEL(name, 128, (const U4* image, int units, const uint64_t* descriptors, const uint32_t* instructions, float* out)) { \
        SHARED(U4, memory, 1536);                                                                                          \
        SHARED(uint64_t, done, 1);                                                                                         \
        SHARED(uint32_t, columns, 1);                                                                                      \
        for (int i = thread_index(); i < units; i += 128) memory[i] = ld(image + i);                                       \
        if (warp_index() == 0) tensor_alloc<256>(columns), tensor_relinquish();                                            \
        if (thread_index() == 0) mbarrier_init(done, 0, 1);                                                                \
        async_fence();                                                                                                     \
        tensor_fence_before();                                                                                             \
        block_sync();                                                                                                      \
        tensor_fence_after();                                                                                              \
        const uint32_t d = columns[0];                                                                                     \
        if (thread_index() == 0) {                                                                                         \
            const uint64_t base = shared_address(memory, 0) >> 4;                                                          \
            for (int i = 0; i < 2; i++) {                                                                                  \
                const uint64_t* p = descriptors + 4 * i;                                                                   \
                tensor_copy(d + 128 + 8 * i, ld(p + 2) + base), tensor_copy(d + 132 + 8 * i, ld(p + 3) + base);            \
                mma_scaled<MX>(d, ld(p) + base, ld(p + 1) + base, ld(instructions + i), d + 128 + 8 * i, d + 132 + 8 * i, i > 0); \
            }                                                                                                              \
            tensor_commit(done, 0);                                                                                        \
        }                                                                                                                  \
        while (!mbarrier_passed(done, 0, 0)) {}                                                                            \
        tensor_fence_after();                                                                                              \
        for (int c = 0; c < 128; c += 32) {                                                                                \
            float v[32];                                                                                                   \
            tensor_load(d + ((uint32_t)(warp_index() * 32) << 16) + c, v);                                                 \
            UNROLL for (int i = 0; i < 32; i++) st(out + thread_index() * 128 + c + i, v[i]);                              \
        }                                                                                                                  \
        tensor_fence_before();                                                                                             \
        block_sync();                                                                                                      \
        if (warp_index() == 0) tensor_fence_after(), tensor_free<256>(d);                                                  \
    }
PRIMITIVE_TCGEN(primitive_tcgen_nvfp4, false)
PRIMITIVE_TCGEN(primitive_tcgen_mxfp4, true)
#endif
