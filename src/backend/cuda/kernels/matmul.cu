// y[M, N] = x[M, K] · W[N, K]^T, weights in the layout of weight.cuh, tokens in BF16 as operand.cu writes them.
//
// Weights are the A operand (16 outputs), rows of x its eight columns: a lane loads its weights straight into registers, each
// byte once, and nothing of them passes through shared memory. A block has two tiles; its eight warps each have one eighth of
// the steps along K. Their sums are added in the order of warps, so that the sum of an output is the same whatever M is, which
// kernel computes it and what else is in the batch.
// A row of x that is not quantized is two rows, the BF16 nearest to it and what that leaves: f32 to 16 bits of mantissa.
// Roofline: weights once from memory (M <= 8·NT); limits: N a multiple of 32 and K of 128 after padding, K/128 any.
// Issue slots per HMMA in the loop, E2M1 by 16, nvcc 13.0.88, sm_80 / 90 / 120: M <= 8 19.4 / 19.7 / 18.1, M <= 16
// 10.4 / 10.4 / 10.6, M <= 32 6.6 / 6.5 / 6.9.
#pragma once
#include "weight.cuh"

constexpr int WARPS = 8, TILES = 2;

// The first step of a warp's slice of K.
DEV int slice_begin(int steps, int warp) { return (int)((long)steps * warp / WARPS); }

// Adds up what the warps have of TILES x NT tiles, in their order, and stores it with its scales; `of_token` gives a token's.
template <int NT, class Factor>
DEV void store_sums(const float (&acc)[TILES][NT][4], SharedArray<float> sums, int out0, int row0, int rows, int planes, int n, float lifted,
                    const float* row_scales, float x_scale, const float* bias, float* y, const Factor& of_token) {
    constexpr int OUT = TILES * TILE, COLS = NT * 8;
    const int warp = warp_index(), g = lane_index() >> 2, t = lane_index() & 3;
    UNROLL for (int r = 0; r < TILES; r++)
        UNROLL for (int c = 0; c < NT; c++)
            UNROLL for (int i = 0; i < 4; i++)
                sums[(warp * COLS + c * 8 + t * 2 + (i & 1)) * OUT + r * TILE + g + (i >> 1) * 8] = acc[r][c][i];
    block_sync();
    for (int e = thread_index(); e < OUT * COLS / planes; e += WARPS * 32) {
        const int o = e % OUT, token = e / OUT, out = out0 + o, m = row0 / planes + token;
        if (out >= n || m * planes >= rows) continue;
        float total = 0.0f;
        for (int p = 0; p < planes; p++)
            UNROLL for (int w = 0; w < WARPS; w++) total += sums[(w * COLS + token * planes + p) * OUT + o];
        total = total * lifted * (ld(row_scales + out) * x_scale * of_token(m));
        st(y + (long)m * n + out, bias ? total + ld(bias + out) : total);
    }
}

// Adds the sum of a step with the scales that 128 columns have: of the weight's block of 128 rows, and of each token.
template <int NT>
DEV void add_group(float (&acc)[TILES][NT][4], const float (&part)[TILES][NT][4], const float* grid_scales, const float* x_groups, long tile0,
                   int row0, int rows, int planes, int steps, int step) {
    const int t = lane_index() & 3;
    UNROLL for (int r = 0; r < TILES; r++) {
        const float w = grid_scales ? ld(grid_scales + (tile0 + r) * TILE / 128 * steps + step) : 1.0f;
        UNROLL for (int c = 0; c < NT; c++)
            UNROLL for (int i = 0; i < 4; i++) {
                const int row = row0 + c * 8 + t * 2 + (i & 1);
                const float v = x_groups && row < rows ? ld(x_groups + (long)(row / planes) * steps + step) : 1.0f;
                acc[r][c][i] = fmaf(part[r][c][i], w * v, acc[r][c][i]);
            }
    }
}

template <int W, int NT, bool GROUPED>
DEV void matmul(const U4* weights, const uint32_t* scales, const float* grid_scales, const uint16_t* x, const float* x_scales,
                const float* x_groups, const float* row_scales, const float* bias, float* y, int rows, int planes, int n, int k, float x_scale,
                SharedArray<float> sums) {
    const int lane = lane_index(), warp = warp_index(), g = lane >> 2, t = lane & 3, steps = k / STEP;
    const long tile0 = (long)block_x() * TILES;
    const int row0 = block_y() * 8 * NT;
    const int first = slice_begin(steps, warp), last = slice_begin(steps, warp + 1);
    float acc[TILES][NT][4] = {};
    for (int step = first; step < last; step++) {
        float part[TILES][NT][4] = {};
        uint32_t s[TILES] = {};
        if constexpr (scale_lanes(W) > 0)
            UNROLL for (int r = 0; r < TILES; r++) s[r] = ld_stream(scales + scale_index<W>(tile0 + r, steps, step, lane));
        UNROLL for (int half = 0; half < 2; half++) {
            U4 q[TILES][words(W)], b[NT][2];
            UNROLL for (int r = 0; r < TILES; r++)
                UNROLL for (int i = 0; i < words(W); i++)
                    q[r][i] = ld_stream(weights + word_index<W>(tile0 + r, steps, step, half, lane) + 32 * i);
            UNROLL for (int c = 0; c < NT; c++) {
                const int row = row0 + c * 8 + g;
                const U4* p = (const U4*)(x + (long)row * k + step * STEP + half * 64 + t * 16);
                b[c][0] = row < rows ? ld(p) : U4{0, 0, 0, 0};
                b[c][1] = row < rows ? ld(p + 1) : U4{0, 0, 0, 0};
            }
            UNROLL for (int r = 0; r < TILES; r++) {
                const uint32_t s0 = scale_pair(W, s[r] >> (16 * half) & 0xffu), s1 = scale_pair(W, s[r] >> (16 * half + 8) & 0xffu);
                UNROLL for (int j = 0; j < 4; j++) {
                    uint32_t a[4];
                    operand_a<W>(q[r], j, s0, s1, a);
                    UNROLL for (int c = 0; c < NT; c++) {
                        const U4& v = b[c][j >> 1];
                        mma_bf16(GROUPED ? part[r][c] : acc[r][c], a, j & 1 ? v.z : v.x, j & 1 ? v.w : v.y);
                    }
                }
            }
        }
        if constexpr (GROUPED) add_group<NT>(acc, part, grid_scales, x_groups, tile0, row0, rows, planes, steps, step);
    }
    store_sums<NT>(acc, sums, (int)tile0 * TILE, row0, rows, planes, n, lift(W), row_scales, x_scale, bias, y,
                   [&](int m) { return x_scales ? ld(x_scales + m) : 1.0f; });
}

// Blocks on a multiprocessor. Only the kernels for 32 rows spill then: 1 to 4 of 420 slots, for twice the loads on their way.
constexpr int blocks_of(int nt, bool grouped) { return nt == 1 && !grouped ? 3 : nt == 4 && grouped ? 1 : 2; }
#define MATMUL(name, W, NT, GROUPED)                                                                                       \
    KERNEL_OF(blocks_of(NT, GROUPED), name, 256,                                                                           \
              (const U4* weights, const uint32_t* scales, const float* grid_scales, const uint16_t* x,                    \
               const float* x_scales, const float* x_groups, const float* row_scales, const float* bias, float* y,        \
               int rows, int planes, int n, int k, float x_scale)) {                                                       \
        SHARED(float, sums, WARPS * NT * 8 * TILES * TILE);                                                                \
        matmul<W, NT, GROUPED>(weights, scales, grid_scales, x, x_scales, x_groups, row_scales, bias, y, rows, planes,    \
                               n, k, x_scale, sums);                                                                       \
    }
#define MATMULS(name, W)                     \
    MATMUL(matmul_##name##_8, W, 1, false)   \
    MATMUL(matmul_##name##_16, W, 2, false)  \
    MATMUL(matmul_##name##_32, W, 4, false)  \
    MATMUL(matmul_##name##_8g, W, 1, true)   \
    MATMUL(matmul_##name##_16g, W, 2, true)  \
    MATMUL(matmul_##name##_32g, W, 4, true)
MATMULS(e2m1_16, W_E2M1_16)
MATMULS(e2m1_32, W_E2M1_32)
MATMULS(mxfp4, W_MXFP4)
MATMULS(e4m3, W_E4M3)
MATMULS(mxfp8, W_MXFP8)
MATMULS(bf16, W_BF16)
