// Rows: out of the embedding, chosen, added to others, activated, gated, their columns picked, looked at. A block has a row.
// Roofline: memory.
#include "activation.cuh"
#include "weight.cuh"

constexpr int ROW = 128;

// Rows of a weight [vocab, K] for tokens, with its output scales.
template <int W>
DEV void embed(const U4* weights, const uint32_t* scales, const float* grid, const float* row_scales, const int* tokens,
               float* out, int k, int steps) {
    const int n = ld(tokens + block_x());
    const float scale = ld(row_scales + n);
    for (int k0 = thread_index() * 16; k0 < k; k0 += ROW * 16) {
        float v[16];
        decode16<W>(weights, scales, steps, n, k0, v);
        const float s = grid ? ld(grid + (long)(n / 128) * steps + k0 / 128) * scale : scale;
        UNROLL for (int i = 0; i < 16; i++) if (k0 + i < k) st(out + (long)block_x() * k + k0 + i, v[i] * s);
    }
}
#define EMBED(name, W)                                                                                                    \
    KERNEL(embed_##name, 128, (const U4* weights, const uint32_t* scales, const float* grid, const float* row_scales,     \
                               const int* tokens, float* out, int k, int steps)) {                                        \
        embed<W>(weights, scales, grid, row_scales, tokens, out, k, steps);                                               \
    }
EMBED(e2m1_16, W_E2M1_16)
EMBED(e2m1_32, W_E2M1_32)
EMBED(mxfp4, W_MXFP4)
EMBED(e4m3, W_E4M3)
EMBED(mxfp8, W_MXFP8)
EMBED(bf16, W_BF16)
#if HAS_NARROW
EMBED(fp4_16, W_FP4_16)
EMBED(fp4_32, W_FP4_32)
EMBED(fp8, W_FP8)
EMBED(fp8_mx, W_FP8_MX)
#endif
#if HAS_TCGEN
EMBED(tcgen_16, W_TCGEN_16)
EMBED(tcgen_32, W_TCGEN_32)
#endif

// Rows of f32, [rows, k]: out[i] = in[index[i]].
KERNEL(gather, 128, (const float* in, const int* index, float* out, int k)) {
    const long from = (long)ld(index + block_x()) * k, to = (long)block_x() * k;
    for (int i = thread_index(); i < k; i += ROW) st(out + to + i, ld(in + from + i));
}

// sum[index[i]] += weights[i] · y[i]; rows are named once.
KERNEL(add_rows, 128, (float* sum, const float* y, const int* index, const float* weights, int k)) {
    const long to = (long)ld(index + block_x()) * k, from = (long)block_x() * k;
    const float w = ld(weights + block_x());
    for (int i = thread_index(); i < k; i += ROW) st(sum + to + i, get(sum + to + i) + w * ld(y + from + i));
}

// x += y, rows of k.
KERNEL(add, 128, (float* x, const float* y, int k)) {
    const long row = (long)block_x() * k;
    for (int i = thread_index(); i < k; i += ROW) st(x + row + i, get(x + row + i) + ld(y + row + i));
}

// gate = silu(gate) · up.
KERNEL(silu_mul, 128, (float* gate, const float* up, int k)) {
    const long row = (long)block_x() * k;
    for (int i = thread_index(); i < k; i += ROW) st(gate + row + i, silu(get(gate + row + i)) * ld(up + row + i));
}

// x = activation(x, up), rows of k; up is null for relu².
KERNEL(activate, 128, (float* x, const float* up, int kind, float limit, int k)) {
    const long row = (long)block_x() * k;
    for (int i = thread_index(); i < k; i += ROW)
        st(x + row + i, activated(kind, limit, get(x + row + i), up ? ld(up + row + i) : 0.0f));
}

// Each run of `group` columns times a matrix [group, group]: out [rows, k]. `pre` multiplies columns before, or is null.
KERNEL(rotate, 128, (const float* x, const float* pre, const float* matrix, int group, float* out, int k)) {
    const long row = (long)block_x() * k;
    for (int i = thread_index(); i < k; i += ROW) {
        const int first = i / group * group;
        float sum = 0.0f;
        for (int j = 0; j < group; j++) {
            const float v = ld(x + row + first + j);
            sum = fmaf(pre ? v * ld(pre + first + j) : v, ld(matrix + j * group + i - first), sum);
        }
        st(out + row + i, sum);
    }
}

// x · sigmoid(gate), rows of k; gate has `width` values a row: k, or one.
KERNEL(gate, 128, (float* x, const float* gate, int width, int k)) {
    const long row = (long)block_x() * k;
    for (int i = thread_index(); i < k; i += ROW)
        st(x + row + i, get(x + row + i) / (1.0f + exp_f32(-ld(gate + (long)block_x() * width + (width == 1 ? 0 : i)))));
}

// x · factor, rows of k.
KERNEL(scale, 128, (float* x, float factor, int k)) {
    const long row = (long)block_x() * k;
    for (int i = thread_index(); i < k; i += ROW) st(x + row + i, get(x + row + i) * factor);
}

// Columns of two tensors side by side, out [rows, k]: columns[i] of a, or -1 - that of b. b may be null.
KERNEL(rearrange, 128, (const float* a, const float* b, int width_a, int width_b, const int* columns, float* out, int k)) {
    const long row = block_x();
    for (int i = thread_index(); i < k; i += ROW) {
        const int c = ld(columns + i);
        st(out + row * k + i, c >= 0 ? ld(a + row * width_a + c) : ld(b + row * width_b + (-1 - c)));
    }
}

// Of each row, the sum of squares and the number of values that are not finite.
KERNEL(look, 128, (const float* x, float* out, int k)) {
    SHARED(float, squares, ROW);
    SHARED(float, broken, ROW);
    const long row = (long)block_x() * k;
    float sum = 0.0f, count = 0.0f;
    for (int i = thread_index(); i < k; i += ROW) {
        const float v = ld(x + row + i);
        sum = fmaf(v, v, sum);
        count += finite(v) ? 0.0f : 1.0f;
    }
    squares[thread_index()] = sum, broken[thread_index()] = count;
    block_sync();
    if (thread_index() > 0) return;
    for (int i = 1; i < ROW; i++) sum += squares[i], count += broken[i];
    st(out + 2L * block_x(), sum), st(out + 2L * block_x() + 1, count);
}

// y = x · W^T + bias with a weight in f32, row-major [N, K]: what no packed format holds exactly. A warp has an output.
KERNEL(matmul_f32, 256, (const float* weights, const float* x, const float* row_scales, const float* bias, float* y, int n, int k)) {
    const int out = block_x() * 8 + warp_index();
    if (out >= n) return;
    const long row = block_y();
    float sum = 0.0f;
    for (int i = lane_index(); i < k; i += 32) sum = fmaf(ld(weights + (long)out * k + i), ld(x + row * k + i), sum);
    UNROLL for (int m = 16; m > 0; m /= 2) sum += shfl_xor(sum, m);
    if (lane_index() == 0) {
        sum *= ld(row_scales + out);
        st(y + row * n + out, bias ? sum + ld(bias + out) : sum);
    }
}
KERNEL(embed_f32, 128, (const float* weights, const float* row_scales, const int* tokens, float* out, int k)) {
    const int n = ld(tokens + block_x());
    const float scale = ld(row_scales + n);
    for (int i = thread_index(); i < k; i += ROW) st(out + (long)block_x() * k + i, ld(weights + (long)n * k + i) * scale);
}
