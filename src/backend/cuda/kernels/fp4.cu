// y[M, N] = x[M, K] · W[N, K]^T where both are E2M1 under block scales, NVFP4's (E4M3 of 16 columns) or MX's (E8M0 of 32), on the FP4
// tensor cores of sm_120 and its family: codes and scales go to the tensor core as they are, nothing is unpacked.
//
// Outputs are the rows of mma.m16n8k64, tokens its columns, in the layouts of weight.cuh and operand.cu. K is cut and summed as in
// matmul.cu and tile.cu: eight slices of steps of 128, each a chain of products in order, added in order; so a token has the same
// bits whatever M is and whichever kernel computes it, if an output of the instruction depends on nothing but its row, its column
// and the sum before. Scales of tensors, rows and tokens are applied at the end.
// Roofline: few rows, weights once from memory; tiles, tensor cores: a step of a block is 256 products (of 16 clocks, where a
// multiprocessor does 2048 multiply-adds a clock) for 18 KiB of weights and 4.5 of tokens from L2, 22 bytes a clock.
// Limits: as matmul.cu.
// nvcc 13.0.88, sm_120, no spills: issue slots per OMMA, by 16: M <= 8 13.6, M <= 16 10.0, M <= 32 7.9, tiles 10.7 (4.0 of
// which end a slice).
#pragma once
#include "tile.cu"

#if HAS_FP4
// Words of scales of a token in a step, and of all its steps with the factor that follows them (operand.cu).
DEV constexpr int token_words(int w) { return w == W_FP4_16 ? 2 : 1; }
DEV int token_pitch(int w, int steps) { return token_words(w) * steps + 1; }
DEV float token_factor(const uint32_t* x_scales, int w, int steps, int m) {
    return float_of(ld(x_scales + (long)(m + 1) * token_pitch(w, steps) - 1));
}

// Products of both halves of a step: R tiles of weights, NT of tokens.
template <int W, int R, int NT>
DEV void fp4_step(float (&acc)[R][NT][4], const U4 (&q)[R][2], const uint32_t (&s)[R], const U4 (&b)[NT], const uint32_t (&xs)[NT]) {
    UNROLL for (int c = 0; c < NT; c++)
        UNROLL for (int r = 0; r < R; r++) mma_e2m1<W == W_FP4_32, 0>(acc[r][c], q[r][0], b[c].x, b[c].y, s[r], xs[c]);
    UNROLL for (int c = 0; c < NT; c++)
        UNROLL for (int r = 0; r < R; r++) mma_e2m1<W == W_FP4_32, 1>(acc[r][c], q[r][1], b[c].z, b[c].w, s[r], xs[c]);
}

template <int W, int NT>
DEV void fp4_matmul(const U4* weights, const uint32_t* scales, const U4* x, const uint32_t* x_scales, const float* row_scales,
                    const float* bias, float* y, int rows, int n, int k, float x_scale, SharedArray<float> sums) {
    const int lane = lane_index(), warp = warp_index(), g = lane >> 2, t = lane & 3, steps = k / STEP, pitch = token_pitch(W, steps);
    const long tile0 = (long)block_x() * TILES;
    const int row0 = block_y() * 8 * NT, last = slice_begin(steps, warp + 1);
    float acc[TILES][NT][4] = {};
    for (int step = slice_begin(steps, warp); step < last; step++) {
        U4 q[TILES][2], b[NT];
        uint32_t s[TILES], xs[NT];
        UNROLL for (int r = 0; r < TILES; r++) {
            UNROLL for (int half = 0; half < 2; half++)
                q[r][half] = ld_stream(weights + word_index<W>(tile0 + r, steps, step, half, lane));
            s[r] = ld_stream(scales + fp4_scale_index<W>(tile0 + r, steps, step, lane));
        }
        UNROLL for (int c = 0; c < NT; c++) {
            const int row = row0 + c * 8 + g;
            b[c] = row < rows ? ld(x + ((long)row * steps + step) * 4 + t) : U4{0, 0, 0, 0};
            xs[c] = row < rows ? ld(x_scales + (long)row * pitch + step * token_words(W) + t % token_words(W)) : 0;
        }
        fp4_step<W, TILES, NT>(acc, q, s, b, xs);
    }
    store_sums<NT>(acc, sums, (int)tile0 * TILE, row0, rows, 1, n, 1.0f, row_scales, x_scale, bias, y,
                   [&](int m) { return token_factor(x_scales, W, steps, m); });
}

constexpr int FP4_R = 2, FP4_STAGE = TOKENS * 4;

// For many rows: as tile.cu, a step of 64 tokens in each of two stages, rows of 64 bytes, of which the 128-bit loads of two groups
// of four lanes fill all banks.
template <int W>
DEV void fp4_tile(const U4* weights, const uint32_t* scales, const U4* x, const uint32_t* x_scales, const float* row_scales,
                  const float* bias, float* y, int tokens, int n, int k, float x_scale, SharedArray<U4> stages,
                  SharedArray<uint32_t> token_scales) {
    constexpr int NT = TOKENS / 8, WORDS = token_words(W);
    const int lane = lane_index(), warp = warp_index(), g = lane >> 2, t = lane & 3, steps = k / STEP;
    const long tile0 = ((long)block_x() * WARPS + warp) * FP4_R;
    const int token0 = block_y() * TOKENS, thread = thread_index();
    // A warp beyond the last output copies and waits with the others.
    const bool active = tile0 * TILE < n;

    // A thread copies 16 bytes of a token's codes and, if it is one of the first, has a word of its scales: written while the step
    // before is computed. What stands beyond the last token is computed and thrown away.
    const U4* from = x + (long)min(token0 + thread / 4, tokens - 1) * steps * 4 + thread % 4;
    auto copy = [&](int stage) {
        cp_async(stages, stage * FP4_STAGE + thread, from);
        cp_commit();
        from += 4;
    };
    const bool scaler = thread < TOKENS * WORDS;
    const uint32_t* scale_of = x_scales + (long)min(token0 + thread / WORDS % TOKENS, tokens - 1) * token_pitch(W, steps) + thread % WORDS;
    U4 q[FP4_R][2] = {};
    uint32_t s[FP4_R] = {};
    auto fetch = [&](int step) {
        UNROLL for (int r = 0; r < FP4_R; r++) {
            UNROLL for (int half = 0; half < 2; half++)
                q[r][half] = ld_stream(weights + word_index<W>(tile0 + r, steps, step, half, lane));
            s[r] = ld_stream(scales + fp4_scale_index<W>(tile0 + r, steps, step, lane));
        }
    };

    float acc[FP4_R][NT][4] = {}, total[FP4_R][NT][4] = {};
    copy(0);
    if (active) fetch(0);
    if (scaler) token_scales[thread] = ld(scale_of);
    int end = slice_end(steps, 0);
    for (int step = 0; step < steps; step++) {
        cp_wait<0>();
        block_sync();
        // Everyone is done with the other stage.
        const int stage = step & 1, next = min(step + 1, steps - 1);
        if (step + 1 < steps) copy(stage ^ 1);
        const uint32_t next_scale = scaler ? ld(scale_of + next * WORDS) : 0;
        if (active) {
            U4 now[FP4_R][2], b[NT];
            uint32_t ns[FP4_R], xs[NT];
            UNROLL for (int r = 0; r < FP4_R; r++) now[r][0] = q[r][0], now[r][1] = q[r][1], ns[r] = s[r];
            fetch(next);
            UNROLL for (int c = 0; c < NT; c++) {
                b[c] = stages[stage * FP4_STAGE + (c * 8 + g) * 4 + t];
                xs[c] = token_scales[(stage * TOKENS + c * 8 + g) * WORDS + t % WORDS];
            }
            fp4_step<W, FP4_R, NT>(acc, now, ns, b, xs);
            if (step + 1 == end) {
                UNROLL for (int r = 0; r < FP4_R; r++)
                    UNROLL for (int c = 0; c < NT; c++)
                        UNROLL for (int i = 0; i < 4; i++) total[r][c][i] += acc[r][c][i], acc[r][c][i] = 0.0f;
                end = slice_end(steps, next);
            }
        }
        if (scaler) token_scales[(stage ^ 1) * TOKENS * WORDS + thread] = next_scale;
    }
    if (!active) return;
    store_tile(total, (int)tile0 * TILE, token0, tokens, n, 1.0f, row_scales, x_scale, bias, y,
               [&](int m) { return token_factor(x_scales, W, steps, m); });
}

// The parameters are those of matmul.cu, of which `grid_scales` and `x_groups` are null and `planes` is 1.
#define FP4_PARAMETERS                                                                                                     \
    (const U4* weights, const uint32_t* scales, const float* grid_scales, const U4* x, const uint32_t* x_scales,           \
     const float* x_groups, const float* row_scales, const float* bias, float* y, int rows, int planes, int n, int k, float x_scale)
#define FP4_MATMUL(name, W, NT)                                                                                            \
    KERNEL_OF(NT == 4 ? 2 : 3, name, 256, FP4_PARAMETERS) {                                                                \
        SHARED(float, sums, WARPS * NT * 8 * TILES * TILE);                                                                \
        fp4_matmul<W, NT>(weights, scales, x, x_scales, row_scales, bias, y, rows, n, k, x_scale, sums);                   \
    }
#define FP4_KERNELS(name, W)                                                                                               \
    FP4_MATMUL(matmul_##name##_8, W, 1)                                                                                    \
    FP4_MATMUL(matmul_##name##_16, W, 2)                                                                                   \
    FP4_MATMUL(matmul_##name##_32, W, 4)                                                                                   \
    KERNEL_OF(1, tile_##name, 256, FP4_PARAMETERS) {                                                                       \
        SHARED(U4, stages, 2 * FP4_STAGE);                                                                                 \
        SHARED(uint32_t, token_scales, 2 * TOKENS * token_words(W));                                                       \
        fp4_tile<W>(weights, scales, x, x_scales, row_scales, bias, y, rows, n, k, x_scale, stages, token_scales);         \
    }
FP4_KERNELS(fp4_16, W_FP4_16)
FP4_KERNELS(fp4_32, W_FP4_32)
#endif
