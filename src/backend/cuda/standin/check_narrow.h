// Products on FP4 and FP8 tensor cores: the instructions alone, then the kernels of narrow.cu.

// Whether what is checked has them: PTX for another architecture has not.
static bool has_narrow() {
    const bool has = has_kernel("tile_fp4_16");
    if (!has) printf("no kernels for FP4 and FP8 tensor cores in this PTX\n");
    return has;
}
static double e8m0_value(int code) { return ldexp(1, code - 127); }

// The instruction on random registers. Where an element or a scale stands is here the other way round than in ptx.h: from its
// place in the matrix to lane, register and bits (PTX ISA 9.0, fragments of mma.m16n8k64 and, for eight bits, mma.m16n8k32; block scaling
// for mma.sync). Lanes that a selector leaves out hold anything.
static void check_instruction(const std::string& name, int bits, int blocks, int part, bool e8m0, bool wide) {
    const int columns = bits == 4 ? 64 : 32, run = bits == 4 ? 8 : 4, half = columns / 2;  // columns of a word; from one word to the next
    std::vector<uint32_t> a(128), b(64), scales(64);
    std::vector<float> c(128);
    for (auto* v : {&a, &b, &scales}) for (auto& x : *v) x = RANDOM();
    for (auto& x : c) x = below(3) ? (float)uniform(-2000, 2000) : 0.0f;
    std::vector<std::vector<int>> codes_a(16, std::vector<int>(columns)), codes_b(columns, std::vector<int>(8));
    int scale_a[16][4], scale_b[4][8];
    auto place = [](uint32_t& word, int bits, int at, int value) { word = (word & ~(((1u << bits) - 1) << at)) | (uint32_t)value << at; };
    auto scale = [&] { return e8m0 ? (wide ? 90 + below(70) : 110 + below(30)) : wide ? below(127) : 40 + below(40); };
    auto element = [&] { int c = below(1 << bits); return bits == 8 && (c & 127) == 127 ? c - 1 : c; };
    // Where the scales of a row or column begin: E4M3 in lanes of their own, E8M0 in bytes.
    const int lane_part = e8m0 ? 0 : part, first = e8m0 ? part * blocks : 0;
    for (int m = 0; m < 16; m++) {
        for (int k = 0; k < columns; k++) {
            codes_a[m][k] = element();
            place(a[(m % 8 * 4 + k % half / run) * 4 + m / 8 + k / half * 2], bits, bits * (k % run), codes_a[m][k]);
        }
        for (int i = 0; i < blocks; i++) {
            scale_a[m][i] = scale();
            place(scales[(m % 8 * 4 + m / 8 + 2 * lane_part) * 2], 8, 8 * (i + first), scale_a[m][i]);
        }
    }
    for (int n = 0; n < 8; n++) {
        for (int k = 0; k < columns; k++) {
            codes_b[k][n] = element();
            place(b[(n * 4 + k % half / run) * 2 + k / half], bits, bits * (k % run), codes_b[k][n]);
        }
        for (int i = 0; i < blocks; i++) {
            scale_b[i][n] = scale();
            place(scales[(n * 4 + lane_part) * 2 + 1], 8, 8 * (i + first), scale_b[i][n]);
        }
    }
    Array<uint32_t> da(a), db(b), ds(scales);
    Array<float> dc(c), dd(128);
    if (!::run(name.c_str(), 1, 1, 1, (U4*)da.p, db.p, ds.p, dc.p, dd.p)) return;
    std::vector<double> expected(128), size(128);
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
            const int at = (m % 8 * 4 + n / 2) * 4 + m / 8 * 2 + n % 2;
            double sum = c[at], all = fabs(c[at]);
            for (int k = 0; k < columns; k++) {
                const int i = k * blocks / columns;
                const double s = e8m0 ? e8m0_value(scale_a[m][i]) * e8m0_value(scale_b[i][n]) : e4m3_value(scale_a[m][i]) * e4m3_value(scale_b[i][n]);
                const double v = bits == 4 ? e2m1_value(codes_a[m][k]) * e2m1_value(codes_b[k][n]) : e4m3_value(codes_a[m][k]) * e4m3_value(codes_b[k][n]);
                sum += v * s, all += fabs(v * s);
            }
            expected[at] = sum, size[at] = all + 1e-30;
        }
    close(name, dd.get(name), expected, size, 1e-6);
}
static void check_primitives() {
    if (!has_kernel("primitive_mma_nvfp4_0")) { printf("no primitives of FP4 and FP8 in this PTX\n"); return; }
    for (int trial = 0; trial < 24; trial++) {
        const std::string part = std::to_string(trial & 1);
        check_instruction("primitive_mma_nvfp4_" + part, 4, 4, trial & 1, false, trial < 8);
        check_instruction("primitive_mma_mxfp4_" + part, 4, 2, trial & 1, true, trial < 8);
        check_instruction("primitive_mma_mxfp8_" + std::to_string(trial & 3), 8, 1, trial & 3, true, trial < 8);
    }
}

// The kind whose elements and scales those of a kind for narrow.cu are.
static int plain_kind(int narrow) {
    static const int plain[4] = {0, 2, 3, 4};
    return plain[narrow - 6];
}

// From the comment in weight.cuh.
static OnDevice pack_narrow(const Linear& w) {
    const int steps = (w.k + 127) / 128, tiles = (w.n + 31) / 32 * 2, block = block_of(w.kind), bits = w.kind < 3 ? 4 : 8;
    // Columns of a product, those of a word, and from the first word of a row to the second; words of scales of a tile in a step.
    const int columns = 256 / bits, run = 32 / bits, second = bits == 4 ? 32 : 4, width = !block ? 0 : block == 32 ? 16 : 32;
    const bool mx = e8m0(w.kind);
    OnDevice d{std::vector<uint32_t>((size_t)tiles * steps * 64 * bits), std::vector<uint32_t>((size_t)tiles * steps * width), std::vector<float>(tiles * 16, 0.0f), steps};
    for (int n = 0; n < w.n; n++) {
        int top = 0;
        if (mx) for (int b = 0; b < w.k / block; b++) top = std::max(top, w.scales[n * (w.k / block) + b]);
        d.rows[n] = mx ? (float)ldexp(1, top - 127) : 1.0f;
        for (int k = 0; k < w.k; k++) {
            const int scale = block ? w.scales[n * (w.k / block) + k / block] : 0, byte = mx ? 127 + scale - top : scale;
            if (block && byte <= 0) continue;
            const int tile = n / 16, step = k / 128, product = k % 128 / columns, lane = n % 8 * 4 + k % 32 / 8;
            const int word = n / 8 % 2 + k % columns / second % 2 * 2;
            const size_t at = (size_t)tile * steps + step;
            d.words[((at * (bits / 2) + product) * 32 + lane) * 4 + word] |= (uint32_t)w.codes[n * w.k + k] << bits * (k % run);
            if (!block) continue;
            const int row = n % 8 * (mx ? 2 : 4) + n / 8 % 2;
            uint32_t& s = d.scales[at * width + row + (mx ? 0 : k / 64 % 2 * 2)];
            const int shift = 8 * (mx ? k / 32 % 4 : k / 16 % 4);
            s = (s & ~(255u << shift)) | (uint32_t)byte << shift;
        }
    }
    return d;
}
static double narrow_weight(const Linear& w, int n, int k) {
    int top = 0;
    if (!e8m0(w.kind)) return weight(w, n, k);
    for (int b = 0; b < w.k / 32; b++) top = std::max(top, w.scales[n * (w.k / 32) + b]);
    // What is too far below a row's largest scale counts as nothing.
    return 127 + w.scales[n * (w.k / 32) + k / 32] - top > 0 ? weight(w, n, k) : 0;
}

// Tokens as operand.cu writes them; the last, if `broken`, with the factor of a row in which something is not finite, or of FP8
// without blocks with a NaN.
struct Codes { std::vector<uint32_t> words, scales; std::vector<std::vector<double>> values; };
static Codes random_codes(int m, int k, int kind, bool extreme, bool broken) {
    const int steps = (k + 127) / 128, block = block_of(kind), pitch = block ? 128 * steps / (4 * block) + 1 : 1, bits = kind < 3 ? 4 : 8;
    const bool mx = e8m0(kind);
    Codes x{std::vector<uint32_t>((size_t)m * steps * 4 * bits), std::vector<uint32_t>((size_t)m * pitch), {}};
    for (int r = 0; r < m; r++) {
        const bool nan = broken && r == m - 1;
        x.values.emplace_back(k);
        std::vector<int> scales(block ? k / block : 0);
        for (auto& s : scales) s = mx ? (extreme ? 60 + below(130) : 120 + below(10)) : extreme ? below(127) : 40 + below(60);
        for (size_t i = 0; i < scales.size(); i++) x.scales[(size_t)r * pitch + i / 4] |= (uint32_t)scales[i] << 8 * (i % 4);
        x.scales[(size_t)r * pitch + pitch - 1] = bits_of(block ? (nan ? NAN : 1.0f) : (float)uniform(.5, 2));
        for (int c = 0; c < k; c++) {
            int code = below(1 << bits);
            if (bits == 8 && (code & 127) == 127) code--;
            if (!block && nan && c == k / 2) code = 127;
            const int eight = c % 128 / 8, at = eight % 4 * 4 + eight / 4;
            x.words[((size_t)r * steps + c / 128) * 4 * bits + (bits == 4 ? at : 2 * at + c % 8 / 4)] |= (uint32_t)code << bits * (c % (32 / bits));
            const double v = bits == 4 ? e2m1_value(code) : e4m3_value(code);
            x.values[r][c] = !block ? v : v * (mx ? e8m0_value(scales[c / block]) : e4m3_value(scales[c / block]));
        }
    }
    return x;
}

// `columns` as in matmul_case; `grid` and `groups`: scales of 128 columns that the weight and the tokens have.
struct Grouped { bool grid = false, groups = false; };
static void narrow_case(int m, int n, int k, int kind, bool biased, bool extreme, bool broken, int columns, Grouped grouped = {}) {
    const Linear w = random_linear(n, k, plain_kind(kind), extreme);
    const OnDevice d = pack_narrow(w);
    const Codes x = random_codes(m, k, plain_kind(kind), extreme, broken);
    const bool mx = e8m0(w.kind), blocks = block_of(w.kind), in_groups = grouped.grid || grouped.groups;
    std::vector<float> rows(d.rows), bias(n), grid((n + 127) / 128 * d.steps), groups(m * d.steps);
    for (int i = 0; i < n; i++) rows[i] *= (float)uniform(.01, .02), bias[i] = (float)uniform(-1, 1);
    for (auto* v : {&grid, &groups}) for (auto& f : *v) f = (float)uniform(.5, 2);
    const float scale = .25f;
    Array<uint32_t> words(d.words), scales(d.scales), dx(x.words), dxs(x.scales);
    Array<float> drows(rows), dbias(bias), dgrid(grid), dgroups(groups), y((size_t)m * n), small((size_t)m * n);
    auto product = [&](int columns, float* y) {
        const std::string name = (columns == 64 ? std::string("tile_") + NAMES[kind] : std::string("matmul_") + NAMES[kind] + "_" + std::to_string(columns)) + (in_groups ? "g" : "");
        const int outputs = columns < 64 ? 32 : in_groups ? 128 : 256;
        // A token has a scale for all of K or one for each 128 columns.
        return run(name.c_str(), (n + outputs - 1) / outputs, (m + columns - 1) / columns, 1, (U4*)words.p, blocks ? scales.p : nullptr, grouped.grid ? dgrid.p : nullptr, (U4*)dx.p, grouped.groups ? nullptr : dxs.p, grouped.groups ? dgroups.p : nullptr, drows.p, biased ? dbias.p : nullptr, y, m, 1, n, d.steps * 128, scale);
    };
    char what[160];
    snprintf(what, sizeof what, "%s columns=%d M=%d N=%d K=%d grid=%d groups=%d", NAMES[kind], columns, m, n, k, grouped.grid, grouped.groups);
    if (!product(columns, y.p)) return;
    if (columns > 8 && product(8, small.p)) equal(std::string(what) + " against 8", y.get(what), small.get(what));
    std::vector<double> expected, size;
    for (int i = 0; i < m; i++)
        for (int o = 0; o < n; o++) {
            double s = 0, a = 0;
            for (int c = 0; c < k; c++) {
                double v = narrow_weight(w, o, c) / (double)(mx ? d.rows[o] : 1) * x.values[i][c];
                if (grouped.grid) v *= grid[o / 128 * d.steps + c / 128];
                if (grouped.groups) v *= groups[i * d.steps + c / 128];
                s += v, a += fabs(v);
            }
            double f = (double)rows[o] * scale * (blocks && broken && i == m - 1 ? NAN : 1);
            if (!blocks && !grouped.groups) f *= float_of(x.scales[i]);
            expected.push_back(s * f + (biased ? bias[o] : 0)), size.push_back(a * fabs(f) + (biased ? fabs(bias[o]) : 0) + 1e-30);
        }
    // Chains of cut-off sums lose more than rounded ones.
    close(what, y.get(what), expected, size, 2e-6);
}
static void check_narrow() {
    if (!has_narrow()) return;
    for (int kind : {6, 7, 8, 9}) {
        for (int wide : {8, 16, 32}) {
            narrow_case(1, 32, 128, kind, false, false, false, wide);
            narrow_case(wide - 3, 40, 128 * 9 + 32, kind, true, true, true, wide);
            narrow_case(wide / 2 + 1, 150, 64, kind, true, false, false, wide);
            narrow_case(3, 33, 128 * 17 + 96, kind, false, true, false, wide);
        }
        // Slices of no step, of one and of two; blocks and warps beyond the last output; tokens beyond the last.
        narrow_case(65, 40, 128 * 9 + 32, kind, true, true, true, 64);
        narrow_case(33, 280, 128 * 3, kind, false, false, false, 64);
        narrow_case(9, 150, 64, kind, true, true, false, 64);
        narrow_case(40, 33, 128 * 17, kind, true, false, true, 64);
        if (kind == 6) narrow_case(5, 33, 16, kind, false, false, false, 8);
    }
    // FP8 under scales of 128 columns of the weight, the tokens, both.
    for (Grouped grouped : {Grouped{true, false}, Grouped{false, true}, Grouped{true, true}}) {
        for (int wide : {8, 16, 32}) {
            narrow_case(wide - 3, 40, 128 * 9 + 32, 8, true, true, true, wide, grouped);
            narrow_case(wide / 2 + 1, 150, 100, 8, false, false, false, wide, grouped);
        }
        narrow_case(65, 40, 128 * 9 + 30, 8, true, true, true, 64, grouped);
        narrow_case(33, 280, 128 * 3, 8, false, false, false, 64, grouped);
    }
}
// Rows out of an embedding in this layout.
static void check_narrow_rows() {
    if (!has_kernel("embed_fp4_16")) return;
    for (int kind : {6, 7, 8, 9})
        for (auto [k, n] : {std::pair{128 * 17, 40}, std::pair{64, 300}}) {
            const Linear w = random_linear(n, k, plain_kind(kind), true);
            const OnDevice d = pack_narrow(w);
            const bool mx = e8m0(w.kind), gridded = kind == 8 && n == 300;
            std::vector<float> rows(d.rows), grid((n + 127) / 128 * d.steps);
            for (int i = 0; i < n; i++) rows[i] *= (float)uniform(.5, 2);
            for (auto& f : grid) f = (float)uniform(.5, 2);
            const std::vector<int> tokens{0, n - 1, 8, 31, 32, 7, n / 2};
            Array<uint32_t> words(d.words), scales(d.scales);
            Array<float> drows(rows), dgrid(grid), out(tokens.size() * k);
            Array<int> dt(tokens);
            const std::string what = std::string("embed_") + NAMES[kind];
            if (!run(what.c_str(), (int)tokens.size(), 1, 1, (U4*)words.p, block_of(w.kind) ? scales.p : nullptr, gridded ? dgrid.p : nullptr, drows.p, dt.p, out.p, k, d.steps)) continue;
            std::vector<double> expected, size;
            for (int t : tokens) for (int i = 0; i < k; i++) {
                expected.push_back(narrow_weight(w, t, i) * rows[t] / (mx ? (double)d.rows[t] : 1.0) * (gridded ? grid[t / 128 * d.steps + i / 128] : 1.0f));
                size.push_back(fabs(expected.back()) + 1e-30);
            }
            close(what, out.get(what), expected, size, 3e-7);
        }
}
