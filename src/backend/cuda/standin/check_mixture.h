// Checks of mixture.cu; included by check.cc.

struct RouteRule { int scores, groups = 1, top_groups = 1; bool biased = false, rescale = false; float epsilon = 0, scale = 1; };

// Numbers in the order in which they are chosen: NaN, then the larger; of equal ones the first.
static std::vector<int> best_of(const std::vector<float>& v) {
    std::vector<int> order(v.size());
    for (size_t i = 0; i < v.size(); i++) order[i] = (int)i;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return std::isnan(v[a]) || std::isnan(v[b]) ? std::isnan(v[a]) > std::isnan(v[b]) : v[a] > v[b]; });
    return order;
}

// The router's choice, as logits/routing.rs defines it, bit for bit; and the weights of what was chosen in f64.
static void check_route(int tokens, int count, int k, RouteRule rule) {
    std::vector<float> logits((size_t)tokens * count), bias(count);
    for (auto& v : logits) v = below(2) ? (float)(below(7) - 3) * (below(2) ? 1.0f : -1.0f) : (float)std::normal_distribution<>(0, 4)(RANDOM);
    for (int e = 0; e < count; e++) bias[e] = e % 7 == 5 ? -INFINITY : (float)(below(17) - 8) / 8;
    auto row = [&](int t, auto value) { if (t < tokens) for (int e = 0; e < count; e++) logits[(size_t)t * count + e] = value(e); };
    row(0, [](int e) { return e % 3 ? -120.0f : 2.0f; });
    row(1, [](int e) { return -(float)e * 1.37f; });
    // Weights that are no normal numbers; all alike; what is no number, of either sign.
    row(2, [](int e) { return e == 1 ? 0.0f : -88.5f - (float)(e % 15); });
    row(3, [](int e) { return 1.25f; });
    row(4, [&](int e) { return e == count / 2 ? -NAN : e % 11 == 3 ? INFINITY : e % 11 == 4 ? -INFINITY : (float)e / 8; });
    // Zeros of either sign are equal.
    row(5, [](int e) { return e % 3 == 2 ? -1.0f : e % 2 ? 0.0f : -0.0f; });
    Array<float> dl(logits), db(bias), weights((size_t)tokens * k);
    Array<int> experts((size_t)tokens * k);
    if (!run("mixture_route", (tokens + 3) / 4, 1, 1, dl.p, rule.biased ? db.p : nullptr, experts.p, weights.p, tokens, count, k, rule.scores, rule.groups, rule.top_groups, (int)rule.rescale, rule.epsilon, rule.scale)) return;
    const auto e = experts.get("experts");
    const auto w = weights.get("weights");
    auto softmax = [](std::vector<float> v) {
        float most = -INFINITY, total = 0;
        for (float x : v) most = fmaxf(most, x);
        for (auto& x : v) total += x = exp_libm(x - most);
        for (auto& x : v) x /= total;
        return v;
    };
    for (int t = 0; t < tokens; t++) {
        const std::vector<float> of(logits.begin() + (size_t)t * count, logits.begin() + (size_t)(t + 1) * count);
        std::vector<float> values = rule.scores == SOFTMAX ? softmax(of) : of, compared;
        if (rule.scores == SIGMOID) for (auto& v : values) v = 1.0f / (1.0f + exp_libm(-v));
        for (int i = 0; i < count; i++) compared.push_back(rule.biased ? values[i] + bias[i] : values[i]);
        const int size = count / rule.groups;
        std::vector<float> sums;
        for (int g = 0; g < rule.groups; g++) {
            const std::vector<float> group(compared.begin() + g * size, compared.begin() + (g + 1) * size);
            const auto order = best_of(group);
            sums.push_back(size > 1 ? group[order[0]] + group[order[1]] : group[0]);
        }
        auto groups = best_of(sums);
        groups.resize(rule.top_groups);
        std::vector<int> chosen;
        for (int i : best_of(compared)) if (std::find(groups.begin(), groups.end(), i / size) != groups.end() && (int)chosen.size() < k) chosen.push_back(i);
        std::vector<float> own;
        for (int i : chosen) own.push_back(values[i]);
        if (rule.scores == SOFTMAX_OF_CHOSEN) own = softmax(own);
        float kept = 0;
        for (float v : own) kept += v;
        std::vector<std::pair<int, float>> expected;
        for (int i = 0; i < k; i++) expected.emplace_back(chosen[i], (rule.rescale ? own[i] / (kept + rule.epsilon) : own[i]) * rule.scale);
        std::sort(expected.begin(), expected.end(), [](auto a, auto b) { return a.first < b.first; });
        // The same weights in f64.
        double most = -INFINITY, total = 0, sum = 0;
        for (float x : of) most = std::max(most, (double)x);
        auto share = [&](int i) { return rule.scores == SIGMOID ? 1 / (1 + exp(-(double)of[i])) : exp(of[i] - most); };
        if (rule.scores == SOFTMAX) for (int i = 0; i < count; i++) total += share(i);
        if (rule.scores == SOFTMAX_OF_CHOSEN) for (int i : chosen) total += share(i);
        if (rule.scores == SIGMOID) total = 1;
        for (int i : chosen) sum += share(i) / total;
        // The smallest that are no zero in f32.
        const double least = rule.scores == SIGMOID ? 4e-39 : 1e-44;
        const double by = rule.scale / (rule.rescale ? sum + rule.epsilon : 1);
        for (int i = 0; i < k; i++) {
            const auto [expert, weight] = expected[i];
            const float got = w[(size_t)t * k + i];
            const bool none = std::isnan(weight);
            const bool good = e[(size_t)t * k + i] == expert && (none ? std::isnan(got) : bits_of(got) == bits_of(weight)) &&
                              (none || fabs(got - share(expert) / total * by) <= (2e-6 * share(expert) / total + least) * by + 1e-44);
            if (good) continue;
            printf("FAIL mixture_route: scores %d, token %d, number %d of %d of %d experts: %d by %g, expected %d by %g\n", rule.scores, t, i, k, count, e[(size_t)t * k + i], got, expert, weight), FAILED++;
            break;
        }
    }
}

static void check_sort(int tokens, int count, int k) {
    const int pairs = tokens * k;
    std::vector<int> experts;
    for (int t = 0; t < tokens; t++) {
        std::vector<int> all(count);
        for (int i = 0; i < count; i++) all[i] = i;
        std::shuffle(all.begin(), all.end(), RANDOM);
        // Some experts have nothing to do.
        std::stable_sort(all.begin(), all.end(), [](int a, int b) { return (a % 5 == 2) < (b % 5 == 2); });
        std::sort(all.begin(), all.begin() + k);
        experts.insert(experts.end(), all.begin(), all.begin() + k);
    }
    Array<int> de(experts), token_of(pairs), expert_of(pairs), place(pairs), begins(count + 1);
    if (!run("mixture_sort", count, 1, 1, de.p, token_of.p, expert_of.p, place.p, begins.p, pairs, k, count)) return;
    std::vector<int> order(pairs), first(count + 1, 0), to(pairs), tokens_of, experts_of;
    for (int i = 0; i < pairs; i++) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return experts[a] < experts[b]; });
    for (int i = 0; i < pairs; i++) to[order[i]] = i, tokens_of.push_back(order[i] / k), experts_of.push_back(experts[order[i]]);
    for (int e = 0; e <= count; e++) for (int x : experts) first[e] += x < e;
    equal("mixture_sort tokens", token_of.get("tokens"), tokens_of), equal("mixture_sort experts", expert_of.get("experts"), experts_of);
    equal("mixture_sort places", place.get("places"), to), equal("mixture_sort begins", begins.get("begins"), first);
}

// A sorted row is what the kernel of one linear makes of it, bit for bit: operand, product, sum.
static void check_experts(int kind, bool grouped, int nt, int activation, bool fused) {
    const int count = 4, n = 40, k = 128 * 3 + 64, kp = 512, tokens = 9, top = 2;
    const bool narrow = kind >= 6;
    static const int of_narrow[4] = {NVFP4, MXFP4, FP8_TOKEN, MXFP8};
    const int format = narrow ? CODES + (grouped ? FP8_GROUP : of_narrow[kind - 6]) : grouped ? FP8_GROUP : kind == 0 ? NVFP4 : kind == 5 ? FLOAT : kind == 3 ? FP8_TOKEN : kind == 4 ? MXFP8 : MXFP4;
    const int planes = format == FLOAT ? 2 : 1;
    const int row_scales = scale_pitch(format, kp);
    const bool scaled = row_scales > 0;
    // Halves of words of a row of x.
    const int width = narrow ? kp * code_bits(format) / 16 : planes * kp;
    // Expert 2 has no token, and expert 0 most.
    std::vector<int> begins{0, 9, 14, 14, 18}, token_of, expert_of;
    for (int t = 0; t < 9; t++) token_of.push_back(t), expert_of.push_back(0);
    for (int t : {0, 2, 3, 5, 8}) token_of.push_back(t), expert_of.push_back(1);
    for (int t : {1, 4, 6, 7}) token_of.push_back(t), expert_of.push_back(3);
    std::vector<Linear> linears;
    std::vector<std::unique_ptr<Array<uint32_t>>> words, scales;
    std::vector<std::unique_ptr<Array<float>>> rows, grids, biases, pres;
    std::vector<uint64_t> pointers, pre_of;
    std::vector<float> scale_of;
    for (int e = 0; e < count; e++) {
        linears.push_back(random_linear(n, k, narrow ? plain_kind(kind) : kind, e == 1));
        OnDevice d = narrow ? pack_narrow(linears[e]) : pack(linears[e]);
        std::vector<float> grid((n + 127) / 128 * d.steps), bias(n), pre(k);
        for (auto* v : {&grid, &bias, &pre}) for (auto& f : *v) f = (float)uniform(.5, 2);
        words.push_back(std::make_unique<Array<uint32_t>>(d.words)), scales.push_back(std::make_unique<Array<uint32_t>>(d.scales));
        rows.push_back(std::make_unique<Array<float>>(d.rows)), grids.push_back(std::make_unique<Array<float>>(grid));
        biases.push_back(std::make_unique<Array<float>>(bias)), pres.push_back(std::make_unique<Array<float>>(pre));
        auto address = [](const void* p) { return (uint64_t)p; };
        pointers.insert(pointers.end(), {address(words[e]->p), d.scales.empty() ? 0 : address(scales[e]->p), grouped && e != 1 ? address(grids[e]->p) : 0,
                                         address(rows[e]->p), e % 2 ? address(biases[e]->p) : 0});
        pre_of.push_back(e == 3 ? address(pres[e]->p) : 0), scale_of.push_back((float)uniform(.01, .03));
    }
    // Gate and up side by side, or apart, or no gate.
    const int pitch = fused ? 2 * k : k;
    const float limit = 1.2f;
    std::vector<float> in((size_t)tokens * k), gate((size_t)18 * pitch), up((size_t)18 * k);
    for (auto* v : {&in, &up, &gate}) for (auto& f : *v) f = (float)std::normal_distribution<>(0, 1)(RANDOM);
    if (fused) for (int row = 0; row < 18; row++) std::copy_n(up.begin() + row * k, k, gate.begin() + row * pitch + k);
    Array<float> din(in), dup(up), dgate(gate), dscale(scale_of);
    const float* beside = activation == RELU2 ? nullptr : fused ? dgate.p + k : dup.p;
    Array<uint64_t> dpointers(pointers), dpre(pre_of);
    Array<int> dtoken(token_of), dexpert(expert_of), dbegins(begins);
    const std::string what = std::string("mixture ") + NAMES[kind] + (grouped ? " grouped" : "");
    const size_t many = 18 * row_scales;
    Array<uint16_t> x((size_t)18 * width), active_x((size_t)18 * width);
    Array<float> s(many), active_s(many), y((size_t)18 * n);
    if (!run("mixture_operand", 18, 1, 1, din.p, dtoken.p, dexpert.p, dscale.p, dpre.p, format, 0, k, kp, x.p, scaled ? s.p : nullptr)) return;
    if (!run("mixture_activate", 18, 1, 1, dgate.p, beside, pitch, activation, limit, dexpert.p, dscale.p, dpre.p, format, 0, k, kp, active_x.p, scaled ? active_s.p : nullptr)) return;
    const std::string suffix = std::string(NAMES[kind]) + (nt == 1 ? "_8" : "_32") + (grouped ? "g" : "");
    if (!run(("mixture_" + suffix).c_str(), (n + 31) / 32, (9 * planes + 8 * nt - 1) / (8 * nt), count, dpointers.p, dbegins.p, x.p, scaled && !grouped ? s.p : nullptr, grouped ? s.p : nullptr, dscale.p, y.p, planes, n, kp)) return;
    const auto gx = x.get(what), gs = active_x.get(what);
    const auto gy = y.get(what);
    for (int row = 0; row < 18; row++) {
        const int e = expert_of[row];
        Array<float> one(std::vector<float>(in.begin() + (size_t)token_of[row] * k, in.begin() + (size_t)(token_of[row] + 1) * k));
        Array<float> g(std::vector<float>(gate.begin() + (size_t)row * pitch, gate.begin() + (size_t)row * pitch + k)), u(std::vector<float>(up.begin() + (size_t)row * k, up.begin() + (size_t)(row + 1) * k));
        Array<uint16_t> ox(width), os(width);
        Array<float> oscale(row_scales), sscale(row_scales), oy(n);
        run("operand_plain", 1, 1, 1, one.p, (float*)pre_of[e], format, scale_of[e], 0, k, kp, ox.p, scaled ? oscale.p : nullptr);
        run("activate", 1, 1, 1, g.p, activation == RELU2 ? nullptr : u.p, activation, limit, k);
        run("operand_plain", 1, 1, 1, g.p, (float*)pre_of[e], format, scale_of[e], 0, k, kp, os.p, scaled ? sscale.p : nullptr);
        const uint64_t* p = &pointers[5 * e];
        run(("matmul_" + suffix).c_str(), (n + 31) / 32, 1, 1, (U4*)p[0], (uint32_t*)p[1], (float*)p[2], ox.p, scaled && !grouped ? oscale.p : nullptr, grouped ? oscale.p : nullptr, (float*)p[3], (float*)p[4], oy.p, planes, planes, n, kp, scale_of[e]);
        const size_t from = (size_t)row * width, to = from + width;
        equal(what + " operand", std::vector<uint16_t>(gx.begin() + from, gx.begin() + to), ox.get(what));
        equal(what + " activated", std::vector<uint16_t>(gs.begin() + from, gs.begin() + to), os.get(what));
        equal(what + " product", std::vector<float>(gy.begin() + (size_t)row * n, gy.begin() + (size_t)(row + 1) * n), oy.get(what));
    }
    if (kind != 0) return;
    std::vector<int> place(18);
    std::vector<float> weights(18), e((size_t)tokens * n, 0);
    for (int i = 0; i < 18; i++) place[i] = i * 5 % 18, weights[i] = (float)uniform(0, 1);
    Array<int> dplace(place);
    Array<float> dweights(weights), out((size_t)tokens * n);
    if (!run("mixture_sum", tokens, 1, 1, y.p, dplace.p, dweights.p, out.p, top, n)) return;
    for (int t = 0; t < tokens; t++) for (int i = 0; i < top; i++) for (int c = 0; c < n; c++) {
        const float product = weights[t * top + i] * gy[(size_t)place[t * top + i] * n + c];
        e[(size_t)t * n + c] += product;
    }
    equal("mixture_sum", out.get("mixture_sum"), e);
}

static void check_mixture() {
    const RouteRule softmax{SOFTMAX, 1, 1, false, true}, plain{SOFTMAX}, of_chosen{SOFTMAX_OF_CHOSEN};
    check_route(9, 8, 2, softmax), check_route(5, 128, 8, softmax), check_route(6, 60, 4, plain), check_route(5, 512, 10, softmax), check_route(1, 3, 3, plain);
    check_route(5, 3, 2, of_chosen), check_route(9, 32, 4, of_chosen), check_route(5, 128, 40, of_chosen);
    // As MiniMax-M2, GLM, Nemotron 3 and DeepSeek-V3 have them; groups of two, more of them than lanes; one group of three.
    check_route(9, 5, 3, {SIGMOID}), check_route(6, 256, 8, {SIGMOID, 1, 1, true, true}), check_route(6, 128, 8, {SIGMOID, 1, 1, true, true, 1e-20f, 1.0f});
    check_route(5, 512, 22, {SIGMOID, 1, 1, true, true, 1e-20f, 5.0f}), check_route(9, 256, 8, {SIGMOID, 8, 4, true, true, 1e-20f, 2.5f});
    check_route(9, 8, 3, {SIGMOID, 2, 1, true, false, 0, 2.5f}), check_route(5, 80, 6, {SIGMOID, 40, 9, true, true}), check_route(7, 21, 5, {SIGMOID, 3, 1, false, true, 0.25f});
    check_sort(1, 8, 2), check_sort(300, 60, 8), check_sort(7, 128, 8);
    for (int kind = 0; kind < 6; kind++) for (int nt : {1, 4}) check_experts(kind, false, nt, (kind + nt / 4) % 4, kind > 2);
    if (has_narrow()) for (int nt : {1, 4}) {
        for (int kind : {6, 7, 8, 9}) check_experts(kind, false, nt, SILU, kind == 6);
        check_experts(8, true, nt, SILU, nt == 1);
    }
    for (int nt : {1, 4}) check_experts(3, true, nt, nt == 1 ? SILU : CLAMPED_SWIGLU, nt == 1);
    check_tcgen_mixture();
}
