// Checks of sample.cu; included by check.cc.

struct Job { int row, penalised, want, k; double temperature, ln_min_p, top_p, uniform; };

static std::vector<float> random_logits(int vocab, int kind) {
    std::vector<float> v(vocab);
    for (auto& x : v) x = kind == 1 ? (float)(below(9) - 4) : (float)std::normal_distribution<>(0, kind == 2 ? 30 : 3)(RANDOM);
    if (kind == 3) for (auto& x : v) if (below(3) == 0) x = -INFINITY;
    // The largest stands in a few places.
    if (kind == 4) for (int i = 0; i < 3; i++) v[below(vocab)] = 20;
    return v;
}

static void check_totals(int vocab, int a_columns, int b_columns) {
    const int rows = 9, pieces = (vocab + PIECE - 1) / PIECE;
    std::vector<float> a, b;
    for (int r = 0; r < rows; r++) {
        const int kind = r > 3 ? 4 : r % 3;
        const auto x = random_logits(a_columns, kind), y = r == 2 ? x : random_logits(b_columns, kind);
        a.insert(a.end(), x.begin(), x.end()), b.insert(b.end(), y.begin(), y.begin() + std::min<size_t>(b_columns, y.size()));
        b.resize((r + 1) * (size_t)b_columns, 1e9f);
    }
    a[3L * a_columns + vocab / 2] = NAN, b[3L * b_columns + vocab - 1] = -INFINITY;
    Array<float> da(a), db(b);
    for (bool two : {false, true}) {
        Array<double> out((size_t)rows * pieces * 8);
        if (!run("totals", pieces, rows, 1, da.p, two ? db.p : nullptr, out.p, a_columns, b_columns, vocab)) return;
        const auto got = out.get("totals");
        for (int r = 0; r < rows; r++) for (int piece = 0; piece < pieces; piece++) {
            const float *x = &a[(size_t)r * a_columns], *y = &b[(size_t)r * b_columns];
            const int from = piece * PIECE, to = std::min(vocab, from + PIECE);
            const double* g = &got[((size_t)r * pieces + piece) * 8];
            int broken = 0;
            for (int i = from; i < to; i++) broken += !std::isfinite(x[i]) + (two && !std::isfinite(y[i]));
            bool good = g[7] == broken;
            if (!broken) {
                const int p = (int)(std::max_element(x + from, x + to) - x), q = (int)(std::max_element(y + from, y + to) - y);
                double s = 0, u = 0, w = 0;
                for (int i = from; i < to; i++) {
                    const double d = (double)x[i] - x[p], e = (double)y[i] - y[q];
                    s += exp(d), u += exp(e), w += exp(d) * (d - e);
                }
                good &= g[0] == x[p] && g[1] == p && fabs(g[2] - s) <= 1e-13 * s;
                if (two) good &= g[3] == y[q] && g[4] == q && fabs(g[5] - u) <= 1e-13 * u && fabs(g[6] - w) <= 1e-12 * (fabs(w) + s);
                if (two && r == 2) good &= g[6] == 0;
            }
            if (!good) printf("FAIL totals: row %d piece %d of %d logits\n", r, piece, vocab), FAILED++;
        }
    }
    const std::vector<int> at{0, 3, 1, 1, 2}, tokens{vocab - 1, 0, 5, 6, vocab / 2};
    std::vector<int> rows_of, tokens_of;
    for (int i = 0; i < 300; i++) rows_of.push_back(at[i % 5]), tokens_of.push_back(i < 5 ? tokens[i] % vocab : below(vocab));
    Array<int> dr(rows_of), dt(tokens_of);
    Array<float> out(300);
    run("logits_at", 2, 1, 1, da.p, dr.p, dt.p, out.p, 300, a_columns);
    std::vector<float> e;
    for (int i = 0; i < 300; i++) e.push_back(a[(size_t)rows_of[i] * a_columns + tokens_of[i]]);
    equal("logits_at", out.get("logits_at"), e);
}

static void check_penalise() {
    const int vocab = 700;
    std::vector<float> logits;
    for (int r = 0; r < 3; r++) { const auto x = random_logits(vocab, r == 1 ? 1 : 0); logits.insert(logits.end(), x.begin(), x.end()); }
    logits[5] = -INFINITY, logits[6] = 3e38f, logits[7] = -3e38f;
    const std::vector<float> penalties{1.7f, .3f, -.2f, 1.0f, .5f, 1.5f, 1e-5f, 0, 0};
    std::vector<int> entries;
    std::vector<float> e(logits);
    for (int r = 0; r < 3; r++) for (int token = r; token < vocab; token += 2 + r) {
        const int times = token % 4;
        entries.insert(entries.end(), {r, token, times});
        float& v = e[r * vocab + token];
        auto set = [&](double x) { if (std::isfinite(v)) v = (float)std::min(3.40282346638528859812e38, std::max(-3.40282346638528859812e38, x)); };
        if (penalties[3 * r] != 1) set(v > 0 ? v / penalties[3 * r] : v * penalties[3 * r]);
        const float less = penalties[3 * r + 1] * (float)times;
        if (times && (penalties[3 * r + 1] != 0 || penalties[3 * r + 2] != 0)) set(v - (float)(less + penalties[3 * r + 2]));
    }
    Array<float> dl(logits), dp(penalties);
    Array<int> de(entries);
    const int count = (int)entries.size() / 3;
    run("penalise", (count + 255) / 256, 1, 1, dl.p, de.p, dp.p, count, vocab);
    equal("penalise", dl.get("penalise"), e);
}

static void check_jobs(int vocab) {
    const int rows = 7, runs = (vocab + RUN - 1) / RUN, pieces = (runs + 7) / 8;
    std::vector<float> logits, penalised;
    for (int r = 0; r < rows; r++) {
        auto x = random_logits(vocab, r % 4);
        if (r == 4) x[vocab - 1] = INFINITY;
        if (r == 5) std::fill(x.begin(), x.end(), -INFINITY);
        if (r == 6) x[vocab / 3] = NAN;
        logits.insert(logits.end(), x.begin(), x.end());
    }
    for (int r = 0; r < 2; r++) { const auto x = random_logits(vocab, r); penalised.insert(penalised.end(), x.begin(), x.end()); }
    std::vector<Job> jobs;
    for (int r = 0; r < rows; r++) {
        jobs.push_back({r, 0, 0, 0, 1, 1, 1, 0});
        jobs.push_back({r, 0, WANT_SUMS | WANT_DRAW, 0, .7, 1, 1, uniform(0, 1)});
        jobs.push_back({r, 0, WANT_SUMS | WANT_TOP_P | WANT_FEW, 0, 1.3, 1, .8, 0});
        jobs.push_back({r, 0, WANT_FEW, 3, 1, 1, 1, 0});
        jobs.push_back({r, 0, WANT_FEW, 0, .9, log(.05), 1, 0});
        jobs.push_back({r, 0, WANT_FEW, 2, 1, log(1e-6), 1, 0});
        jobs.push_back({r, 0, WANT_SUMS | WANT_DRAW, 0, 1, 1, 1, r % 2 ? 0.0 : 1 - 1e-16});
    }
    jobs.push_back({1, 1, WANT_SUMS | WANT_DRAW, 0, 1, 1, 1, .5}), jobs.push_back({0, 1, WANT_FEW, 2, 1, 1, 1, 0});
    std::vector<int> ints;
    std::vector<double> numbers;
    for (auto& j : jobs) ints.insert(ints.end(), {j.row, j.penalised, j.want, j.k}), numbers.insert(numbers.end(), {j.temperature, j.ln_min_p, j.top_p, j.uniform});
    const int n = (int)jobs.size();
    Array<float> dl(logits), dp(penalised), maxima((size_t)n * runs), bounds(n), final_bounds(n), classes((size_t)n * pieces * CLASSES);
    Array<int> dj(ints), counts((size_t)n * runs);
    Array<double> dn(numbers), sums((size_t)n * runs);
    Array<uint32_t> found((size_t)n * FOUND), few((size_t)n * FEW * 2);
    const double error = 1.2e-16 * (4.0 * vocab + 1000);
    if (!run("sample_max", pieces, n, 1, dl.p, dp.p, dj.p, maxima.p, vocab, runs)) return;
    if (!run("sample_head", 1, n, 1, dl.p, dp.p, dj.p, dn.p, maxima.p, bounds.p, found.p, vocab, runs)) return;
    if (!run("sample_sums", pieces, n, 1, dl.p, dp.p, dj.p, dn.p, found.p, sums.p, classes.p, vocab, runs)) return;
    if (!run("sample_pick", 1, n, 1, dl.p, dp.p, dj.p, dn.p, sums.p, classes.p, bounds.p, final_bounds.p, found.p, vocab, runs, error)) return;
    if (!run("sample_count", pieces, n, 1, dl.p, dp.p, dj.p, final_bounds.p, counts.p, vocab, runs)) return;
    if (!run("sample_gather", pieces, n, 1, dl.p, dp.p, dj.p, final_bounds.p, counts.p, found.p, few.p, vocab, runs)) return;
    maxima.get("maxima");
    const auto end = final_bounds.get("bounds");
    const auto got = found.get("found"), list = few.get("few");
    for (int i = 0; i < n; i++) {
        const Job& j = jobs[i];
        const float* x = (j.penalised ? penalised.data() : logits.data()) + (size_t)j.row * vocab;
        const uint32_t* g = &got[i * FOUND];
        auto bad = [&](const char* what) { printf("FAIL sample, %d logits, job %d (row %d): %s\n", vocab, i, j.row, what), FAILED++; };
        bool broken = false, some = false;
        for (int t = 0; t < vocab; t++) broken |= std::isnan(x[t]) || x[t] == INFINITY, some |= x[t] > -INFINITY;
        if (g[0] != (uint32_t)(broken ? 1 : some ? 0 : 2)) bad("how it ended");
        if (broken || !some) continue;
        const int first = (int)(std::max_element(x, x + vocab) - x);
        if (g[1] != (uint32_t)first || float_of(g[2]) != x[first]) bad("the largest logit");
        std::vector<double> w(vocab);
        double total = 0;
        for (int t = 0; t < vocab; t++) total += w[t] = exp(((double)x[t] - x[first]) / j.temperature);
        const double sum = double_of((uint64_t)g[7] << 32 | g[6]);
        if (j.want & WANT_SUMS && fabs(sum - total) > 1e-13 * total) bad("the sum");
        if (j.want & WANT_DRAW) {
            double before = 0;
            int t = 0;
            for (; t < vocab - 1 && before + w[t] <= j.uniform * total; t++) before += w[t];
            if (g[4] == 1 && g[3] != (uint32_t)t) bad("the draw");
            // What is not sure is so near the edge of a token that it seldom happens.
            const bool near = before != 0 && j.uniform * total - before < 1e-9 * total;
            if (g[4] != 1 && !near && before + w[t] - j.uniform * total > 1e-9 * total) bad("a draw that is not sure");
            if (g[4] > 1) bad("sure or not");
        }
        if (j.want & WANT_FEW) {
            std::vector<int> all;
            for (int t = 0; t < vocab; t++) if (x[t] >= end[i]) all.push_back(t);
            if (g[5] != all.size()) bad("the number of candidates");
            for (size_t c = 0; c < std::min<size_t>(all.size(), FEW); c++) {
                const uint32_t* p = &list[((size_t)i * FEW + c) * 2];
                if (p[0] != (uint32_t)all[c] || float_of(p[1]) != x[all[c]]) { bad("a candidate"); break; }
            }
            // Whoever may be chosen is among them, and not many more.
            std::vector<double> sorted(w);
            std::sort(sorted.rbegin(), sorted.rend());
            double least = 0;
            if (j.k && j.k <= vocab) least = sorted[j.k - 1];
            if (j.ln_min_p <= 0) least = std::max(least, exp(j.ln_min_p));
            if (j.want & WANT_TOP_P) { double s = 0; for (size_t c = 0; c < sorted.size() && s < j.top_p * total; c++) s += least = sorted[c]; }
            for (int t = 0; t < vocab; t++) if (w[t] >= least && w[t] > 0 && x[t] < end[i]) { bad("a candidate is missing"); break; }
            if (!j.k) for (int t = 0; t < vocab; t++) if (w[t] < least * .49 && x[t] >= end[i]) { bad("a bound far too low"); break; }
            std::vector<float> of_runs(runs, -INFINITY);
            for (int t = 0; t < vocab; t++) of_runs[t / RUN] = std::max(of_runs[t / RUN], x[t]);
            std::sort(of_runs.rbegin(), of_runs.rend());
            if (j.k && runs >= j.k && !(end[i] >= of_runs[j.k - 1])) bad("a bound too low for top-k");
        }
        for (size_t c = (j.want & WANT_FEW ? g[5] : 0); c < FEW; c++) if (list[((size_t)i * FEW + c) * 2 + 1] != 0) { bad("more candidates than told"); break; }
    }
}

static void check_sample() {
    check_totals(1, 1, 1), check_totals(300, 311, 300), check_totals(5000, 5003, 5010);
    check_penalise();
    for (int vocab : {1, 31, 256, 700, 3001, 9000}) check_jobs(vocab);
}
