// A mixture of experts without the host in between. `pairs` are (token, one of its experts); sorted by expert and then token they
// are the rows of everything between the router and the sum, so that each expert's rows lie together: expert e has rows
// begins[e]..begins[e+1]. Grids are for the worst case; blocks without rows leave.
// Roofline: weights of the experts that are chosen, once.
#include "formats.cuh"

constexpr int MIX = 256, MAX_EXPERTS = 512, ROUTERS = 4;

// Of equal bits only equal; ascends as the numbers do, NaN beyond both ends.
DEV int order_of(float x) {
    const int bits = (int)bits_of(x);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// Softmax of router logits [tokens, count], the k largest (of equal ones the first), weights rescaled to one where `normalize`:
// experts and weights [tokens, k], ascending by expert. A warp has a token; sums have the host's order.
KERNEL(mixture_route, 128, (const float* logits, int* experts, float* weights, int tokens, int count, int k, int normalize)) {
    SHARED(float, powers, ROUTERS * MAX_EXPERTS);
    SHARED(float, shares, ROUTERS * MAX_EXPERTS);
    SHARED(int, ranks, ROUTERS * MAX_EXPERTS);
    SHARED(float, sorted, ROUTERS * MAX_EXPERTS);
    const int token = block_x() * ROUTERS + warp_index(), lane = lane_index(), base = warp_index() * MAX_EXPERTS;
    // Whole warps leave; nobody waits for them.
    if (token >= tokens) return;
    const float* row = logits + (long)token * count;
    float most = -INFINITY;
    for (int e = lane; e < count; e += 32) most = fmaxf(most, ld(row + e));
    UNROLL for (int m = 16; m > 0; m /= 2) most = fmaxf(most, shfl_xor(most, m));
    for (int e = lane; e < count; e += 32) powers[base + e] = exp_libm(ld(row + e) - most);
    warp_sync();
    float total = 0.0f;
    for (int e = 0; e < count; e++) total += powers[base + e];
    for (int e = lane; e < count; e += 32) shares[base + e] = powers[base + e] / total;
    warp_sync();
    for (int e = lane; e < count; e += 32) {
        const float own = shares[base + e];
        int rank = 0;
        for (int other = 0; other < count; other++) {
            const int o = order_of(shares[base + other]);
            rank += o > order_of(own) || (o == order_of(own) && other < e);
        }
        ranks[base + e] = rank;
        sorted[base + rank] = own;
    }
    warp_sync();
    float kept = 0.0f;
    for (int i = 0; i < k; i++) kept += sorted[base + i];
    for (int e = lane; e < count; e += 32) {
        if (ranks[base + e] >= k) continue;
        int to = 0;
        for (int other = 0; other < e; other++) to += ranks[base + other] < k;
        const float own = shares[base + e];
        st(experts + (long)token * k + to, e);
        st(weights + (long)token * k + to, normalize ? own / kept : own);
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
KERNEL(mixture_operand, 256, (const float* in, const int* token_of, const int* expert_of, const float* scale_of, const uint64_t* pre_of,
                              int format, int rule, int k, int kp, uint16_t* x, float* scales)) {
    SHARED(float, scratch, THREADS / 32);
    const int row = block_x(), expert = ld(expert_of + row);
    const float* p = in + (long)ld(token_of + row) * k;
    quantize_row([&](int k0, float (&v)[UNIT]) { load16(p, k0, k, v); }, (const float*)ld(pre_of + expert), format,
                 ld(scale_of + expert), rule, row, k, kp, x, scales, scratch);
}
// silu(gate) · up of sorted pairs, quantized likewise.
KERNEL(mixture_silu, 256, (const float* gate, const float* up, const int* expert_of, const float* scale_of, const uint64_t* pre_of,
                           int format, int rule, int k, int kp, uint16_t* x, float* scales)) {
    SHARED(float, scratch, THREADS / 32);
    const int row = block_x(), expert = ld(expert_of + row);
    const float *g = gate + (long)row * k, *u = up + (long)row * k;
    quantize_row(
        [&](int k0, float (&v)[UNIT]) {
            float w[UNIT];
            load16(g, k0, k, v), load16(u, k0, k, w);
            UNROLL for (int i = 0; i < UNIT; i++) v[i] = silu(v[i]) * w[i];
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

// out[token] = Σ weights[token, i] · y[place[token, i]], in the order of experts. A block has a token.
KERNEL(mixture_sum, 256, (const float* y, const int* place, const float* weights, float* out, int k, int n)) {
    const long token = block_x();
    for (int c = thread_index(); c < n; c += MIX) {
        float sum = 0.0f;
        for (int i = 0; i < k; i++) sum = sum + ld(weights + token * k + i) * ld(y + (long)ld(place + token * k + i) * n + c);
        st(out + token * n + c, sum);
    }
}
