// Checks of recurrent.cu; included by check.cc. Definitions in f64, token by token; and pieces against the whole, bit for bit.

static double softplus_exact(double x) { return std::max(x, 0.0) + log1p(exp(-fabs(x))); }
static double sigmoid_exact(double x) { return 1 / (1 + exp(-x)); }

// Sequences, each with tokens [0, len) of inputs of its own.
struct Mixer {
    bool delta;
    // Mamba: heads, head_dim, groups, width. Delta net: value heads, value_dim, key heads, key_dim.
    int heads, rows, shared, width, kernel;
    float low, high;
    int inner() const { return heads * rows; }
    int channels() const { return inner() + 2 * shared * width; }
    int projected() const { return delta ? channels() : inner() + channels() + heads; }
    int first() const { return delta ? 0 : inner(); }
};
static std::vector<float> normal(size_t n, double scale) {
    std::vector<float> v(n);
    for (auto& x : v) x = (float)std::normal_distribution<>(0, scale)(RANDOM);
    return v;
}

struct RecurrentCheck {
    Mixer m;
    std::vector<float> taps, bias, of_heads, norm;
    // By sequence: [len, projected]; z, a, b of a delta net.
    std::vector<std::vector<float>> in, z, a, b;

    RecurrentCheck(Mixer m, std::vector<int> lengths) : m(m) {
        taps = normal((size_t)m.kernel * m.channels(), .5), bias = normal(m.channels(), .3), norm = normal(m.delta ? m.rows : m.inner(), .5);
        for (int h = 0; h < m.heads; h++) {
            of_heads.push_back(-(float)exp(uniform(-2, 2)));
            if (!m.delta) of_heads.push_back((float)uniform(-1, 1));
            of_heads.push_back((float)uniform(-6, 3));
        }
        for (int n : lengths) {
            in.push_back(normal((size_t)n * m.projected(), 1)), z.push_back(normal((size_t)n * m.inner(), 1));
            a.push_back(normal((size_t)n * m.heads, 6)), b.push_back(normal((size_t)n * m.heads, 6));
        }
    }

    // The sequence alone: outputs of the scan [len, inner], gated and normed ones, the tail and the state it leaves.
    struct Exact { std::vector<double> scan, size, out, state; };
    Exact exact(int s) const {
        const int n = (int)in[s].size() / m.projected(), C = m.channels(), K = m.kernel;
        Exact e;
        e.state.assign((size_t)m.inner() * m.width, 0);
        for (int t = 0; t < n; t++) {
            std::vector<double> u(C);
            for (int c = 0; c < C; c++) {
                double sum = m.delta ? 0 : bias[c];
                for (int j = 0; j < K; j++) if (t - K + 1 + j >= 0) sum += (double)taps[j * C + c] * in[s][(size_t)(t - K + 1 + j) * m.projected() + m.first() + c];
                u[c] = sum * sigmoid_exact(sum);
            }
            const int keys = m.shared * m.width;
            if (m.delta) for (int g = 0; g < 2 * m.shared; g++) {
                double squares = 0;
                for (int i = 0; i < m.width; i++) squares += u[g * m.width + i] * u[g * m.width + i];
                for (int i = 0; i < m.width; i++) u[g * m.width + i] /= sqrt(squares + 1e-6) * (g < m.shared ? sqrt((double)m.width) : 1);
            }
            std::vector<double> y(m.inner());
            for (int h = 0; h < m.heads; h++) {
                const int g = h / (m.heads / m.shared);
                const double A = of_heads[h * (m.delta ? 2 : 3)], dt_bias = of_heads[h * (m.delta ? 2 : 3) + (m.delta ? 1 : 2)];
                const double raw = m.delta ? a[s][(size_t)t * m.heads + h] : in[s][(size_t)t * m.projected() + m.inner() + C + h];
                double step = softplus_exact(raw + dt_bias);
                if (!m.delta) step = std::min(std::max(step, (double)m.low), (double)m.high);
                const double decay = exp(A * step), beta = m.delta ? sigmoid_exact(b[s][(size_t)t * m.heads + h]) : 0;
                const double* write = m.delta ? &u[keys + g * m.width] : &u[m.inner() + g * m.width];
                const double* read = m.delta ? &u[g * m.width] : &u[m.inner() + keys + g * m.width];
                for (int p = 0; p < m.rows; p++) {
                    double* S = &e.state[(size_t)(h * m.rows + p) * m.width];
                    const double x = m.delta ? u[2 * keys + h * m.rows + p] : u[h * m.rows + p];
                    double held = 0, sum = 0, size = 0;
                    for (int i = 0; i < m.width; i++) S[i] *= decay, held += S[i] * write[i];
                    const double gain = m.delta ? beta * (x - held) : step * x;
                    for (int i = 0; i < m.width; i++) S[i] += gain * write[i], sum += S[i] * read[i], size += fabs(S[i] * read[i]);
                    const double d = m.delta ? 0 : of_heads[h * 3 + 1] * x;
                    y[h * m.rows + p] = sum + d;
                    e.size.push_back(size + fabs(d) + 1e-3);
                }
            }
            e.scan.insert(e.scan.end(), y.begin(), y.end());
            const int group = m.delta ? m.rows : m.inner() / m.shared;
            auto gate = [&](int i) { const double x = m.delta ? z[s][(size_t)t * m.inner() + i] : in[s][(size_t)t * m.projected() + i]; return x * sigmoid_exact(x); };
            for (int i = 0; i < m.inner(); i++) {
                double squares = 0;
                for (int k = i / group * group; k < i / group * group + group; k++) { const double v = m.delta ? y[k] : y[k] * gate(k); squares += v * v; }
                const double r = 1 / sqrt(squares / group + 1e-5);
                e.out.push_back(y[i] * gate(i) * r * norm[m.delta ? i % group : i]);
            }
        }
        return e;
    }

    // What is on the device: every sequence has slot 2·s + 1, and others hold junk.
    struct Kept { Array<float> tails, states; };
    struct Result { std::vector<float> scan, out; };
    // Passes over spans (sequence, first token, tokens), each a batch; results by sequence.
    std::vector<Result> passes(const std::vector<std::vector<std::array<int, 3>>>& batches, Kept& kept) const {
        std::vector<Result> results(in.size());
        Array<float> dtaps(taps), dbias(bias), dheads(of_heads), dnorm(norm);
        for (auto& batch : batches) {
            std::vector<int> spans, span_of;
            std::vector<float> x, gates, va, vb;
            for (auto [s, from, n] : batch) {
                spans.insert(spans.end(), {(int)span_of.size(), n, from == 0, 2 * s + 1});
                for (int i = 0; i < n; i++) span_of.push_back((int)spans.size() / 4 - 1);
                auto part = [&, from = from, n = n](const std::vector<float>& v, int width, std::vector<float>& to) { to.insert(to.end(), v.begin() + (size_t)from * width, v.begin() + (size_t)(from + n) * width); };
                part(in[s], m.projected(), x), part(z[s], m.inner(), gates), part(a[s], m.heads, va), part(b[s], m.heads, vb);
            }
            const int T = (int)span_of.size(), S = (int)batch.size(), C = m.channels(), blocks = (C + m.heads + 127) / 128;
            Array<float> dx(x), dz(gates), da(va), db(vb), conv((size_t)T * C), steps((size_t)T * m.heads * 2), y((size_t)T * m.inner()), out((size_t)T * m.inner());
            Array<int> dspans(spans), dof(span_of);
            bool good = true;
            if (m.delta) {
                good &= run("delta_convolve", T, blocks, 1, dx.p, da.p, db.p, kept.tails.p, dtaps.p, dheads.p, dspans.p, dof.p, conv.p, steps.p, C, m.heads, m.kernel);
                good &= run("delta_unit", (T * 2 * m.shared + 7) / 8, 1, 1, conv.p, T, C, 2 * m.shared, m.shared, m.width, 1 / sqrtf((float)m.width));
                good &= run("delta_scan", (m.rows + 7) / 8, m.heads, S, conv.p, steps.p, kept.states.p, dspans.p, y.p, m.shared, m.heads, m.width, m.rows);
                good &= run("delta_norm", (T * m.heads + 3) / 4, 1, 1, y.p, dz.p, dnorm.p, 1e-5f, out.p, T * m.heads, m.rows);
            } else {
                good &= run("mamba_convolve", T, blocks, 1, dx.p, kept.tails.p, dtaps.p, dbias.p, dheads.p, m.low, m.high, dspans.p, dof.p, conv.p, steps.p, m.inner(), C, m.heads, m.kernel);
                good &= run("mamba_scan", (m.rows + 7) / 8, m.heads, S, conv.p, steps.p, dheads.p, kept.states.p, dspans.p, y.p, m.heads, m.rows, m.shared, m.width);
                good &= run("mamba_norm", T, m.shared, 1, y.p, dx.p, dnorm.p, 1e-5f, out.p, m.inner(), m.inner() / m.shared, m.projected());
            }
            if (m.kernel > 1) good &= run("keep_tail", S, (C + 127) / 128, 1, dx.p, kept.tails.p, dspans.p, m.projected(), m.first(), C, m.kernel - 1);
            if (!good) return {};
            const auto gy = y.get("scan"), go = out.get("mixer");
            for (size_t i = 0; i < batch.size(); i++) {
                auto& r = results[batch[i][0]];
                const size_t from = (size_t)spans[4 * i] * m.inner(), to = from + (size_t)batch[i][2] * m.inner();
                r.scan.insert(r.scan.end(), gy.begin() + from, gy.begin() + to), r.out.insert(r.out.end(), go.begin() + from, go.begin() + to);
            }
        }
        return results;
    }

    void check() const {
        char text[160];
        snprintf(text, sizeof text, "%s heads=%d x %d shared=%d width=%d kernel=%d", m.delta ? "delta net" : "mamba", m.heads, m.rows, m.shared, m.width, m.kernel);
        const std::string what = text;
        const int slots = 2 * (int)in.size() + 1, tail = (m.kernel - 1) * m.channels(), state = m.inner() * m.width;
        const auto junk_t = normal((size_t)slots * tail, 100), junk_s = normal((size_t)slots * state, 100);
        auto fresh = [&] { return std::unique_ptr<Kept>(new Kept{Array<float>(junk_t), Array<float>(junk_s)}); };
        std::vector<std::array<int, 3>> whole;
        std::vector<std::vector<std::array<int, 3>>> pieces;
        for (int s = 0; s < (int)in.size(); s++) {
            const int n = (int)in[s].size() / m.projected();
            whole.push_back({s, 0, n});
            // One token, two, and so on; other sequences beside it or not.
            for (int from = 0, i = 0; from < n; i++) {
                const int len = std::min(n - from, 1 + i % 4);
                if ((int)pieces.size() <= i) pieces.emplace_back();
                pieces[i].insert(i % 2 ? pieces[i].begin() : pieces[i].end(), {s, from, len});
                from += len;
            }
        }
        auto once = fresh(), often = fresh();
        const auto all = passes({whole}, *once), cut = passes(pieces, *often);
        if (all.empty() || cut.empty()) return;
        const auto states = once->states.get(what), tails = once->tails.get(what);
        equal(what + ": states of pieces", often->states.get(what), states), equal(what + ": tails of pieces", often->tails.get(what), tails);
        for (int s = 0; s < (int)in.size(); s++) {
            equal(what + ": pieces", cut[s].out, all[s].out), equal(what + ": scans of pieces", cut[s].scan, all[s].scan);
            const Exact e = exact(s);
            close(what + " scan", all[s].scan, e.scan, e.size, 2e-6);
            std::vector<double> ones(e.out.size(), 4), big(state);
            close(what, all[s].out, e.out, ones, 4e-6);
            const std::vector<float> left(states.begin() + (size_t)(2 * s + 1) * state, states.begin() + (size_t)(2 * s + 2) * state);
            for (int i = 0; i < state; i++) big[i] = fabs(e.state[i]) + 1;
            close(what + " state", left, e.state, big, 3e-6);
            const int n = (int)in[s].size() / m.projected();
            std::vector<float> kept;
            for (int j = n - m.kernel + 1; j < n; j++) for (int c = 0; c < m.channels(); c++) kept.push_back(j < 0 ? 0 : in[s][(size_t)j * m.projected() + m.first() + c]);
            equal(what + " tail", std::vector<float>(tails.begin() + (size_t)(2 * s + 1) * tail, tails.begin() + (size_t)(2 * s + 2) * tail), kept);
        }
        // Nobody else's.
        for (int slot = 0; slot < slots; slot += 2) {
            equal(what + ": another tail", std::vector<float>(tails.begin() + (size_t)slot * tail, tails.begin() + (size_t)(slot + 1) * tail), std::vector<float>(junk_t.begin() + (size_t)slot * tail, junk_t.begin() + (size_t)(slot + 1) * tail));
            equal(what + ": another state", std::vector<float>(states.begin() + (size_t)slot * state, states.begin() + (size_t)(slot + 1) * state), std::vector<float>(junk_s.begin() + (size_t)slot * state, junk_s.begin() + (size_t)(slot + 1) * state));
        }
    }
};

// One in the last place, beside the exact.
static void check_libm() {
    const int n = 8192;
    std::vector<float> x(n);
    for (int i = 0; i < n; i++) x[i] = i % 4 ? (float)uniform(0, 1) : i % 8 ? (float)uniform(0, 80) : ldexpf((float)uniform(0, 1), -below(30));
    Array<float> dx(x), exponentials(n), logarithms(n);
    if (!run("primitive_libm", n / 32, 1, 1, dx.p, exponentials.p, logarithms.p)) return;
    std::vector<double> e(n), l(n), of_e(n), of_l(n);
    auto ulp = [](double v) { return ldexp(1, ilogb(v) - 23); };
    for (int i = 0; i < n; i++) {
        e[i] = exp(-(double)x[i]), of_e[i] = ulp(e[i]);
        l[i] = log1p(std::min((double)x[i], 1.0)), of_l[i] = l[i] > 0 ? ulp(l[i]) : 1e-30;
    }
    close("e^-x", exponentials.get("e^-x"), e, of_e, 1.0);
    close("ln(1 + x)", logarithms.get("ln(1 + x)"), l, of_l, 1.0);
}

static void check_recurrent() {
    check_libm();
    RecurrentCheck({false, 2, 5, 1, 7, 3, 0, INFINITY}, {4}).check();
    RecurrentCheck({false, 6, 12, 2, 40, 4, 0, INFINITY}, {9, 1, 14}).check();
    RecurrentCheck({false, 4, 8, 4, 16, 1, .01f, 1.5f}, {3, 5}).check();
    RecurrentCheck({false, 1, 3, 1, 256, 4, 0, INFINITY}, {2, 1}).check();
    RecurrentCheck({true, 2, 5, 1, 7, 3, 0, 0}, {4}).check();
    RecurrentCheck({true, 6, 12, 2, 40, 4, 0, 0}, {9, 1, 14}).check();
    RecurrentCheck({true, 2, 17, 2, 130, 1, 0, 0}, {3, 2}).check();
    RecurrentCheck({true, 1, 3, 1, 256, 4, 0, 0}, {2, 1}).check();
}
