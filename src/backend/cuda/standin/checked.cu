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
