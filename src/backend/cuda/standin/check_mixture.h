// Checks of mixture.cu; included by check.cc.

// The router's choice, as logits/routing.rs defines it; `weights` in f64.
static void check_route(int tokens, int count, int k, bool normalize) {
    std::vector<float> logits((size_t)tokens * count);
    for (auto& v : logits) v = below(2) ? (float)(below(7) - 3) : (float)std::normal_distribution<>(0, 4)(RANDOM);
    for (int e = 0; e < count; e++) logits[e] = e % 3 ? -120.0f : 2.0f;
    if (tokens > 1) for (int e = 0; e < count; e++) logits[count + e] = -(float)e * 1.37f;
    // Weights that are no normal numbers.
    if (tokens > 2) for (int e = 0; e < count; e++) logits[2 * count + e] = e == 1 ? 0.0f : -88.5f - (float)(e % 15);
    Array<float> dl(logits), weights((size_t)tokens * k);
    Array<int> experts((size_t)tokens * k);
    if (!run("mixture_route", (tokens + 3) / 4, 1, 1, dl.p, experts.p, weights.p, tokens, count, k, (int)normalize)) return;
    const auto e = experts.get("experts");
    const auto w = weights.get("weights");
    for (int t = 0; t < tokens; t++) {
        const float* row = &logits[(size_t)t * count];
        std::vector<int> order(count);
        for (int i = 0; i < count; i++) order[i] = i;
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
        double total = 0, kept = 0;
        const double most = row[order[0]];
        for (int i = 0; i < count; i++) total += exp(row[i] - most);
        for (int i = 0; i < k; i++) kept += exp(row[order[i]] - most) / total;
        // Of weights that are equal in f32, e^-100 and e^-101 of a sum, the first: looked at by value.
        std::vector<int> chosen(e.begin() + (size_t)t * k, e.begin() + (size_t)(t + 1) * k);
        bool good = std::is_sorted(chosen.begin(), chosen.end()) && std::adjacent_find(chosen.begin(), chosen.end()) == chosen.end();
        for (int i = 0; i < k; i++) {
            const int x = chosen[i];
            good &= x >= 0 && x < count;
            if (!good) break;
            const double p = exp(row[x] - most) / total / (normalize ? kept : 1);
            good &= fabs(w[(size_t)t * k + i] - p) <= 1e-6 * p + 1e-44;
        }
        std::vector<int> expected(order.begin(), order.begin() + k);
        std::sort(expected.begin(), expected.end());
        const bool tiny = exp(row[order[std::min(k, count - 1)]] - most) < 1e-37;
        if (!good || (chosen != expected && !tiny)) printf("FAIL mixture_route: token %d of %d experts, %d chosen\n", t, count, k), FAILED++;
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
static void check_experts(int kind, bool grouped, int nt) {
    const int count = 4, n = 40, k = 128 * 3 + 64, kp = 512, tokens = 9, top = 2;
    const int format = grouped ? FP8_GROUP : kind == 0 ? NVFP4 : kind == 5 ? FLOAT : kind == 3 ? FP8_TOKEN : kind == 4 ? MXFP8 : MXFP4;
    const int planes = format == FLOAT ? 2 : 1;
    const bool scaled = format == FP8_GROUP || format == FP8_TOKEN;
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
        linears.push_back(random_linear(n, k, kind, e == 1));
        OnDevice d = pack(linears[e]);
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
    std::vector<float> in((size_t)tokens * k), up((size_t)18 * k), gate((size_t)18 * k);
    for (auto* v : {&in, &up, &gate}) for (auto& f : *v) f = (float)std::normal_distribution<>(0, 1)(RANDOM);
    Array<float> din(in), dup(up), dgate(gate), dscale(scale_of);
    Array<uint64_t> dpointers(pointers), dpre(pre_of);
    Array<int> dtoken(token_of), dexpert(expert_of), dbegins(begins);
    const std::string what = std::string("mixture ") + NAMES[kind] + (grouped ? " grouped" : "");
    const size_t many = 18 * (grouped ? kp / 128 : 1);
    Array<uint16_t> x((size_t)18 * planes * kp), silu_x((size_t)18 * planes * kp);
    Array<float> s(many), silu_s(many), y((size_t)18 * n);
    if (!run("mixture_operand", 18, 1, 1, din.p, dtoken.p, dexpert.p, dscale.p, dpre.p, format, 0, k, kp, x.p, scaled ? s.p : nullptr)) return;
    if (!run("mixture_silu", 18, 1, 1, dgate.p, dup.p, dexpert.p, dscale.p, dpre.p, format, 0, k, kp, silu_x.p, scaled ? silu_s.p : nullptr)) return;
    const std::string suffix = std::string(NAMES[kind]) + (nt == 1 ? "_8" : "_32") + (grouped ? "g" : "");
    if (!run(("mixture_" + suffix).c_str(), (n + 31) / 32, (9 * planes + 8 * nt - 1) / (8 * nt), count, dpointers.p, dbegins.p, x.p, scaled && !grouped ? s.p : nullptr, grouped ? s.p : nullptr, dscale.p, y.p, planes, n, kp)) return;
    const auto gx = x.get(what), gs = silu_x.get(what);
    const auto gy = y.get(what);
    for (int row = 0; row < 18; row++) {
        const int e = expert_of[row];
        Array<float> one(std::vector<float>(in.begin() + (size_t)token_of[row] * k, in.begin() + (size_t)(token_of[row] + 1) * k));
        Array<float> g(std::vector<float>(gate.begin() + (size_t)row * k, gate.begin() + (size_t)(row + 1) * k)), u(std::vector<float>(up.begin() + (size_t)row * k, up.begin() + (size_t)(row + 1) * k));
        Array<uint16_t> ox((size_t)planes * kp), os((size_t)planes * kp);
        Array<float> oscale(grouped ? kp / 128 : 1), sscale(grouped ? kp / 128 : 1), oy(n);
        run("operand_plain", 1, 1, 1, one.p, (float*)pre_of[e], format, scale_of[e], 0, k, kp, ox.p, scaled ? oscale.p : nullptr);
        run("operand_silu", 1, 1, 1, g.p, u.p, (float*)pre_of[e], format, scale_of[e], 0, k, kp, os.p, scaled ? sscale.p : nullptr);
        const uint64_t* p = &pointers[5 * e];
        run(("matmul_" + suffix).c_str(), (n + 31) / 32, 1, 1, (U4*)p[0], (uint32_t*)p[1], (float*)p[2], ox.p, scaled && !grouped ? oscale.p : nullptr, grouped ? oscale.p : nullptr, (float*)p[3], (float*)p[4], oy.p, planes, planes, n, kp, scale_of[e]);
        const size_t from = (size_t)row * planes * kp, to = from + (size_t)planes * kp;
        equal(what + " operand", std::vector<uint16_t>(gx.begin() + from, gx.begin() + to), ox.get(what));
        equal(what + " silu", std::vector<uint16_t>(gs.begin() + from, gs.begin() + to), os.get(what));
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
    check_route(9, 8, 2, true), check_route(5, 128, 8, true), check_route(6, 60, 4, false), check_route(3, 512, 10, true), check_route(1, 3, 3, false);
    check_sort(1, 8, 2), check_sort(300, 60, 8), check_sort(7, 128, 8);
    for (int kind = 0; kind < 6; kind++) for (int nt : {1, 4}) check_experts(kind, false, nt);
    for (int nt : {1, 4}) check_experts(3, true, nt);
}
