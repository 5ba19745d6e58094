// Products on FP4 tensor cores: the instruction alone, then the kernels of fp4.cu.

// Whether what is checked has them: PTX for another architecture has not.
static bool has_fp4() {
#ifdef PTX
    if (FROM_PTX && !ptx::MODULE.kernels.count("tile_fp4_16")) { printf("no FP4 kernels in this PTX\n"); return false; }
#endif
    return true;
}
static double e8m0_value(int code) { return ldexp(1, code - 127); }

// The instruction on random registers. Where an element or a scale stands is here the other way round than in ptx.h: from its
// place in the matrix to lane, register and bits (PTX ISA 9.0, fragments of mma.m16n8k64; block scaling for mma.sync). Lanes that a
// selector leaves out hold anything.
static void check_primitives() {
#ifdef PTX
    if (FROM_PTX && !ptx::MODULE.kernels.count("primitive_mma_nvfp4_0")) { printf("no FP4 primitives in this PTX\n"); return; }
#endif
    for (int trial = 0; trial < 48; trial++) {
        const bool mx = trial & 1;
        const int part = trial >> 1 & 1, blocks = mx ? 2 : 4;
        std::vector<uint32_t> a(128), b(64), scales(64);
        std::vector<float> c(128);
        for (auto* v : {&a, &b, &scales}) for (auto& x : *v) x = RANDOM();
        for (auto& x : c) x = trial % 3 ? (float)uniform(-2000, 2000) : 0.0f;
        int codes_a[16][64], codes_b[64][8], scale_a[16][4], scale_b[4][8];
        auto place = [](uint32_t& word, int bits, int at, int value) { word = (word & ~(((1u << bits) - 1) << at)) | (uint32_t)value << at; };
        auto scale = [&] { return mx ? 110 + below(30) : trial < 8 ? below(127) : 40 + below(40); };
        for (int m = 0; m < 16; m++) {
            for (int k = 0; k < 64; k++) {
                codes_a[m][k] = below(16);
                place(a[(m % 8 * 4 + k % 32 / 8) * 4 + m / 8 + k / 32 * 2], 4, 4 * (k % 8), codes_a[m][k]);
            }
            for (int i = 0; i < blocks; i++) {
                scale_a[m][i] = scale();
                const int lane = m % 8 * 4 + m / 8 + (mx ? 0 : 2 * part);
                place(scales[lane * 2], 8, 8 * (i + (mx ? 2 * part : 0)), scale_a[m][i]);
            }
        }
        for (int n = 0; n < 8; n++) {
            for (int k = 0; k < 64; k++) {
                codes_b[k][n] = below(16);
                place(b[(n * 4 + k % 32 / 8) * 2 + k / 32], 4, 4 * (k % 8), codes_b[k][n]);
            }
            for (int i = 0; i < blocks; i++) {
                scale_b[i][n] = scale();
                place(scales[(n * 4 + (mx ? 0 : part)) * 2 + 1], 8, 8 * (i + (mx ? 2 * part : 0)), scale_b[i][n]);
            }
        }
        Array<uint32_t> da(a), db(b), ds(scales);
        Array<float> dc(c), dd(128);
        const std::string name = std::string("primitive_mma_") + (mx ? "mxfp4_" : "nvfp4_") + std::to_string(part);
        if (!run(name.c_str(), 1, 1, 1, (U4*)da.p, db.p, ds.p, dc.p, dd.p)) return;
        std::vector<double> expected(128), size(128);
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 8; n++) {
                const int at = (m % 8 * 4 + n / 2) * 4 + m / 8 * 2 + n % 2;
                double sum = c[at], all = fabs(c[at]);
                for (int k = 0; k < 64; k++) {
                    const int i = k * blocks / 64;
                    const double s = mx ? e8m0_value(scale_a[m][i]) * e8m0_value(scale_b[i][n]) : e4m3_value(scale_a[m][i]) * e4m3_value(scale_b[i][n]);
                    const double v = e2m1_value(codes_a[m][k]) * e2m1_value(codes_b[k][n]) * s;
                    sum += v, all += fabs(v);
                }
                expected[at] = sum, size[at] = all + 1e-30;
            }
        close(name, dd.get(name), expected, size, 1e-6);
    }
}

// From the comment in weight.cuh.
static OnDevice pack_fp4(const Linear& w) {
    const int steps = (w.k + 127) / 128, tiles = (w.n + 31) / 32 * 2, block = block_of(w.kind);
    const bool mx = e8m0(w.kind);
    OnDevice d{std::vector<uint32_t>((size_t)tiles * steps * 256), std::vector<uint32_t>((size_t)tiles * steps * (mx ? 16 : 32)), std::vector<float>(tiles * 16, 0.0f), steps};
    for (int n = 0; n < w.n; n++) {
        int top = 0;
        for (int b = 0; b < w.k / block; b++) top = std::max(top, w.scales[n * (w.k / block) + b]);
        d.rows[n] = mx ? (float)ldexp(1, top - 127) : 1.0f;
        for (int k = 0; k < w.k; k++) {
            const int scale = w.scales[n * (w.k / block) + k / block], byte = mx ? 127 + scale - top : scale;
            if (byte <= 0) continue;
            const int tile = n / 16, step = k / 128, half = k / 64 % 2, lane = n % 8 * 4 + k % 32 / 8, word = n / 8 % 2 + k / 32 % 2 * 2;
            const size_t at = (size_t)tile * steps + step;
            d.words[((at * 2 + half) * 32 + lane) * 4 + word] |= (uint32_t)w.codes[n * w.k + k] << 4 * (k % 8);
            const int row = n % 8 * (mx ? 2 : 4) + n / 8 % 2;
            uint32_t& s = d.scales[at * (mx ? 16 : 32) + row + (mx ? 0 : half * 2)];
            const int shift = 8 * (mx ? k / 32 % 4 : k / 16 % 4);
            s = (s & ~(255u << shift)) | (uint32_t)byte << shift;
        }
    }
    return d;
}
static double fp4_weight(const Linear& w, int n, int k) {
    int top = 0;
    if (!e8m0(w.kind)) return weight(w, n, k);
    for (int b = 0; b < w.k / 32; b++) top = std::max(top, w.scales[n * (w.k / 32) + b]);
    // What is too far below a row's largest scale counts as nothing.
    return 127 + w.scales[n * (w.k / 32) + k / 32] - top > 0 ? weight(w, n, k) : 0;
}

// Tokens as operand.cu writes them; the last, if `broken`, with the factor of a row in which something is not finite.
struct Codes { std::vector<uint32_t> words, scales; std::vector<std::vector<double>> values; };
static Codes random_codes(int m, int k, bool mx, bool extreme, bool broken) {
    const int steps = (k + 127) / 128, block = mx ? 32 : 16, pitch = (mx ? 1 : 2) * steps + 1;
    Codes x{std::vector<uint32_t>((size_t)m * steps * 16), std::vector<uint32_t>((size_t)m * pitch), {}};
    for (int r = 0; r < m; r++) {
        x.values.emplace_back(k);
        std::vector<int> scales(k / block);
        for (auto& s : scales) s = mx ? (extreme ? 60 + below(130) : 120 + below(10)) : extreme ? below(127) : 40 + below(60);
        for (int i = 0; i < k / block; i++) x.scales[(size_t)r * pitch + i / 4] |= (uint32_t)scales[i] << 8 * (i % 4);
        x.scales[(size_t)r * pitch + pitch - 1] = bits_of(broken && r == m - 1 ? NAN : 1.0f);
        for (int c = 0; c < k; c++) {
            const int code = below(16), word = c % 128 / 8;
            x.words[((size_t)r * steps + c / 128) * 16 + word % 4 * 4 + word / 4] |= (uint32_t)code << 4 * (c % 8);
            x.values[r][c] = e2m1_value(code) * (mx ? e8m0_value(scales[c / block]) : e4m3_value(scales[c / block]));
        }
    }
    return x;
}

// `columns` as in matmul_case.
static void fp4_case(int m, int n, int k, bool mx, bool biased, bool extreme, bool broken, int columns) {
    const Linear w = random_linear(n, k, mx ? 2 : 0, extreme);
    const OnDevice d = pack_fp4(w);
    const Codes x = random_codes(m, k, mx, extreme, broken);
    std::vector<float> rows(d.rows), bias(n);
    for (int i = 0; i < n; i++) rows[i] *= (float)uniform(.01, .02), bias[i] = (float)uniform(-1, 1);
    const float scale = .25f;
    Array<uint32_t> words(d.words), scales(d.scales), dx(x.words), dxs(x.scales);
    Array<float> drows(rows), dbias(bias), y((size_t)m * n), small((size_t)m * n);
    auto product = [&](int columns, float* y) {
        const std::string kind = mx ? "fp4_32" : "fp4_16", name = columns == 64 ? "tile_" + kind : "matmul_" + kind + "_" + std::to_string(columns);
        const int outputs = columns < 64 ? 32 : 256;
        return run(name.c_str(), (n + outputs - 1) / outputs, (m + columns - 1) / columns, 1, (U4*)words.p, scales.p, (float*)nullptr, (U4*)dx.p, dxs.p, (float*)nullptr, drows.p, biased ? dbias.p : nullptr, y, m, 1, n, d.steps * 128, scale);
    };
    char what[120];
    snprintf(what, sizeof what, "fp4_%d columns=%d M=%d N=%d K=%d", mx ? 32 : 16, columns, m, n, k);
    if (!product(columns, y.p)) return;
    if (columns > 8 && product(8, small.p)) equal(std::string(what) + " against 8", y.get(what), small.get(what));
    std::vector<double> expected, size;
    for (int i = 0; i < m; i++)
        for (int o = 0; o < n; o++) {
            double s = 0, a = 0;
            for (int c = 0; c < k; c++) {
                const double v = fp4_weight(w, o, c) / (double)(mx ? d.rows[o] : 1) * x.values[i][c];
                s += v, a += fabs(v);
            }
            const double f = (double)rows[o] * scale * (broken && i == m - 1 ? NAN : 1);
            expected.push_back(s * f + (biased ? bias[o] : 0)), size.push_back(a * fabs(rows[o] * scale) + (biased ? fabs(bias[o]) : 0) + 1e-30);
        }
    // Chains of cut-off sums lose more than rounded ones.
    close(what, y.get(what), expected, size, 2e-6);
}
static void check_fp4() {
    if (!has_fp4()) return;
    for (bool mx : {false, true}) {
        for (int wide : {8, 16, 32}) {
            fp4_case(1, 32, 128, mx, false, false, false, wide);
            fp4_case(wide - 3, 40, 128 * 9 + 32, mx, true, true, true, wide);
            fp4_case(wide / 2 + 1, 150, 64, mx, true, false, false, wide);
            fp4_case(3, 33, 128 * 17 + 96, mx, false, true, false, wide);
        }
        // Slices of no step, of one and of two; blocks and warps beyond the last output; tokens beyond the last.
        fp4_case(65, 40, 128 * 9 + 32, mx, true, true, true, 64);
        fp4_case(33, 280, 128 * 3, mx, false, false, false, 64);
        fp4_case(9, 150, 64, mx, true, true, false, 64);
        fp4_case(40, 33, 128 * 17, mx, true, false, true, 64);
        if (!mx) fp4_case(5, 33, 16, mx, false, false, false, 8);
    }
    // Rows out of an embedding in this layout.
    for (bool mx : {false, true})
        for (auto [k, n] : {std::pair{128 * 17, 40}, std::pair{64, 300}}) {
            const Linear w = random_linear(n, k, mx ? 2 : 0, true);
            const OnDevice d = pack_fp4(w);
            std::vector<float> rows(d.rows);
            for (int i = 0; i < n; i++) rows[i] *= (float)uniform(.5, 2);
            const std::vector<int> tokens{0, n - 1, 8, 31, 32, 7, n / 2};
            Array<uint32_t> words(d.words), scales(d.scales);
            Array<float> drows(rows), out(tokens.size() * k);
            Array<int> dt(tokens);
            const std::string what = mx ? "embed_fp4_32" : "embed_fp4_16";
            if (!run(what.c_str(), (int)tokens.size(), 1, 1, (U4*)words.p, scales.p, (float*)nullptr, drows.p, dt.p, out.p, k, d.steps)) continue;
            std::vector<double> expected, size;
            for (int t : tokens) for (int i = 0; i < k; i++) {
                expected.push_back(fp4_weight(w, t, i) * rows[t] / (mx ? (double)d.rows[t] : 1.0));
                size.push_back(fabs(expected.back()) + 1e-30);
            }
            close(what, out.get(what), expected, size, 3e-7);
        }
}
