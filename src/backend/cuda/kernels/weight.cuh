// How weights lie in memory, and how 16 of them become BF16.
//
// A weight [N, K] is cut into tiles of 16 rows and steps of 128 columns (both padded with zeros). It is the A operand of
// mma.m16n8k16, whose order of K is ours to choose, as long as the tokens follow: lane 4g+t of a warp owns rows g and g+8 and,
// in each half step (64 columns), columns 16t..16t+15, so whole scale blocks. Of these, product j takes 4j..4j+3.
//   four bits:   [tile][step][half][lane] of U4; word j has the eight codes of product j, bits permuted (unpack_e2m1)
//   eight bits:  [tile][step][half][2][lane] of U4; words 2j', 2j'+1 have product j = 2·(index) + j' (unpack_e4m3)
//   BF16:        [tile][step][half][4][lane] of U4: product j as it is
//   scales:      a byte each for (half 0, row g), (half 0, row g+8), (half 1, g), (half 1, g+8) in a word;
//                blocks of 16: [tile][step][lane], blocks of 32: [tile][step][g][t/2]
// Elements leave here multiplied by 2^-LIFT, and whoever uses them multiplies sums by 2^LIFT.
//
// Where codes meet codes on FP4 and FP8 tensor cores (narrow.cu), a weight is the A operand of mma.m16n8k64 or m16n8k32, in the natural
// order of K but for what a lane has:
//   four bits:   [tile][step][product of 64 columns][lane] of U4: columns 8t.. of rows g and g+8, then columns 32 + 8t..
//   eight bits:  [tile][step][product of 32 columns][lane] of U4: columns 8t.. of rows g and g+8, then columns 8t + 4..
//   scales:      words of a row's four scales in order. E4M3 by 16: [tile][step][lane], row g + 8·(t % 2), half t / 2;
//                E8M0 by 32: [tile][step][g][t % 2]
//
// Where tcgen05.mma multiplies codes of four bits (tcgen.cu), a tile is 128 rows:
//   codes:       [tile][step][32 columns][row] of U4, in order
//   scales:      words of a row's four scales in order; E4M3 by 16: [tile][step][half][row % 32][row / 32], E8M0 by 32 the same without halves
#pragma once
#include "formats.cuh"

constexpr int STEP = 128, TILE = 16;

enum Weight { W_E2M1_16 = 0, W_E2M1_32 = 1, W_MXFP4 = 2, W_E4M3 = 3, W_MXFP8 = 4, W_BF16 = 5, W_FP4_16 = 6, W_FP4_32 = 7, W_FP8 = 8, W_FP8_MX = 9, W_TCGEN_16 = 10, W_TCGEN_32 = 11 };

// U4 words of a lane in a half step.
DEV constexpr int words(int w) { return w == W_BF16 ? 4 : w == W_E4M3 || w == W_MXFP8 || w == W_FP8 || w == W_FP8_MX ? 2 : 1; }
// Lanes of a row that have scales of their own; 0 without block scales.
DEV constexpr int scale_lanes(int w) { return w == W_E2M1_16 ? 4 : w == W_E2M1_32 || w == W_MXFP4 || w == W_MXFP8 ? 2 : 0; }
DEV constexpr float lift(int w) { return w == W_BF16 || w == W_E4M3 ? 1.0f : w == W_MXFP8 ? 8.0f : 512.0f; }

// Eight codes to four BF16 pairs, 2^126 too small: sign, exponent and mantissa stand where BF16 has them.
DEV void unpack_e2m1(uint32_t u, uint32_t (&a)[4]) {
    a[0] = u & 0x81c081c0u;
    a[1] = rotr(u, 6) & 0x81c081c0u;
    a[2] = rotr(u, 12) & 0x81c081c0u;
    a[3] = (rotr(u, 10) & 0x80c080c0u) | ((u >> 2) & 0x01000100u);
}
// Four codes to two BF16 pairs, 2^120 too small.
DEV void unpack_e4m3(uint32_t u, uint32_t& a, uint32_t& b) {
    a = u & 0x87f087f0u;
    b = (rotr(u, 12) & 0x80f080f0u) | ((u >> 4) & 0x07000700u);
}
// Two copies of a block's scale in BF16, times 2^117. E4M3 comes as (exponent + 20) << 3 | mantissa, a power of two as its
// exponent under BF16's bias, 0 for a scale too small to count.
DEV uint32_t scale_pair(int w, uint32_t byte) {
    return w == W_MXFP4 || w == W_MXFP8 ? byte * 0x00800080u : byte * 0x00100010u + 0x70007000u;
}

// A operand of product j (0..3) of a half step, from a lane's words and the scales of its two rows.
template <int W> DEV void operand_a(const U4 (&q)[words(W)], int j, uint32_t s0, uint32_t s1, uint32_t (&a)[4]) {
    if constexpr (W == W_BF16) {
        a[0] = q[j].x, a[1] = q[j].y, a[2] = q[j].z, a[3] = q[j].w;
    } else if constexpr (W == W_E4M3 || W == W_MXFP8) {
        const U4& v = q[j >> 1];
        unpack_e4m3(j & 1 ? v.z : v.x, a[0], a[1]);
        unpack_e4m3(j & 1 ? v.w : v.y, a[2], a[3]);
        const uint32_t one = 0x7b807b80u;  // 2^120
        a[0] = mul_bf16x2(a[0], W == W_E4M3 ? one : s0);
        a[1] = mul_bf16x2(a[1], W == W_E4M3 ? one : s1);
        a[2] = mul_bf16x2(a[2], W == W_E4M3 ? one : s0);
        a[3] = mul_bf16x2(a[3], W == W_E4M3 ? one : s1);
    } else {
        const uint32_t u[4] = {q[0].x, q[0].y, q[0].z, q[0].w};
        unpack_e2m1(u[j], a);
        a[0] = mul_bf16x2(a[0], s0), a[1] = mul_bf16x2(a[1], s1), a[2] = mul_bf16x2(a[2], s0), a[3] = mul_bf16x2(a[3], s1);
    }
}

// Where the words of a half step begin, and a lane's word of scales.
template <int W> DEV long word_index(long tile, int steps, int step, int half, int lane) {
    return (((tile * steps + step) * 2 + half) * words(W)) * 32 + lane;
}
template <int W> DEV long scale_index(long tile, int steps, int step, int lane) {
    return (tile * steps + step) * (8 * scale_lanes(W)) + (scale_lanes(W) == 4 ? lane : (lane >> 2) * 2 + (lane & 3) / 2);
}

// A lane's codes of a product, and its word of scales, in the layouts for FP4 and FP8 tensor cores.
template <int W> DEV long code_index(long tile, int steps, int step, int product, int lane) {
    return ((tile * steps + step) * (2 * words(W)) + product) * 32 + lane;
}
template <int W> DEV long code_scale_index(long tile, int steps, int step, int lane) {
    return W == W_FP4_16 ? (tile * steps + step) * 32 + lane : (tile * steps + step) * 16 + (lane >> 2) * 2 + (lane & 1);
}

// Weights (row n, columns k0..k0+15) as f32, without output scales; k0 is a multiple of 16.
template <int W> DEV void decode16(const U4* words_, const uint32_t* scales, int steps, int n, int k0, float (&v)[16]) {
    const int step = k0 / STEP, half = k0 / 64 & 1, t = k0 / 16 & 3, g = n & 7, upper = n >> 3 & 1, lane = g * 4 + t;
    const long tile = n / TILE;
    if constexpr (W == W_FP8 || W == W_FP8_MX) {
        // Columns k0.. are two runs of eight, of neighbouring lanes of a product.
        const int product = k0 / 32 & 3, first = k0 / 8 & 3;
        float scale = 1.0f;
        if constexpr (W == W_FP8_MX) {
            const uint32_t byte = ld(scales + code_scale_index<W>(tile, steps, step, g * 4 + upper)) >> 8 * product & 0xffu;
            scale = float_of(byte ? byte << 23 : 0x00400000u);
        }
        UNROLL for (int i = 0; i < 2; i++) {
            const U4 q = ld(words_ + code_index<W>(tile, steps, step, product, g * 4 + first + i));
            UNROLL for (int j = 0; j < 4; j++) {
                v[8 * i + j] = decode_e4m3((upper ? q.y : q.x) >> 8 * j & 0xffu) * scale;
                v[8 * i + 4 + j] = decode_e4m3((upper ? q.w : q.z) >> 8 * j & 0xffu) * scale;
            }
        }
    } else if constexpr (W == W_TCGEN_16 || W == W_TCGEN_32) {
        const int row = n % 128, at = W == W_TCGEN_16 ? k0 / 16 : k0 / 32;
        const long first = (long)(n / 128) * steps * STEP / (W == W_TCGEN_16 ? 64 : 128) + at / 4;
        const uint32_t byte = ld(scales + first * 128 + row % 32 * 4 + row / 32) >> 8 * (at % 4) & 0xffu;
        const float scale = W == W_TCGEN_16 ? decode_e4m3(byte) : float_of(byte ? byte << 23 : 0x00400000u);
        const U4 q = ld(words_ + ((long)(n / 128) * steps * 4 + k0 / 32) * 128 + row);
        const uint32_t two[2] = {k0 & 16 ? q.z : q.x, k0 & 16 ? q.w : q.y};
        UNROLL for (int i = 0; i < 16; i++) v[i] = decode_e2m1(two[i / 8] >> 4 * (i % 8)) * scale;
    } else if constexpr (W == W_FP4_16 || W == W_FP4_32) {
        // Columns 16t.. of the half step are words 2t and 2t + 1 of its eight: of two lanes, before or beyond column 32.
        const uint32_t s = ld(scales + code_scale_index<W>(tile, steps, step, g * 4 + upper + (W == W_FP4_16 ? half * 2 : 0)));
        const uint32_t byte = s >> 8 * (W == W_FP4_16 ? t : half * 2 + t / 2) & 0xffu;
        const float scale = W == W_FP4_16 ? decode_e4m3(byte) : float_of(byte ? byte << 23 : 0x00400000u);
        UNROLL for (int i = 0; i < 2; i++) {
            const U4 q = ld(words_ + code_index<W>(tile, steps, step, half, g * 4 + (2 * t + i) % 4));
            const uint32_t word = t < 2 ? (upper ? q.y : q.x) : (upper ? q.w : q.z);
            UNROLL for (int j = 0; j < 8; j++) v[8 * i + j] = decode_e2m1(word >> 4 * j) * scale;
        }
    } else {
        U4 q[words(W)];
        UNROLL for (int i = 0; i < words(W); i++) q[i] = ld(words_ + word_index<W>(tile, steps, step, half, lane) + 32 * i);
        uint32_t s = 0;
        if constexpr (scale_lanes(W) > 0) s = scale_pair(W, ld(scales + scale_index<W>(tile, steps, step, lane)) >> (16 * half + 8 * upper) & 0xffu);
        UNROLL for (int j = 0; j < 4; j++) {
            uint32_t a[4];
            operand_a<W>(q, j, s, s, a);
            UNROLL for (int i = 0; i < 2; i++) {
                const uint32_t pair = upper ? a[2 * i + 1] : a[2 * i];
                v[4 * j + 2 * i] = float_of(pair << 16) * lift(W);
                v[4 * j + 2 * i + 1] = float_of(pair & 0xffff0000u) * lift(W);
            }
        }
    }
}
