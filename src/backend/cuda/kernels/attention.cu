// Keys and values into the paged cache, and causal grouped-query attention over it.
//
// The cache holds, per layer, page of 16 tokens and KV head, 16 rows of head_dim keys, and values likewise: f32, BF16 or E4M3.
// The keys of a sequence are cut into pieces of SPLIT positions; a block computes one query row, one KV head and one piece for
// up to HEADS query heads that share it, and `attention_combine` adds the pieces in order. Pieces begin at multiples of SPLIT
// whatever the batch, so a token's result depends on its sequence only. Roofline: the cache once per query row and head group.
#include "formats.cuh"

constexpr int PAGE = 16, SPLIT = 256, HEADS = 4, MAX_DIM = 256, ATTEND = 128;

enum Cache { KV_F32 = 0, KV_BF16 = 1, KV_FP8 = 2 };

DEV float kv_load(const void* cache, int format, long at, float scale) {
    if (format == KV_F32) return ld((const float*)cache + at);
    if (format == KV_BF16) return float_of((uint32_t)ld((const uint16_t*)cache + at) << 16);
    return decode_e4m3(ld((const uint8_t*)cache + at)) * scale;
}
DEV void kv_store(void* cache, int format, long at, float v, float scale) {
    if (format == KV_F32) st((float*)cache + at, v);
    else if (format == KV_BF16) st((uint16_t*)cache + at, (uint16_t)to_bf16(v));
    else st((uint8_t*)cache + at, (uint8_t)encode_fp8(v, scale));
}

// Norms (where given) and rotates queries and keys, and writes keys and values to the cache. A warp has one head of one token:
// queries first, then keys, then values. `rope` is [positions, 2, d/2], cosines then sines, or null.
KERNEL(rope_cache, 128, (const float* q, const float* k, const float* v, float* q_out, void* keys, void* values,
                         const float* q_norm, const float* k_norm, float eps, const float* rope, const int* positions,
                         const int* slots, int tokens, int heads, int kv_heads, int d, int format, float k_scale, float v_scale)) {
    const int per_token = heads + 2 * kv_heads, unit = block_x() * (ATTEND / 32) + warp_index();
    // Whole warps leave; nobody waits for them.
    if (unit >= tokens * per_token) return;
    const int token = unit / per_token, head = unit % per_token, lane = lane_index();
    // slots[token]: page · 16 + row in the page.
    const int slot = ld(slots + token);
    if (head >= heads + kv_heads) {
        const int h = head - heads - kv_heads;
        const long to = ((long)(slot / PAGE) * kv_heads + h) * PAGE * d + (long)(slot % PAGE) * d;
        for (int i = lane; i < d; i += 32) kv_store(values, format, to + i, ld(v + ((long)token * kv_heads + h) * d + i), v_scale);
        return;
    }
    const bool query = head < heads;
    const int h = query ? head : head - heads;
    const float* from = query ? q + ((long)token * heads + h) * d : k + ((long)token * kv_heads + h) * d;
    const float* norm = query ? q_norm : k_norm;
    float inverse = 1.0f;
    if (norm) {
        float squares = 0.0f;
        for (int i = lane; i < d; i += 32) {
            const float x = ld(from + i);
            squares = fmaf(x, x, squares);
        }
        UNROLL for (int m = 16; m > 0; m /= 2) squares += shfl_xor(squares, m);
        inverse = 1.0f / sqrtf(squares / (float)d + eps);
    }
    const float* turn = rope ? rope + (long)ld(positions + token) * d : nullptr;
    const long to = ((long)(slot / PAGE) * kv_heads + h) * PAGE * d + (long)(slot % PAGE) * d;
    for (int i = lane; i < d / 2; i += 32) {
        float a = ld(from + i), b = ld(from + d / 2 + i);
        if (norm) a = a * inverse * ld(norm + i), b = b * inverse * ld(norm + d / 2 + i);
        if (turn) {
            const float c = ld(turn + i), s = ld(turn + d / 2 + i), x = a * c - b * s;
            b = b * c + a * s;
            a = x;
        }
        if (query) {
            st(q_out + ((long)token * heads + h) * d + i, a);
            st(q_out + ((long)token * heads + h) * d + d / 2 + i, b);
        } else {
            kv_store(keys, format, to + i, a, k_scale);
            kv_store(keys, format, to + d / 2 + i, b, k_scale);
        }
    }
}

// Softmax numerators times values over one piece of the keys: parts [tokens, heads, pieces, d] and their maximum and sum
// [tokens, heads, pieces, 2].
KERNEL(attention, 128, (const float* q, const void* keys, const void* values, float* parts, float* totals, const int* positions,
                        const int* tables, const int* table_of, int heads, int kv_heads, int d, int window, float scale,
                        int format, float k_scale, float v_scale, int pieces)) {
    SHARED(float, query, HEADS * MAX_DIM);
    SHARED(float, scores, HEADS * SPLIT);
    const int share = heads / kv_heads, groups = (share + HEADS - 1) / HEADS;
    const int token = block_x(), kv_head = block_y() / groups, head0 = kv_head * share + block_y() % groups * HEADS;
    const int count = min(HEADS, kv_head * share + share - head0), piece = block_z();
    const int end = ld(positions + token) + 1, begin = window > 0 ? max(0, end - window) : 0;
    const int from = max(begin, piece * SPLIT), to = min(end, (piece + 1) * SPLIT);
    if (from >= to) return;
    const int* table = tables + ld(table_of + token);
    for (int i = thread_index(); i < count * d; i += ATTEND) query[i] = ld(q + ((long)token * heads + head0) * d + i);
    block_sync();

    // Scores: half a warp has a page, a lane a key.
    for (int p = from / PAGE + thread_index() / PAGE; p * PAGE < to; p += ATTEND / PAGE) {
        const int position = p * PAGE + thread_index() % PAGE;
        if (position < from || position >= to) continue;
        const long at = ((long)ld(table + p) * kv_heads + kv_head) * PAGE * d + (long)(position % PAGE) * d;
        float sums[HEADS] = {};
        for (int i = 0; i < d; i++) {
            const float x = kv_load(keys, format, at + i, k_scale);
            UNROLL for (int h = 0; h < HEADS; h++) if (h < count) sums[h] = fmaf(x, query[h * d + i], sums[h]);
        }
        UNROLL for (int h = 0; h < HEADS; h++) if (h < count) scores[h * SPLIT + position - piece * SPLIT] = sums[h] * scale;
    }
    block_sync();

    // A warp has a head: maximum, numerators, sum.
    const int h = warp_index(), lane = lane_index(), offset = piece * SPLIT;
    if (h < count) {
        float most = -INFINITY, sum = 0.0f;
        for (int i = from - offset + lane; i < to - offset; i += 32) {
            const float s = scores[h * SPLIT + i];
            most = s > most ? s : most;
        }
        UNROLL for (int m = 16; m > 0; m /= 2) {
            const float o = shfl_xor(most, m);
            most = o > most ? o : most;
        }
        for (int i = from - offset + lane; i < to - offset; i += 32) {
            const float e = exp_f32(scores[h * SPLIT + i] - most);
            scores[h * SPLIT + i] = e;
            sum += e;
        }
        UNROLL for (int m = 16; m > 0; m /= 2) sum += shfl_xor(sum, m);
        if (lane == 0) {
            float* out = totals + (((long)token * heads + head0 + h) * pieces + piece) * 2;
            st(out, most), st(out + 1, sum);
        }
    }
    block_sync();

    // Values: a thread has dimensions.
    for (int i = thread_index(); i < d; i += ATTEND) {
        float sums[HEADS] = {};
        for (int position = from; position < to; position++) {
            const long at = ((long)ld(table + position / PAGE) * kv_heads + kv_head) * PAGE * d + (long)(position % PAGE) * d;
            const float x = kv_load(values, format, at + i, v_scale);
            UNROLL for (int g = 0; g < HEADS; g++) if (g < count) sums[g] = fmaf(scores[g * SPLIT + position - offset], x, sums[g]);
        }
        UNROLL for (int g = 0; g < HEADS; g++)
            if (g < count) st(parts + (((long)token * heads + head0 + g) * pieces + piece) * d + i, sums[g]);
    }
}

// Adds the pieces of a token's head, in order: [tokens, heads, d].
KERNEL(attention_combine, 128, (const float* parts, const float* totals, float* out, const int* positions, int heads, int d,
                                int window, int pieces)) {
    const int token = block_x(), head = block_y();
    const int end = ld(positions + token) + 1, begin = window > 0 ? max(0, end - window) : 0;
    const int first = begin / SPLIT, last = (end - 1) / SPLIT;
    const long row = (long)token * heads + head;
    float most = -INFINITY, sum = 0.0f;
    for (int p = first; p <= last; p++) most = fmaxf(most, ld(totals + (row * pieces + p) * 2));
    for (int p = first; p <= last; p++)
        sum = fmaf(exp_f32(ld(totals + (row * pieces + p) * 2) - most), ld(totals + (row * pieces + p) * 2 + 1), sum);
    for (int i = thread_index(); i < d; i += ATTEND) {
        float v = 0.0f;
        for (int p = first; p <= last; p++)
            v = fmaf(exp_f32(ld(totals + (row * pieces + p) * 2) - most), ld(parts + (row * pieces + p) * d + i), v);
        st(out + row * d + i, v / sum);
    }
}
