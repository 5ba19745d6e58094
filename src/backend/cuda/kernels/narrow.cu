// y[M, N] = x[M, K] · W[N, K]^T where both are codes, of four bits (NVFP4: E4M3 scales of 16 columns; MXFP4) or of eight (FP8 with
// scales of tensors, rows, tokens or 128 columns; MXFP8), on the FP4 and FP8 tensor cores of sm_120 and its family: codes and block
// scales go to the tensor core as they are, nothing is unpacked.
//
// Outputs are the rows of mma.m16n8k64 (four bits) or mma.m16n8k32, tokens its columns, in the layouts of weight.cuh and operand.cu.
// K is cut and summed as in matmul.cu and tile.cu: eight slices of steps of 128, each a chain of products in order, added in order; so
// a token has the same bits whatever M is and whichever kernel computes it, if an output of the instruction depends on nothing but its
// row, its column and the sum before. Scales of tensors, rows and tokens are applied at the end, those of 128 columns (GROUPED) to the
// sum of each step, begun from zero.
// FP8 without block scales goes to the instruction that has them too, with ones: on GeForce it is twice as fast as the plain one, whose
// sums in f32 are throttled (737 and 370 TFLOPS on an RTX 5090, main-horse.github.io/posts/5090-mm-perf).
// Roofline: few rows, weights once from memory; tiles, tensor cores: a step of a block is 256 products of four bits or 512 of eight (of
// 16 clocks each, where a multiprocessor does 2048 or 1024 multiply-adds a clock) for 18 or 32 KiB of weights and 4.5 or 8 of tokens
// from L2, 22 or 20 bytes a clock.
// Limits: as matmul.cu.
// nvcc 13.0.88, sm_120, no spills: issue slots per tensor instruction, M <= 8 / 16 / 32 / tiles: four bits by 16 14.5 / 9.5 / 7.8 / 10.6
// (4.0 of which end a slice), FP8 5.9 / 4.9 / 4.1 / 5.1, FP8 grouped 12.8 / 10.1 / 9.6 / 8.2, MXFP8 8.4 / 6.2 / 5.1 / 5.9.
#pragma once
#include "tile.cu"

#if HAS_NARROW
// Words of block scales of a token in a step, and of all its steps with the factor that follows them (operand.cu): for FP8 without block
// scales the factor alone, the token's scale.
DEV constexpr int token_words(int w) { return w == W_FP4_16 ? 2 : w == W_FP8 ? 0 : 1; }
DEV int token_pitch(int w, int steps) { return token_words(w) * steps + 1; }
DEV float token_factor(const uint32_t* x_scales, int w, int steps, int m) {
    return x_scales ? float_of(ld(x_scales + (long)(m + 1) * token_pitch(w, steps) - 1)) : 1.0f;
}

// Product J of a step; FP8 without block scales has ones for them.
template <int W, int J> DEV void mma_codes(float (&d)[4], const U4& a, uint32_t b0, uint32_t b1, uint32_t a_scales, uint32_t b_scales) {
    if constexpr (W == W_FP8) mma_e4m3<0>(d, a, b0, b1, 127, 127);
    else if constexpr (W == W_FP8_MX) mma_e4m3<J>(d, a, b0, b1, a_scales, b_scales);
    else mma_e2m1<W == W_FP4_32, J>(d, a, b0, b1, a_scales, b_scales);
}
// A step is words(W) units of two products, for which a lane has two U4 of a tile's weights and one of a token. Products J and J + 1 of
// a step: R tiles of weights, NT of tokens.
template <int W, int J, int R, int NT>
DEV void narrow_products(float (&acc)[R][NT][4], const U4 (&q)[R][2], const uint32_t (&s)[R], const U4 (&b)[NT], const uint32_t (&xs)[NT]) {
    UNROLL for (int c = 0; c < NT; c++)
        UNROLL for (int r = 0; r < R; r++) mma_codes<W, J>(acc[r][c], q[r][0], b[c].x, b[c].y, s[r], xs[c]);
    UNROLL for (int c = 0; c < NT; c++)
        UNROLL for (int r = 0; r < R; r++) mma_codes<W, J + 1>(acc[r][c], q[r][1], b[c].z, b[c].w, s[r], xs[c]);
}
template <int W, int R, int NT>
DEV void narrow_unit(int unit, float (&acc)[R][NT][4], const U4 (&q)[R][2], const uint32_t (&s)[R], const U4 (&b)[NT], const uint32_t (&xs)[NT]) {
    if (words(W) == 1 || unit == 0) narrow_products<W, 0>(acc, q, s, b, xs);
    else narrow_products<W, words(W) == 2 ? 2 : 0>(acc, q, s, b, xs);
}
template <int W, int R> DEV void load_unit(const U4* weights, long tile0, int steps, int step, int unit, int lane, U4 (&q)[R][2]) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < 2; j++) q[r][j] = ld_stream(weights + code_index<W>(tile0 + r, steps, step, 2 * unit + j, lane));
}
template <int W, int R> DEV void load_scales(const uint32_t* scales, long tile0, int steps, int step, int lane, uint32_t (&s)[R]) {
    UNROLL for (int r = 0; r < R; r++) s[r] = token_words(W) > 0 ? ld_stream(scales + code_scale_index<W>(tile0 + r, steps, step, lane)) : 0;
}

template <int W, int NT, bool GROUPED>
DEV void narrow_matmul(const U4* weights, const uint32_t* scales, const float* grid_scales, const U4* x, const uint32_t* x_scales,
                       const float* x_groups, const float* row_scales, const float* bias, float* y, int rows, int n, int k, float x_scale,
                       SharedArray<float> sums) {
    constexpr int WORDS = token_words(W);
    const int lane = lane_index(), warp = warp_index(), g = lane >> 2, t = lane & 3, steps = k / STEP, pitch = token_pitch(W, steps);
    const long tile0 = (long)block_x() * TILES;
    const int row0 = block_y() * 8 * NT, last = slice_begin(steps, warp + 1);
    float acc[TILES][NT][4] = {};
    for (int step = slice_begin(steps, warp); step < last; step++) {
        float part[TILES][NT][4] = {};
        uint32_t s[TILES], xs[NT];
        load_scales<W>(scales, tile0, steps, step, lane, s);
        UNROLL for (int c = 0; c < NT; c++) {
            const int row = row0 + c * 8 + g;
            xs[c] = WORDS > 0 && row < rows ? ld(x_scales + (long)row * pitch + step * WORDS + t % max(WORDS, 1)) : 0;
        }
        UNROLL for (int unit = 0; unit < words(W); unit++) {
            U4 q[TILES][2], b[NT];
            load_unit<W>(weights, tile0, steps, step, unit, lane, q);
            UNROLL for (int c = 0; c < NT; c++) {
                const int row = row0 + c * 8 + g;
                b[c] = row < rows ? ld(x + (((long)row * steps + step) * 4 + t) * words(W) + unit) : U4{0, 0, 0, 0};
            }
            narrow_unit<W>(unit, GROUPED ? part : acc, q, s, b, xs);
        }
        if constexpr (GROUPED) add_group<NT>(acc, part, grid_scales, x_groups, tile0, row0, rows, 1, steps, step);
    }
    store_sums<NT>(acc, sums, (int)tile0 * TILE, row0, rows, 1, n, 1.0f, row_scales, x_scale, bias, y,
                   [&](int m) { return token_factor(x_scales, W, steps, m); });
}

// Rows of a step of tokens in shared memory, in U4: of 64 bytes, of which the 128-bit loads of two groups of four lanes fill all banks,
// or of 128 and 16 more, for the same.
DEV constexpr int narrow_pitch(int w) { return words(w) == 1 ? 4 : 9; }
DEV constexpr int narrow_stage(int w) { return TOKENS * narrow_pitch(w); }
// Words that a token has of its own in a step: block scales, or the scale of its 128 columns.
DEV constexpr int narrow_scales(int w, bool grouped) { return grouped ? 1 : token_words(w); }
DEV constexpr int narrow_scale_stages(int w, bool grouped) { return narrow_scales(w, grouped) > 0 ? 2 * TOKENS * narrow_scales(w, grouped) : 1; }

// For many rows: as tile.cu, a step of 64 tokens in each of two stages.
template <int W, int R, bool GROUPED>
DEV void narrow_tile(const U4* weights, const uint32_t* scales, const float* grid_scales, const U4* x, const uint32_t* x_scales,
                     const float* x_groups, const float* row_scales, const float* bias, float* y, int tokens, int n, int k, float x_scale,
                     SharedArray<U4> stages, SharedArray<uint32_t> token_scales) {
    constexpr int NT = TOKENS / 8, WORDS = narrow_scales(W, GROUPED), CHUNKS = 4 * words(W), ROWS = WARPS * 32 / CHUNKS;
    const int lane = lane_index(), warp = warp_index(), g = lane >> 2, t = lane & 3, steps = k / STEP;
    const long tile0 = ((long)block_x() * WARPS + warp) * R;
    const int token0 = block_y() * TOKENS, thread = thread_index();
    // A warp beyond the last output copies and waits with the others.
    const bool active = tile0 * TILE < n;

    // A thread copies 16 bytes of each ROWS-th token's codes and, if it is one of the first, has a word of its scales: written while the
    // step before is computed. What stands beyond the last token is computed and thrown away.
    const int chunk = thread % CHUNKS, token = thread / CHUNKS;
    const U4* from[words(W)];
    UNROLL for (int i = 0; i < words(W); i++) from[i] = x + (long)min(token0 + token + ROWS * i, tokens - 1) * steps * CHUNKS + chunk;
    auto copy = [&](int stage) {
        UNROLL for (int i = 0; i < words(W); i++) {
            cp_async(stages, stage * narrow_stage(W) + (token + ROWS * i) * narrow_pitch(W) + chunk, from[i]);
            from[i] += CHUNKS;
        }
        cp_commit();
    };
    const bool scaler = thread < TOKENS * WORDS;
    const int scaled = min(token0 + thread / max(WORDS, 1) % TOKENS, tokens - 1);
    const uint32_t* scale_of = GROUPED ? (x_groups ? (const uint32_t*)x_groups + (long)scaled * steps : nullptr)
                                       : x_scales + (long)scaled * token_pitch(W, steps) + thread % max(WORDS, 1);
    auto token_scale = [&](int step) { return !scaler ? 0 : GROUPED && !scale_of ? bits_of(1.0f) : ld(scale_of + step * WORDS); };
    U4 q[R][2] = {};
    uint32_t s[R] = {};
    auto fetch = [&](int step, int unit) {
        load_unit<W>(weights, tile0, steps, step, unit, lane, q);
        if (unit == 0) load_scales<W>(scales, tile0, steps, step, lane, s);
    };

    float acc[R][NT][4] = {}, total[R][NT][4] = {};
    copy(0);
    if (active) fetch(0, 0);
    if (scaler) token_scales[thread] = token_scale(0);
    int end = slice_end(steps, 0);
    for (int step = 0; step < steps; step++) {
        cp_wait<0>();
        block_sync();
        // Everyone is done with the other stage.
        const int stage = step & 1, next = min(step + 1, steps - 1);
        if (step + 1 < steps) copy(stage ^ 1);
        const uint32_t next_scale = token_scale(next);
        if (active) {
            float part[R][NT][4] = {};
            uint32_t ns[R], xs[NT] = {};
            UNROLL for (int r = 0; r < R; r++) ns[r] = s[r];
            if constexpr (token_words(W) > 0)
                UNROLL for (int c = 0; c < NT; c++) xs[c] = token_scales[(stage * TOKENS + c * 8 + g) * WORDS + t % WORDS];
            UNROLL for (int unit = 0; unit < words(W); unit++) {
                U4 now[R][2], b[NT];
                UNROLL for (int r = 0; r < R; r++) now[r][0] = q[r][0], now[r][1] = q[r][1];
                fetch(unit + 1 < words(W) ? step : next, (unit + 1) % words(W));
                UNROLL for (int c = 0; c < NT; c++)
                    b[c] = stages[stage * narrow_stage(W) + (c * 8 + g) * narrow_pitch(W) + t * words(W) + unit];
                narrow_unit<W>(unit, GROUPED ? part : acc, now, ns, b, xs);
            }
            if constexpr (GROUPED)
                add_tile_group(acc, part, grid_scales, tile0, steps, step, [&](int m) { return float_of(token_scales[stage * TOKENS + m]); });
            if (step + 1 == end) {
                UNROLL for (int r = 0; r < R; r++)
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

// The parameters are those of matmul.cu, of which `planes` is 1.
#define NARROW_PARAMETERS                                                                                                  \
    (const U4* weights, const uint32_t* scales, const float* grid_scales, const U4* x, const uint32_t* x_scales,           \
     const float* x_groups, const float* row_scales, const float* bias, float* y, int rows, int planes, int n, int k, float x_scale)
#define NARROW_MATMUL(name, W, NT, GROUPED)                                                                                \
    KERNEL_OF(blocks_of(NT, GROUPED), name, 256, NARROW_PARAMETERS) {                                                      \
        SHARED(float, sums, WARPS * NT * 8 * TILES * TILE);                                                                \
        narrow_matmul<W, NT, GROUPED>(weights, scales, grid_scales, x, x_scales, x_groups, row_scales, bias, y, rows, n,   \
                                      k, x_scale, sums);                                                                   \
    }
#define NARROW_TILE(name, W, R, GROUPED)                                                                                   \
    KERNEL_OF(1, name, 256, NARROW_PARAMETERS) {                                                                           \
        SHARED(U4, stages, 2 * narrow_stage(W));                                                                           \
        SHARED(uint32_t, token_scales, narrow_scale_stages(W, GROUPED));                                                   \
        narrow_tile<W, R, GROUPED>(weights, scales, grid_scales, x, x_scales, x_groups, row_scales, bias, y, rows, n, k,   \
                                   x_scale, stages, token_scales);                                                         \
    }
#define NARROW_KERNELS(name, W)                  \
    NARROW_MATMUL(matmul_##name##_8, W, 1, false)  \
    NARROW_MATMUL(matmul_##name##_16, W, 2, false) \
    NARROW_MATMUL(matmul_##name##_32, W, 4, false) \
    NARROW_TILE(tile_##name, W, 2, false)
NARROW_KERNELS(fp4_16, W_FP4_16)
NARROW_KERNELS(fp4_32, W_FP4_32)
NARROW_KERNELS(fp8, W_FP8)
NARROW_KERNELS(fp8_mx, W_FP8_MX)
NARROW_MATMUL(matmul_fp8_8g, W_FP8, 1, true)
NARROW_MATMUL(matmul_fp8_16g, W_FP8, 2, true)
NARROW_MATMUL(matmul_fp8_32g, W_FP8, 4, true)
NARROW_TILE(tile_fp8g, W_FP8, 1, true)
#endif
