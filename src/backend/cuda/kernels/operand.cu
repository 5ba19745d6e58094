// What enters a product: rows of f32 become BF16 rows that hold exactly what the format of the input can say (E2M1 by E4M3,
// E4M3, MX elements have at most six significant bits), with the scale of a row or of 128 columns beside them. An input that is
// not quantized becomes two rows, the nearest BF16 and what that leaves. For narrow.cu rows are codes and scales instead.
//
// Three sources share it: plain rows, the norm of the residual stream (to which what a mixer gave is added first), and
// silu(gate) · up. A block has a row; a thread 16 columns at a time, one NVFP4 block, half an MX one, an eighth of a group of 128.
// Roofline: memory, each value read at most three times, of which two from cache. Any K.
#include "activation.cuh"

constexpr int THREADS = 256, UNIT = 16;

DEV void load16(const float* row, int k0, int k, float (&v)[UNIT]) {
    if (k % 4 == 0 && k0 + UNIT <= k) {
        UNROLL for (int i = 0; i < 4; i++) {
            const U4 q = ld((const U4*)(row + k0) + i);
            v[4 * i] = float_of(q.x), v[4 * i + 1] = float_of(q.y), v[4 * i + 2] = float_of(q.z), v[4 * i + 3] = float_of(q.w);
        }
    } else {
        UNROLL for (int i = 0; i < UNIT; i++) v[i] = k0 + i < k ? ld(row + k0 + i) : 0.0f;
    }
}

// Sum or maximum over the block, the same in all threads: lanes by a tree, then warps in order.
template <bool MAXIMUM> DEV float block_reduce(float v, SharedArray<float> scratch) {
    UNROLL for (int m = 16; m > 0; m /= 2) {
        const float o = shfl_xor(v, m);
        v = MAXIMUM ? (o > v ? o : v) : v + o;
    }
    block_sync();
    if (lane_index() == 0) scratch[warp_index()] = v;
    block_sync();
    float all = scratch[0];
    UNROLL for (int w = 1; w < THREADS / 32; w++) {
        const float o = scratch[w];
        all = MAXIMUM ? (o > all ? o : all) : all + o;
    }
    return all;
}

// The larger; NaN if one is. Magnitudes only.
DEV float amax16(const float (&v)[UNIT]) {
    float a = 0.0f;
    UNROLL for (int i = 0; i < UNIT; i++) a = magnitude(v[i]) > a ? magnitude(v[i]) : a;
    return a;
}
DEV bool finite16(const float (&v)[UNIT]) {
    bool all = true;
    UNROLL for (int i = 0; i < UNIT; i++) all &= finite(v[i]);
    return all;
}

DEV void store16(uint16_t* row, int k0, const float (&v)[UNIT]) {
    UNROLL for (int i = 0; i < 2; i++)
        st((U4*)(row + k0) + i, U4{to_bf16x2(v[8 * i], v[8 * i + 1]), to_bf16x2(v[8 * i + 2], v[8 * i + 3]),
                                   to_bf16x2(v[8 * i + 4], v[8 * i + 5]), to_bf16x2(v[8 * i + 6], v[8 * i + 7])});
}

// The least scale of fp_quant's blocks.
constexpr float LEAST = 1.262177448e-29f;

// Sum over a block of 32, which two neighbouring lanes have: eight partial sums by index modulo 8, then halves onto halves.
DEV float sum32(const float (&v)[UNIT]) {
    float s[8];
    UNROLL for (int j = 0; j < 8; j++) {
        const float other[2] = {shfl_xor(v[j], 1), shfl_xor(v[j + 8], 1)};
        const bool odd = lane_index() & 1;
        s[j] = (odd ? other[0] : v[j]) + (odd ? other[1] : v[j + 8]);
        s[j] += odd ? v[j] : other[0];
        s[j] += odd ? v[j + 8] : other[1];
    }
    UNROLL for (int w = 4; w > 0; w /= 2)
        UNROLL for (int j = 0; j < w; j++) s[j] += s[j + w];
    return s[0];
}
// fp_quant's scale of such a block: a power of two, of its largest magnitude or of its standard deviation.
DEV float scale_fp_quant(const float (&v)[UNIT], float amax, bool quest) {
    float x = amax;
    if (quest) {
        const float mean = sum32(v) / 32.0f;
        float squares[UNIT];
        UNROLL for (int i = 0; i < UNIT; i++) squares[i] = (v[i] - mean) * (v[i] - mean);
        x = 2.9224786f / 6.0f * sqrtf(sum32(squares) / 32.0f) + 1e-8f;
    }
    return float_of(bits_of(x > LEAST ? x : LEAST) & 0x7f800000u);
}

// A row of codes: of each 128 columns the 16 eights, each fourth of them together (0, 4, 8, 12, then 1, ...), as a lane of narrow.cu
// reads them, or, `natural`, in order, as tcgen.cu does. `u` is the number of these 16 columns; an eight has a word of four bits each or
// two of eight.
template <int WORDS> DEV void store_codes(uint32_t* row, int u, const uint32_t (&words)[2 * WORDS], bool natural) {
    UNROLL for (int half = 0; half < 2; half++) {
        const int at = u % 8 * 2 + half, to = natural ? at : at % 4 * 4 + at / 4;
        UNROLL for (int i = 0; i < WORDS; i++) st(row + (u / 8 * 16 + to) * WORDS + i, words[half * WORDS + i]);
    }
}
// Columns of a block of codes that have a scale; 0: none in a block.
DEV int code_block(int format) { return format == NVFP4 ? 16 : format == MXFP4 || format == MXFP8 ? 32 : 0; }
// Words of scales of a row of codes in blocks: the blocks' as bytes, in order, and what the row is multiplied by beside: 1, or NaN where
// something in it is not finite, whatever the GPU would make of such a block.
DEV int code_scales(int format, int kp) { return kp / (4 * code_block(format)) + 1; }

// Quantizes a row. `value(k0, v)` gives 16 columns, zeros beyond k; `pre` multiplies columns, or is null. `kp` is k padded to
// 128; `scales` [rows] or [rows, kp/128] where the format has any, [rows, code_scales] of codes in blocks.
template <class Value>
DEV void quantize_row(const Value& value, const float* pre, int what, float scale, int rule, int row, int k, int kp,
                      uint16_t* x, float* scales, SharedArray<float> scratch) {
    const int units = kp / UNIT, format = what % CODES, block = code_block(format);
    const bool codes = what >= CODES, natural = what >= 2 * CODES;
    auto columns = [&](int u, float (&v)[UNIT]) {
        if (u >= units) {
            UNROLL for (int i = 0; i < UNIT; i++) v[i] = 0.0f;
            return;
        }
        value(u * UNIT, v);
        if (pre) UNROLL for (int i = 0; i < UNIT; i++) if (u * UNIT + i < k) v[i] *= ld(pre + u * UNIT + i);
    };
    if (format == FP8_TOKEN) {
        float a = 0.0f;
        for (int u = thread_index(); u < units; u += THREADS) {
            float v[UNIT];
            columns(u, v);
            const float b = amax16(v);
            a = b > a ? b : a;
        }
        scale = block_reduce<true>(a, scratch) / 448.0f;
        if (!(scale > 0.0f)) scale = 1.0f;
        if (thread_index() == 0) st(scales + row, scale);
    }
    auto code_row = [&](int bits) { return (uint32_t*)x + (long)row * (kp / 32 * bits); };
    auto scale_row = [&] { return scales + (long)row * code_scales(format, kp); };
    float broken = 0.0f;
    // All lanes of a warp go round together: groups of lanes share a scale.
    for (int u0 = warp_index() * 32; u0 < units; u0 += THREADS) {
        const int u = u0 + lane_index();
        float v[UNIT];
        columns(u, v);
        float a = amax16(v);
        int sound = finite16(v);
        if (format == FLOAT) {
            if (u >= units) continue;
            float low[UNIT];
            UNROLL for (int i = 0; i < UNIT; i++) low[i] = v[i] - float_of(to_bf16(v[i]) << 16);
            store16(x + (long)2 * row * kp, u * UNIT, v);
            store16(x + (long)(2 * row + 1) * kp, u * UNIT, low);
            continue;
        }
        // What becomes E2M1 or E4M3: its scale, what inputs are divided by, and the scale's code.
        bool four = false;
        float s = 1.0f, step = 1.0f;
        uint32_t byte = 0;
        if (format == NVFP4) {
            four = true, byte = encode_e4m3(a / (6.0f * scale)), s = decode_e4m3(byte), step = s * scale;
        } else if (format == FP8_STATIC || format == FP8_TOKEN) {
            step = scale;
        } else if (format == FP8_GROUP) {
            UNROLL for (int m = 4; m > 0; m /= 2) {
                const float o = shfl_xor(a, m);
                a = o > a ? o : a;
            }
            s = a / 448.0f;
            if (!(s > 0.0f)) s = 1.0f;
            if (u < units && u % 8 == 0) st(scales + (long)row * (kp / 128) + u / 8, s);
            step = s, s = 1.0f;
        } else {
            const float o = shfl_xor(a, 1);
            a = o > a ? o : a;
            sound &= shfl_xor(sound, 1);
            if (format == FP_QUANT_AMAX || format == FP_QUANT_QUEST) {
                s = scale_fp_quant(v, a, format == FP_QUANT_QUEST);
                const float factor = 1.0f / scale / s;
                UNROLL for (int i = 0; i < UNIT; i++) v[i] = sound ? round_e2m1(v[i] * factor) * s : nan_value();
                if (u < units) store16(x + (long)row * kp, u * UNIT, v);
                continue;
            }
            four = format == MXFP4;
            s = step = scale_e8m0(a, four ? 6.0f : 448.0f, four ? 2 : 8, rule), byte = bits_of(s) >> 23;
        }
        if (codes && block) {
            if (!sound) broken = 1.0f, byte = 0;
            if (u < units && u * UNIT % block == 0) st((uint8_t*)scale_row() + u * UNIT / block, (uint8_t)byte);
        }
        if (four) {
            uint32_t words[2] = {};
            if (sound && step > 0.0f)
                UNROLL for (int i = 0; i < UNIT; i++) words[i / 8] |= encode_e2m1(v[i] / step) << 4 * (i % 8);
            if (codes) {
                if (u < units) store_codes<1>(code_row(4), u, words, natural);
                continue;
            }
            UNROLL for (int i = 0; i < UNIT; i++) v[i] = sound ? decode_e2m1(words[i / 8] >> 4 * (i % 8)) * s : nan_value();
        } else {
            // Without blocks an element that is not finite is NaN; in one it makes all of them NaN. Codes take the place of values.
            UNROLL for (int i = 0; i < UNIT; i++) v[i] = float_of(block && !sound ? 0x7fu : encode_fp8(v[i], step));
            if (codes) {
                uint32_t words[4] = {};
                UNROLL for (int i = 0; i < UNIT; i++) words[i / 4] |= bits_of(v[i]) << 8 * (i % 4);
                if (u < units) store_codes<2>(code_row(8), u, words, false);
                continue;
            }
            UNROLL for (int i = 0; i < UNIT; i++) v[i] = decode_e4m3(bits_of(v[i])) * s;
        }
        if (u < units) store16(x + (long)row * kp, u * UNIT, v);
    }
    if (!codes || !block) return;
    broken = block_reduce<true>(broken, scratch);
    if (thread_index() == 0) st(scale_row() + code_scales(format, kp) - 1, broken > 0.0f ? nan_value() : 1.0f);
}

// Rows as they are.
KERNEL_OF(3, operand_plain, 256, (const float* in, const float* pre, int format, float scale, int rule, int k, int kp, uint16_t* x,
                            float* scales)) {
    SHARED(float, scratch, THREADS / 32);
    const int row = block_x();
    const float* p = in + (long)row * k;
    quantize_row([&](int k0, float (&v)[UNIT]) { load16(p, k0, k, v); }, pre, format, scale, rule, row, k, kp, x, scales, scratch);
}

// silu(gate) · up.
KERNEL_OF(3, operand_silu, 256, (const float* gate, const float* up, const float* pre, int format, float scale, int rule, int k,
                           int kp, uint16_t* x, float* scales)) {
    SHARED(float, scratch, THREADS / 32);
    const int row = block_x();
    const float *g = gate + (long)row * k, *u = up + (long)row * k;
    quantize_row(
        [&](int k0, float (&v)[UNIT]) {
            float w[UNIT];
            load16(g, k0, k, v), load16(u, k0, k, w);
            UNROLL for (int i = 0; i < UNIT; i++) v[i] = silu(v[i]) * w[i];
        },
        pre, format, scale, rule, row, k, kp, x, scales, scratch);
}

// out = stream + update (update null: stream as it is, out not written); normed = norm(out) · weight, and its quantized rows;
// each of the two where it is not null.
KERNEL_OF(3, operand_norm, 256, (const float* stream, const float* update, float* out, const float* weight, float eps, float* normed,
                           const float* pre, int format, float scale, int rule, int k, int kp, uint16_t* x, float* scales)) {
    SHARED(float, scratch, THREADS / 32);
    const int row = block_x();
    const float* s = stream + (long)row * k;
    auto sum = [&](int k0, float (&v)[UNIT]) {
        load16(s, k0, k, v);
        if (!update) return;
        float w[UNIT];
        load16(update + (long)row * k, k0, k, w);
        UNROLL for (int i = 0; i < UNIT; i++) v[i] += w[i];
    };
    float squares = 0.0f;
    for (int u = thread_index(); u * UNIT < k; u += THREADS) {
        float v[UNIT];
        sum(u * UNIT, v);
        UNROLL for (int i = 0; i < UNIT; i++) squares = fmaf(v[i], v[i], squares);
        if (update) UNROLL for (int i = 0; i < UNIT; i++) if (u * UNIT + i < k) st(out + (long)row * k + u * UNIT + i, v[i]);
    }
    const float inverse = 1.0f / sqrtf(block_reduce<false>(squares, scratch) / (float)k + eps);
    auto norm = [&](int k0, float (&v)[UNIT]) {
        sum(k0, v);
        float w[UNIT];
        load16(weight, k0, k, w);
        UNROLL for (int i = 0; i < UNIT; i++) v[i] = v[i] * inverse * w[i];
    };
    if (normed)
        for (int u = thread_index(); u * UNIT < k; u += THREADS) {
            float v[UNIT];
            norm(u * UNIT, v);
            UNROLL for (int i = 0; i < UNIT; i++) if (u * UNIT + i < k) st(normed + (long)row * k + u * UNIT + i, v[i]);
        }
    if (x) quantize_row(norm, pre, format, scale, rule, row, k, kp, x, scales, scratch);
}
