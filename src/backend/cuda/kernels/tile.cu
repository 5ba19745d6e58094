// y[M, N] = x[M, K] · W[N, K]^T for many rows of x: the same sums as matmul.cu, bit for bit, in the same order.
//
// A block has 64 tokens and eight warps of 16·R outputs each. Steps of the tokens pass through two stages of shared memory by
// cp.async, one being filled while the other is read: rows of 256 + 16 bytes, so that the two 128-bit loads of a lane (row g,
// columns 16t..) meet no bank twice. Weights go straight from memory to registers, half a step ahead, and are unpacked once for
// the 64 tokens. A slice of K (an eighth) is summed from zero in `acc`, slices are added in order in `total`.
// Of an input that is not quantized the block sums the first plane over all of K, then the second, which follows it in memory.
// Roofline: tensor cores. A step of a block is 1024 HMMA (512 grouped) for 16 KiB of tokens and 18 KiB of E2M1 (32 of FP8, 64 of
// BF16; half that grouped) from L2: 17 bytes a clock and multiprocessor where one takes 2 clocks. Limits: as matmul.cu.
// nvcc 13.0.88, sm_80 / 90 / 120, no spills; 34 KiB of shared memory, one block a multiprocessor:
//   registers                E2M1 by 16 230 / 230 / 226, E4M3 242 / 246 / 228, BF16 250 / 250 / 242, grouped up to 212
//   issue slots per HMMA     E2M1 by 16 4.8 / 5.1 / 5.4, E4M3 4.7 / 4.9 / 5.2, BF16 3.0 / 3.3 / 3.8, E2M1 by 16 grouped 6.9 /
//                            7.2 / 7.0; of these 0.8 to 1.0 are taken at the end of a slice only, 1.6 unpack E2M1, 0.35 load
#pragma once
#include "matmul.cu"

constexpr int TOKENS = 64, PITCH = STEP / 8 + 1, STAGE = TOKENS * PITCH;

// The end of the slice of K that has this step.
DEV int slice_end(int steps, int step) {
    int slice = 1;
    while (slice_begin(steps, slice) <= step) slice++;
    return slice_begin(steps, slice);
}

// A sum with its scales and, if there is one, its bias.
DEV float finished(float sum, float row_scale, float of_token, const float* bias, float add) {
    const float v = sum * (row_scale * of_token);
    return bias ? v + add : v;
}

// Stores what a warp has of R x NT tiles with its scales; `of_token` gives a token's.
template <int R, int NT, class Factor>
DEV void store_tile(const float (&total)[R][NT][4], int out0, int token0, int tokens, int n, float lifted, const float* row_scales,
                    float x_scale, const float* bias, float* y, const Factor& of_token) {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int upper = 0; upper < 2; upper++) {
            const int out = out0 + r * TILE + g + upper * 8;
            if (out >= n) continue;
            const float row_scale = ld(row_scales + out) * x_scale, add = bias ? ld(bias + out) : 0.0f;
            UNROLL for (int c = 0; c < NT; c++)
                UNROLL for (int i = 0; i < 2; i++) {
                    const int m = token0 + c * 8 + t * 2 + i;
                    if (m >= tokens) continue;
                    st(y + (long)m * n + out, finished(total[r][c][upper * 2 + i] * lifted, row_scale, of_token(m), bias, add));
                }
        }
}

// Adds the sum of a step with the scales that 128 columns have; `of_token` gives that of a block's token.
template <int R, int NT, class Scale>
DEV void add_tile_group(float (&acc)[R][NT][4], const float (&part)[R][NT][4], const float* grid_scales, long tile0, int steps, int step,
                        const Scale& of_token) {
    const int t = lane_index() & 3;
    UNROLL for (int r = 0; r < R; r++) {
        const float w = grid_scales ? ld(grid_scales + (tile0 + r) * TILE / 128 * steps + step) : 1.0f;
        UNROLL for (int c = 0; c < NT; c++)
            UNROLL for (int i = 0; i < 2; i++) {
                const float v = w * of_token(c * 8 + t * 2 + i);
                acc[r][c][i] = fmaf(part[r][c][i], v, acc[r][c][i]);
                acc[r][c][i + 2] = fmaf(part[r][c][i + 2], v, acc[r][c][i + 2]);
            }
    }
}

template <int W, int R, bool GROUPED>
DEV void tile(const U4* weights, const uint32_t* scales, const float* grid_scales, const uint16_t* x, const float* x_scales,
              const float* x_groups, const float* row_scales, const float* bias, float* y, int rows, int planes, int n, int k, float x_scale,
              SharedArray<U4> stages, SharedArray<float> token_scales) {
    constexpr int NT = TOKENS / 8, COPIES = TOKENS * (STEP / 8) / (WARPS * 32);
    const int lane = lane_index(), warp = warp_index(), g = lane >> 2, t = lane & 3, steps = k / STEP, tokens = rows / planes;
    const long tile0 = ((long)block_x() * WARPS + warp) * R;
    const int token0 = block_y() * TOKENS, passes = planes * steps;
    // A warp beyond the last output copies and waits with the others.
    const bool active = tile0 * TILE < n;

    // A thread copies 16 bytes of each sixteenth row; what stands beyond the last token is computed and thrown away.
    const int chunk = thread_index() % (STEP / 8), row0 = thread_index() / (STEP / 8);
    const U4* from[COPIES];
    UNROLL for (int i = 0; i < COPIES; i++)
        from[i] = (const U4*)(x + (long)min(token0 + row0 + 16 * i, tokens - 1) * planes * k) + chunk;
    auto copy = [&](int stage) {
        UNROLL for (int i = 0; i < COPIES; i++) {
            cp_async(stages, stage * STAGE + (row0 + 16 * i) * PITCH + chunk, from[i]);
            from[i] += STEP / 8;
        }
        cp_commit();
    };
    U4 q[R][words(W)] = {};
    uint32_t s[R] = {};
    auto fetch = [&](int step, int half) {
        UNROLL for (int r = 0; r < R; r++) {
            UNROLL for (int i = 0; i < words(W); i++)
                q[r][i] = ld_stream(weights + word_index<W>(tile0 + r, steps, step, half, lane) + 32 * i);
            if constexpr (scale_lanes(W) > 0)
                if (half == 0) s[r] = ld_stream(scales + scale_index<W>(tile0 + r, steps, step, lane));
        }
    };

    // Of 128 columns, the scale of a token: a thread has one, written while the step before is computed.
    const float* scale_of = x_groups ? x_groups + (long)min(token0 + thread_index() % TOKENS, tokens - 1) * steps : nullptr;
    auto token_scale = [&](int step) { return scale_of ? ld(scale_of + step) : 1.0f; };

    float acc[R][NT][4] = {}, total[R][NT][4] = {};
    copy(0);
    if (active) fetch(0, 0);
    if (GROUPED && thread_index() < TOKENS) token_scales[thread_index()] = token_scale(0);
    int step = 0, end = slice_end(steps, 0);
    for (int pass = 0; pass < passes; pass++) {
        cp_wait<0>();
        block_sync();
        // Everyone is done with the other stage.
        if (pass + 1 < passes) copy((pass + 1) & 1);
        const int next = step + 1 < steps ? step + 1 : 0;
        const float next_scale = GROUPED ? token_scale(next) : 1.0f;
        if (active) {
            const int stage = (pass & 1) * STAGE + g * PITCH + t * 2;
            float part[R][NT][4] = {};
            uint32_t both[R];
            UNROLL for (int r = 0; r < R; r++) both[r] = s[r];
            UNROLL for (int half = 0; half < 2; half++) {
                U4 now[R][words(W)];
                UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < words(W); i++) now[r][i] = q[r][i];
                fetch(half == 0 ? step : next, half ^ 1);
                uint32_t s0[R], s1[R];
                UNROLL for (int r = 0; r < R; r++) {
                    s0[r] = scale_pair(W, both[r] >> (16 * half) & 0xffu);
                    s1[r] = scale_pair(W, both[r] >> (16 * half + 8) & 0xffu);
                }
                UNROLL for (int pair = 0; pair < 2; pair++) {
                    U4 b[NT];
                    UNROLL for (int c = 0; c < NT; c++) b[c] = stages[stage + c * 8 * PITCH + half * 8 + pair];
                    UNROLL for (int j = 0; j < 2; j++)
                        UNROLL for (int r = 0; r < R; r++) {
                            uint32_t a[4];
                            operand_a<W>(now[r], pair * 2 + j, s0[r], s1[r], a);
                            UNROLL for (int c = 0; c < NT; c++)
                                mma_bf16(GROUPED ? part[r][c] : acc[r][c], a, j ? b[c].z : b[c].x, j ? b[c].w : b[c].y);
                        }
                }
            }
            if constexpr (GROUPED)
                add_tile_group(acc, part, grid_scales, tile0, steps, step, [&](int m) -> float { return token_scales[(pass & 1) * TOKENS + m]; });
            if (step + 1 == end) {
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int c = 0; c < NT; c++)
                        UNROLL for (int i = 0; i < 4; i++) total[r][c][i] += acc[r][c][i], acc[r][c][i] = 0.0f;
                end = slice_end(steps, next);
            }
        }
        if (GROUPED && thread_index() < TOKENS) token_scales[((pass + 1) & 1) * TOKENS + thread_index()] = next_scale;
        step = next;
    }
    if (!active) return;
    store_tile(total, (int)tile0 * TILE, token0, tokens, n, lift(W), row_scales, x_scale, bias, y,
               [&](int m) { return x_scales ? ld(x_scales + m) : 1.0f; });
}

#define TILED(name, W, R, GROUPED)                                                                                         \
    KERNEL_OF(1, name, 256,                                                                                                \
              (const U4* weights, const uint32_t* scales, const float* grid_scales, const uint16_t* x,                    \
               const float* x_scales, const float* x_groups, const float* row_scales, const float* bias, float* y,        \
               int rows, int planes, int n, int k, float x_scale)) {                                                       \
        SHARED(U4, stages, 2 * STAGE);                                                                                     \
        SHARED(float, token_scales, GROUPED ? 2 * TOKENS : 1);                                                             \
        tile<W, R, GROUPED>(weights, scales, grid_scales, x, x_scales, x_groups, row_scales, bias, y, rows, planes, n, k, \
                            x_scale, stages, token_scales);                                                                \
    }
#define TILES_OF(name, W)             \
    TILED(tile_##name, W, 2, false)   \
    TILED(tile_##name##g, W, 1, true)
TILES_OF(e2m1_16, W_E2M1_16)
TILES_OF(e2m1_32, W_E2M1_32)
TILES_OF(mxfp4, W_MXFP4)
TILES_OF(e4m3, W_E4M3)
TILES_OF(mxfp8, W_MXFP8)
TILES_OF(bf16, W_BF16)
