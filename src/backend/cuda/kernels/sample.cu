// What is read off rows of logits: totals for scores and divergence, and what the choice of a token depends on.
//
// A row is cut into runs of 256 logits, which a warp reads, and pieces of 8 runs, which a block reads, from the row's beginning
// and whatever else is in the batch. Exponentials and sums are f64; exponentials have the bits of logits/sampler.rs, sums its
// value but for their order, and whoever uses a sum knows how far that may carry (`SUM_ERROR` in sample.rs).
// A choice is a job: sample_max, sample_head (largest logit, bound of the candidates), sample_sums, sample_pick (the draw, or the
// bound of top-p), sample_count and sample_gather (the candidates, ascending), each as far as any job of the launch needs it.
// Roofline: each logit read once from memory, and again from cache.
#include "formats.cuh"

constexpr int READ = 256, RUN = 256, PIECE = READ / 32 * RUN, CLASSES = 32, FEW = 1024;

// What a job asks for beyond the largest logit: bits.
enum Want { WANT_SUMS = 1, WANT_DRAW = 2, WANT_TOP_P = 4, WANT_FEW = 8 };
// A job: [row, 1 if of the penalised rows, bits of Want, k (0: none)], and [temperature, ln of min-p (1: none), top-p, uniform].
constexpr int JOB = 4;
// What comes of a job, in words: how it ended, the largest logit's token and bits, the token drawn, 1 if it is sure, the number of
// candidates, a sum's low and high half.
constexpr int FOUND = 8;
enum End { END_WELL = 0, END_BROKEN = 1, END_NOTHING = 2 };

// e^x for x <= 0, the arithmetic of logits/sampler.rs: the same bits.
DEV double exp_f64(double x) {
    const double bounded = x > -708.0 ? x : -708.0;
    const double shifted = bounded * 1.4426950408889634074 + 6755399441055744.0, n = shifted - 6755399441055744.0;
    const double r = (bounded - n * double_of(0x3fe62e42fee00000ull)) - n * double_of(0x3dea39ef35793c76ull);
    double factorial[14];
    factorial[0] = 1.0;
    UNROLL for (int i = 1; i < 14; i++) factorial[i] = factorial[i - 1] * i;
    double sum = 0.0;
    UNROLL for (int i = 13; i >= 0; i--) sum = sum * r + 1.0 / factorial[i];
    return x < -708.0 ? 0.0 : double_of(bits_of(sum) + (bits_of(shifted) << 52));
}

DEV double warp_sum(double v) {
    UNROLL for (int m = 16; m > 0; m /= 2) v += shfl_xor(v, m);
    return v;
}
DEV int warp_sum(int v) {
    UNROLL for (int m = 16; m > 0; m /= 2) v += shfl_xor(v, m);
    return v;
}
// The largest, and the first place of it; in all lanes.
DEV void warp_first(float& v, int& at) {
    UNROLL for (int m = 16; m > 0; m /= 2) {
        const float o = shfl_xor(v, m);
        const int a = shfl_xor(at, m);
        if (o > v || (o == v && a < at)) v = o, at = a;
    }
}
// The same over the block; `values` and `places` have a slot a warp.
DEV void block_first(float& v, int& at, SharedArray<float> values, SharedArray<int> places) {
    warp_first(v, at);
    block_sync();
    if (lane_index() == 0) values[warp_index()] = v, places[warp_index()] = at;
    block_sync();
    for (int w = 0; w < READ / 32; w++) {
        const float o = values[w];
        const int a = places[w];
        if (o > v || (o == v && a < at)) v = o, at = a;
    }
}
DEV double block_sum(double v, SharedArray<double> scratch) {
    v = warp_sum(v);
    block_sync();
    if (lane_index() == 0) scratch[warp_index()] = v;
    block_sync();
    double all = 0.0;
    for (int w = 0; w < READ / 32; w++) all += scratch[w];
    return all;
}

// Of each piece of rows a [rows, columns] and, where there is one, b: out [rows, pieces, 8], f64: largest a, its first place, the
// sum of e^(a - largest); the same of b; the sum of e^(a - largest a) · ((a - largest a) - (b - largest b)); how many values are
// not finite. The first `vocab` columns count.
KERNEL(totals, 256, (const float* a, const float* b, double* out, int a_columns, int b_columns, int vocab)) {
    SHARED(float, values, READ / 32);
    SHARED(int, places, READ / 32);
    SHARED(double, scratch, READ / 32);
    const int row = block_y(), from = block_x() * PIECE, t = thread_index();
    constexpr int EACH = PIECE / READ;
    float v[2][EACH], most[2] = {0.0f, 0.0f};
    int place[2] = {0, 0};
    double broken = 0.0, total[2] = {0.0, 0.0}, weighted = 0.0;
    UNROLL for (int s = 0; s < 2; s++) {
        if (s == 1 && !b) continue;
        const float* p = s ? b + (long)row * b_columns : a + (long)row * a_columns;
        float best = -INFINITY;
        int at = from;
        UNROLL for (int i = 0; i < EACH; i++) {
            const int token = from + i * READ + t;
            v[s][i] = token < vocab ? ld(p + token) : -INFINITY;
            if (token < vocab && !finite(v[s][i])) broken += 1.0;
            if (v[s][i] > best) best = v[s][i], at = token;
        }
        block_first(best, at, values, places);
        most[s] = best, place[s] = at;
    }
    UNROLL for (int i = 0; i < EACH; i++) {
        if (from + i * READ + t >= vocab) continue;
        const double x = (double)v[0][i] - (double)most[0], p = exp_f64(x);
        total[0] += p;
        if (!b) continue;
        const double y = (double)v[1][i] - (double)most[1];
        total[1] += exp_f64(y);
        weighted += p * (x - y);
    }
    UNROLL for (int s = 0; s < 2; s++) total[s] = block_sum(total[s], scratch);
    weighted = block_sum(weighted, scratch);
    broken = block_sum(broken, scratch);
    if (t > 0) return;
    double* to = out + ((long)row * grid_x() + block_x()) * 8;
    UNROLL for (int s = 0; s < 2; s++)
        st(to + 3 * s, (double)most[s]), st(to + 3 * s + 1, (double)place[s]), st(to + 3 * s + 2, total[s]);
    st(to + 6, weighted), st(to + 7, broken);
}

// out[i] = logits[rows[i], tokens[i]].
KERNEL(logits_at, 256, (const float* logits, const int* rows, const int* tokens, float* out, int count, int columns)) {
    const int i = block_x() * READ + thread_index();
    if (i < count) st(out + i, ld(logits + (long)ld(rows + i) * columns + ld(tokens + i)));
}

DEV float keep_finite(float before, float after) {
    const float most = 3.40282346638528859812e38f;
    return !finite(before) ? before : after > most ? most : after < -most ? -most : after;
}
// Changes the logits of tokens of the text so far: entries of [row, token, times generated], penalties of a row [repetition,
// frequency, presence]. A token is named once a row.
KERNEL(penalise, 256, (float* logits, const int* entries, const float* penalties, int count, int columns)) {
    const int i = block_x() * READ + thread_index();
    if (i >= count) return;
    const int row = ld(entries + 3 * i), times = ld(entries + 3 * i + 2);
    const float repetition = ld(penalties + 3 * row), frequency = ld(penalties + 3 * row + 1), presence = ld(penalties + 3 * row + 2);
    float* p = logits + (long)row * columns + ld(entries + 3 * i + 1);
    float v = get(p);
    if (repetition != 1.0f) v = keep_finite(v, v > 0.0f ? v / repetition : v * repetition);
    if (times > 0 && (frequency != 0.0f || presence != 0.0f)) v = keep_finite(v, v - (frequency * (float)times + presence));
    st(p, v);
}

DEV const float* job_row(const float* logits, const float* penalised, const int* jobs, int vocab) {
    const int* job = jobs + JOB * block_y();
    return (ld(job + 1) ? penalised : logits) + (long)ld(job) * vocab;
}

// The largest logit of each run, [jobs, runs]; NaN where one is NaN or +inf.
KERNEL(sample_max, 256, (const float* logits, const float* penalised, const int* jobs, float* maxima, int vocab, int runs)) {
    const float* row = job_row(logits, penalised, jobs, vocab);
    const int run = block_x() * (READ / 32) + warp_index();
    if (run >= runs) return;
    float most = -INFINITY;
    int broken = 0;
    for (int token = run * RUN + lane_index(); token < min(vocab, (run + 1) * RUN); token += 32) {
        const float v = ld(row + token);
        if (!(v < INFINITY)) broken = 1;
        if (v > most) most = v;
    }
    UNROLL for (int m = 16; m > 0; m /= 2) {
        const float o = shfl_xor(most, m);
        most = o > most ? o : most;
    }
    broken = warp_sum(broken);
    if (lane_index() == 0) st(maxima + (long)block_y() * runs + run, broken ? nan_value() : most);
}

// A bound at or below max + temperature · ln(weight) by more than rounding can be.
DEV float bound_of(float most, double temperature, double ln_weight) {
    const double at = (double)most + temperature * ln_weight;
    const double slack = 1e-6 * ((double)magnitude(most) + temperature * -ln_weight) + 1e-6 * temperature + 1e-37;
    return (float)(at - slack);
}

// The largest logit and its first token, and a bound that no candidate of top-k and of min-p lies below. A block has a job.
KERNEL(sample_head, 256, (const float* logits, const float* penalised, const int* jobs, const double* numbers, const float* maxima,
                          float* bounds, uint32_t* found, int vocab, int runs)) {
    SHARED(float, values, READ / 32);
    SHARED(int, places, READ / 32);
    SHARED(int, flags, READ);
    const float* row = job_row(logits, penalised, jobs, vocab);
    const int job = block_y(), t = thread_index(), k = ld(jobs + JOB * job + 3);
    const float* of_runs = maxima + (long)job * runs;
    float most = -INFINITY;
    int first = runs, broken = 0;
    for (int i = t; i < runs; i += READ) {
        const float v = ld(of_runs + i);
        if (v != v) broken = 1;
        if (v > most) most = v, first = i;
    }
    block_first(most, first, values, places);
    flags[t] = broken;
    block_sync();
    for (int i = 0; i < READ; i++) broken |= flags[i];
    // The place of it in its run: a thread has a logit.
    static_assert(RUN == READ);
    const int token = first * RUN + t;
    float here = token < vocab && ld(row + token) == most ? 1.0f : 0.0f;
    int at = token;
    block_first(here, at, values, places);
    // At least k runs' largest logits are no smaller than the k-th largest of them, and so at least k logits.
    float bound = -INFINITY;
    int none = 0;
    if (k > 0)
        for (int i = t; i < runs; i += READ) {
            const float v = ld(of_runs + i);
            int above = 0;
            for (int j = 0; j < runs; j++) above += ld(of_runs + j) >= v;
            if (above >= k && v > bound) bound = v;
        }
    block_first(bound, none, values, places);
    if (t > 0) return;
    const double temperature = ld(numbers + JOB * job), ln_min_p = ld(numbers + JOB * job + 1);
    if (ln_min_p <= 0.0) {
        const float other = bound_of(most, temperature, ln_min_p);
        bound = other > bound ? other : bound;
    }
    st(bounds + job, bound);
    uint32_t* to = found + FOUND * job;
    st(to, (uint32_t)(broken ? END_BROKEN : most > -INFINITY ? END_WELL : END_NOTHING));
    st(to + 1, (uint32_t)at), st(to + 2, bits_of(most));
    for (int i = 3; i < FOUND; i++) st(to + i, 0u);
}

// Sums of e^((logit - largest) / temperature): of each run, f64 [jobs, runs]; for top-p also of each piece and class, f32 [jobs,
// pieces, 32]: 0 has e^0, then [1/2, 1), [1/4, 1/2) and so on, the last all that is smaller.
KERNEL(sample_sums, 256, (const float* logits, const float* penalised, const int* jobs, const double* numbers, const uint32_t* found,
                          double* sums, float* classes, int vocab, int runs)) {
    SHARED(float, mass, CLASSES * (READ + 1));
    const int job = block_y(), t = thread_index(), want = ld(jobs + JOB * job + 2);
    if (!(want & WANT_SUMS) || ld(found + FOUND * job) != END_WELL) return;
    const float* row = job_row(logits, penalised, jobs, vocab);
    const double most = float_of(ld(found + FOUND * job + 2)), temperature = ld(numbers + JOB * job);
    const bool classed = want & WANT_TOP_P;
    if (classed) for (int c = 0; c < CLASSES; c++) mass[c * (READ + 1) + t] = 0.0f;
    const int run = block_x() * (READ / 32) + warp_index();
    double sum = 0.0;
    for (int token = run * RUN + lane_index(); token < min(vocab, (run + 1) * RUN); token += 32) {
        const double weight = exp_f64(((double)ld(row + token) - most) / temperature);
        sum += weight;
        if (classed) {
            const int c = min(CLASSES - 1, 127 - (int)(bits_of((float)weight) >> 23));
            mass[c * (READ + 1) + t] = mass[c * (READ + 1) + t] + (float)weight;
        }
    }
    sum = warp_sum(sum);
    if (lane_index() == 0 && run < runs) st(sums + (long)job * runs + run, sum);
    if (!classed) return;
    block_sync();
    if (t >= CLASSES) return;
    float all = 0.0f;
    for (int i = 0; i < READ; i++) all += mass[t * (READ + 1) + i];
    st(classes + ((long)job * grid_x() + block_x()) * CLASSES + t, all);
}

// The sum over the row; the token at `uniform` of it and whether rounding could not have made it another; for top-p a bound below
// which no token of the nucleus lies. A block has a job.
KERNEL(sample_pick, 256, (const float* logits, const float* penalised, const int* jobs, const double* numbers, const double* sums,
                          const float* classes, const float* bounds, float* final_bounds, uint32_t* found, int vocab, int runs,
                          double sum_error)) {
    SHARED(double, tile, READ);
    SHARED(double, passed, 2);
    SHARED(int, where, 1);
    const int job = block_y(), t = thread_index(), want = ld(jobs + JOB * job + 2), pieces = (runs + READ / 32 - 1) / (READ / 32);
    if (t == 0 && !(want & WANT_TOP_P)) st(final_bounds + job, ld(bounds + job));
    uint32_t* to = found + FOUND * job;
    if (!(want & WANT_SUMS) || get(to) != END_WELL) {
        if (t == 0 && (want & WANT_TOP_P)) st(final_bounds + job, -INFINITY);
        return;
    }
    const double uniform = ld(numbers + JOB * job + 3), temperature = ld(numbers + JOB * job);
    const float most = float_of(get(to + 2));
    // The total, then the run where the target lies: one thread adds, in order.
    double total = 0.0, before = 0.0, target = 0.0;
    if (t == 0) where[0] = -1;
    for (int round = 0; round < (want & WANT_DRAW ? 2 : 1); round++) {
        double sum = 0.0;
        for (int from = 0; from < runs; from += READ) {
            block_sync();
            tile[t] = from + t < runs ? ld(sums + (long)job * runs + from + t) : 0.0;
            block_sync();
            if (t > 0) continue;
            for (int i = 0; i < min(READ, runs - from); i++) {
                const double next = sum + tile[i];
                if (round == 1 && where[0] < 0 && next > target) where[0] = from + i, passed[0] = sum, passed[1] = target;
                sum = next;
            }
        }
        if (round == 0) total = sum, target = uniform * sum;
    }
    if (t == 0) {
        const uint64_t bits = bits_of(total);
        st(to + 6, (uint32_t)bits), st(to + 7, (uint32_t)(bits >> 32));
    }
    if (t == 0 && (want & WANT_TOP_P)) {
        // The first class with which they have top-p of it, and a little more for the rounding of f32.
        const double wanted = ld(numbers + JOB * job + 2) * total * (1.0 + 1e-5);
        int c = 0;
        for (double sum = 0.0; c < CLASSES; c++) {
            for (int p = 0; p < pieces; p++) sum += (double)ld(classes + ((long)job * pieces + p) * CLASSES + c);
            if (sum >= wanted) break;
        }
        st(final_bounds + job, c < CLASSES - 1 ? bound_of(most, temperature, -(double)c * 0.6931471805599453) : -INFINITY);
    }
    if (!(want & WANT_DRAW)) return;
    block_sync();
    const int run = where[0];
    if (run < 0) {
        if (t == 0) st(to + 3, 0u), st(to + 4, 0u);
        return;
    }
    before = passed[0], target = passed[1];
    const float* row = job_row(logits, penalised, jobs, vocab);
    const int token = run * RUN + t;
    tile[t] = token < vocab ? exp_f64(((double)ld(row + token) - (double)most) / temperature) : 0.0;
    block_sync();
    if (t > 0) return;
    const double error = sum_error * total;
    for (int i = 0; i < RUN; i++) {
        const double next = before + tile[i];
        if (next > target) {
            const bool sure = (before == 0.0 || before + error <= target) && next - error > target;
            st(to + 3, (uint32_t)(run * RUN + i)), st(to + 4, sure ? 1u : 0u);
            return;
        }
        before = next;
    }
    st(to + 3, 0u), st(to + 4, 0u);
}

// How many logits of each run are not below the bound, [jobs, runs].
KERNEL(sample_count, 256, (const float* logits, const float* penalised, const int* jobs, const float* bounds, int* counts, int vocab,
                           int runs)) {
    const int job = block_y(), run = block_x() * (READ / 32) + warp_index();
    if (!(ld(jobs + JOB * job + 2) & WANT_FEW) || run >= runs) return;
    const float* row = job_row(logits, penalised, jobs, vocab);
    const float bound = ld(bounds + job);
    int count = 0;
    for (int token = run * RUN + lane_index(); token < min(vocab, (run + 1) * RUN); token += 32) count += ld(row + token) >= bound;
    count = warp_sum(count);
    if (lane_index() == 0) st(counts + (long)job * runs + run, count);
}

// Those logits, ascending by token: few [jobs, 1024, 2], token and bits, zeros behind the last; of more than 1024 their number.
KERNEL(sample_gather, 256, (const float* logits, const float* penalised, const int* jobs, const float* bounds, const int* counts,
                            uint32_t* found, uint32_t* few, int vocab, int runs)) {
    const int job = block_y(), run = block_x() * (READ / 32) + warp_index(), lane = lane_index();
    if (run >= runs) return;
    uint32_t* list = few + (long)job * FEW * 2;
    if (!(ld(jobs + JOB * job + 2) & WANT_FEW)) {
        if (run == 0) for (int i = lane; i < FEW * 2; i += 32) st(list + i, 0u);
        return;
    }
    const float* row = job_row(logits, penalised, jobs, vocab);
    const float bound = ld(bounds + job);
    int at = 0;
    for (int i = lane; i < run; i += 32) at += ld(counts + (long)job * runs + i);
    at = warp_sum(at);
    const int own = ld(counts + (long)job * runs + run);
    if (run == runs - 1) {
        if (lane == 0) st(found + FOUND * job + 5, (uint32_t)(at + own));
        for (int i = (at + own) * 2 + lane; i < FEW * 2; i += 32) st(list + i, 0u);
    }
    if (own == 0) return;
    for (int from = run * RUN; from < (run + 1) * RUN; from += 32) {
        const int token = from + lane;
        const float v = token < vocab ? ld(row + token) : 0.0f;
        const int hit = token < vocab && v >= bound;
        int upto = hit;
        UNROLL for (int m = 1; m < 32; m *= 2) {
            const int o = shfl(upto, lane - m);
            if (lane >= m) upto += o;
        }
        const int to = at + upto - 1;
        if (hit && to < FEW) {
            st(list + 2 * to, (uint32_t)token), st(list + 2 * to + 1, bits_of(v));
        }
        at += shfl(upto, 31);
    }
}
