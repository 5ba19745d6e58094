// Every kernel against its definition, on ragged shapes, with every access checked: what scripts/cuda-check.sh runs. The
// definitions here are plain loops over whole matrices and know nothing of tiles, lanes or pages.
//
// usage: check [FILE...]: the kernels of these files (matmul, tile, narrow, tcgen, operand, attention, recurrent, rows, mixture, sample), or
// primitives; all without.
#include "checked.cu"

#include <random>

// Where this is built with -DPTX, `--ptx PTX` before the files runs the kernels from what the compiler made of them.
#ifdef PTX
#include "ptx.h"
static bool FROM_PTX = false;
#endif

static int FAILED = 0, CHECKED = 0;
static std::mt19937 RANDOM(1);
static double uniform(double a, double b) { return std::uniform_real_distribution<>(a, b)(RANDOM); }
static int below(int n) { return (int)(RANDOM() % (unsigned)n); }

// Whether what is checked has a kernel: PTX for an architecture or of one file has not all of them.
static bool has_kernel(const std::string& name) {
#ifdef PTX
    if (FROM_PTX) return ptx::MODULE.kernels.count(name) > 0;
#endif
    return standin::kernels().count(name) > 0;
}

// An array on the device. `poison`: nothing of it was written.
template <class T> struct Array {
    T* p;
    size_t n;
    explicit Array(size_t n) : p((T*)standin::allocate(std::max<size_t>(n, 1) * sizeof(T))), n(n) {}
    explicit Array(const std::vector<T>& v) : Array(v.size()) { set(v); }
    Array(const Array&) = delete;
    ~Array() { standin::release(p); }
    void set(const std::vector<T>& v) {
        memcpy(p, v.data(), v.size() * sizeof(T));
        standin::Shadow& s = *standin::region_of(p, 1)->shadow;
        memset(s.written.data(), 1, v.size() * sizeof(T));
    }
    // Values, all of which must have been written.
    std::vector<T> get(const std::string& what) const {
        standin::Shadow& s = *standin::region_of(p, 1)->shadow;
        if (n && memchr(s.written.data(), 0, n * sizeof(T))) {
            const size_t at = (uint8_t*)memchr(s.written.data(), 0, n * sizeof(T)) - s.written.data();
            printf("FAIL %s: value %zu of %zu was not written\n", what.c_str(), at / sizeof(T), n), FAILED++;
        }
        return std::vector<T>(p, p + n);
    }
    bool untouched(size_t from, size_t to) const {
        standin::Shadow& s = *standin::region_of(p, 1)->shadow;
        return std::all_of(s.written.begin() + from * sizeof(T), s.written.begin() + to * sizeof(T), [](uint8_t w) { return !w; });
    }
};

// With `dynamic` bytes of shared memory beside what the kernel declares.
template <class... A> static bool run_with(size_t dynamic, const char* name, int gx, int gy, int gz, A... args) {
    auto k = standin::kernels().find(name);
    if (k == standin::kernels().end()) { printf("FAIL no kernel %s\n", name), FAILED++; return false; }
    void* pointers[] = {(void*)&args...};
    std::string fault;
#ifdef PTX
    if (FROM_PTX) fault = ptx::launch(name, gx, gy, gz, k->second.threads, pointers, dynamic);
    else
#endif
        fault = standin::launch(k->second, gx, gy, gz, k->second.threads, pointers, dynamic);
    CHECKED++;
    if (!fault.empty()) printf("FAIL %s\n", fault.c_str()), FAILED++;
    return fault.empty();
}
template <class... A> static bool run(const char* name, int gx, int gy, int gz, A... args) { return run_with(0, name, gx, gy, gz, args...); }
// |got - expected| <= bound · scale, element by element.
static void close(const std::string& what, const std::vector<float>& got, const std::vector<double>& expected, const std::vector<double>& scale, double bound) {
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < got.size(); i++) {
        double e = std::isnan(expected[i]) && std::isnan(got[i]) ? 0 : fabs(got[i] - expected[i]) / std::max(scale[i], 1e-300);
        if (std::isinf(expected[i]) && got[i] == expected[i]) e = 0;
        if (e != e) e = INFINITY;  // one is NaN, the other not
        if (e > worst) worst = e, at = i;
    }
    if (!(worst <= bound)) printf("FAIL %s: element %zu is %g, expected %g: %.1e of %.1e allowed\n", what.c_str(), at, got[at], expected[at], worst, bound), FAILED++;
}
template <class T> static void equal(const std::string& what, const std::vector<T>& got, const std::vector<T>& expected) {
    for (size_t i = 0; i < expected.size(); i++) {
        if (memcmp(&got[i], &expected[i], sizeof(T)) == 0) continue;
        if (got[i] != got[i] && expected[i] != expected[i]) continue;
        printf("FAIL %s: element %zu is %g, expected %g\n", what.c_str(), i, (double)got[i], (double)expected[i]), FAILED++;
        return;
    }
}

// --- formats, independently of formats.cuh ---

static double e2m1_value(int code) {
    static const double v[8] = {0, .5, 1, 1.5, 2, 3, 4, 6};
    return code & 8 ? -v[code & 7] : v[code & 7];
}
static double e4m3_value(int code) {
    const int e = code >> 3 & 15, m = code & 7;
    if ((code & 127) == 127) return NAN;
    const double v = e ? ldexp(1 + m / 8.0, e - 7) : ldexp(m / 8.0, -6);
    return code & 128 ? -v : v;
}
// The nearest value of a format, ties to the even code, by looking at all codes below and above; `codes` of them ascend.
static double nearest(double x, int codes, double (*value)(int)) {
    if (std::isnan(x)) return NAN;
    static std::map<int, std::vector<double>> tables;
    std::vector<double>& values = tables[codes];
    for (int c = (int)values.size(); c < codes; c++) values.push_back(value(c));
    const int above = (int)(std::lower_bound(values.begin(), values.end(), fabs(x)) - values.begin());
    if (above == codes) return x < 0 ? -values.back() : values.back();
    int best = above;
    if (above > 0) {
        const double down = fabs(x) - values[above - 1], up = values[above] - fabs(x);
        if (down < up || (down == up && above % 2 == 1)) best = above - 1;
    }
    return x < 0 ? -values[best] : values[best];
}
static double nearest_e2m1(double x) { return nearest(x, 8, e2m1_value); }
static double nearest_e4m3(double x) { return nearest(x, 127, e4m3_value); }
// e^x as backend/cpu/elementwise.rs has it: the same bits.
static float exp_defined(float x) {
    const float clamped = std::min(std::max(x, -87.3f), 88.3f), shifted = fmaf(clamped, (float)M_LOG2E, 12582912.0f), n = shifted - 12582912.0f;
    const float r = fmaf(n, 2.1219444e-4f, fmaf(n, -355.0f / 512.0f, clamped));
    float p = 1.9875691e-4f;
    for (float c : {1.3982e-3f, 8.333452e-3f, 4.1665796e-2f, 1.6666665e-1f, 0.5f}) p = fmaf(p, r, c);
    p = fmaf(p, r * r, r) + 1.0f;
    return x < -87.3f ? 0.0f : ldexpf(p, (int)n);
}
static float bf16_round(float f) { return standin::bf(to_bf16(f)); }

// --- matmul ---

struct Linear { int n, k, kind; std::vector<int> codes, scales; std::vector<float> grid; };
static const char* NAMES[10] = {"e2m1_16", "e2m1_32", "mxfp4", "e4m3", "mxfp8", "bf16", "fp4_16", "fp4_32", "fp8", "fp8_mx"};
static int block_of(int kind) { return kind == 0 ? 16 : kind == 3 || kind == 5 ? 0 : 32; }
static bool e8m0(int kind) { return kind == 2 || kind == 4; }

static double weight(const Linear& w, int n, int k) {
    const int c = w.codes[n * w.k + k];
    double v = w.kind < 3 ? e2m1_value(c) : w.kind < 5 ? e4m3_value(c) : standin::bf(c);
    if (block_of(w.kind)) {
        const int s = w.scales[n * (w.k / block_of(w.kind)) + k / block_of(w.kind)];
        v *= e8m0(w.kind) ? ldexp(1, s - 127) : e4m3_value(s);
    }
    return v;
}
static Linear random_linear(int n, int k, int kind, bool extreme) {
    Linear w{n, k, kind, std::vector<int>(n * k), {}, {}};
    for (auto& c : w.codes) {
        if (kind < 3) c = below(16);
        else if (kind < 5) do c = below(256); while ((c & 127) == 127);
        else c = to_bf16((float)uniform(-2, 2));
    }
    if (block_of(kind)) {
        w.scales.resize(n * (k / block_of(kind)));
        // Zero, subnormal and largest scales, or those of usual weights.
        for (auto& s : w.scales) s = e8m0(kind) ? (extreme ? 100 + below(40) : 120 + below(8)) : extreme ? below(127) : 40 + below(60);
        if (extreme && !e8m0(kind)) w.scales[0] = 0, w.scales.back() = 126;
    }
    return w;
}
struct OnDevice { std::vector<uint32_t> words, scales; std::vector<float> rows; int steps; };
// From the comment in weight.cuh: what each lane's words hold.
static OnDevice pack(const Linear& w) {
    const int steps = (w.k + 127) / 128, tiles = (w.n + 31) / 32 * 2, quads = w.kind < 3 ? 1 : w.kind < 5 ? 2 : 4;
    OnDevice d{std::vector<uint32_t>((size_t)tiles * steps * 2 * quads * 128), {}, std::vector<float>(tiles * 16, 0.0f), steps};
    const int lanes = w.kind == 0 ? 4 : block_of(w.kind) ? 2 : 0;
    d.scales.assign((size_t)tiles * steps * 8 * lanes, 0);
    auto top = [&](int n) { int t = 0; for (int b = 0; b < w.k / 32; b++) t = std::max(t, w.scales[n * (w.k / 32) + b]); return t; };
    for (int n = 0; n < w.n; n++) d.rows[n] = e8m0(w.kind) ? (float)ldexp(1, top(n) - 127) : 1.0f;
    auto byte = [&](int n, int k) {  // -1: counts nothing
        if (n >= w.n || k >= w.k) return -1;
        const int s = w.scales[n * (w.k / block_of(w.kind)) + k / block_of(w.kind)];
        if (e8m0(w.kind)) { const int b = 244 + s - top(n); return b > 0 ? b : -1; }
        if (e4m3_value(s) == 0) return -1;
        int e;
        const double m = frexp(e4m3_value(s), &e);
        return (e - 1 + 20) << 3 | (int)((m * 2 - 1) * 8);
    };
    for (int tile = 0; tile < tiles; tile++)
        for (int step = 0; step < steps; step++)
            for (int half = 0; half < 2; half++)
                for (int lane = 0; lane < 32; lane++) {
                    const int g = lane / 4, t = lane % 4;
                    for (int upper = 0; upper < 2; upper++)
                        for (int i = 0; i < 16; i++) {
                            const int n = tile * 16 + g + 8 * upper, k = step * 128 + half * 64 + t * 16 + i;
                            if (n >= w.n || k >= w.k || (block_of(w.kind) && byte(n, k) < 0)) continue;
                            const uint32_t c = w.codes[n * w.k + k];
                            const int j = i / 4, pair = i / 2 % 2 * 2 + upper, h = i % 2;  // product, register of A, half of it
                            const size_t base = ((((size_t)tile * steps + step) * 2 + half) * quads) * 128 + lane * 4;
                            if (w.kind == 5) {
                                d.words[base + j * 128 + pair] |= c << 16 * h;
                            } else if (w.kind < 3) {
                                for (int bit = 0; bit < 4; bit++) {
                                    int to = (bit == 3 ? 15 : 6 + bit) + 16 * h;
                                    if (pair == 1) to = (to + 6) % 32;
                                    if (pair == 2) to = (to + 12) % 32;
                                    if (pair == 3) to = bit == 2 ? to + 2 : (to + 10) % 32;
                                    d.words[base + j] |= (c >> bit & 1) << to;
                                }
                            } else {
                                for (int bit = 0; bit < 8; bit++) {
                                    int to = (bit == 7 ? 15 : 4 + bit) + 16 * h;
                                    if (upper) to = bit >= 4 && bit < 7 ? to + 4 : (to + 12) % 32;
                                    d.words[base + j / 2 * 128 + j % 2 * 2 + pair / 2] |= (c >> bit & 1) << to;
                                }
                            }
                        }
                    if (lanes && t % (4 / lanes) == 0)
                        for (int upper = 0; upper < 2; upper++) {
                            int b = byte(tile * 16 + g + 8 * upper, step * 128 + half * 64 + t * 16);
                            if (b < 0) b = e8m0(w.kind) ? 0 : 160;
                            d.scales[((size_t)tile * steps + step) * 8 * lanes + g * lanes + t * lanes / 4] |= (uint32_t)b << (16 * half + 8 * upper);
                        }
                }
    return d;
}

// `columns`: rows of x in a block of the kernel for few rows, 8, 16 or 32; of the tile, 64. All must give the bits of that for 8.
static void matmul_case(int m, int n, int k, int kind, int planes, bool grouped, bool with_grid, bool x_grouped, bool x_scaled, bool biased, bool extreme, int columns) {
    Linear w = random_linear(n, k, kind, extreme);
    OnDevice d = pack(w);
    const int kp = d.steps * 128;
    std::vector<uint16_t> x((size_t)m * planes * kp, 0);
    for (int r = 0; r < m * planes; r++) for (int c = 0; c < k; c++) x[(size_t)r * kp + c] = to_bf16((float)uniform(-3, 3));
    std::vector<float> rows(d.rows), bias(n), xs(m), xg(m * d.steps), grid(((n + 127) / 128) * d.steps);
    for (int i = 0; i < n; i++) rows[i] *= (float)uniform(.01, .02), bias[i] = (float)uniform(-1, 1);
    for (auto& s : xs) s = (float)uniform(.5, 2);
    for (auto& s : xg) s = (float)uniform(.5, 2);
    for (auto& s : grid) s = (float)uniform(.5, 2);
    const float scale = .25f;
    Array<uint32_t> words(d.words), scales(d.scales);
    Array<uint16_t> dx(x);
    Array<float> dg(grid), dxs(xs), dxg(xg), drows(rows), dbias(bias), y((size_t)m * n), small((size_t)m * n);
    auto product = [&](int columns, float* y) {
        const std::string name = (columns == 64 ? std::string("tile_") + NAMES[kind] : std::string("matmul_") + NAMES[kind] + "_" + std::to_string(columns)) + (grouped ? "g" : "");
        const int outputs = columns < 64 ? 32 : grouped ? 128 : 256, units = columns < 64 ? m * planes : m;
        return run(name.c_str(), (n + outputs - 1) / outputs, (units + columns - 1) / columns, 1, (U4*)words.p, d.scales.empty() ? nullptr : scales.p, with_grid ? dg.p : nullptr, dx.p, x_scaled ? dxs.p : nullptr, x_grouped ? dxg.p : nullptr, drows.p, biased ? dbias.p : nullptr, y, m * planes, planes, n, kp, scale);
    };
    char what[160];
    snprintf(what, sizeof what, "%s columns=%d M=%d N=%d K=%d planes=%d grouped=%d grid=%d groups=%d scaled=%d", NAMES[kind], columns, m, n, k, planes, grouped, with_grid, x_grouped, x_scaled);
    if (!product(columns, y.p)) return;
    if (columns > 8 && product(8, small.p)) equal(std::string(what) + " against 8", y.get(what), small.get(what));
    std::vector<double> expected, size;
    for (int i = 0; i < m; i++)
        for (int o = 0; o < n; o++) {
            double s = 0, a = 0;
            for (int c = 0; c < k; c++) {
                double f = 1;
                if (grouped) f = (with_grid ? grid[o / 128 * d.steps + c / 128] : 1.0f) * (x_grouped ? xg[i * d.steps + c / 128] : 1.0f);
                for (int p = 0; p < planes; p++) {
                    // Row scales hold what block scales of a power of two were divided by.
                    const double v = weight(w, o, c) / (e8m0(kind) ? (double)d.rows[o] : 1.0) * standin::bf(x[((size_t)i * planes + p) * kp + c]) * f;
                    s += v, a += fabs(v);
                }
            }
            const double f = (double)rows[o] * scale * (x_scaled ? xs[i] : 1.0f);
            expected.push_back(s * f + (biased ? bias[o] : 0)), size.push_back(a * fabs(f) + (biased ? fabs(bias[o]) : 0) + 1e-6);
        }
    close(what, y.get(what), expected, size, 1e-6);
}
static void check_matmul() {
    for (int kind = 0; kind < 6; kind++)
        for (int wide : {8, 16, 32})
            for (int grouped = 0; grouped < 2; grouped++) {
                matmul_case(1, 32, 128, kind, 1, grouped, false, false, false, false, false, wide);
                matmul_case(wide - 3, 40, 128 * 9 + 32, kind, 1, grouped, grouped, grouped, !grouped, true, true, wide);
                // Blocks of weights with tokens of one scale, and the other way round.
                matmul_case(wide / 2 + 1, 150, 64, kind, 2, grouped, grouped, false, true, true, false, wide);
                matmul_case(3, 33, 128 * 5, kind, 2, grouped, false, grouped, false, false, true, wide);
            }
    // The same row gives the same bits whatever it stands beside, whichever kernel computes it.
    Linear w = random_linear(48, 128 * 11, 0, false);
    OnDevice d = pack(w);
    std::vector<uint16_t> x(20 * 128 * 11);
    for (auto& v : x) v = to_bf16((float)uniform(-1, 1));
    Array<uint32_t> words(d.words), scales(d.scales);
    Array<uint16_t> all(x), one(std::vector<uint16_t>(x.begin() + 13 * 128 * 11, x.begin() + 14 * 128 * 11));
    Array<float> rows(d.rows), many(20 * 48), alone(48);
    run("matmul_e2m1_16_32", 2, 1, 1, (U4*)words.p, scales.p, (float*)nullptr, all.p, (float*)nullptr, (float*)nullptr, rows.p, (float*)nullptr, many.p, 20, 1, 48, 128 * 11, 1.0f);
    run("matmul_e2m1_16_8", 2, 1, 1, (U4*)words.p, scales.p, (float*)nullptr, one.p, (float*)nullptr, (float*)nullptr, rows.p, (float*)nullptr, alone.p, 1, 1, 48, 128 * 11, 1.0f);
    const auto m = many.get("batch"), a = alone.get("alone");
    equal("a row of a batch", std::vector<float>(m.begin() + 13 * 48, m.begin() + 14 * 48), a);
}

// Slices of no step, of one and of two; blocks and warps beyond the last output; tokens beyond the last.
static void check_tile() {
    for (int kind = 0; kind < 6; kind++)
        for (int grouped = 0; grouped < 2; grouped++) {
            matmul_case(65, 40, 128 * 9 + 32, kind, 1, grouped, grouped, grouped, !grouped, true, true, 64);
            matmul_case(33, 280, 128 * 3, kind, 2, grouped, grouped, false, false, true, false, 64);
            matmul_case(9, 150, 64, kind, 1, grouped, false, grouped, true, false, false, 64);
            matmul_case(40, 33, 128 * 17, kind, 1, grouped, grouped, false, true, false, true, 64);
        }
}

// --- operand ---

static double e8m0_scale(double amax, double largest, int emax, int rule) {
    if (!std::isfinite(amax)) return NAN;
    int e;
    if (rule == 0) {
        e = amax == 0 ? -127 : (int)ceil(log2(amax / largest));
        if (amax > 0) { while (ldexp(largest, e) < amax) e++; while (ldexp(largest, e - 1) >= amax) e--; }
    } else {
        const double a = rule == 2 ? (double)float_of((bits_of((float)amax) + (1u << 21)) & 0xff800000u) : amax;
        e = a == 0 ? -127 : (int)floor(log2(a)) - emax;
    }
    return ldexp(1, std::min(127, std::max(-127, e)));
}
// Of a row as codes: bits of an element, columns that share a scale of their own (0: none in a block), and floats of its scales.
static int code_bits(int format) { return format % CODES == NVFP4 || format % CODES == MXFP4 ? 4 : 8; }
static int code_columns(int format) { return format % CODES == NVFP4 ? 16 : format % CODES == MXFP4 || format % CODES == MXFP8 ? 32 : 0; }
static int scale_pitch(int format, int kp) {
    if (format >= CODES && code_columns(format)) return kp / (4 * code_columns(format)) + 1;
    return format % CODES == FP8_GROUP ? kp / 128 : format % CODES == FP8_TOKEN ? 1 : 0;
}
// What a row becomes: values, and the scale of each 128 columns (or of the row in the first).
static void define(const std::vector<float>& v, int format, float scale, int rule, std::vector<float>& out, std::vector<float>& scales) {
    const int k = (int)v.size();
    out.assign(k, 0), scales.assign((k + 127) / 128, 1);
    const int block = format == NVFP4 ? 16 : format >= MXFP4 ? 32 : format == FP8_GROUP ? 128 : k;
    for (int b = 0; b < k; b += block) {
        float amax = 0;
        bool sound = true;
        for (int i = b; i < std::min(k, b + block); i++) amax = std::max(amax, fabsf(v[i])), sound &= std::isfinite(v[i]);
        float s = scale;
        if (format == NVFP4) s = (float)nearest_e4m3(amax / (6.0f * scale));
        if (format == FP8_TOKEN || format == FP8_GROUP) { s = amax / 448.0f; if (!(s > 0)) s = 1; scales[b / 128] = s; }
        if (format == MXFP4) s = (float)e8m0_scale(amax, 6, 2, rule);
        if (format == MXFP8) s = (float)e8m0_scale(amax, 448, 8, rule);
        if (format == FP_QUANT_AMAX || format == FP_QUANT_QUEST) {
            // As formats/fp_quant.rs adds up: eight sums by index modulo 8.
            auto sum = [&](auto of) {
                float lanes[8] = {};
                for (int i = 0; i < 32; i++) lanes[i % 8] += of(v[b + i]);
                return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
            };
            const float mean = sum([](float x) { return x; }) / 32;
            float x = format == FP_QUANT_AMAX ? amax : 2.92247856f / 6 * sqrtf(sum([&](float x) { return (x - mean) * (x - mean); }) / 32) + 1e-8f;
            x = std::max(x, ldexpf(1, -96));
            s = std::isfinite(x) ? ldexpf(1, ilogbf(x)) : x;
        }
        for (int i = b; i < std::min(k, b + block); i++) {
            if (format == FLOAT) out[i] = v[i];
            else if (format >= FP_QUANT_AMAX) out[i] = sound && std::isfinite(s) ? (float)nearest_e2m1(v[i] * (1.0f / scale / s)) * s : NAN;
            else if (format == NVFP4) out[i] = !sound ? NAN : s * scale > 0 ? (float)nearest_e2m1(v[i] / (s * scale)) * s : 0;
            else if (format == MXFP4) out[i] = sound ? (float)nearest_e2m1(v[i] / s) * s : NAN;
            else if (format == MXFP8) out[i] = sound ? (float)nearest_e4m3(v[i] / s) * s : NAN;
            else out[i] = std::isfinite(v[i]) ? (float)nearest_e4m3(v[i] / s) : NAN;
        }
    }
}
// `values`: the rows before they are quantized.
static void operand_matches(const std::string& what, const std::vector<std::vector<float>>& values, int format, float scale, int rule, int kp, const Array<uint16_t>& x, const Array<float>* scales) {
    const auto got = x.get(what);
    std::vector<float> s;
    if (scales) s = scales->get(what + " scales");
    if (format >= CODES) {
        const int bits = code_bits(format), block = code_columns(format), pitch = scale_pitch(format, kp);
        for (size_t r = 0; r < values.size(); r++) {
            std::vector<float> out, expected_scales, g(kp), e(kp, 0);
            define(values[r], format % CODES, scale, rule, out, expected_scales);
            float factor = 1;
            for (size_t i = 0; i < out.size(); i++) {
                if (out[i] != out[i]) factor = NAN;
                // Four bits cannot say that something is not finite.
                if (out[i] == out[i] || bits == 8) e[i] = out[i] + 0.0f;
            }
            for (int i = 0; i < kp; i++) {
                const int eight = i % 128 / 8;
                const int place = format >= 2 * CODES ? eight : eight % 4 * 4 + eight / 4;
                const uint8_t* codes = (const uint8_t*)got.data() + ((r * kp + i / 128 * 128) + place * 8) * bits / 8;
                const int code = bits == 8 ? codes[i % 8] : codes[i % 8 / 2] >> 4 * (i % 2) & 15;
                double v = bits == 8 ? e4m3_value(code) : e2m1_value(code);
                if (block) {
                    const uint8_t byte = ((const uint8_t*)(s.data() + r * pitch))[i / block];
                    v *= block == 32 ? ldexp(1, byte - 127) : e4m3_value(byte);
                }
                g[i] = (float)v + 0.0f;
            }
            equal(what + " row " + std::to_string(r), g, e);
            if (block) equal(what + " factor", std::vector<float>{s[r * pitch + pitch - 1]}, std::vector<float>{factor});
            else if (pitch) expected_scales.resize(pitch), equal(what + " scales", std::vector<float>(s.begin() + r * pitch, s.begin() + (r + 1) * pitch), expected_scales);
        }
        return;
    }
    for (size_t r = 0; r < values.size(); r++) {
        std::vector<float> out, expected_scales;
        define(values[r], format, scale, rule, out, expected_scales);
        std::vector<float> g(kp), low(kp), e(kp, 0), e_low(kp, 0);
        const int planes = format == FLOAT ? 2 : 1;
        for (int i = 0; i < kp; i++) {
            g[i] = standin::bf(got[(r * planes) * kp + i]);
            if (planes == 2) low[i] = standin::bf(got[(r * 2 + 1) * kp + i]);
            if (i >= (int)out.size()) continue;
            e[i] = planes == 2 ? bf16_round(out[i]) : out[i];
            if (planes == 2) e_low[i] = bf16_round(out[i] - bf16_round(out[i]));
        }
        // -0 and 0 are the same operand.
        for (auto* v : {&g, &low, &e, &e_low}) for (auto& f : *v) f += 0.0f;
        equal(what + " row " + std::to_string(r), g, e);
        if (planes == 2) equal(what + " low row " + std::to_string(r), low, e_low);
        if (format == FP8_TOKEN) equal(what + " scale", std::vector<float>{s[r]}, std::vector<float>{expected_scales[0]});
        if (format == FP8_GROUP) equal(what + " scales", std::vector<float>(s.begin() + r * (kp / 128), s.begin() + r * (kp / 128) + expected_scales.size()), expected_scales);
    }
}
static std::vector<float> random_row(int k, int kind) {
    std::vector<float> v(k);
    for (auto& x : v) x = (float)(kind == 1 ? uniform(-1, 1) * pow(10, uniform(-30, 30)) : std::normal_distribution<>(0, 1)(RANDOM));
    if (kind == 2) std::fill(v.begin(), v.end(), 0.0f);
    if (kind == 3) v[k / 2] = NAN, v[0] = INFINITY;
    if (kind == 4) for (auto& x : v) x = (float)(below(97) - 48) / 8;  // ties
    return v;
}
static void check_operand() {
    std::vector<int> formats;
    for (int format = FLOAT; format <= FP_QUANT_QUEST; format++) formats.push_back(format);
    for (int format = NVFP4; format <= MXFP8; format++) formats.push_back(format + CODES);
    for (int format : {NVFP4, MXFP4}) formats.push_back(format + 2 * CODES);
    for (int format : formats)
        for (int rule = 0; rule < (format % CODES == MXFP4 || format % CODES == MXFP8 ? 3 : 1); rule++)
            for (int k : {16, 48, 99, 100, 128, 416, 4608}) {
                if (format % CODES >= MXFP4 && k % 32) continue;
                if (format % CODES == NVFP4 && k % 16) continue;
                const int rows = 5, kp = (k + 127) / 128 * 128, width = format >= CODES ? kp * code_bits(format) / 16 : format == FLOAT ? 2 * kp : kp;
                const float scale = format % CODES == NVFP4 ? .01f : format == FP_QUANT_AMAX || format == FP_QUANT_QUEST ? 1 / 3.f : .02f;
                std::vector<std::vector<float>> v, w, g;
                std::vector<float> flat, up, gate, pre(k);
                for (auto& p : pre) p = (float)uniform(.5, 2);
                for (int r = 0; r < rows; r++) {
                    v.push_back(random_row(k, r)), w.push_back(random_row(k, r == 3 ? 0 : r % 3 == 1 ? 0 : r)), g.push_back(random_row(k, 0));
                    flat.insert(flat.end(), v[r].begin(), v[r].end());
                    up.insert(up.end(), w[r].begin(), w[r].end()), gate.insert(gate.end(), g[r].begin(), g[r].end());
                }
                const std::string what = "operand format " + std::to_string(format) + " rule " + std::to_string(rule) + " K=" + std::to_string(k);
                const size_t count = rows * scale_pitch(format, kp);
                const bool scaled = count > 0;
                Array<float> in(flat), dpre(pre), dup(up), dgate(gate);
                {
                    Array<uint16_t> x((size_t)rows * width);
                    Array<float> s(count);
                    if (run("operand_plain", rows, 1, 1, in.p, (float*)nullptr, format, scale, rule, k, kp, x.p, scaled ? s.p : nullptr))
                        operand_matches(what, v, format, scale, rule, kp, x, scaled ? &s : nullptr);
                }
                {
                    Array<uint16_t> x((size_t)rows * width);
                    Array<float> s(count);
                    std::vector<std::vector<float>> product;
                    for (int r = 0; r < rows; r++) {
                        std::vector<float> p(k);
                        for (int i = 0; i < k; i++) p[i] = g[r][i] / (1.0f + exp_defined(-g[r][i])) * w[r][i] * pre[i];
                        product.push_back(p);
                    }
                    if (run("operand_silu", rows, 1, 1, dgate.p, dup.p, dpre.p, format, scale, rule, k, kp, x.p, scaled ? s.p : nullptr))
                        operand_matches(what + " silu", product, format, scale, rule, kp, x, scaled ? &s : nullptr);
                }
                for (int updated = 0; updated < 2; updated++) {
                    Array<uint16_t> x((size_t)rows * width);
                    Array<float> s(count), out((size_t)rows * k), normed((size_t)rows * k);
                    if (!run("operand_norm", rows, 1, 1, dgate.p, updated ? dup.p : nullptr, updated ? out.p : nullptr, dpre.p, 1e-5f, normed.p, (float*)nullptr, format, scale, rule, k, kp, x.p, scaled ? s.p : nullptr)) continue;
                    const auto n = normed.get(what + " norm");
                    std::vector<std::vector<float>> rows_of;
                    std::vector<double> expected, size;
                    std::vector<float> sums;
                    for (int r = 0; r < rows; r++) {
                        double squares = 0;
                        std::vector<float> sum(k);
                        for (int i = 0; i < k; i++) sum[i] = updated ? g[r][i] + w[r][i] : g[r][i], squares += (double)sum[i] * sum[i];
                        const double inverse = 1 / sqrt(squares / k + 1e-5);
                        for (int i = 0; i < k; i++) expected.push_back(sum[i] * inverse * pre[i]), size.push_back(fabs(expected.back()) + 1e-30);
                        sums.insert(sums.end(), sum.begin(), sum.end());
                        rows_of.push_back(std::vector<float>(n.begin() + r * k, n.begin() + (r + 1) * k));
                    }
                    close(what + " norm", n, expected, size, 1e-6);
                    if (updated) equal(what + " sum", out.get(what + " sum"), sums);
                    // Quantized is what was given out: bits are settled there.
                    operand_matches(what + " norm", rows_of, format, scale, rule, kp, x, scaled ? &s : nullptr);
                }
            }
}

// --- attention ---

// `dv`: values of another width; `half`: pairs that turn, where it is not all of a head; sinks; queries that grow.
struct More { int dv = 0, half = 0; bool sinks = false, grows = false; };
static void attention_case(int heads, int kv_heads, int d, int format, int window, bool norms, bool turned, std::vector<std::pair<int, int>> spans, int broken = 0, float loud = 1, More more = {}) {
    const int dv = more.dv ? more.dv : d, half = more.half ? more.half : d / 2;
    const float k_scale = format == KV_FP8 ? .02f : 1, v_scale = format == KV_FP8 ? .03f : 1, scale = loud / sqrtf((float)d);
    int tokens = 0, pages = 1, reach = 0;
    std::vector<int> positions, slots, tables, table_of;
    for (auto [start, len] : spans) {
        const int count = (start + len + 15) / 16, first = (int)tables.size();
        for (int i = 0; i < count; i++) tables.push_back(pages + count - 1 - i);  // pages in an order of their own
        for (int p = start; p < start + len; p++) positions.push_back(p), slots.push_back(tables[first + p / 16] * 16 + p % 16), table_of.push_back(first);
        pages += count, tokens += len, reach = std::max(reach, start + len);
    }
    auto row = [&](size_t n) { std::vector<float> v(n); for (auto& x : v) x = (float)std::normal_distribution<>(0, 1)(RANDOM); return v; };
    const auto q = row((size_t)tokens * heads * d), k = row((size_t)tokens * kv_heads * d), v = row((size_t)tokens * kv_heads * dv), qn = row(d), kn = row(d);
    const auto sinks = row(heads);
    std::vector<float> growth(tokens);
    for (auto& g : growth) g = (float)uniform(.5, 2);
    std::vector<float> rope((size_t)reach * 2 * half);
    for (int p = 0; p < reach; p++) for (int i = 0; i < half; i++) rope[(size_t)p * 2 * half + i] = cosf(p * powf(100, -2.f * i / d)), rope[(size_t)p * 2 * half + half + i] = sinf(p * powf(100, -2.f * i / d));
    const int pitch = (d + 15) / 16 * 16, wide = (dv + 15) / 16 * 16;
    const size_t elements = (size_t)pages * kv_heads * 16 * pitch, of_values = (size_t)pages * kv_heads * 16 * wide;
    const int bytes = format == KV_F32 ? 4 : format == KV_BF16 ? 2 : 1;
    auto decode = [&](const uint8_t* c, size_t i, float s) { return format == KV_F32 ? (double)((float*)c)[i] : format == KV_BF16 ? (double)standin::bf(((uint16_t*)c)[i]) : e4m3_value(c[i]) * s; };
    // What was in the cache before: random, finite.
    std::vector<uint8_t> before_k(elements * bytes), before_v(of_values * bytes);
    for (auto* c : {&before_k, &before_v}) for (size_t i = 0; i < c->size() / bytes; i++) {
        const float x = (float)std::normal_distribution<>(0, 1)(RANDOM);
        if (format == KV_F32) memcpy(c->data() + 4 * i, &x, 4);
        else if (format == KV_BF16) ((uint16_t*)c->data())[i] = (uint16_t)to_bf16(x);
        else (*c)[i] = (uint8_t)(below(120) | below(2) << 7);
    }
    // NaN where nobody may look, behind a sequence's end; and in a key (1) or a value (2) that the first sequence's tokens see.
    auto break_at = [&](std::vector<uint8_t>& c, int first, int p) {
        // In every byte of a word.
        for (int dim : {4, 5, 6, 7}) {
            const size_t at = ((size_t)tables[first + p / 16] * kv_heads * 16 + p % 16) * (&c == &before_k ? pitch : wide) + dim;
            if (format == KV_F32) ((float*)c.data())[at] = NAN;
            else if (format == KV_BF16) ((uint16_t*)c.data())[at] = 0x7fc0;
            else c[at] = 0xff;
        }
    };
    for (size_t i = 0, token = 0; i < spans.size(); token += spans[i++].second) {
        const int stop = spans[i].first + spans[i].second;
        for (int p = stop; p % 16; p++) break_at(before_k, table_of[token], p), break_at(before_v, table_of[token], p);
    }
    if (broken) break_at(broken == 1 ? before_k : before_v, 0, 2);
    Array<float> dq(q), dk(k), dvalues(v), dqn(qn), dkn(kn), drope(rope), dsinks(sinks), dgrowth(growth), turned_q((size_t)tokens * heads * d);
    Array<int> dp(positions), ds(slots), dt(tables), dof(table_of);
    Array<uint8_t> keys(before_k), values(before_v);
    char what[160];
    snprintf(what, sizeof what, "attention heads=%d/%d d=%d/%d half=%d format=%d window=%d norms=%d sinks=%d", heads, kv_heads, d, dv, half, format, window, norms, more.sinks);
    if (!run("rope_cache", (tokens * (heads + 2 * kv_heads) + 3) / 4, 1, 1, dq.p, dk.p, dvalues.p, turned_q.p, (void*)keys.p, (void*)values.p, norms ? dqn.p : nullptr, norms ? dkn.p : nullptr, 1e-5f, turned ? drope.p : nullptr, dp.p, ds.p, more.grows ? dgrowth.p : nullptr, tokens, heads, kv_heads, d, dv, half, format, k_scale, v_scale)) return;
    auto turn = [&](const float* x, const std::vector<float>& norm, int p, std::vector<double>& out) {
        double squares = 0;
        for (int i = 0; i < d; i++) squares += (double)x[i] * x[i];
        const double inverse = norms ? 1 / sqrt(squares / d + 1e-5) : 1;
        for (int i = 0; i < d; i++) {
            auto of = [&](int i) { return x[i] * inverse * (norms ? norm[i] : 1); };
            if (!turned || i >= 2 * half) { out.push_back(of(i)); continue; }
            const double c = rope[(size_t)p * 2 * half + i % half], s = rope[(size_t)p * 2 * half + half + i % half];
            out.push_back(i < half ? of(i) * c - of(i + half) * s : of(i) * c + of(i - half) * s);
        }
    };
    std::vector<double> expected_q, ones((size_t)tokens * heads * d, 4);
    for (int t = 0; t < tokens; t++) for (int h = 0; h < heads; h++) {
        turn(&q[((size_t)t * heads + h) * d], qn, positions[t], expected_q);
        if (more.grows) for (size_t i = expected_q.size() - d; i < expected_q.size(); i++) expected_q[i] *= growth[t];
    }
    const auto gq = turned_q.get(what);
    close(std::string(what) + " queries", gq, expected_q, ones, 1e-6);
    // The cache: new rows where they belong, everything else as it was.
    std::vector<uint8_t> fresh(pages * 16, 0);
    for (int t = 0; t < tokens; t++) {
        fresh[slots[t]] = 1;
        for (int h = 0; h < kv_heads; h++) {
            std::vector<double> key;
            turn(&k[((size_t)t * kv_heads + h) * d], kn, positions[t], key);
            for (int i = 0; i < max(d, dv); i++) {
                const size_t row = ((size_t)(slots[t] / 16) * kv_heads + h) * 16 + slots[t] % 16;
                const double step = format == KV_F32 ? 1e-6 : format == KV_BF16 ? 1 / 256. : 1 / 16.;
                const double small = format == KV_FP8 ? .001 : 1e-6;
                auto off = [&](double got, double x) { return !(fabs(got - x) <= fabs(x) * step + small); };
                if ((i < d && off(decode(keys.p, row * pitch + i, k_scale), key[i])) || (i < dv && off(decode(values.p, row * wide + i, v_scale), v[((size_t)t * kv_heads + h) * dv + i]))) {
                    printf("FAIL %s: key or value %d of token %d\n", what, i, t), FAILED++;
                    return;
                }
            }
        }
    }
    for (int s = 0; s < pages * 16; s++) if (!fresh[s]) for (int h = 0; h < kv_heads; h++) {
        const size_t row = (((size_t)(s / 16) * kv_heads + h) * 16 + s % 16) * bytes;
        if (memcmp(keys.p + row * pitch, before_k.data() + row * pitch, d * bytes) || memcmp(values.p + row * wide, before_v.data() + row * wide, dv * bytes)) { printf("FAIL %s: slot %d changed\n", what, s), FAILED++; return; }
    }
    const int pieces = (reach + 255) / 256, share = heads / kv_heads;
    Array<float> out((size_t)tokens * heads * dv), other((size_t)tokens * heads * dv);
    // In blocks of 16 or 32 rows, of runs of so many tokens at most.
    auto attend = [&](int rows, int longest, Array<float>& out) {
        std::vector<int> runs;
        int first = 0, most = 0;
        for (auto [start, len] : spans) {
            for (int i = 0; i < len; i += longest) runs.push_back(first + i), runs.push_back(std::min(longest, len - i)), most = std::max(most, runs.back());
            first += len;
        }
        Array<int> dr(runs);
        Array<float> parts((size_t)tokens * heads * pieces * dv), totals((size_t)tokens * heads * pieces * 2);
        const int groups = (most * share + rows - 1) / rows;
        const std::string name = std::string("attention_") + (format == KV_F32 ? "f32_" : format == KV_BF16 ? "bf16_" : "fp8_") + std::to_string(rows);
        return run(name.c_str(), (int)runs.size() / 2, kv_heads * groups, pieces, turned_q.p, (void*)keys.p, (void*)values.p, parts.p, totals.p, dp.p, dt.p, dof.p, dr.p, groups, heads, kv_heads, d, dv, window, scale, k_scale, v_scale, pieces) &&
            run("attention_combine", tokens, heads, 1, parts.p, totals.p, more.sinks ? dsinks.p : nullptr, out.p, dp.p, heads, dv, window, pieces);
    };
    if (!attend(16, 32, out)) return;
    const auto got = out.get(what);
    // The same bits in blocks of other rows, and for a token alone.
    for (auto [rows, longest] : {std::pair{32, 32}, {16, 1}, {32, 3}}) {
        if (format == KV_F32) rows = 16;
        if (!attend(rows, longest, other)) return;
        equal(std::string(what) + " in blocks of " + std::to_string(rows) + ", runs of " + std::to_string(longest), other.get(what), got);
    }
    std::vector<double> expected, size;
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < heads; h++) {
            const int from = window ? std::max(0, positions[t] + 1 - window) : 0, g = h / (heads / kv_heads);
            auto at = [&](int p) { return ((size_t)tables[table_of[t] + p / 16] * kv_heads + g) * 16 + p % 16; };
            std::vector<double> s;
            double most = -1e300, total = 0;
            for (int p = from; p <= positions[t]; p++) {
                double x = 0;
                for (int i = 0; i < d; i++) x += (double)gq[((size_t)t * heads + h) * d + i] * decode(keys.p, at(p) * pitch + i, k_scale);
                s.push_back(x * scale), most = std::max(most, x * scale);
            }
            if (more.sinks) most = std::max(most, (double)sinks[h]), total = exp(sinks[h] - most);
            for (auto& x : s) x = exp(x - most), total += x;
            for (int i = 0; i < dv; i++) {
                double x = 0, a = 0;
                for (int p = from; p <= positions[t]; p++) { const double y = s[p - from] / total * decode(values.p, at(p) * wide + i, v_scale); x += y, a += fabs(y); }
                // What e^x in f32 has no number for counts as nothing.
                expected.push_back(x), size.push_back(a + 1e-20);
            }
        }
    // Queries and numerators have 16 bits beside a rounded cache.
    close(what, got, expected, size, loud * (format == KV_F32 ? 1e-6 : 4e-5));
}
static void check_attention() {
    for (int format = 0; format < 3; format++) {
        attention_case(2, 2, 8, format, 0, false, true, {{0, 3}});
        attention_case(6, 1, 16, format, 0, true, true, {{0, 37}, {30, 1}, {5, 2}});
        attention_case(10, 2, 64, format, 7, true, false, {{250, 12}, {0, 1}, {513, 1}});
        attention_case(4, 4, 130, format, 300, false, true, {{600, 2}, {255, 2}});
    }
    for (int format = 0; format < 3; format++)
        for (int broken : {1, 2}) attention_case(2, 2, 32, format, 0, false, true, {{8, 9}, {3, 1}}, broken);
    // Scores so far apart that numerators overflow without the right maximum.
    for (int format = 0; format < 3; format++) attention_case(4, 2, 32, format, 0, false, true, {{300, 3}, {70, 1}}, 0, 200);
    attention_case(4, 1, 256, KV_F32, 0, false, true, {{1023, 2}});
    for (int format = 0; format < 3; format++) {
        attention_case(4, 2, 24, format, 0, true, true, {{0, 19}, {300, 2}}, 0, 1, {40, 4, false, false});
        attention_case(6, 2, 40, format, 5, false, true, {{0, 3}, {513, 3}}, 0, 1, {10, 13, true, true});
    }
    // Sinks that count for much, and hardly.
    attention_case(3, 1, 32, KV_BF16, 0, false, false, {{0, 1}, {270, 1}}, 0, 1, {0, 0, true, true});
    attention_case(3, 3, 32, KV_F32, 0, false, true, {{0, 2}, {270, 1}}, 0, 200, {33, 8, true, false});
}

// --- rows ---

// Of layouts for FP4 and FP8 tensor cores.
static void check_narrow_rows();
static void check_tcgen_rows();
static void check_rows() {
    check_narrow_rows(), check_tcgen_rows();
    for (int kind = 0; kind < 6; kind++)
        for (auto [k, n] : {std::pair{128 * 17, 40}, std::pair{128 * 3, 70}, std::pair{64, 300}, std::pair{101, 33}}) {
            if (block_of(kind) && k % block_of(kind)) continue;
            Linear w = random_linear(n, k, kind, true);
            OnDevice d = pack(w);
            std::vector<float> rows(d.rows), grid((n + 127) / 128 * d.steps);
            for (int i = 0; i < n; i++) rows[i] *= (float)uniform(.5, 2);
            for (auto& g : grid) g = (float)uniform(.5, 2);
            const std::vector<int> tokens{0, n - 1, 8, 31, 32, 7, n / 2};
            Array<uint32_t> words(d.words), scales(d.scales);
            Array<float> drows(rows), dg(grid), out(tokens.size() * k);
            Array<int> dt(tokens);
            const std::string what = std::string("embed_") + NAMES[kind];
            if (!run(what.c_str(), (int)tokens.size(), 1, 1, (U4*)words.p, d.scales.empty() ? nullptr : scales.p, kind == 3 ? dg.p : nullptr, drows.p, dt.p, out.p, k, d.steps)) continue;
            std::vector<double> expected, size;
            for (int t : tokens) for (int i = 0; i < k; i++) {
                expected.push_back(weight(w, t, i) * rows[t] / (e8m0(kind) ? (double)d.rows[t] : 1.0) * (kind == 3 ? grid[t / 128 * d.steps + i / 128] : 1.0f));
                size.push_back(fabs(expected.back()) + 1e-30);
            }
            close(what, out.get(what), expected, size, 3e-7);
        }
    const int rows = 7, k = 300;
    std::vector<float> x(rows * k), y(rows * k), weights(3);
    for (auto* v : {&x, &y}) for (auto& f : *v) f = (float)std::normal_distribution<>(0, 1)(RANDOM);
    for (auto& f : weights) f = (float)uniform(0, 1);
    const std::vector<int> index{5, 0, 3};
    Array<int> di(index);
    Array<float> dy(y), dw(weights);
    {
        Array<float> dx(x), out(3 * k);
        run("gather", 3, 1, 1, dx.p, di.p, out.p, k);
        std::vector<float> e;
        for (int i : index) e.insert(e.end(), x.begin() + i * k, x.begin() + (i + 1) * k);
        equal("gather", out.get("gather"), e);
        run("add_rows", 3, 1, 1, dx.p, dy.p, di.p, dw.p, k);
        e = x;
        for (int i = 0; i < 3; i++) for (int c = 0; c < k; c++) { const float p = weights[i] * y[i * k + c]; e[index[i] * k + c] += p; }
        equal("add_rows", dx.get("add_rows"), e);
    }
    {
        Array<float> dx(x);
        run("add", rows, 1, 1, dx.p, dy.p, k);
        std::vector<float> e(x);
        for (int i = 0; i < rows * k; i++) e[i] += y[i];
        equal("add", dx.get("add"), e);
    }
    {
        // Over the whole range of e^x, ends included.
        std::vector<float> wide(x), e;
        for (int i = 0; i < k; i++) wide[i] = (float)(i - k / 2) * .65f, wide[k + i] = (float)uniform(-90, 90);
        wide[0] = 87.3f, wide[1] = 87.30001f, wide[2] = -88.3f, wide[3] = -88.30001f, wide[4] = 1e9f, wide[5] = -1e9f;
        Array<float> dx(wide);
        run("silu_mul", rows, 1, 1, dx.p, dy.p, k);
        for (int i = 0; i < rows * k; i++) e.push_back(wide[i] / (1 + exp_defined(-wide[i])) * y[i]);
        equal("silu_mul", dx.get("silu_mul"), e);
    }
    const std::vector<float> given = [&] {
        std::vector<float> v(x);
        for (int i = 0; i < k; i++) v[i] = (float)(i - k / 2) * .65f, v[k + i] = (float)uniform(-90, 90);
        v[0] = NAN, v[1] = 1e9f, v[2] = -1e9f, v[3] = 0.0f, v[4] = 7.0f;
        return v;
    }();
    for (int kind = 0; kind < 4; kind++) {
        std::vector<float> u(y), e;
        for (int i = 0; i < rows * k; i++) u[i] *= 6;
        u[5] = NAN;
        Array<float> dx(given), du(u);
        run("activate", rows, 1, 1, dx.p, kind == 0 ? nullptr : du.p, kind, 7.0f, k);
        const auto got = dx.get("activate");
        for (int i = 0; i < rows * k; i++) {
            const float x = given[i];
            const bool bad = x != x || (kind > 0 && u[i] != u[i]);
            double exact = std::max((double)x, 0.0) * std::max((double)x, 0.0);
            if (kind == 1) exact = x / (1 + exp(-2 * sqrt(2 / M_PI) * (x + .044715 * x * x * x))) * u[i];
            if (kind == 2) { const double g = std::min((double)x, 7.0), up = std::clamp((double)u[i], -7.0, 7.0); exact = (up + 1) * g / (1 + exp(-1.702 * g)); }
            if (kind == 3) exact = x / (1 + exp(-(double)x)) * u[i];
            // gelu's argument is rounded before the exponential.
            const double size = fabs(exact) * (1 + (kind == 1 ? 4e-2 * fabs((double)x * x * x) : fabs(x))) + 1e-30;
            if (bad ? got[i] == got[i] : !(fabs(got[i] - exact) <= 3e-6 * size + 1e-28) && !(std::isinf(exact) && std::isinf(got[i]))) { printf("FAIL activate %d: %g of %g and %g, expected %g\n", kind, got[i], x, u[i], exact), FAILED++; break; }
        }
    }
    for (int group : {16, 32}) {
        const int n = 320;
        const auto m = std::vector<float>([&] { std::vector<float> m(group * group); for (auto& v : m) v = (float)uniform(-1, 1); return m; }());
        std::vector<float> in(2 * n), pre(n), e;
        for (auto* v : {&in, &pre}) for (auto& f : *v) f = (float)uniform(-2, 2);
        for (bool scaled : {false, true}) {
            Array<float> dx(in), dp(pre), dm(m), out(2 * n);
            run("rotate", 2, 1, 1, dx.p, scaled ? dp.p : nullptr, dm.p, group, out.p, n);
            e.clear();
            for (int i = 0; i < 2 * n; i++) {
                float sum = 0;
                for (int j = 0; j < group; j++) { const int at = i / group * group + j; const float v = scaled ? in[at] * pre[at % n] : in[at]; sum = fmaf(v, m[j * group + i % group], sum); }
                e.push_back(sum);
            }
            equal("rotate", out.get("rotate"), e);
        }
    }
    for (int width : {1, k}) {
        std::vector<float> g(rows * width), e;
        for (auto& v : g) v = (float)uniform(-20, 20);
        Array<float> dx(given), dg(g);
        run("gate", rows, 1, 1, dx.p, dg.p, width, k);
        for (int i = 0; i < rows * k; i++) e.push_back(given[i] / (1 + exp_defined(-g[width == 1 ? i / k : i])));
        equal("gate", dx.get("gate"), e);
    }
    {
        Array<float> dx(given);
        run("scale", rows, 1, 1, dx.p, 1.37f, k);
        std::vector<float> e(given);
        for (auto& v : e) v *= 1.37f;
        equal("scale", dx.get("scale"), e);
    }
    {
        const int wide = 41, n = 333;
        std::vector<int> columns;
        for (int i = 0; i < n; i++) columns.push_back(i % 3 == 1 ? -1 - below(wide) : below(k));
        columns[1] = -wide, columns[2] = k - 1, columns[0] = 0;
        Array<float> dx(given), dy2(std::vector<float>(y.begin(), y.begin() + rows * wide)), out(rows * n);
        Array<int> dc(columns);
        run("rearrange", rows, 1, 1, dx.p, dy2.p, k, wide, dc.p, out.p, n);
        std::vector<float> e;
        for (int r = 0; r < rows; r++) for (int c : columns) e.push_back(c >= 0 ? given[r * k + c] : y[r * wide - 1 - c]);
        equal("rearrange", out.get("rearrange"), e);
    }
    {
        std::vector<float> broken(x);
        broken[2 * k + 17] = NAN, broken[4 * k] = INFINITY, broken[4 * k + 299] = -INFINITY, broken[5 * k + 3] = 1e30f;
        Array<float> dx(broken), out(2 * rows);
        run("look", rows, 1, 1, dx.p, out.p, k);
        const auto got = out.get("look");
        for (int r = 0; r < rows; r++) {
            double squares = 0, count = 0;
            for (int i = 0; i < k; i++) squares += (double)broken[r * k + i] * broken[r * k + i], count += !std::isfinite(broken[r * k + i]);
            if (got[2 * r + 1] != count || (squares < 1e30 && fabs(got[2 * r] - squares) > 1e-5 * squares) || (!(squares < 1e38) && std::isfinite(got[2 * r]))) printf("FAIL look: row %d\n", r), FAILED++;
        }
    }
    {
        const int n = 21, kk = 77;
        std::vector<float> w(n * kk), in(3 * kk), scales(n), bias(n);
        for (auto* v : {&w, &in, &scales, &bias}) for (auto& f : *v) f = (float)std::normal_distribution<>(0, 1)(RANDOM);
        Array<float> dw2(w), dx(in), ds(scales), db(bias), out(3 * n), rows_out(2 * kk);
        run("matmul_f32", (n + 7) / 8, 3, 1, dw2.p, dx.p, ds.p, db.p, out.p, n, kk);
        std::vector<double> e, s;
        for (int m = 0; m < 3; m++) for (int o = 0; o < n; o++) {
            double sum = 0, a = 0;
            for (int i = 0; i < kk; i++) sum += (double)w[o * kk + i] * in[m * kk + i], a += fabs((double)w[o * kk + i] * in[m * kk + i]);
            e.push_back(sum * scales[o] + bias[o]), s.push_back(a * fabs(scales[o]) + fabs(bias[o]));
        }
        close("matmul_f32", out.get("matmul_f32"), e, s, 1e-6);
        Array<int> tokens(std::vector<int>{20, 3});
        run("embed_f32", 2, 1, 1, dw2.p, ds.p, tokens.p, rows_out.p, kk);
        std::vector<float> er;
        for (int t : {20, 3}) for (int i = 0; i < kk; i++) er.push_back(w[t * kk + i] * scales[t]);
        equal("embed_f32", rows_out.get("embed_f32"), er);
    }
}

#include "check_narrow.h"
#include "check_tcgen.h"
#include "check_mixture.h"
#include "check_recurrent.h"
#include "check_sample.h"

int main(int argc, char** argv) {
    setvbuf(stdout, nullptr, _IOLBF, 0);  // a fault is told when it is found
#ifdef PTX
    if (argc > 2 && std::string(argv[1]) == "--ptx") {
        const std::string wrong = ptx::load_module(argv[2]);
        if (!wrong.empty()) { printf("FAIL %s\n", wrong.c_str()); return 1; }
        FROM_PTX = true, argc -= 2, argv += 2;
    }
#endif
    standin::STRICT = true;
    const std::vector<std::pair<std::string, void (*)()>> all{{"primitives", [] { check_primitives(), check_tensor_primitives(); }}, {"matmul", check_matmul}, {"tile", check_tile}, {"narrow", check_narrow}, {"tcgen", check_tcgen}, {"operand", check_operand}, {"attention", check_attention}, {"recurrent", check_recurrent}, {"rows", check_rows}, {"mixture", check_mixture}, {"sample", check_sample}};
    for (auto& [name, check] : all) {
        bool wanted = argc == 1;
        for (int i = 1; i < argc; i++) wanted |= name == argv[i];
        if (wanted) check();
    }
    printf("%s: %d launches, %d failures\n", FAILED ? "FAIL" : "PASS", CHECKED, FAILED);
    return FAILED != 0;
}
