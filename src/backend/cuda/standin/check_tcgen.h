// Products by tcgen05: the instructions alone, then the kernels of tcgen.cu. Where an element, a scale or a sum stands is here the other
// way round than in ptx.h: from its place in the matrix to bytes of shared memory, lanes and columns.

// Whether what is checked has them: PTX for another architecture has not.
static bool has_tcgen() {
    const bool has = has_kernel("tile_tcgen_16");
    if (!has) printf("no kernels by tcgen05 in this PTX\n");
    return has;
}
static uint64_t descriptor(int start, int leading, int stride) {
    return (uint64_t)(start / 16) + ((uint64_t)(leading / 16) << 16) + ((uint64_t)(stride / 16) << 32) + (1ull << 46);
}
static std::vector<uint32_t> random_image(int units) {
    std::vector<uint32_t> v(units * 4);
    for (auto& x : v) x = RANDOM();
    return v;
}
static void put_bits(std::vector<uint32_t>& image, int byte, int bit, int bits, int value) {
    uint32_t& word = image[byte / 4];
    const int at = byte % 4 * 8 + bit;
    word = (word & ~(((1u << bits) - 1) << at)) | (uint32_t)value << at;
}

// Row r of a copy stands in lanes r, r + 32, r + 64 and r + 96, its 16 bytes in four columns.
static void check_copy(int stride) {
    const int second = 48 + 4 * stride;
    const std::vector<uint32_t> image = random_image(1024);
    Array<uint32_t> d(image);
    Array<float> out(1024);
    if (!::run("primitive_tensor_copy", 1, 1, 1, (U4*)d.p, 1024, descriptor(16, 0, stride), descriptor(second, 0, stride), out.p)) return;
    const std::vector<float> got = out.get("primitive_tensor_copy");
    for (int copy = 0; copy < 2; copy++)
        for (int row = 0; row < 32; row++)
            for (int word = 0; word < 4; word++)
                for (int quarter = 0; quarter < 4; quarter++) {
                    const uint32_t want = image[((copy ? second : 16) + row / 8 * stride + row % 8 * 16) / 4 + word];
                    if (bits_of(got[(quarter * 32 + row) * 8 + copy * 4 + word]) == want) continue;
                    printf("FAIL primitive_tensor_copy: row %d word %d in quarter %d\n", row, word, quarter), FAILED++;
                    return;
                }
}

// Two products of 128 rows by `n` columns, added: matrices and scales at places of their own in shared memory, elements and scales random.
// `rows_between`: 16-byte units between groups of eight rows beyond their own; 0 columns beyond eight: descriptors that repeat eight rows.
static void check_tensor_product(const std::string& name, bool mx, int n, int gap, bool repeat, bool wide) {
    const int blocks = mx ? 2 : 4, stride = 128 + 16 * gap;
    std::vector<uint32_t> image = random_image(1536);
    std::vector<uint64_t> descriptors;
    std::vector<uint32_t> instructions;
    std::vector<double> expected(128 * 128), size(128 * 128, 1e-30);
    int at = 0;
    for (int product = 0; product < 2; product++) {
        const int part = mx ? 2 * ((product + n / 8) % 2) : 0;
        std::vector<double> values[2];
        uint64_t of_side[4];
        for (int side = 0; side < 2; side++) {
            const int rows = side ? n : 128, kept = side && repeat ? 8 : rows;
            // The units of 32 columns follow each other, or the rows of each.
            const bool columns_first = (product + side) % 2;
            const int group = columns_first ? 2 * stride : stride, leading = columns_first ? stride : kept / 8 * stride;
            const int start = at, scales = at + 2 * kept / 8 * stride;
            at = scales + 512;
            of_side[side] = descriptor(start, leading, side && repeat ? 0 : group), of_side[2 + side] = descriptor(scales, 0, 128);
            values[side].resize(rows * 64);
            for (int r = 0; r < rows; r++) {
                int scale[4];
                for (int b = 0; b < blocks; b++) {
                    scale[b] = mx ? (wide ? 90 + below(70) : 110 + below(30)) : wide ? below(127) : 40 + below(40);
                    // A row's word: row r % 32 of the copy, its word r / 32.
                    put_bits(image, scales + r % 32 * 16 + r / 32 * 4 + part + b, 0, 8, scale[b]);
                }
                for (int k = 0; k < 64; k++) {
                    const int row = r % kept, code = r < kept ? below(16) : -1;
                    const int byte = start + row / 8 * group + row % 8 * 16 + k / 32 * leading + k % 32 / 2;
                    if (code >= 0) put_bits(image, byte, k % 2 * 4, 4, code);
                    const int held = image[byte / 4] >> (byte % 4 * 8 + k % 2 * 4) & 15, b = k * blocks / 64;
                    values[side][r * 64 + k] = e2m1_value(held) * (mx ? e8m0_value(scale[b]) : e4m3_value(scale[b]));
                }
            }
        }
        descriptors.insert(descriptors.end(), {of_side[0], of_side[1], of_side[2], of_side[3]});
        instructions.push_back((1 << 7) + (1 << 10) + (n / 8 << 17) + (mx ? 1 << 23 : 0) + (1 << 27) + (part << 4) + ((uint32_t)part << 29));
        for (int m = 0; m < 128; m++)
            for (int c = 0; c < n; c++)
                for (int k = 0; k < 64; k++) {
                    const double v = values[0][m * 64 + k] * values[1][c * 64 + k];
                    expected[m * 128 + c] += v, size[m * 128 + c] += fabs(v);
                }
    }
    if (at > 1536 * 16) { printf("FAIL %s: no room for this\n", name.c_str()), FAILED++; return; }
    Array<uint32_t> di(image), dn(instructions);
    Array<uint64_t> dd(descriptors);
    Array<float> out(128 * 128);
    if (!::run(name.c_str(), 1, 1, 1, (U4*)di.p, 1536, dd.p, dn.p, out.p)) return;
    close(name, out.get(name), expected, size, 1e-6);
}
static void check_tensor_primitives() {
    if (!has_kernel("primitive_tensor_copy")) { printf("no primitives of tcgen05 in this PTX\n"); return; }
    for (int stride : {128, 144, 512}) check_copy(stride);
    for (int trial = 0; trial < 8; trial++) {
        const bool wide = trial < 2;
        check_tensor_product(trial & 1 ? "primitive_tcgen_mxfp4" : "primitive_tcgen_nvfp4", trial & 1, 128, 0, trial >= 2 && trial < 4, wide);
        check_tensor_product(trial & 1 ? "primitive_tcgen_mxfp4" : "primitive_tcgen_nvfp4", trial & 1, 128, trial >= 4 ? 1 : 2, true, wide);
    }
}

// From the comment in weight.cuh.
static OnDevice pack_tcgen(const Linear& w) {
    const int steps = (w.k + 127) / 128, tiles = (w.n + 127) / 128, block = block_of(w.kind), words = block == 16 ? 2 : 1;
    const bool mx = e8m0(w.kind);
    OnDevice d{std::vector<uint32_t>((size_t)tiles * steps * 2048), std::vector<uint32_t>((size_t)tiles * steps * words * 128), std::vector<float>(tiles * 128, 0.0f), steps};
    for (int n = 0; n < w.n; n++) {
        int top = 0;
        if (mx) for (int b = 0; b < w.k / block; b++) top = std::max(top, w.scales[n * (w.k / block) + b]);
        d.rows[n] = mx ? (float)ldexp(1, top - 127) : 1.0f;
        for (int k = 0; k < w.k; k++) {
            const int scale = w.scales[n * (w.k / block) + k / block], byte = mx ? 127 + scale - top : scale;
            if (byte <= 0) continue;
            const size_t at = (size_t)(n / 128) * steps + k / 128;
            d.words[((at * 4 + k / 32 % 4) * 128 + n % 128) * 4 + k / 8 % 4] |= (uint32_t)w.codes[n * w.k + k] << 4 * (k % 8);
            uint32_t& s = d.scales[(at * words + (mx ? 0 : k / 64 % 2)) * 128 + n % 32 * 4 + n % 128 / 32];
            const int shift = 8 * (k / block % 4);
            s = (s & ~(255u << shift)) | (uint32_t)byte << shift;
        }
    }
    return d;
}
static const char* TCGEN_NAMES[2] = {"tcgen_16", "tcgen_32"};
// `kind` 0 or 2 as elsewhere. All ways of computing it must give the bits of the tile.
static void tcgen_case(int m, int n, int k, int kind, bool biased, bool extreme, bool broken) {
    const Linear w = random_linear(n, k, kind, extreme);
    const OnDevice d = pack_tcgen(w);
    const bool mx = e8m0(kind);
    Codes x = random_codes(m, k, kind, extreme, broken);
    // As random_codes has them, of each 128 columns the words of 0, 4, 8, 12, then 1, ...; here in order.
    for (size_t at = 0; at < x.words.size(); at += 16) {
        std::vector<uint32_t> words(x.words.begin() + at, x.words.begin() + at + 16);
        for (int i = 0; i < 16; i++) x.words[at + i] = words[i % 4 * 4 + i / 4];
    }
    std::vector<float> rows(d.rows), bias(n);
    for (int i = 0; i < n; i++) rows[i] *= (float)uniform(.01, .02), bias[i] = (float)uniform(-1, 1);
    const float scale = .25f;
    const int pitch = (mx ? 1 : 2) * d.steps + 1;
    Array<uint32_t> words(d.words), scales(d.scales), dx(x.words), dxs(x.scales);
    Array<float> drows(rows), dbias(bias), y((size_t)m * n);
    char what[160];
    snprintf(what, sizeof what, "%s M=%d N=%d K=%d", TCGEN_NAMES[mx], m, n, k);
    auto product = [&](int tokens, bool sliced, float* y) {
        const std::string name = std::string(tokens == 8 ? "matmul_" : "tile_") + TCGEN_NAMES[mx];
        const size_t dynamic = (size_t)6 * (tokens == 8 ? mx ? 9728 : 10752 : mx ? 17408 : 18432);
        Array<float> parts(sliced ? (size_t)8 * m * n : 1);
        float* to = sliced ? parts.p : y;
        if (!run_with(dynamic, name.c_str(), (n + 127) / 128, (m + tokens - 1) / tokens, sliced ? 8 : 1, (U4*)words.p, (U4*)scales.p, (U4*)dx.p, dxs.p, drows.p, biased ? dbias.p : nullptr, to, m, sliced ? 8 : 1, n, d.steps * 128, scale)) return false;
        return !sliced || run("sum_slices", (n + 255) / 256, m, 1, parts.p, dxs.p, drows.p, biased ? dbias.p : nullptr, y, m, pitch, n, scale);
    };
    if (!product(128, false, y.p)) return;
    for (auto [tokens, sliced] : {std::pair{8, false}, std::pair{8, true}, std::pair{128, true}}) {
        Array<float> other((size_t)m * n);
        if (product(tokens, sliced, other.p)) equal(std::string(what) + (tokens == 8 ? ", by eight" : "") + (sliced ? ", in slices" : ""), other.get(what), y.get(what));
    }
    std::vector<double> expected, size;
    for (int i = 0; i < m; i++)
        for (int o = 0; o < n; o++) {
            double s = 0, a = 0;
            for (int c = 0; c < k; c++) {
                const double v = narrow_weight(w, o, c) / (double)(mx ? d.rows[o] : 1) * x.values[i][c];
                s += v, a += fabs(v);
            }
            const double f = (double)rows[o] * scale * (broken && i == m - 1 ? NAN : 1);
            expected.push_back(s * f + (biased ? bias[o] : 0)), size.push_back(a * fabs(f) + (biased ? fabs(bias[o]) : 0) + 1e-30);
        }
    close(what, y.get(what), expected, size, 2e-6);
}
// Each row of a mixture has the bits that the product of its expert gives it. `rows` of experts; the last has none.
static void tcgen_mixture(int kind, std::vector<int> rows, int tokens) {
    const int n = 140, k = 128 * 3 + 64, steps = 4, count = (int)rows.size(), pitch = (kind == 2 ? 1 : 2) * steps + 1;
    std::vector<int> begins{0};
    for (int r : rows) begins.push_back(begins.back() + r);
    const Codes x = random_codes(begins.back(), k, kind, false, true);
    Array<uint32_t> dx(x.words), dxs(x.scales);
    std::vector<std::unique_ptr<Array<uint32_t>>> words, scales;
    std::vector<std::unique_ptr<Array<float>>> row_scales, biases;
    std::vector<uint64_t> pointers;
    std::vector<float> scale_of;
    for (int e = 0; e < count; e++) {
        const OnDevice d = pack_tcgen(random_linear(n, k, kind, e == 1));
        std::vector<float> bias(n);
        for (auto& b : bias) b = (float)uniform(-1, 1);
        words.push_back(std::make_unique<Array<uint32_t>>(d.words)), scales.push_back(std::make_unique<Array<uint32_t>>(d.scales));
        row_scales.push_back(std::make_unique<Array<float>>(d.rows)), biases.push_back(std::make_unique<Array<float>>(bias));
        pointers.insert(pointers.end(), {(uint64_t)words[e]->p, (uint64_t)scales[e]->p, 0, (uint64_t)row_scales[e]->p, e % 2 ? (uint64_t)biases[e]->p : 0});
        scale_of.push_back((float)uniform(.01, .03));
    }
    Array<uint64_t> dp(pointers);
    Array<int> db(begins);
    Array<float> ds(scale_of), y((size_t)begins.back() * n), one((size_t)begins.back() * n);
    const std::string name = TCGEN_NAMES[kind == 2], suffix = name + (tokens == 8 ? "_8" : "_128");
    const size_t dynamic = (size_t)6 * (tokens == 8 ? kind == 2 ? 9728 : 10752 : kind == 2 ? 17408 : 18432);
    const int most = *std::max_element(rows.begin(), rows.end());
    if (!run_with(dynamic, ("mixture_" + suffix).c_str(), (n + 127) / 128, (most + tokens - 1) / tokens, count, dp.p, db.p, (U4*)dx.p, dxs.p, (float*)nullptr, ds.p, y.p, 1, n, steps * 128)) return;
    for (int e = 0; e < count; e++) {
        const uint64_t* p = &pointers[5 * e];
        const size_t first = begins[e];
        if (rows[e] && !run_with((size_t)6 * (kind == 2 ? 17408 : 18432), ("tile_" + name).c_str(), (n + 127) / 128, (rows[e] + 127) / 128, 1, (U4*)p[0], (U4*)p[1], (U4*)(dx.p + first * steps * 16), dxs.p + first * pitch, (float*)p[3], (float*)p[4], one.p + first * n, rows[e], 1, n, steps * 128, scale_of[e])) return;
    }
    equal("mixture " + suffix, y.get(suffix), one.get(suffix));
}
// Where operations are never heard of again, the kernel ends, and says so by what it gives.
static void check_silence() {
    standin::MUTE = true;
    const Linear w = random_linear(40, 300, 0, false);
    std::vector<uint32_t> none(3 * 2048), factors(3 * 7);
    Array<uint32_t> words(none), scales(none), dx(none), dxs(factors);
    Array<float> rows(std::vector<float>(128, 1.0f)), y(3 * 40);
    if (run_with(6 * 18432, "tile_tcgen_16", 1, 1, 1, (U4*)words.p, (U4*)scales.p, (U4*)dx.p, dxs.p, rows.p, (float*)nullptr, y.p, 3, 1, 40, 384, 1.0f)) {
        const std::vector<float> got = y.get("silence");
        if (!std::all_of(got.begin(), got.end(), [](float v) { return v != v; })) printf("FAIL tile_tcgen_16: results of products that were never done\n"), FAILED++;
    }
    standin::MUTE = false;
}
static void check_tcgen() {
    if (!has_tcgen()) return;
    for (int kind : {0, 2}) {
        tcgen_case(1, 32, 128, kind, false, false, false);
        // Slices of no step, of one and of two, then of more than there are stages; outputs and tokens beyond a block.
        tcgen_case(11, 150, 128 * 9 + 32, kind, true, true, true);
        tcgen_case(131, 40, 64, kind, true, false, false);
        tcgen_case(5, 33, 128 * 60, kind, false, false, true);
    }
    tcgen_case(3, 9, 16, 0, true, false, false);
#ifdef PTX
    if (!FROM_PTX) check_silence();
#else
    check_silence();
#endif
}
static void check_tcgen_mixture() {
    if (!has_kernel("mixture_tcgen_16_8")) return;
    for (int kind : {0, 2}) tcgen_mixture(kind, {9, 5, 3, 0}, 8), tcgen_mixture(kind, {2, 130, 0}, 128);
}
static void check_tcgen_rows() {
    if (!has_kernel("embed_tcgen_16")) return;
    for (int kind : {0, 2})
        for (auto [k, n] : {std::pair{128 * 3, 140}, std::pair{64, 300}}) {
            const Linear w = random_linear(n, k, kind, true);
            const OnDevice d = pack_tcgen(w);
            std::vector<float> rows(d.rows);
            for (int i = 0; i < n; i++) rows[i] *= (float)uniform(.5, 2);
            const std::vector<int> tokens{0, n - 1, 8, 31, 32, 129, n / 2};
            Array<uint32_t> words(d.words), scales(d.scales);
            Array<float> drows(rows), out(tokens.size() * k);
            Array<int> dt(tokens);
            const std::string what = std::string("embed_") + TCGEN_NAMES[kind == 2];
            if (!run(what.c_str(), (int)tokens.size(), 1, 1, (U4*)words.p, scales.p, (float*)nullptr, drows.p, dt.p, out.p, k, d.steps)) continue;
            std::vector<double> expected, size;
            for (int t : tokens) for (int i = 0; i < k; i++) {
                expected.push_back(narrow_weight(w, t, i) * rows[t] / (kind == 2 ? (double)d.rows[t] : 1.0));
                size.push_back(fabs(expected.back()) + 1e-30);
            }
            close(what, out.get(what), expected, size, 3e-7);
        }
}
