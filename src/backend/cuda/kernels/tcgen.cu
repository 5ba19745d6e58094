// y[M, N] = x[M, K] · W[N, K]^T where both are codes of four bits (NVFP4: E4M3 scales of 16 columns; MXFP4), on the FP4 tensor cores of
// sm_100 and its family, by tcgen05.mma: codes and block scales go to the tensor core as they are.
//
// A block has 128 outputs, which are the rows of the instruction, and 128 tokens, its columns. Steps of 128 columns of K pass through
// six stages of shared memory by cp.async; one thread copies a stage's scales to tensor memory and issues its two products, and an
// mbarrier of the stage tells when they are done, two steps later. What no token stands behind is computed and thrown away: so there is
// one instruction for any M, and a token has the same bits whatever M is, if an output depends on nothing but its row, its column and the
// sum before.
// For up to eight tokens (TOKENS 8) only their rows are in shared memory, and the descriptor has the instruction find them sixteen times.
// K is cut and summed as elsewhere: eight slices of steps, each a chain of products from zero, added in order. Each slice can be a
// block's (`slices` 8), which leaves its sums; sum_slices adds those in the same order.
// No wait is for ever: where an mbarrier does not come (TRIES), what it should have brought is NaN.
// In shared memory a side is 16 bytes of 32 columns of each row, one row after the other, then the next 32 columns: no bank conflicts,
// and no swizzling. The weight lies so in memory.
// Roofline: few tokens, weights once from memory; else tensor cores: a step of a block is 17 or 18 KiB from L2 for two products of
// 64 clocks each at 16,384 multiply-adds a clock and multiprocessor: 136 to 144 bytes a clock, more than L2 has been seen to give (about
// 64), so about half of the tensor cores' rate. Two CTAs that share an instruction would halve that; not done.
// Limits: as matmul.cu; N is padded to 128.
#pragma once
#include "narrow.cu"

#if HAS_TCGEN
constexpr int SIDE = 128, TENSOR_COLUMNS_USED = 256, STAGES = 6;
// Pieces of 512 bytes that a step's scales of 128 rows are, each four bytes of every row: row r's at word 4·(r % 32) + r / 32.
DEV constexpr int scale_pieces(int w) { return w == W_TCGEN_16 ? 2 : 1; }
// A stage in U4: the weight's codes and scales, the tokens' codes and scales.
DEV constexpr int token_codes_at(int w) { return 4 * SIDE + 32 * scale_pieces(w); }
DEV constexpr int token_scales_at(int w, int tokens) { return token_codes_at(w) + 4 * tokens; }
DEV constexpr int tcgen_stage(int w, int tokens) { return token_scales_at(w, tokens) + 32 * scale_pieces(w); }

// Rows of 16 bytes from `at` on, the next 32 columns `leading` bytes on, the next eight rows `stride` bytes.
DEV uint64_t matrix_descriptor(uint32_t at, uint32_t leading, uint32_t stride) {
    return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 | 1ull << 46;
}
// E2M1 by E2M1 in f32, 128 rows and columns; `part`: the byte of a word of scales that the product's begin with.
DEV constexpr uint32_t instruction_descriptor(int w, int part) {
    return 1u << 7 | 1u << 10 | (uint32_t)(SIDE / 8) << 17 | (w == W_TCGEN_32 ? 1u << 23 : 0) | (uint32_t)(SIDE / 128) << 27 | (uint32_t)part << 29 |
           (uint32_t)part << 4;
}

// What thread 0 does with a full stage: scales to their columns, two products into `sums`, word when they are done.
template <int W, int TOKENS>
DEV void issue(SharedArray<U4> stages, SharedArray<uint64_t> done, int stage, uint32_t sums, bool add) {
    constexpr int PIECES = scale_pieces(W);
    const int base = stage * tcgen_stage(W, TOKENS);
    const uint32_t scales = sums + SIDE + stage * 16;
    UNROLL for (int i = 0; i < PIECES; i++) {
        tensor_copy(scales + 4 * i, matrix_descriptor(shared_address(stages, base + 4 * SIDE + 32 * i), 0, 128));
        tensor_copy(scales + 8 + 4 * i, matrix_descriptor(shared_address(stages, base + token_scales_at(W, TOKENS) + 32 * i), 0, 128));
    }
    UNROLL for (int i = 0; i < 2; i++) {
        const int piece = PIECES == 2 ? i : 0, part = PIECES == 2 ? 0 : 2 * i;
        mma_scaled<W == W_TCGEN_32>(sums, matrix_descriptor(shared_address(stages, base + 2 * SIDE * i), 16 * SIDE, 128),
                                    matrix_descriptor(shared_address(stages, base + token_codes_at(W) + 2 * TOKENS * i), 16 * TOKENS, TOKENS == 8 ? 0 : 128),
                                    instruction_descriptor(W, part), scales + 4 * piece, scales + 8 + 4 * piece, add || i > 0);
    }
    tensor_commit(done, stage);
}

// A thread has one output and, of 128 tokens, 64, or all of 8.
template <int W, int TOKENS>
DEV void tcgen(const U4* weights, const U4* scales, const U4* x, const uint32_t* x_scales, const float* row_scales, const float* bias,
               float* y, int tokens, int slices, int n, int k, float x_scale, SharedArray<U4> stages, SharedArray<uint64_t> done,
               SharedArray<uint32_t> columns) {
    constexpr int PIECES = scale_pieces(W), OWN = TOKENS == 8 ? 8 : 64, LOADED = TOKENS == 8 ? 8 : 32, STAGE_SIZE = tcgen_stage(W, TOKENS);
    const int thread = thread_index(), warp = warp_index(), lane = lane_index(), steps = k / STEP, pitch = PIECES * steps + 1;
    const long tile = block_x();
    const int token0 = block_y() * TOKENS, out = (int)tile * SIDE + warp % 4 * 32 + lane, token = token0 + warp / 4 * OWN;
    const bool owner = TOKENS > 8 || warp < 4;
    const int first = slices > 1 ? slice_begin(steps, block_z()) : 0, last = slices > 1 ? slice_begin(steps, block_z() + 1) : steps;
    float total[OWN] = {};
    bool lost = false;
    if (first < last) {
        auto copy = [&](int step) {
            const int base = (step - first) % STAGES * STAGE_SIZE;
            UNROLL for (int i = 0; i < 2; i++)
                cp_async(stages, base + thread + 256 * i, weights + (tile * steps + step) * 4 * SIDE + thread + 256 * i);
            if (thread < 32 * PIECES) cp_async(stages, base + 4 * SIDE + thread, scales + (tile * steps + step) * 32 * PIECES + thread);
            // Eight lanes have as many rows: no bank twice. What stands beyond the last token is computed and thrown away.
            UNROLL for (int row = warp * 8 + lane % 8; row < TOKENS; row += 64)
                cp_async(stages, base + token_codes_at(W) + lane / 8 * TOKENS + row, x + ((long)min(token0 + row, tokens - 1) * steps + step) * 4 + lane / 8);
            if (thread < TOKENS * PIECES) {
                const int row = thread / PIECES, piece = thread % PIECES;
                cp_async(as_words(stages), 4 * (base + token_scales_at(W, TOKENS) + 32 * piece) + row % 32 * 4 + row / 32,
                         x_scales + (long)min(token0 + row, tokens - 1) * pitch + step * PIECES + piece);
            }
        };
        auto wait = [&](int step) {
            const int at = step - first;
            bool passed = lost;
            for (int tries = 0; tries < TRIES && !passed; tries++) passed = mbarrier_passed(done, at % STAGES, at / STAGES & 1);
            lost |= !passed;
        };
        if (warp == 0) tensor_alloc<TENSOR_COLUMNS_USED>(columns), tensor_relinquish();
        if (thread == 0) UNROLL for (int i = 0; i < STAGES; i++) mbarrier_init(done, i, 1);
        // Columns beyond eight tokens have scales too.
        if (TOKENS == 8)
            for (int i = thread; i < STAGES * 32 * PIECES; i += 256)
                stages[i / (32 * PIECES) * STAGE_SIZE + token_scales_at(W, TOKENS) + i % (32 * PIECES)] = U4{0, 0, 0, 0};
        tensor_fence_before();
        block_sync();
        tensor_fence_after();
        const uint32_t sums = columns[0];
        auto drain = [&] {
            tensor_fence_after();
            if (owner)
                UNROLL for (int c = 0; c < OWN; c += LOADED) {
                    float v[LOADED];
                    tensor_load(sums + ((uint32_t)(warp % 4 * 32) << 16) + warp / 4 * OWN + c, v);
                    UNROLL for (int i = 0; i < LOADED; i++) total[c + i] += v[i];
                }
            tensor_fence_before();
        };
        UNROLL for (int i = 0; i < STAGES - 2; i++) {
            if (first + i < last) copy(first + i);
            cp_commit();
        }
        int begin = first, end = slice_end(steps, first);
        for (int step = first; step < last; step++) {
            cp_wait<STAGES - 3>();
            async_fence();
            if (step == end) {
                wait(step - 1);
                drain();
                begin = step, end = slice_end(steps, step);
            }
            block_sync();
            if (thread == 0) {
                tensor_fence_after();
                issue<W, TOKENS>(stages, done, (step - first) % STAGES, sums, step > begin);
            }
            // The stage of two steps ago is filled again.
            if (step - first >= 2) wait(step - 2);
            if (step + STAGES - 2 < last) copy(step + STAGES - 2);
            cp_commit();
        }
        cp_wait<0>();
        wait(last - 1);
        drain();
        block_sync();
        if (warp == 0) {
            tensor_fence_after();
            tensor_free<TENSOR_COLUMNS_USED>(sums);
        }
    }
    if (!owner || out >= n) return;
    const float row_scale = ld(row_scales + out) * x_scale, add = bias ? ld(bias + out) : 0.0f;
    UNROLL for (int i = 0; i < OWN; i++) {
        const int m = token + i;
        if (m >= tokens) continue;
        if (lost) total[i] = nan_value();
        if (slices > 1) st(y + ((long)block_z() * tokens + m) * n + out, total[i]);
        else st(y + (long)m * n + out, finished(total[i], row_scale, float_of(ld(x_scales + (long)(m + 1) * pitch - 1)), bias, add));
    }
}

// Where the sums of slices are blocks' of their own: [slices, tokens, n], added in order, with what store_tile gives them.
KERNEL(sum_slices, 256, (const float* sums, const uint32_t* x_scales, const float* row_scales, const float* bias, float* y, int tokens,
                         int pitch, int n, float x_scale)) {
    const int out = block_x() * 256 + thread_index(), m = block_y();
    if (out >= n) return;
    float total = 0.0f;
    UNROLL for (int slice = 0; slice < WARPS; slice++) total += ld(sums + ((long)slice * tokens + m) * n + out);
    st(y + (long)m * n + out, finished(total, ld(row_scales + out) * x_scale, float_of(ld(x_scales + (long)(m + 1) * pitch - 1)), bias, bias ? ld(bias + out) : 0.0f));
}

#define TCGEN(name, W, TOKENS)                                                                                             \
    KERNEL_OF(2, name, 256,                                                                                                \
              (const U4* weights, const U4* scales, const U4* x, const uint32_t* x_scales, const float* row_scales,        \
               const float* bias, float* y, int tokens, int slices, int n, int k, float x_scale)) {                        \
        DYNAMIC(U4, stages, STAGES* tcgen_stage(W, TOKENS));                                                               \
        SHARED(uint64_t, done, STAGES);                                                                                    \
        SHARED(uint32_t, columns, 1);                                                                                      \
        tcgen<W, TOKENS>(weights, scales, x, x_scales, row_scales, bias, y, tokens, slices, n, k, x_scale, stages, done,   \
                         columns);                                                                                         \
    }
TCGEN(matmul_tcgen_16, W_TCGEN_16, 8)
TCGEN(matmul_tcgen_32, W_TCGEN_32, 8)
TCGEN(tile_tcgen_16, W_TCGEN_16, 128)
TCGEN(tile_tcgen_32, W_TCGEN_32, 128)
#endif
