// Mixers that keep a state: Mamba-2 and the gated delta net, between their projections. `backend/cpu/recurrent` is the
// definition; but for the norms at the end these give its bits.
//
// What a layer keeps lies in slots: the convolution's last inputs, `tails` [slots, kernel - 1, channels], and `states` [slots,
// heads, rows, width]. `spans` [spans, 4] are the batch's sequences: first row, tokens, whether it begins here (then it finds
// zeros, whatever the slot holds), slot; `span_of` [tokens].
// A state goes through its sequence's tokens in order, in registers: 16 lanes have a row of it, value i with lane i mod 16, a
// block eight rows of a head. So a token's bits depend on its sequence only, however it is cut.
// Roofline: the state once a pass; of a long prompt the chain of tokens, each two rounds of shuffles at most.
// Limits: rows of a state up to MAX_STATE values.
#include "formats.cuh"

constexpr int MIXER = 128, LANES = 16, STATE_ROWS = MIXER / LANES, MAX_STATE = 256, PARTS = MAX_STATE / LANES;

// silu(convolution) of a token's channel c: taps [kernel, channels] from the oldest input to the newest, added to the bias. Inputs
// are columns `first`.. of rows of `width`.
DEV float convolve(const float* rows, int width, int first, const float* tails, const float* taps, const float* bias,
                   const int* span, int token, int c, int channels, int kernel) {
    const int begin = ld(span), at = token - begin;
    const bool begins = ld(span + 2) != 0;
    const float* tail = tails + (long)ld(span + 3) * (kernel - 1) * channels + c;
    float sum = bias ? ld(bias + c) : 0.0f;
    for (int j = 0; j < kernel; j++) {
        // Of the span's rows; before the first, counted from the tail's oldest, at + j.
        const int from = at + j - (kernel - 1);
        float x = 0.0f;
        if (from >= 0) x = ld(rows + (long)(begin + from) * width + first + c);
        else if (!begins) x = ld(tail + (long)(at + j) * channels);
        sum = fmaf(ld(taps + (long)j * channels + c), x, sum);
    }
    return sum / (1.0f + exp_f32(-sum));
}

// rows [tokens, inner | channels | heads] to conv [tokens, channels], and of each head its step and what that leaves of the state,
// steps [tokens, heads, 2]. `of_heads` [heads, 3]: -exp(A_log), D, dt_bias. Blocks are (token, 128 channels).
KERNEL(mamba_convolve, 128, (const float* rows, const float* tails, const float* taps, const float* bias, const float* of_heads,
                             float low, float high, const int* spans, const int* span_of, float* conv, float* steps, int inner,
                             int channels, int heads, int kernel)) {
    const int token = block_x(), c = block_y() * MIXER + thread_index(), width = inner + channels + heads;
    if (c >= channels + heads) return;
    if (c < channels) {
        const int* span = spans + 4 * ld(span_of + token);
        st(conv + (long)token * channels + c, convolve(rows, width, inner, tails, taps, bias, span, token, c, channels, kernel));
        return;
    }
    const int h = c - channels;
    float step = softplus(ld(rows + (long)token * width + inner + c) + ld(of_heads + 3 * h + 2));
    step = step < low ? low : step;
    step = step > high ? high : step;
    float* to = steps + ((long)token * heads + h) * 2;
    st(to, step), st(to + 1, exp_libm(ld(of_heads + 3 * h) * step));
}

// The same of qkv [tokens, channels] and the gates a, b [tokens, heads]: how much is written and what is left, steps [tokens, heads,
// 2]. `of_heads` [heads, 2]: -exp(A_log), dt_bias.
KERNEL(delta_convolve, 128, (const float* qkv, const float* a, const float* b, const float* tails, const float* taps,
                             const float* of_heads, const int* spans, const int* span_of, float* conv, float* steps, int channels,
                             int heads, int kernel)) {
    const int token = block_x(), c = block_y() * MIXER + thread_index();
    if (c >= channels + heads) return;
    if (c < channels) {
        const int* span = spans + 4 * ld(span_of + token);
        st(conv + (long)token * channels + c, convolve(qkv, channels, 0, tails, taps, nullptr, span, token, c, channels, kernel));
        return;
    }
    const int h = c - channels;
    const long at = (long)token * heads + h;
    st(steps + 2 * at, 1.0f / (1.0f + exp_libm(-ld(b + at))));
    st(steps + 2 * at + 1, exp_libm(ld(of_heads + 2 * h) * softplus(ld(a + at) + ld(of_heads + 2 * h + 1))));
}

// Leaves each slot's tail with the last `kept` inputs of what it held and its span's rows. Blocks are (span, 128 channels).
KERNEL(keep_tail, 128, (const float* rows, float* tails, const int* spans, int width, int first, int channels, int kept)) {
    const int* span = spans + 4 * block_x();
    const int c = block_y() * MIXER + thread_index(), begin = ld(span), len = ld(span + 1);
    if (c >= channels) return;
    float* tail = tails + (long)ld(span + 3) * kept * channels + c;
    for (int j = 0; j < kept; j++) {
        float x = 0.0f;
        if (j + len >= kept) x = ld(rows + (long)(begin + len - kept + j) * width + first + c);
        else if (ld(span + 2) == 0) x = get(tail + (long)(j + len) * channels);
        st(tail + (long)j * channels, x);
    }
}

// Sum over 16 lanes: halves onto halves.
DEV float sum16(float v) {
    UNROLL for (int m = LANES / 2; m > 0; m /= 2) v += shfl_xor(v, m);
    return v;
}

// A row of a state, value 16·i + lane in s[i]; zeros beyond it, and where the sequence begins.
DEV void load_state(const float* row, bool there, int lane, int width, float (&s)[PARTS]) {
    UNROLL for (int i = 0; i < PARTS; i++) s[i] = there && i * LANES + lane < width ? get(row + i * LANES + lane) : 0.0f;
}
DEV void store_state(float* row, bool there, int lane, int width, const float (&s)[PARTS]) {
    UNROLL for (int i = 0; i < PARTS; i++) if (there && i * LANES + lane < width) st(row + i * LANES + lane, s[i]);
}

// conv [tokens, heads · rows of x | groups · width of B | the same of C] through the states [slots, heads, head_dim, width]: y
// [tokens, heads, head_dim]. Blocks are (rows, head, span).
KERNEL(mamba_scan, 128, (const float* conv, const float* steps, const float* of_heads, float* states, const int* spans, float* y,
                         int heads, int head_dim, int groups, int width)) {
    const int lane = thread_index() % LANES, p = block_x() * STATE_ROWS + thread_index() / LANES, h = block_y();
    const int* span = spans + 4 * block_z();
    const int begin = ld(span), end = begin + ld(span + 1), inner = heads * head_dim;
    const bool inside = p < head_dim;
    const float d = ld(of_heads + 3 * h + 1);
    float* kept = states + (((long)ld(span + 3) * heads + h) * head_dim + p) * width;
    float s[PARTS];
    load_state(kept, inside && ld(span + 2) == 0, lane, width, s);
    for (int token = begin; token < end; token++) {
        const float* row = conv + (long)token * (inner + 2 * groups * width);
        const float *b = row + inner + h / (heads / groups) * width, *c = b + groups * width;
        const float* step = steps + ((long)token * heads + h) * 2;
        const float x = inside ? ld(row + h * head_dim + p) : 0.0f, gain = ld(step) * x, decay = ld(step + 1);
        float sum = 0.0f;
        UNROLL for (int i = 0; i < PARTS; i++) {
            if (i * LANES >= width) break;
            const int at = i * LANES + lane;
            if (at >= width) continue;
            s[i] = fmaf(s[i], decay, gain * ld(b + at));
            sum = fmaf(s[i], ld(c + at), sum);
        }
        sum = sum16(sum);
        if (inside && lane == 0) st(y + (long)token * inner + h * head_dim + p, fmaf(d, x, sum));
    }
    store_state(kept, inside, lane, width, s);
}

// Makes each of a token's first `heads` runs of `width` values one of length one, those before `scaled` one of length `scale`; what is
// all zero stays. conv [tokens, channels]; 16 lanes have a run.
KERNEL(delta_unit, 128, (float* conv, int tokens, int channels, int heads, int scaled, int width, float scale)) {
    const int lane = thread_index() % LANES;
    const long run = (long)block_x() * STATE_ROWS + thread_index() / LANES;
    const bool inside = run < (long)tokens * heads;
    float* x = conv + run / heads * channels + run % heads * width;
    float squares = 0.0f;
    for (int i = lane; inside && i < width; i += LANES) squares = fmaf(get(x + i), get(x + i), squares);
    // Source of the constant: transformers, l2norm in models/qwen3_next.
    const float factor = 1.0f / sqrtf(sum16(squares) + 1e-6f) * (run % heads < scaled ? scale : 1.0f);
    for (int i = lane; inside && i < width; i += LANES) st(x + i, get(x + i) * factor);
}

// conv [tokens, key_heads · key_dim of q | the same of k | value_heads · value_dim of v] through the states [slots, value_heads,
// value_dim, key_dim]: out [tokens, value_heads, value_dim]. Blocks are (rows, value head, span).
KERNEL(delta_scan, 128, (const float* conv, const float* steps, float* states, const int* spans, float* out, int key_heads,
                         int value_heads, int key_dim, int value_dim)) {
    const int lane = thread_index() % LANES, p = block_x() * STATE_ROWS + thread_index() / LANES, h = block_y();
    const int* span = spans + 4 * block_z();
    const int begin = ld(span), end = begin + ld(span + 1), keys = key_heads * key_dim, inner = value_heads * value_dim;
    const bool inside = p < value_dim;
    float* kept = states + (((long)ld(span + 3) * value_heads + h) * value_dim + p) * key_dim;
    float s[PARTS], key[PARTS];
    load_state(kept, inside && ld(span + 2) == 0, lane, key_dim, s);
    for (int token = begin; token < end; token++) {
        const float* row = conv + (long)token * (2 * keys + inner);
        const float *q = row + h / (value_heads / key_heads) * key_dim, *k = q + keys;
        const float* step = steps + ((long)token * value_heads + h) * 2;
        const float v = inside ? ld(row + 2 * keys + h * value_dim + p) : 0.0f, decay = ld(step + 1);
        // What the decayed state holds under the key.
        float sum = 0.0f;
        UNROLL for (int i = 0; i < PARTS; i++) {
            if (i * LANES >= key_dim) break;
            const int at = i * LANES + lane;
            key[i] = at < key_dim ? ld(k + at) : 0.0f;
            s[i] *= decay;
            sum = fmaf(s[i], key[i], sum);
        }
        const float delta = ld(step) * (v - sum16(sum));
        // What the query reads after the key's value was put right.
        sum = 0.0f;
        UNROLL for (int i = 0; i < PARTS; i++) {
            if (i * LANES >= key_dim) break;
            const int at = i * LANES + lane;
            s[i] = fmaf(key[i], delta, s[i]);
            sum = fmaf(s[i], at < key_dim ? ld(q + at) : 0.0f, sum);
        }
        sum = sum16(sum);
        if (inside && lane == 0) st(out + (long)token * inner + h * value_dim + p, sum);
    }
    store_state(kept, inside, lane, key_dim, s);
}

DEV float swish(float x) { return x / (1.0f + exp_f32(-x)); }

// out = rms(y · silu(z)) · weight, the norm over each run of `group` of a token's `inner` values; z are the first columns of rows of
// `width`. Blocks are (token, group).
KERNEL(mamba_norm, 128, (const float* y, const float* rows, const float* weight, float eps, float* out, int inner, int group, int width)) {
    SHARED(float, scratch, MIXER / 32);
    const long token = block_x(), first = (long)block_y() * group;
    auto gated = [&](int i) { return ld(y + token * inner + first + i) * swish(ld(rows + token * width + first + i)); };
    float squares = 0.0f;
    for (int i = thread_index(); i < group; i += MIXER) squares = fmaf(gated(i), gated(i), squares);
    UNROLL for (int m = 16; m > 0; m /= 2) squares += shfl_xor(squares, m);
    if (lane_index() == 0) scratch[warp_index()] = squares;
    block_sync();
    float all = 0.0f;
    UNROLL for (int w = 0; w < MIXER / 32; w++) all += scratch[w];
    const float inverse = 1.0f / sqrtf(all / (float)group + eps);
    for (int i = thread_index(); i < group; i += MIXER) st(out + token * inner + first + i, gated(i) * inverse * ld(weight + first + i));
}

// out = rms(o) · weight · silu(z), the norm over each run of `width` values; a warp has one of `runs`.
KERNEL(delta_norm, 128, (const float* o, const float* z, const float* weight, float eps, float* out, int runs, int width)) {
    const long run = (long)block_x() * (MIXER / 32) + warp_index(), row = run * width;
    // Whole warps leave; nobody waits for them.
    if (run >= runs) return;
    float squares = 0.0f;
    for (int i = lane_index(); i < width; i += 32) squares = fmaf(ld(o + row + i), ld(o + row + i), squares);
    UNROLL for (int m = 16; m > 0; m /= 2) squares += shfl_xor(squares, m);
    const float inverse = 1.0f / sqrtf(squares / (float)width + eps);
    for (int i = lane_index(); i < width; i += 32) st(out + row + i, ld(o + row + i) * inverse * ld(weight + i) * swish(ld(z + row + i)));
}
