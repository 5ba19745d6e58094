// A mixture of experts without the host in between. `pairs` are (token, one of its experts); sorted by expert and then token they
// are the rows of everything between the router and the sum, so that each expert's rows lie together: expert e has rows
// begins[e]..begins[e+1]. Grids are for the worst case; blocks without rows leave.
// Roofline: weights of the experts that are chosen, once.
#include "formats.cuh"

constexpr int MIX = 256, MAX_EXPERTS = 512, ROUTERS = 4;

// What experts are compared by; the numbers are those of `scores_number` in mixture.rs.
enum Scores { SOFTMAX = 0, SOFTMAX_OF_CHOSEN = 1, SIGMOID = 2 };

// Below all that can be chosen.
constexpr int NEVER = -0x7fffffff - 1;
// Of equal scores equal, -0 and 0 among them; ascends as the numbers do, NaN beyond them all.
DEV int order_of(float x) {
    if (x != x) return 0x7fffffff;
    const int bits = (int)bits_of(x + 0.0f);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// Router logits [tokens, count] to the k best experts and their weights, [tokens, k], ascending by expert. What is compared:
// softmax, logits, or sigmoid with `bias` (or null) added, of the experts in the `top_groups` groups whose two best have the
// largest sums. Weights are softmax (of all, of the chosen) or sigmoid; where `rescale`, divided by their sum and `epsilon`;
// times `scale`. A warp has a token; all in the order of logits/routing.rs.
KERNEL(mixture_route, 128, (const float* logits, const float* bias, int* experts, float* weights, int tokens, int count, int k,
                            int scores, int groups, int top_groups, int rescale, float epsilon, float scale)) {
    SHARED(float, values, ROUTERS * MAX_EXPERTS);
    SHARED(int, orders, ROUTERS * MAX_EXPERTS);
    SHARED(int, chosen, ROUTERS * MAX_EXPERTS);
    SHARED(float, best, ROUTERS * MAX_EXPERTS);
    const int token = block_x() * ROUTERS + warp_index(), lane = lane_index(), base = warp_index() * MAX_EXPERTS;
    // Whole warps leave; nobody waits for them.
    if (token >= tokens) return;
    const float* row = logits + (long)token * count;
    float total = 0.0f;
    if (scores == SOFTMAX) {
        float most = -INFINITY;
        for (int e = lane; e < count; e += 32) most = fmaxf(most, ld(row + e));
        UNROLL for (int m = 16; m > 0; m /= 2) most = fmaxf(most, shfl_xor(most, m));
        for (int e = lane; e < count; e += 32) best[base + e] = exp_libm(ld(row + e) - most);
        warp_sync();
        for (int e = 0; e < count; e++) total += best[base + e];
    }
    for (int e = lane; e < count; e += 32) {
        float v = ld(row + e);
        if (scores == SOFTMAX) v = best[base + e] / total;
        if (scores == SIGMOID) v = 1.0f / (1.0f + exp_libm(-v));
        values[base + e] = v;
        orders[base + e] = order_of(bias ? v + ld(bias + e) : v);
    }
    warp_sync();
    if (groups > 1) {
        const int size = count / groups;
        for (int g = lane; g < groups; g += 32) {
            int first = NEVER, second = NEVER;
            float two[2] = {0.0f, 0.0f};
            for (int e = g * size; e < (g + 1) * size; e++) {
                const int o = orders[base + e];
                const float v = bias ? values[base + e] + ld(bias + e) : values[base + e];
                if (o > first) second = first, first = o, two[1] = two[0], two[0] = v;
                else if (o > second) second = o, two[1] = v;
            }
            chosen[base + g] = order_of(two[0] + two[1]);
        }
        warp_sync();
        for (int g = lane; g < groups; g += 32) {
            const int own = chosen[base + g];
            int rank = 0;
            for (int other = 0; other < groups; other++) {
                const int o = chosen[base + other];
                rank += o > own || (o == own && other < g);
            }
            if (rank < top_groups) continue;
            for (int e = g * size; e < (g + 1) * size; e++) orders[base + e] = NEVER;
        }
        warp_sync();
    }
    // One after the other, of equal ones the first.
    for (int i = 0; i < k; i++) {
        int most = NEVER, at = 0;
        for (int e = lane; e < count; e += 32) {
            const int o = orders[base + e];
            if (o > most) most = o, at = e;
        }
        UNROLL for (int m = 16; m > 0; m /= 2) {
            const int o = shfl_xor(most, m), a = shfl_xor(at, m);
            if (o > most || (o == most && a < at)) most = o, at = a;
        }
        warp_sync();
        if (lane == 0) chosen[base + i] = at, best[base + i] = values[base + at], orders[base + at] = NEVER;
        warp_sync();
    }
    if (scores == SOFTMAX_OF_CHOSEN) {
        float most = -INFINITY;
        for (int i = 0; i < k; i++) most = fmaxf(most, best[base + i]);
        warp_sync();
        for (int i = lane; i < k; i += 32) best[base + i] = exp_libm(best[base + i] - most);
        warp_sync();
        for (int i = 0; i < k; i++) total += best[base + i];
        warp_sync();
        for (int i = lane; i < k; i += 32) best[base + i] = best[base + i] / total;
        warp_sync();
    }
    float kept = 0.0f;
    for (int i = 0; i < k; i++) kept += best[base + i];
    for (int i = lane; i < k; i += 32) {
        const int e = chosen[base + i];
        int to = 0;
        for (int other = 0; other < k; other++) to += chosen[base + other] < e;
        const float own = best[base + i];
        st(experts + (long)token * k + to, e);
        st(weights + (long)token * k + to, (rescale ? own / (kept + epsilon) : own) * scale);
    }
}

// Sorts pairs by expert, then token: of the sorted ones the token and the expert; place [pairs] where each went; begins [count +
// 1]. A block has an expert.
KERNEL(mixture_sort, 256, (const int* experts, int* token_of, int* expert_of, int* place, int* begins, int pairs, int k, int count)) {
    SHARED(int, of_warps, MIX / 32);
    const int expert = block_x(), t = thread_index(), lane = lane_index();
    int before = 0;
    for (int p = t; p < pairs; p += MIX) before += ld(experts + p) < expert;
    UNROLL for (int m = 16; m > 0; m /= 2) before += shfl_xor(before, m);
    if (lane == 0) of_warps[warp_index()] = before;
    block_sync();
    int at = 0;
    for (int w = 0; w < MIX / 32; w++) at += of_warps[w];
    if (t == 0) st(begins + expert, at);
    for (int from = 0; from < pairs; from += MIX) {
        const int p = from + t, hit = p < pairs && ld(experts + p) == expert;
        int upto = hit;
        UNROLL for (int m = 1; m < 32; m *= 2) {
            const int o = shfl(upto, lane - m);
            if (lane >= m) upto += o;
        }
        block_sync();
        if (lane == 31) of_warps[warp_index()] = upto;
        block_sync();
        int to = at + upto - 1;
        for (int w = 0; w < MIX / 32; w++) {
            if (w < warp_index()) to += of_warps[w];
            at += of_warps[w];
        }
        if (hit) st(token_of + to, p / k), st(expert_of + to, expert), st(place + p, to);
    }
    if (t == 0 && expert == count - 1) st(begins + count, at);
}

// Rows of sorted pairs, quantized: of x's tokens, with the scale and the factors of columns (pointers, or null) of their expert.
KERNEL_OF(2, mixture_operand, 256, (const float* in, const int* token_of, const int* expert_of, const float* scale_of, const uint64_t* pre_of,
                              int format, int rule, int k, int kp, uint16_t* x, float* scales)) {
    SHARED(float, scratch, THREADS / 32);
    const int row = block_x(), expert = ld(expert_of + row);
    const float* p = in + (long)ld(token_of + row) * k;
    quantize_row([&](int k0, float (&v)[UNIT]) { load16(p, k0, k, v); }, (const float*)ld(pre_of + expert), format,
                 ld(scale_of + expert), rule, row, k, kp, x, scales, scratch);
}
// activation(gate, up) of sorted pairs, rows `pitch` apart, quantized likewise; up is null for relu².
KERNEL_OF(3, mixture_activate, 256, (const float* gate, const float* up, int pitch, int kind, float limit, const int* expert_of,
                               const float* scale_of, const uint64_t* pre_of, int format, int rule, int k, int kp, uint16_t* x,
                               float* scales)) {
    SHARED(float, scratch, THREADS / 32);
    const int row = block_x(), expert = ld(expert_of + row);
    const float *g = gate + (long)row * pitch, *u = up ? up + (long)row * pitch : nullptr;
    quantize_row(
        [&](int k0, float (&v)[UNIT]) {
            float w[UNIT] = {};
            load16(g, k0, k, v);
            if (u) load16(u, k0, k, w);
            UNROLL for (int i = 0; i < UNIT; i++) v[i] = activated(kind, limit, v[i], w[i]);
        },
        (const float*)ld(pre_of + expert), format, ld(scale_of + expert), rule, row, k, kp, x, scales, scratch);
}

// The products of matmul.cu of sorted rows with their experts' weights; `experts` [count, 5] are pointers to words, block scales,
// grid of scales, row scales and bias, null where there is none. Blocks are (outputs, rows, expert).
template <int W, int NT, bool GROUPED>
DEV void mixture_matmul(const uint64_t* experts, const int* begins, const uint16_t* x, const float* x_scales, const float* x_groups,
                        const float* scale_of, float* y, int planes, int n, int k, SharedArray<float> sums) {
    const int expert = block_z(), first = ld(begins + expert), rows = (ld(begins + expert + 1) - first) * planes;
    if (block_y() * 8 * NT >= rows) return;
    const uint64_t* p = experts + 5 * expert;
    matmul<W, NT, GROUPED>((const U4*)ld(p), (const uint32_t*)ld(p + 1), (const float*)ld(p + 2), x + (long)first * planes * k,
                           x_scales ? x_scales + first : nullptr, x_groups ? x_groups + (long)first * (k / STEP) : nullptr, (const float*)ld(p + 3), (const float*)ld(p + 4),
                           y + (long)first * n, rows, planes, n, k, ld(scale_of + expert), sums);
}
#define MIXTURE(name, W, NT, GROUPED)                                                                                        \
    KERNEL_OF(NT == 1 ? blocks_of(NT, GROUPED) : 1, mixture_##name, 256,                                                     \
              (const uint64_t* experts, const int* begins, const uint16_t* x, const float* x_scales, const float* x_groups,  \
               const float* scale_of, float* y, int planes, int n, int k)) {                                                 \
        SHARED(float, sums, WARPS * NT * 8 * TILES * TILE);                                                                  \
        mixture_matmul<W, NT, GROUPED>(experts, begins, x, x_scales, x_groups, scale_of, y, planes, n, k, sums);             \
    }
#define MIXTURES(name, W)              \
    MIXTURE(name##_8, W, 1, false)     \
    MIXTURE(name##_32, W, 4, false)
MIXTURES(e2m1_16, W_E2M1_16)
MIXTURES(e2m1_32, W_E2M1_32)
MIXTURES(mxfp4, W_MXFP4)
MIXTURES(e4m3, W_E4M3)
MIXTURES(mxfp8, W_MXFP8)
MIXTURES(bf16, W_BF16)
MIXTURE(e4m3_8g, W_E4M3, 1, true)
MIXTURE(e4m3_32g, W_E4M3, 4, true)

#if HAS_NARROW
// The same with the products of narrow.cu; a row of x has k/2 or k bytes.
template <int W, int NT, bool GROUPED>
DEV void mixture_narrow(const uint64_t* experts, const int* begins, const U4* x, const uint32_t* x_scales, const float* x_groups,
                        const float* scale_of, float* y, int n, int k, SharedArray<float> sums) {
    const int expert = block_z(), first = ld(begins + expert), rows = ld(begins + expert + 1) - first;
    if (block_y() * 8 * NT >= rows) return;
    const uint64_t* p = experts + 5 * expert;
    narrow_matmul<W, NT, GROUPED>((const U4*)ld(p), (const uint32_t*)ld(p + 1), (const float*)ld(p + 2), x + (long)first * (k / 32 * words(W)),
                                  x_scales ? x_scales + (long)first * token_pitch(W, k / STEP) : nullptr,
                                  x_groups ? x_groups + (long)first * (k / STEP) : nullptr, (const float*)ld(p + 3), (const float*)ld(p + 4),
                                  y + (long)first * n, rows, n, k, ld(scale_of + expert), sums);
}
#define MIXTURE_NARROW(name, W, NT, GROUPED)                                                                                          \
    KERNEL_OF(NT == 1 ? blocks_of(NT, GROUPED) : 1, mixture_##name, 256,                                                     \
              (const uint64_t* experts, const int* begins, const U4* x, const uint32_t* x_scales, const float* x_groups,     \
               const float* scale_of, float* y, int planes, int n, int k)) {                                                 \
        SHARED(float, sums, WARPS * NT * 8 * TILES * TILE);                                                                  \
        mixture_narrow<W, NT, GROUPED>(experts, begins, x, x_scales, x_groups, scale_of, y, n, k, sums);                     \
    }
#define MIXTURES_NARROW(name, W)            \
    MIXTURE_NARROW(name##_8, W, 1, false)   \
    MIXTURE_NARROW(name##_32, W, 4, false)
MIXTURES_NARROW(fp4_16, W_FP4_16)
MIXTURES_NARROW(fp4_32, W_FP4_32)
MIXTURES_NARROW(fp8, W_FP8)
MIXTURES_NARROW(fp8_mx, W_FP8_MX)
MIXTURE_NARROW(fp8_8g, W_FP8, 1, true)
MIXTURE_NARROW(fp8_32g, W_FP8, 4, true)
#endif

#if HAS_TCGEN
// The same with the products of tcgen.cu: blocks are (128 outputs, TOKENS rows, expert).
template <int W, int TOKENS>
DEV void mixture_tcgen(const uint64_t* experts, const int* begins, const U4* x, const uint32_t* x_scales, const float* scale_of, float* y,
                       int n, int k, SharedArray<U4> stages, SharedArray<uint64_t> done, SharedArray<uint32_t> columns) {
    const int expert = block_z(), first = ld(begins + expert), rows = ld(begins + expert + 1) - first;
    if (block_y() * TOKENS >= rows) return;
    const uint64_t* p = experts + 5 * expert;
    tcgen<W, TOKENS>((const U4*)ld(p), (const U4*)ld(p + 1), x + (long)first * (k / 32), x_scales + (long)first * (scale_pieces(W) * (k / STEP) + 1),
                     (const float*)ld(p + 3), (const float*)ld(p + 4), y + (long)first * n, rows, 1, n, k, ld(scale_of + expert), stages, done,
                     columns);
}
#define MIXTURE_TCGEN(name, W, TOKENS)                                                                                       \
    KERNEL_OF(2, mixture_##name, 256,                                                                                        \
              (const uint64_t* experts, const int* begins, const U4* x, const uint32_t* x_scales, const float* x_groups,     \
               const float* scale_of, float* y, int planes, int n, int k)) {                                                 \
        DYNAMIC(U4, stages, STAGES* tcgen_stage(W, TOKENS));                                                                 \
        SHARED(uint64_t, done, STAGES);                                                                                      \
        SHARED(uint32_t, columns, 1);                                                                                        \
        mixture_tcgen<W, TOKENS>(experts, begins, x, x_scales, scale_of, y, n, k, stages, done, columns);                    \
    }
MIXTURE_TCGEN(tcgen_16_8, W_TCGEN_16, 8)
MIXTURE_TCGEN(tcgen_16_128, W_TCGEN_16, 128)
MIXTURE_TCGEN(tcgen_32_8, W_TCGEN_32, 8)
MIXTURE_TCGEN(tcgen_32_128, W_TCGEN_32, 128)
#endif

// out[token] = Σ weights[token, i] · y[place[token, i]], in the order of experts. A block has a token.
KERNEL(mixture_sum, 256, (const float* y, const int* place, const float* weights, float* out, int k, int n)) {
    const long token = block_x();
    for (int c = thread_index(); c < n; c += MIX) {
        float sum = 0.0f;
        for (int i = 0; i < k; i++) sum = sum + ld(weights + token * k + i) * ld(y + (long)ld(place + token * k + i) * n + c);
        st(out + token * n + c, sum);
    }
}
