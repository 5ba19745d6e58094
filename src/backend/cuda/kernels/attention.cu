// Keys and values into the paged cache, and causal grouped-query attention over it, on tensor cores.
//
// The cache holds, per layer, page of 16 tokens and KV head, 16 rows of keys, and values likewise: f32, BF16 or E4M3, head_dim
// padded to 16 (values have a width dv of their own). The keys of a sequence are cut into pieces of SPLIT positions, which begin at multiples of SPLIT whatever the
// batch; a block has a piece, a KV head and 16·MT rows, and `attention_combine` adds the pieces in order. A row is a query head
// of a token; the rows of a block belong to up to RUN consecutive tokens of one sequence. Each of the four warps has a quarter
// of the piece, 64 keys, for all rows: it keeps their scores in registers, which become the A operand of the product with the
// values as they are; what the warps give is added in order. Keys that a row does not see count as exact zeros, and no row
// meets another: so a token's bits depend on its sequence only.
// Operands are BF16. Over a cache of f32 each f32 is the sum of three (24 bits), and six of their nine products are computed:
// what f32 gives. Otherwise queries and numerators are two (16 bits), the cache is exact, and the scales of E4M3 multiply scores
// and sums. Sums are f32.
// Roofline: the cache once per 16·MT rows. Limits: head_dim of queries and keys even, up to MAX_DIM.
// nvcc 13.0.88, sm_80 / 90 / 120, no spills; issue slots per HMMA in the loop over keys:
//   BF16 16 rows 3.7 / 3.9 / 4.5, 32 rows 2.0 / 2.1 / 2.9; E4M3 16 rows 8.8 / 8.8 / 8.8, 32 rows 4.8 / 4.8 / 5.3
// Decode of BF16, d = 128, sm_90: 173 slots for the keys of a page, 326 for its values, about 280 for 16 rows of numerators: 44 %
// of what an H200 at full bandwidth leaves; of E4M3 306 + 417 + 280, a tenth more than that.
#include "formats.cuh"

constexpr int PAGE = 16, SPLIT = 256, MAX_DIM = 256, ATTEND = 128, PAGES = SPLIT / PAGE / (ATTEND / 32);

enum Cache { KV_F32 = 0, KV_BF16 = 1, KV_FP8 = 2 };

// Elements between two rows of the cache.
DEV int row_pitch(int d) { return (d + 15) / 16 * 16; }
DEV void kv_store(void* cache, int format, long at, float v, float scale) {
    if (format == KV_F32) st((float*)cache + at, v);
    else if (format == KV_BF16) st((uint16_t*)cache + at, (uint16_t)to_bf16(v));
    else st((uint8_t*)cache + at, (uint8_t)encode_fp8(v, scale));
}

// Norms (where given) and rotates queries and keys, and writes keys and values to the cache. A warp has one head of one token:
// queries first, then keys, then values. `rope` is [positions, 2, half], cosines then sines, or null: the first 2·half dimensions
// turn. `growth` [tokens] multiplies turned queries, or is null.
KERNEL(rope_cache, 128, (const float* q, const float* k, const float* v, float* q_out, void* keys, void* values,
                         const float* q_norm, const float* k_norm, float eps, const float* rope, const int* positions,
                         const int* slots, const float* growth, int tokens, int heads, int kv_heads, int d, int dv, int half,
                         int format, float k_scale, float v_scale)) {
    const int per_token = heads + 2 * kv_heads, unit = block_x() * (ATTEND / 32) + warp_index();
    // Whole warps leave; nobody waits for them.
    if (unit >= tokens * per_token) return;
    const int token = unit / per_token, head = unit % per_token, lane = lane_index();
    // slots[token]: page · 16 + row in the page.
    const int slot = ld(slots + token), pitch = row_pitch(d);
    if (head >= heads + kv_heads) {
        const int h = head - heads - kv_heads;
        const long to = (((long)(slot / PAGE) * kv_heads + h) * PAGE + slot % PAGE) * row_pitch(dv);
        for (int i = lane; i < dv; i += 32) kv_store(values, format, to + i, ld(v + ((long)token * kv_heads + h) * dv + i), v_scale);
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
    const float* turn = rope ? rope + (long)ld(positions + token) * 2 * half : nullptr;
    const float grown = query && growth ? ld(growth + token) : 1.0f;
    const long to = ((long)(slot / PAGE) * kv_heads + h) * PAGE * pitch + (long)(slot % PAGE) * pitch;
    auto value = [&](int i) { return norm ? ld(from + i) * inverse * ld(norm + i) : ld(from + i); };
    auto give = [&](int i, float x) {
        if (query) st(q_out + ((long)token * heads + h) * d + i, x * grown);
        else kv_store(keys, format, to + i, x, k_scale);
    };
    const int pairs = turn ? half : 0;
    for (int i = lane; i < d - pairs; i += 32) {
        // Pairs first, then what does not turn.
        if (i >= pairs) {
            give(i + pairs, value(i + pairs));
            continue;
        }
        const float a = value(i), b = value(i + half), c = ld(turn + i), s = ld(turn + half + i);
        give(i, a * c - b * s), give(i + half, b * c + a * s);
    }
}

// BF16 terms of queries and numerators, and of keys and values.
DEV constexpr int terms(int format) { return format == KV_F32 ? 3 : 2; }
DEV constexpr int cache_terms(int format) { return format == KV_F32 ? 3 : 1; }
// Two floats as BF16 pairs: the nearest, what that leaves, and so on.
template <int N> DEV void split(float a, float b, uint32_t (&pairs)[N]) {
    UNROLL for (int i = 0; i < N; i++) {
        pairs[i] = to_bf16x2(a, b);
        a -= float_of(pairs[i] << 16), b -= float_of(pairs[i] & 0xffff0000u);
    }
}
// Two E4M3 codes, in the upper bytes of the halves of x, to a BF16 pair. NaN becomes 480: see nan_codes.
DEV uint32_t e4m3_pair(uint32_t x) { return mul_bf16x2((x & 0x80008000u) | ((x >> 4) & 0x07f007f0u), 0x7b807b80u); }
// The upper bit of each byte that is the code of a NaN, and others' lower bits: to be collected, and masked once. Where there is
// one, a NaN is put into a product that has it as operand, which is cheaper than to look at each.
DEV uint32_t nan_codes(uint32_t w) { return (w & 0x7f7f7f7fu) + 0x01010101u; }
// Elements in 16 bytes of the cache.
DEV constexpr int vector_of(int format) { return format == KV_F32 ? 4 : format == KV_BF16 ? 8 : 16; }

// B operand of product j of 16 bytes of a key, by terms: dimensions 4j..4j+3 of those.
template <int F> DEV void operand_k(const U4& v, int j, uint32_t (&b)[cache_terms(F)][2]) {
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
    if constexpr (F == KV_F32) {
        UNROLL for (int h = 0; h < 2; h++) {
            uint32_t pairs[3];
            split(float_of(w[2 * h]), float_of(w[2 * h + 1]), pairs);
            UNROLL for (int i = 0; i < 3; i++) b[i][h] = pairs[i];
        }
    } else if constexpr (F == KV_BF16) {
        b[0][0] = w[2 * j], b[0][1] = w[2 * j + 1];
    } else {
        b[0][0] = e4m3_pair(permute(w[j], 0, 0x1404)), b[0][1] = e4m3_pair(permute(w[j], 0, 0x3424));
        const uint32_t nan = nan_codes(w[0]) | nan_codes(w[1]) | nan_codes(w[2]) | nan_codes(w[3]);
        if (j == 0 && (nan & 0x80808080u)) b[0][0] = 0x7fc07fc0u;
    }
}
// Four dimensions of a value: f32 in four words, BF16 in two, E4M3 in one.
template <int F> DEV U4 load_v(const char* p) {
    if constexpr (F == KV_F32) return ld((const U4*)p);
    if constexpr (F == KV_FP8) return U4{ld((const uint32_t*)p), 0, 0, 0};
    const uint64_t v = ld((const uint64_t*)p);
    return U4{(uint32_t)v, (uint32_t)(v >> 32), 0, 0};
}
// Half a B operand by terms: dimension i of two values.
template <int F> DEV void operand_v(const U4& a, const U4& b, int i, uint32_t (&pairs)[cache_terms(F)]) {
    const uint32_t v[4] = {a.x, a.y, a.z, a.w}, w[4] = {b.x, b.y, b.z, b.w};
    if constexpr (F == KV_F32) split(float_of(v[i]), float_of(w[i]), pairs);
    else if constexpr (F == KV_BF16) pairs[0] = permute(v[i / 2], w[i / 2], i % 2 ? 0x7632 : 0x5410);
    else pairs[0] = e4m3_pair(permute(a.x, b.x, 0x4400u + 0x1111u * i));
}
// d + rest += a · b by terms, without the products that are smaller than what the last term leaves. Of three terms the first
// product has a sum of its own, rounded as often as that of an f32 kernel; `rest` is 2^-8 of it.
template <int A, int B>
DEV void mma_terms(float (&d)[4], float (&rest)[4], const uint32_t (&a)[A][4], const uint32_t (&b)[B][2]) {
    UNROLL for (int order = 0; order < A; order++)
        UNROLL for (int i = 0; i <= order; i++)
            if (order - i < B) mma_bf16(A == 3 && order > 0 ? rest : d, a[i], b[order - i][0], b[order - i][1]);
}

// The two sums of mma_terms together.
template <int F> DEV float joined(float d, float rest) { return terms(F) == 3 ? d + rest : d; }

// Softmax numerators times values over one piece of the keys: parts [tokens, heads, pieces, dv] and their maximum and sum
// [tokens, heads, pieces, 2]. `runs` [blocks, 2]: the first token of a run, and how many they are; `groups`: blocks of rows of
// the longest run.
template <int F, int MT>
DEV void attend(const float* q, const void* keys, const void* values, float* parts, float* totals, const int* positions,
                const int* tables, const int* table_of, const int* runs, int groups, int heads, int kv_heads, int d, int dv,
                int window, float scale, float k_scale, float v_scale, int pieces, SharedArray<U4> shared, SharedArray<float> maxima,
                SharedArray<float> sums) {
    constexpr int V = vector_of(F), TERMS = terms(F), ROWS = 16 * MT;
    constexpr int COLS = 9;  // a row of 32 dimensions, and 16 bytes against bank conflicts
    const int lane = lane_index(), warp = warp_index(), g = lane >> 2, t = lane & 3;
    const int share = heads / kv_heads, kv_head = block_y() / groups, row0 = block_y() % groups * ROWS;
    const int first = ld(runs + 2 * block_x()), count = ld(runs + 2 * block_x() + 1) * share;
    if (row0 >= count) return;
    const int piece = block_z(), base = piece * SPLIT, pitch = row_pitch(d), steps = (pitch + 4 * V - 1) / (4 * V) * (V / 4);
    // The token's head of a row, the keys it sees, and those that any row sees.
    auto head_of = [&](int row) { return (long)(first + row / share) * heads + kv_head * share + row % share; };
    auto end_of = [&](int row) { return ld(positions + first + row / share) + 1; };
    auto begin_of = [&](int end) { return window > 0 ? max(0, end - window) : 0; };
    const int block_end = end_of(min(row0 + ROWS, count) - 1), block_begin = begin_of(end_of(row0));
    if (block_end <= base || block_begin >= base + SPLIT) return;

    // Queries as A operands: [tile][step][term][lane]. Lane 4g+t has, of each 4·V dimensions, V from t·V on.
    for (int i = thread_index(); i < MT * steps * 32; i += ATTEND) {
        const int l = i % 32, step = i / 32 % steps, tile = i / 32 / steps;
        const int dim = step / (V / 4) * 4 * V + (l & 3) * V + step % (V / 4) * 4;
        uint32_t a[TERMS][4], pairs[TERMS];
        UNROLL for (int upper = 0; upper < 2; upper++) {
            const float* from = q + head_of(min(row0 + tile * 16 + (l >> 2) + 8 * upper, count - 1)) * d;
            float v[4];
            UNROLL for (int e = 0; e < 4; e++) v[e] = dim + e < d ? ld(from + dim + e) : 0.0f;
            UNROLL for (int h = 0; h < 2; h++) {
                split(v[2 * h], v[2 * h + 1], pairs);
                UNROLL for (int e = 0; e < TERMS; e++) a[e][2 * h + upper] = pairs[e];
            }
        }
        UNROLL for (int e = 0; e < TERMS; e++)
            shared[((tile * steps + step) * TERMS + e) * 32 + l] = U4{a[e][0], a[e][1], a[e][2], a[e][3]};
    }
    const int key0 = base + warp * PAGES * PAGE;
    const int* table = tables + ld(table_of + first) + key0 / PAGE;
    // Pages that any row sees (the others are zeros), their first rows, and of the values that lane's part: bit 4·page + i
    // for its key i.
    const bool any = key0 < block_end && key0 + PAGES * PAGE > block_begin;
    bool seen[PAGES];
    int at[PAGES];
    uint32_t wanted = 0;
    UNROLL for (int p = 0; p < PAGES; p++) {
        const int start = key0 + p * PAGE;
        seen[p] = start < block_end && start + PAGE > block_begin;
        at[p] = seen[p] ? (ld(table + p) * kv_heads + kv_head) * PAGE : 0;
        UNROLL for (int i = 0; i < 4; i++) {
            const int key = start + 2 * t + (i & 1) + (i >> 1) * 8;
            if (key < block_end && key >= block_begin) wanted |= 1u << (4 * p + i);
        }
    }
    block_sync();

    // Scores: columns of a product are eight keys, two products a page.
    float s[MT][2 * PAGES][4] = {}, s_rest[MT][2 * PAGES][4] = {};
    const char* key[PAGES];
    UNROLL for (int p = 0; p < PAGES; p++) key[p] = (const char*)keys + ((long)(at[p] + g) * pitch + t * V) * (16 / V);
    for (int chunk = 0; any && chunk * 4 * V < pitch; chunk++) {
        const bool inside = chunk * 4 * V + t * V < pitch;
        U4 raw[PAGES][2];
        UNROLL for (int p = 0; p < PAGES; p++)
            UNROLL for (int i = 0; i < 2; i++)
                raw[p][i] = seen[p] && inside ? ld((const U4*)(key[p] + i * 8 * pitch * (16 / V)) + chunk * 4) : U4{0, 0, 0, 0};
        UNROLL for (int j = 0; j < V / 4; j++) {
            uint32_t a[MT][TERMS][4];
            UNROLL for (int m = 0; m < MT; m++)
                UNROLL for (int e = 0; e < TERMS; e++) {
                    const U4 v = shared[((m * steps + chunk * (V / 4) + j) * TERMS + e) * 32 + lane];
                    a[m][e][0] = v.x, a[m][e][1] = v.y, a[m][e][2] = v.z, a[m][e][3] = v.w;
                }
            UNROLL for (int p = 0; p < PAGES; p++)
                UNROLL for (int i = 0; i < 2; i++) {
                    uint32_t b[cache_terms(F)][2];
                    operand_k<F>(raw[p][i], j, b);
                    UNROLL for (int m = 0; m < MT; m++) mma_terms(s[m][2 * p + i], s_rest[m][2 * p + i], a[m], b);
                }
        }
    }

    // A row's maximum over the piece, numerators, their sum: lanes of a row by a tree, warps in order.
    const float factor = F == KV_FP8 ? scale * k_scale : scale;
    int begin[MT][2], end[MT][2];
    UNROLL for (int m = 0; m < MT; m++)
        UNROLL for (int upper = 0; upper < 2; upper++) {
            const int row = m * 16 + g + 8 * upper;
            // Relative to the lane's first key.
            const int last = row0 + row < count ? end_of(row0 + row) : 0;
            begin[m][upper] = begin_of(last) - key0 - 2 * t, end[m][upper] = last - key0 - 2 * t;
            float most = -INFINITY;
            UNROLL for (int n = 0; n < 2 * PAGES; n++)
                UNROLL for (int e = 0; e < 2; e++) {
                    float& x = s[m][n][2 * upper + e];
                    x = joined<F>(x, s_rest[m][n][2 * upper + e]) * factor;
                    if (n * 8 + e >= begin[m][upper] && n * 8 + e < end[m][upper] && x > most) most = x;
                }
            UNROLL for (int i = 1; i < 4; i *= 2) {
                const float o = shfl_xor(most, i);
                most = o > most ? o : most;
            }
            if (t == 0) maxima[warp * ROWS + row] = most;
        }
    block_sync();
    uint32_t numerators[MT][PAGES][TERMS][4];
    UNROLL for (int m = 0; m < MT; m++)
        UNROLL for (int upper = 0; upper < 2; upper++) {
            const int row = m * 16 + g + 8 * upper;
            float most = -INFINITY, sum = 0.0f;
            UNROLL for (int w = 0; w < ATTEND / 32; w++) {
                const float o = maxima[w * ROWS + row];
                most = o > most ? o : most;
            }
            UNROLL for (int n = 0; n < 2 * PAGES; n++) {
                float p[2];
                UNROLL for (int e = 0; e < 2; e++) {
                    const bool sees = n * 8 + e >= begin[m][upper] && n * 8 + e < end[m][upper];
                    p[e] = sees ? exp_f32(s[m][n][2 * upper + e] - most) : 0.0f;
                    sum += p[e];
                }
                uint32_t pairs[TERMS];
                split(p[0], p[1], pairs);
                UNROLL for (int e = 0; e < TERMS; e++) numerators[m][n / 2][e][n % 2 * 2 + upper] = pairs[e];
            }
            UNROLL for (int i = 1; i < 4; i *= 2) sum += shfl_xor(sum, i);
            if (t == 0) sums[warp * ROWS + row] = sum;
        }

    // A thread adds what the warps have of a row's four dimensions, and writes that; null: the row sees nothing of the piece.
    float* to[MT];
    UNROLL for (int m = 0; m < MT; m++) {
        const int row = row0 + m * 16 + thread_index() / 8, last = row < count ? end_of(row) : 0;
        const bool sees = row < count && last > base && begin_of(last) < base + SPLIT;
        to[m] = sees ? parts + (head_of(row) * pieces + piece) * dv : nullptr;
    }
    // Values, 32 dimensions at a time: lane 4g+t has dimensions 4g..4g+3 of keys 2t, 2t+1, 2t+8, 2t+9 of each page.
    const char* value[PAGES];
    const int wide = row_pitch(dv);
    UNROLL for (int p = 0; p < PAGES; p++) value[p] = (const char*)values + ((long)(at[p] + 2 * t) * wide + 4 * g) * (16 / V);
    for (int dim0 = 0; dim0 < wide; dim0 += 32) {
        float o[MT][4][4] = {}, o_rest[MT][4][4] = {};
        if (any) {
            const bool inside = dim0 + 4 * g < wide;
            U4 raw[PAGES][4];
            uint32_t nan = 0;
            UNROLL for (int p = 0; p < PAGES; p++)
                UNROLL for (int i = 0; i < 4; i++) {
                    const char* from = value[p] + ((i & 1) + (i >> 1) * 8) * wide * (16 / V) + dim0 * (16 / V);
                    raw[p][i] = (wanted >> (4 * p + i) & 1) && inside ? load_v<F>(from) : U4{0, 0, 0, 0};
                    if (F == KV_FP8) nan |= nan_codes(raw[p][i].x);
                }
            UNROLL for (int p = 0; p < PAGES; p++)
                UNROLL for (int i = 0; i < 4; i++) {
                    uint32_t b[cache_terms(F)][2], pairs[cache_terms(F)];
                    UNROLL for (int h = 0; h < 2; h++) {
                        operand_v<F>(raw[p][2 * h], raw[p][2 * h + 1], i, pairs);
                        UNROLL for (int e = 0; e < cache_terms(F); e++) b[e][h] = pairs[e];
                    }
                    if (F == KV_FP8 && p == 0 && (nan >> (8 * i + 7) & 1)) b[0][0] = 0x7fc07fc0u;
                    UNROLL for (int m = 0; m < MT; m++) mma_terms(o[m][i], o_rest[m][i], numerators[m][p], b);
                }
        }
        // Everyone is done with queries, or with the sums before these.
        block_sync();
        UNROLL for (int m = 0; m < MT; m++)
            UNROLL for (int i = 0; i < 4; i++)
                shared[(warp * ROWS + m * 16 + g + (i >> 1) * 8) * COLS + 2 * t + (i & 1)] =
                    U4{bits_of(joined<F>(o[m][0][i], o_rest[m][0][i])), bits_of(joined<F>(o[m][1][i], o_rest[m][1][i])),
                       bits_of(joined<F>(o[m][2][i], o_rest[m][2][i])), bits_of(joined<F>(o[m][3][i], o_rest[m][3][i]))};
        block_sync();
        const int dim = dim0 + thread_index() % 8 * 4;
        UNROLL for (int m = 0; m < MT; m++) {
            if (!to[m] || dim >= dv) continue;
            float v[4] = {};
            UNROLL for (int w = 0; w < ATTEND / 32; w++) {
                const U4 part = shared[(w * ROWS + m * 16 + thread_index() / 8) * COLS + thread_index() % 8];
                v[0] += float_of(part.x), v[1] += float_of(part.y), v[2] += float_of(part.z), v[3] += float_of(part.w);
            }
            if (F == KV_FP8) UNROLL for (int e = 0; e < 4; e++) v[e] *= v_scale;
            if (dv % 4 == 0) st((U4*)(to[m] + dim), U4{bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3])});
            else UNROLL for (int e = 0; e < 4; e++) if (dim + e < dv) st(to[m] + dim + e, v[e]);
        }
    }
    UNROLL for (int m = 0; m < MT; m++) {
        if (!to[m] || thread_index() % 8 > 0) continue;
        const int row = m * 16 + thread_index() / 8;
        float most = -INFINITY, sum = 0.0f;
        UNROLL for (int w = 0; w < ATTEND / 32; w++) {
            const float o = maxima[w * ROWS + row];
            most = o > most ? o : most;
            sum += sums[w * ROWS + row];
        }
        float* out = totals + (head_of(row0 + row) * pieces + piece) * 2;
        st(out, most), st(out + 1, sum);
    }
}
#define ATTENTION(name, F, MT)                                                                                             \
    KERNEL_OF(MT == 1 && F != KV_F32 ? 4 : 2, attention_##name, 128,                                                       \
              (const float* q, const void* keys, const void* values, float* parts, float* totals, const int* positions,   \
               const int* tables, const int* table_of, const int* runs, int groups, int heads, int kv_heads, int d,       \
               int dv, int window, float scale, float k_scale, float v_scale, int pieces)) {                                      \
        SHARED(U4, shared, MAX_DIM / 16 * 32 * terms(F) * MT);                                                             \
        SHARED(float, maxima, ATTEND / 32 * 16 * MT);                                                                      \
        SHARED(float, sums, ATTEND / 32 * 16 * MT);                                                                        \
        attend<F, MT>(q, keys, values, parts, totals, positions, tables, table_of, runs, groups, heads, kv_heads, d,      \
                      dv, window, scale, k_scale, v_scale, pieces, shared, maxima, sums);                                      \
    }
ATTENTION(f32_16, KV_F32, 1)
ATTENTION(bf16_16, KV_BF16, 1)
ATTENTION(bf16_32, KV_BF16, 2)
ATTENTION(fp8_16, KV_FP8, 1)
ATTENTION(fp8_32, KV_FP8, 2)

// Adds the pieces of a token's head, in order: [tokens, heads, dv]. `sinks` [heads], or null: a score that joins the maximum and,
// last, the sum, and has no value.
KERNEL(attention_combine, 128, (const float* parts, const float* totals, const float* sinks, float* out, const int* positions,
                                int heads, int dv, int window, int pieces)) {
    const int token = block_x(), head = block_y();
    const int end = ld(positions + token) + 1, begin = window > 0 ? max(0, end - window) : 0;
    const int first = begin / SPLIT, last = (end - 1) / SPLIT;
    const long row = (long)token * heads + head;
    float most = sinks ? ld(sinks + head) : -INFINITY, sum = 0.0f;
    for (int p = first; p <= last; p++) most = fmaxf(most, ld(totals + (row * pieces + p) * 2));
    for (int p = first; p <= last; p++)
        sum = fmaf(exp_f32(ld(totals + (row * pieces + p) * 2) - most), ld(totals + (row * pieces + p) * 2 + 1), sum);
    if (sinks) sum += exp_f32(ld(sinks + head) - most);
    for (int i = thread_index(); i < dv; i += ATTEND) {
        float v = 0.0f;
        for (int p = first; p <= last; p++)
            v = fmaf(exp_f32(ld(totals + (row * pieces + p) * 2) - most), ld(parts + (row * pieces + p) * dv + i), v);
        st(out + row * dv + i, v / sum);
    }
}
