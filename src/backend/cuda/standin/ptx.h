// Runs the PTX that the compiler made of the kernels, with the checks of device.h: what the inline PTX of prim.cuh says and what
// the compiler made of the rest are executed too, which a build for the CPU cannot show.
//
// A module is decoded once; an operand is the number of a slot, 32 lanes of 64 bits, constants and special registers included.
// Blocks run one after another, warps of a block in turn, from barrier to barrier; lanes of a warp go together, those with the
// smallest program counter first, so that they meet again where their paths do. Arithmetic is exact (rounding to nearest even,
// subnormals kept); products of BF16 tensor instructions are added one after another, in f32, as device.h does. An instruction that
// is not known here is an error when the module is loaded.
// Errors beyond those of device.h: collectives of a warp that a named lane does not reach; bytes of an asynchronous copy that
// are touched before the copy was waited for, or not waited for at all. shfl and mma order no accesses to memory here.
// Of mbarriers there is what tcgen05 needs: one that is made, that commits arrive at, and that is asked (tensor.h).
// Not modelled: atomics, calls, clusters, bulk copies, everything approximate (ex2, sin, ...).
#pragma once
#include <bit>
#include <fstream>
#include <set>
#include <sstream>
#include <type_traits>

namespace ptx {
using standin::fault;
using std::string;

// Where generic addresses of shared and local memory begin.
constexpr uint64_t SHARED_WINDOW = 1ull << 60, LOCAL_WINDOW = 1ull << 61;
// Instructions of a warp between two barriers after which a kernel is said to have no end.
constexpr long ENDLESS = 30'000'000;
// Shared memory that a launch can give.
constexpr size_t MOST_DYNAMIC = 128 << 10;

struct Warp;
struct Instruction;
using Handler = void (*)(const Instruction&, Warp&, uint32_t lanes);
enum class Kind : uint8_t { Plain, Branch, Exit, Barrier, Collective };
enum class Space : uint8_t { Generic, Global, Shared, Local, Param };

struct Instruction {
    Handler run = nullptr;
    Kind kind = Kind::Plain;
    Space space = Space::Generic;
    bool negated = false, constant = false, is_signed = false, transposed = false;
    int guard = -1;            // slot of the predicate
    int members = -1;          // slot of the mask of a collective's lanes; -1: all
    int d[4] = {}, s[12] = {};
    int inputs = 0, bytes = 0, count = 1, mode = 0, target = -1;
    int64_t offset = 0;        // of an address
    int64_t offset2 = 0;       // of a second address
    uint32_t flip = 0;         // inputs that are predicates to negate
    std::shared_ptr<std::vector<int>> wide;  // outputs, where they are many
};

struct Variable { uint64_t at; size_t size; };
struct Kernel {
    string name;
    int threads = 0, slots = 0;
    std::map<string, Variable> params, shared, local;
    std::vector<string> param_order;
    size_t param_bytes = 0, shared_bytes = 0, local_bytes = 0;
    string dynamic;  // the shared array whose size the launch gives
    std::vector<Instruction> code;
    std::vector<string> text;
    std::vector<std::pair<int, uint64_t>> constants;
    std::vector<std::pair<int, string>> specials;
};

// --- state ---

// Bytes on their way to shared memory: group -1 is not committed yet.
struct Copy { uint64_t to; std::vector<uint8_t> bytes; int group; };
struct SharedArea {
    std::vector<uint8_t> bytes, in_flight;
    std::unique_ptr<standin::Shadow> shadow;
    std::vector<std::pair<uint64_t, size_t>> variables;
};
struct Warp {
    const Kernel* kernel = nullptr;
    SharedArea* shared = nullptr;
    const std::vector<uint8_t>* params = nullptr;
    std::vector<uint64_t> slots;
    std::vector<uint8_t> local, local_written;  // [lane][byte]
    int index = 0, at = 0, pc[32] = {};
    uint32_t live = 0, waiting = 0, barrier = 0;
    std::vector<Copy> copies[32];
    int groups[32] = {};
    std::set<int> loading;  // registers that tcgen05.ld has not filled yet
    bool yields = false;    // waits for an mbarrier: others go on
    uint64_t* slot(int i) { return &slots[(size_t)i * 32]; }
    void run();
    void check_loading(const Instruction& i) const;
};
static void as_thread(const Warp& w, int lane) { standin::B->current = w.index * 32 + lane; }
#define LANES(on) for (int lane = 0; lane < 32; lane++) if ((on) >> lane & 1)

// --- values ---

template <class T> static T get(uint64_t v) {
    if constexpr (std::is_same_v<T, float>) return std::bit_cast<float>((uint32_t)v);
    else if constexpr (std::is_same_v<T, double>) return std::bit_cast<double>(v);
    else return (T)v;
}
template <class T> static uint64_t put(T v) {
    if constexpr (std::is_same_v<T, float>) return v != v ? 0x7fffffffu : std::bit_cast<uint32_t>(v);
    else if constexpr (std::is_same_v<T, double>) return v != v ? 0x7fffffffffffffffull : std::bit_cast<uint64_t>(v);
    else if constexpr (std::is_signed_v<T>) return (uint64_t)(int64_t)v;
    else return (uint64_t)v;
}
// d = F(s...) in each lane; S are the types as which the inputs are read. F has no state.
template <class F, class... S> static void lanes(const Instruction& i, Warp& w, uint32_t on) {
    uint64_t* d = w.slot(i.d[0]);
    [&]<size_t... N>(std::index_sequence<N...>) {
        if (on == ~0u) for (int lane = 0; lane < 32; lane++) d[lane] = put(F()(get<S>(w.slot(i.s[N])[lane])...));
        else LANES(on) d[lane] = put(F()(get<S>(w.slot(i.s[N])[lane])...));
    }(std::index_sequence_for<S...>{});
}
template <class... S, class F> static Handler each(F) { return lanes<F, S...>; }
template <class T> static bool is(const string& type) {
    if constexpr (std::is_same_v<T, float>) return type == "f32";
    else if constexpr (std::is_same_v<T, double>) return type == "f64";
    else return type.size() > 1 && type.substr(1) == std::to_string(sizeof(T) * 8) &&
                (std::is_signed_v<T> ? type[0] == 's' : type[0] == 'u' || type[0] == 'b');
}
template <int N, class T, class F> static Handler same(F) {
    if constexpr (N == 1) return lanes<F, T>;
    else if constexpr (N == 2) return lanes<F, T, T>;
    else return lanes<F, T, T, T>;
}
template <int N, class... T> static Handler among(auto f, const string& type) {
    Handler h = nullptr;
    ((is<T>(type) ? (void)(h = same<N, T>(f)) : void()), ...);
    return h;
}
template <int N>
static Handler of_ints(auto f, const string& t) {
    return among<N, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>(f, t);
}
template <int N> static Handler of_floats(auto f, const string& t) { return among<N, float, double>(f, t); }

static float from_bf16(uint32_t h) { return std::bit_cast<float>((h & 0xffff) << 16); }
// Nearest even.
static uint32_t bf16_of(float f) {
    const uint32_t u = std::bit_cast<uint32_t>(f);
    if (f != f) return 0x7fff;
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
// a · b + c, rounded once.
static uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
    const double p = (double)from_bf16(a) * from_bf16(b), q = from_bf16(c);
    double s = p + q;
    if (std::isfinite(s)) {
        // To odd where the sum is not exact, then again in f32, so that only the last rounding counts.
        const double back = s - p, error = (p - (s - back)) + (q - back);
        if (error != 0 && !(std::bit_cast<uint64_t>(s) & 1)) s = std::nextafter(s, error > 0 ? INFINITY : -INFINITY);
        float f = (float)s;
        if (std::isfinite(f) && (double)f != s && !(std::bit_cast<uint32_t>(f) & 1))
            f = std::nextafterf(f, (double)f < s ? INFINITY : -INFINITY);
        return bf16_of(f);
    }
    return bf16_of((float)s);
}
static float from_f16(uint32_t h) {
    const int e = h >> 10 & 31, m = h & 1023;
    const float v = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf(1 + m / 1024.0f, e - 15) : ldexpf((float)m, -24);
    return h >> 15 & 1 ? -v : v;
}

template <class T> static T minimum(T a, T b) { return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b; }
template <class T> static T maximum(T a, T b) { return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b; }

// Float to integer: saturates, NaN becomes 0.
template <class D, class S> static D to_int(S x) {
    if (x != x) return 0;
    if (x >= (S)std::ldexp(1.0, std::numeric_limits<D>::digits)) return std::numeric_limits<D>::max();
    if (x <= (S)std::numeric_limits<D>::min()) return std::numeric_limits<D>::min();
    return (D)x;
}

// --- memory ---

struct Place { uint8_t* bytes; standin::Shadow* shadow; size_t at; uint8_t* in_flight; const char* what; };
static Place place(Warp& w, int lane, const Instruction& i, Space space, uint64_t address, size_t n) {
    as_thread(w, lane);
    if (space == Space::Generic) {
        if (address >= LOCAL_WINDOW) space = Space::Local, address -= LOCAL_WINDOW;
        else if (address >= SHARED_WINDOW) space = Space::Shared, address -= SHARED_WINDOW;
        else space = Space::Global;
    }
    if (space == Space::Global) {
        standin::Region& r = standin::checked((const void*)address, n, "global memory");
        return {(uint8_t*)address, r.shadow.get(), (size_t)((const char*)address - r.lo), nullptr, "global memory"};
    }
    const char* what = space == Space::Shared ? "shared memory" : "local memory";
    if (address % n) fault(string(what) + ": misaligned access of " + std::to_string(n) + " bytes");
    if (space == Space::Shared) {
        for (auto [at, size] : w.shared->variables)
            if (address >= at && address + n <= at + size)
                return {w.shared->bytes.data() + address, w.shared->shadow.get(), address, w.shared->in_flight.data() + address,
                        what};
    } else {
        for (auto& [name, v] : w.kernel->local)
            if (address >= v.at && address + n <= v.at + v.size)
                return {w.local.data() + lane * w.kernel->local_bytes + address, nullptr, address, nullptr, what};
    }
    fault(string(what) + ": access of " + std::to_string(n) + " bytes outside of every array, at " +
          std::to_string((int64_t)address));
}
static void read(Warp& w, int lane, const Place& p, size_t n, bool constant) {
    if (p.in_flight && memchr(p.in_flight, 1, n)) fault("shared memory: read while a copy to it is on its way");
    if (p.shadow) return standin::read_shadow(*p.shadow, p.at, n, constant, p.what);
    if (memchr(w.local_written.data() + lane * w.kernel->local_bytes + p.at, 0, n))
        fault("local memory: read before anything was written");
}
static void write(Warp& w, int lane, const Place& p, size_t n) {
    if (p.in_flight && memchr(p.in_flight, 1, n)) fault("shared memory: written while a copy to it is on its way");
    if (p.shadow) return standin::write_shadow(*p.shadow, p.at, n, p.what);
    memset(w.local_written.data() + lane * w.kernel->local_bytes + p.at, 1, n);
}
static void load(const Instruction& i, Warp& w, uint32_t on) {
    const size_t n = i.bytes * i.count;
    LANES(on) {
        const uint64_t address = w.slot(i.s[0])[lane] + i.offset;
        const uint8_t* from;
        if (i.space == Space::Param) {
            if (address + n > w.params->size()) fault("parameter out of bounds");
            from = w.params->data() + address;
        } else {
            const Place p = place(w, lane, i, i.space, address, n);
            read(w, lane, p, n, i.constant);
            from = p.bytes;
        }
        for (int e = 0; e < i.count; e++) {
            uint64_t v = 0;
            memcpy(&v, from + e * i.bytes, i.bytes);
            if (i.is_signed && i.bytes < 8) v = (uint64_t)((int64_t)(v << (64 - 8 * i.bytes)) >> (64 - 8 * i.bytes));
            w.slot(i.d[e])[lane] = v;
        }
    }
}
static void store(const Instruction& i, Warp& w, uint32_t on) {
    const size_t n = i.bytes * i.count;
    LANES(on) {
        const Place p = place(w, lane, i, i.space, w.slot(i.s[0])[lane] + i.offset, n);
        write(w, lane, p, n);
        for (int e = 0; e < i.count; e++) memcpy(p.bytes + e * i.bytes, &w.slot(i.s[1 + e])[lane], i.bytes);
    }
}
// The bytes are read at once, and arrive when the thread waits for them.
static void copy_async(const Instruction& i, Warp& w, uint32_t on) {
    LANES(on) {
        const size_t n = i.bytes, real = i.inputs > 2 ? (uint32_t)w.slot(i.s[2])[lane] : n;
        const uint64_t to = w.slot(i.s[0])[lane] + i.offset, from = w.slot(i.s[1])[lane] + i.offset2;
        as_thread(w, lane);
        if (real > n) fault("copy of more bytes than its size");
        if (from % n) fault("global memory: misaligned access of " + std::to_string(n) + " bytes");
        std::vector<uint8_t> bytes(n, 0);
        if (real) {
            standin::Region* r = standin::region_of((const void*)from, real);
            if (!r) fault("global memory: access of " + std::to_string(real) + " bytes outside of every allocation");
            standin::read_shadow(*r->shadow, (const char*)from - r->lo, real, true, "global memory");
            memcpy(bytes.data(), (const void*)from, real);
        }
        const Place p = place(w, lane, i, Space::Shared, to, n);
        write(w, lane, p, n);
        memset(p.bytes, 0xcb, n), memset(p.in_flight, 1, n);
        w.copies[lane].push_back({to, bytes, -1});
    }
}
static void copy_commit(const Instruction&, Warp& w, uint32_t on) {
    LANES(on) {
        for (auto& c : w.copies[lane]) if (c.group < 0) c.group = w.groups[lane];
        w.groups[lane]++;
    }
}
// `mode`: how many of the last groups may still be on their way; -1: none, committed or not.
static void copy_wait(const Instruction& i, Warp& w, uint32_t on) {
    LANES(on) {
        as_thread(w, lane);
        std::vector<Copy> left;
        for (auto& c : w.copies[lane]) {
            if (i.mode >= 0 && (c.group < 0 || c.group >= w.groups[lane] - i.mode)) { left.push_back(std::move(c)); continue; }
            const Place p = place(w, lane, i, Space::Shared, c.to, c.bytes.size());
            memset(p.in_flight, 0, c.bytes.size());
            // For others the bytes are there after the next barrier.
            write(w, lane, p, c.bytes.size());
            memcpy(p.bytes, c.bytes.data(), c.bytes.size());
        }
        w.copies[lane] = std::move(left);
    }
}

// --- collectives of a warp ---

static void warp_barrier(const Instruction&, Warp& w, uint32_t on) {
    LANES(on) standin::B->fibers[w.index * 32 + lane].warp_epoch++;
}
enum { BFLY, IDX, UP, DOWN };
static void shuffle(const Instruction& i, Warp& w, uint32_t on) {
    uint64_t v[32];
    memcpy(v, w.slot(i.s[0]), sizeof v);
    LANES(on) {
        const int b = (int)w.slot(i.s[1])[lane] & 31, c = (int)w.slot(i.s[2])[lane], segment = c >> 8 & 31;
        const int low = lane & segment, high = low | (c & 31 & ~segment);
        int from = i.mode == BFLY ? lane ^ b : i.mode == UP ? lane - b : i.mode == DOWN ? lane + b : low | (b & ~segment);
        const bool good = i.mode == UP ? from >= high : from <= high;
        if (!good) from = lane;
        as_thread(w, lane);
        if (!(on >> from & 1)) fault("shfl reads a lane that does not take part");
        w.slot(i.d[0])[lane] = v[from] & 0xffffffffu;
        if (i.count > 1) w.slot(i.d[1])[lane] = good;
    }
}
enum { BALLOT, ALL, ANY };
static void vote(const Instruction& i, Warp& w, uint32_t on) {
    uint32_t votes = 0;
    LANES(on) votes |= (uint32_t)((w.slot(i.s[0])[lane] ^ (i.flip & 1)) & 1) << lane;
    LANES(on) w.slot(i.d[0])[lane] = i.mode == BALLOT ? votes : i.mode == ALL ? votes == on : votes != 0;
}
static void mma_16816(const Instruction& i, Warp& w, uint32_t) {
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++) {
            const uint32_t v = (uint32_t)w.slot(i.s[r])[lane];
            const int row = g + r % 2 * 8, k = 2 * t + r / 2 * 8;
            a[row][k] = from_bf16(v), a[row][k + 1] = from_bf16(v >> 16);
            d[g + r / 2 * 8][2 * t + r % 2] = get<float>(w.slot(i.s[6 + r])[lane]);
        }
        for (int r = 0; r < 2; r++) {
            const uint32_t v = (uint32_t)w.slot(i.s[4 + r])[lane];
            b[2 * t + 8 * r][g] = from_bf16(v), b[2 * t + 8 * r + 1][g] = from_bf16(v >> 16);
        }
    }
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < 16; k++)
            for (int c = 0; c < 8; c++) d[r][c] += a[r][k] * b[k][c];
    for (int lane = 0; lane < 32; lane++)
        for (int r = 0; r < 4; r++) w.slot(i.d[r])[lane] = put(d[lane / 4 + r / 2 * 8][2 * (lane % 4) + r % 2]);
}
// Block-scaled E2M1, m16n8k64: fragments and scales as the PTX ISA (9.0, "Matrix Fragments for mma.m16n8k64", "Block Scaling") has
// them; sums as MMA-Sim (Xie et al., arXiv 2511.10909) found them on this architecture: 16 products exactly, then these four and
// what is added to, each cut off 35 bits below the largest, to f32 by cutting off. `mode`: E8M0 in two, or E4M3 in four scales;
// `bytes`: byte-id-a, thread-id-a, byte-id-b, thread-id-b in a byte each.
struct Term { double significand; int exponent; };
static Term term_of(double v) {
    if (v == 0) return {0, -1000};
    int e;
    const double m = std::frexp(v, &e);
    return {2 * m, e - 1};
}
// The sum of terms, each cut off so many bits below the largest, to f32 by cutting off.
template <int N> static float cut_off(const Term (&terms)[N], int bits) {
    int top = -1000;
    for (auto& t : terms) top = std::max(top, t.exponent);
    double total = 0;
    for (auto& t : terms) total += std::trunc(std::ldexp(t.significand, bits + t.exponent - top));
    const double v = std::ldexp(total, top - bits);
    const float f = (float)v;
    return std::fabs((double)f) > std::fabs(v) ? std::nextafterf(f, 0.0f) : f;
}
static double scale_code(bool e8m0, uint32_t byte) {
    if (e8m0) return byte == 255 ? NAN : std::ldexp(1.0, (int)byte - 127);
    const uint32_t exponent = byte >> 3 & 15, mantissa = byte & 7;
    if (exponent == 15 && mantissa == 7) return NAN;
    return exponent ? std::ldexp(1 + mantissa / 8.0, (int)exponent - 7) : std::ldexp(mantissa / 8.0, -6);
}
static void mma_16864(const Instruction& i, Warp& w, uint32_t) {
    const bool e8m0 = i.mode == 2;
    const int width = 64 / i.mode, byte_a = i.bytes & 255, thread_a = i.bytes >> 8 & 255, byte_b = i.bytes >> 16 & 255, thread_b = i.bytes >> 24;
    static const int twice[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    auto element = [&](int slot, int lane, int nibble) {
        const uint32_t c = (uint32_t)w.slot(slot)[lane] >> 4 * nibble & 15;
        return c & 8 ? -twice[c & 7] : twice[c & 7];
    };
    float out[32][4];
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
            const int lane = m % 8 * 4 + n / 2, index = m / 8 * 2 + n % 2;
            const float c = get<float>(w.slot(i.s[6 + index])[lane]);
            Term terms[5] = {term_of(c)};
            bool nan = c != c;
            for (int group = 0; group < 4; group++) {
                int sum = 0;  // of four times the products
                for (int k = group * 16; k < group * 16 + 16; k++)
                    sum += element(i.s[m / 8 + k / 32 * 2], m % 8 * 4 + k % 32 / 8, k % 8) * element(i.s[4 + k / 32], n * 4 + k % 32 / 8, k % 8);
                const int at = group * 16 / width;
                const double a = scale_code(e8m0, (uint32_t)w.slot(i.s[10])[m % 8 * 4 + thread_a * 2 + m / 8] >> 8 * (byte_a + at) & 255);
                const double b = scale_code(e8m0, (uint32_t)w.slot(i.s[11])[n * 4 + thread_b] >> 8 * (byte_b + at) & 255);
                nan |= a != a || b != b;
                const Term x = term_of(a), y = term_of(b);
                terms[1 + group] = {sum * 0.25 * x.significand * y.significand, sum ? x.exponent + y.exponent : -1000};
            }
            const float f = cut_off(terms, 35);
            out[lane][index] = nan ? NAN : std::isinf(c) ? c : f;
        }
    for (int lane = 0; lane < 32; lane++)
        for (int r = 0; r < 4; r++) w.slot(i.d[r])[lane] = put(out[lane][r]);
}
// Block-scaled E4M3, m16n8k32: fragments as the PTX ISA has those of m16n8k32 for types of eight bits, a scale a row and a column; sums as
// MMA-Sim found them on this architecture: all 32 products and what is added to, each cut off 25 bits below the largest (by the
// exponents of its factors), to f32 by cutting off. `bytes`: as above.
static void mma_16832(const Instruction& i, Warp& w, uint32_t) {
    const int byte_a = i.bytes & 255, thread_a = i.bytes >> 8 & 255, byte_b = i.bytes >> 16 & 255, thread_b = i.bytes >> 24;
    struct Factor { double significand; int exponent; bool nan; };
    auto factor = [&](int slot, int lane, int byte) {
        const uint32_t c = (uint32_t)w.slot(slot)[lane] >> 8 * byte & 255, e = c >> 3 & 15, m = c & 7;
        const double v = (e ? 8 + m : m) / 8.0;
        return Factor{c & 128 ? -v : v, e ? (int)e - 7 : -6, (c & 127) == 127};
    };
    float out[32][4];
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
            const int lane = m % 8 * 4 + n / 2, index = m / 8 * 2 + n % 2;
            const float c = get<float>(w.slot(i.s[6 + index])[lane]);
            const uint32_t a = (uint32_t)w.slot(i.s[10])[m % 8 * 4 + thread_a * 2 + m / 8] >> 8 * byte_a & 255;
            const uint32_t b = (uint32_t)w.slot(i.s[11])[n * 4 + thread_b] >> 8 * byte_b & 255;
            bool nan = c != c || a == 255 || b == 255;
            Term terms[33] = {term_of(c)};
            for (int k = 0; k < 32; k++) {
                const Factor x = factor(i.s[m / 8 + k / 16 * 2], m % 8 * 4 + k % 16 / 4, k % 4), y = factor(i.s[4 + k / 16], n * 4 + k % 16 / 4, k % 4);
                nan |= x.nan || y.nan;
                const double product = x.significand * y.significand;
                terms[1 + k] = {product, product == 0 ? -1000 : x.exponent + y.exponent + (int)a + (int)b - 254};
            }
            const float f = cut_off(terms, 25);
            out[lane][index] = nan ? NAN : std::isinf(c) ? c : f;
        }
    for (int lane = 0; lane < 32; lane++)
        for (int r = 0; r < 4; r++) w.slot(i.d[r])[lane] = put(out[lane][r]);
}
// --- tensor memory: tcgen05 and mbarriers ---
// Who may touch what when is in tensor.h. Here is what stands where, from tensor memory and shared memory to the matrices, after the PTX
// ISA (9.0, "tcgen05 Matrix and Data Movement": data path layout of M 128; layouts of scale factors A and B; shared memory descriptor,
// K-major canonical layout without swizzling; instruction descriptor of mxf4 and mxf4nvf4).

static uint8_t* descriptor_bytes(SharedArea* area, uint64_t address, size_t n, uint32_t number) {
    for (auto [at, size] : area->variables)
        if (address >= at && address + n <= at + size) {
            if (number) {
                if (memchr(area->in_flight.data() + address, 1, n)) fault("an operation reads shared memory to which a copy is on its way");
                standin::operation_reads_shared(number, *area->shadow, address, n);
            }
            return area->bytes.data() + address;
        }
    fault("a descriptor leads outside of every array of shared memory, to " + std::to_string(address));
}
// Byte `byte` of row `row` of a K-major matrix begins, its sixteen with it: core matrices of eight rows of 16 bytes.
static uint64_t core_address(uint64_t descriptor, int row, int byte) {
    if (descriptor >> 61 || (descriptor >> 49 & 15) || (descriptor >> 46 & 7) != 1) fault("a shared memory descriptor of a kind that is not known");
    const uint64_t start = (descriptor & 0x3fff) * 16, leading = (descriptor >> 16 & 0x3fff) * 16, stride = (descriptor >> 32 & 0x3fff) * 16;
    return start + (row >> 3) * stride + (row & 7) * 16 + (byte >> 4) * leading;
}
static uint32_t lane_of(uint32_t address) { return address >> 16; }
static int column_of(uint32_t address) { return address & 0xffff; }
static void tensor_alloc(const Instruction& i, Warp& w, uint32_t) {
    as_thread(w, 0);
    const int count = (int)w.slot(i.s[1])[0];
    const uint32_t at = standin::allocate_columns(w.index, count);
    const Place p = place(w, 0, i, Space::Shared, w.slot(i.s[0])[0], 4);
    write(w, 0, p, 4);
    memcpy(p.bytes, &at, 4);
}
static void tensor_free(const Instruction& i, Warp& w, uint32_t) {
    as_thread(w, 0);
    standin::free_columns(w.index, (uint32_t)w.slot(i.s[0])[0], (int)w.slot(i.s[1])[0]);
}
static void tensor_relinquish(const Instruction&, Warp&, uint32_t) { standin::tensor().relinquished = true; }
static void tensor_load(const Instruction& i, Warp& w, uint32_t) {
    for (int lane = 0; lane < 32; lane++) {
        as_thread(w, lane);
        const uint32_t at = (uint32_t)w.slot(i.s[0])[lane];
        // A warp of four reaches a quarter each.
        if (lane_of(at) != uint32_t(w.index % 4 * 32)) fault("tcgen05.ld of lanes that another warp reaches");
        standin::knows(standin::B->current).loads++;
        for (size_t n = 0; n < i.wide->size(); n++) w.slot((*i.wide)[n])[lane] = standin::load_cell((int)lane_of(at) + lane, column_of(at) + (int)n);
    }
    w.loading.insert(i.wide->begin(), i.wide->end());
}
static void tensor_wait(const Instruction&, Warp& w, uint32_t) {
    for (int lane = 0; lane < 32; lane++) as_thread(w, lane), standin::wait_loads();
    w.loading.clear();
}
static void tensor_fence(const Instruction& i, Warp& w, uint32_t on) {
    LANES(on) {
        as_thread(w, lane);
        if (i.mode) standin::fence_after();
        else standin::fence_before();
    }
}
static void proxy_fence(const Instruction&, Warp& w, uint32_t on) { LANES(on) as_thread(w, lane), standin::fence_proxies(); }
static void mbarrier_fence(const Instruction&, Warp& w, uint32_t on) { LANES(on) as_thread(w, lane), standin::fence_mbarriers(); }
static uint64_t mbarrier_at(const Instruction& i, Warp& w, int lane, int operand) {
    const uint64_t at = w.slot(i.s[operand])[lane] + i.offset;
    return place(w, lane, i, Space::Shared, at, 8), at;
}
static void mbarrier_make(const Instruction& i, Warp& w, uint32_t on) {
    LANES(on) as_thread(w, lane), standin::make_mbarrier(mbarrier_at(i, w, lane, 0), (int)w.slot(i.s[1])[lane]);
}
static void mbarrier_ask(const Instruction& i, Warp& w, uint32_t on) {
    LANES(on) {
        as_thread(w, lane);
        const bool passed = standin::ask(mbarrier_at(i, w, lane, 0), (int)w.slot(i.s[1])[lane]);
        w.slot(i.d[0])[lane] = passed;
        w.yields |= !passed && !standin::MUTE;
    }
}
static void tensor_commit(const Instruction& i, Warp& w, uint32_t on) {
    LANES(on) as_thread(w, lane), standin::commit_to(mbarrier_at(i, w, lane, 0));
}
static void tensor_copy(const Instruction& i, Warp& w, uint32_t on) {
    SharedArea* area = w.shared;
    LANES(on) {
        as_thread(w, lane);
        const uint32_t to = (uint32_t)w.slot(i.s[0])[lane];
        const uint64_t from = w.slot(i.s[1])[lane];
        const uint32_t number = standin::next_operation();
        if (lane_of(to)) fault("tcgen05.cp to all quarters begins in a lane");
        for (int l = 0; l < 128; l++) {
            descriptor_bytes(area, core_address(from, l % 32, 0), 16, l < 32 ? number : 0);
            for (int c = 0; c < 4; c++) standin::operation_writes(number, false, 0, l, column_of(to) + c);
        }
        standin::enqueue(false, 0, [=] {
            for (int l = 0; l < 128; l++)
                for (int c = 0; c < 4; c++)
                    memcpy(&standin::cell(l, column_of(to) + c, "").value, descriptor_bytes(area, core_address(from, l % 32, 0), 16, 0) + 4 * c, 4);
        });
    }
}
// `mode`: scales of a row in the instruction, as in mma_16864, whose sums these are too: what MMA-Sim found of such products elsewhere.
static void tensor_mma(const Instruction& i, Warp& w, uint32_t on) {
    SharedArea* area = w.shared;
    const int scales = i.mode;
    LANES(on) {
        as_thread(w, lane);
        auto input = [&](int n) { return w.slot(i.s[n])[lane]; };
        const uint32_t d = (uint32_t)input(0), instruction = (uint32_t)input(3);
        const uint64_t matrix[2] = {input(1), input(2)};
        const uint32_t at[2] = {(uint32_t)input(4), (uint32_t)input(5)};
        const bool add = input(6) & 1;
        auto bits = [&](int from, int count) { return (int)(instruction >> from & ((1u << count) - 1)); };
        // Type of a and b E2M1; of scales E8M0 or E4M3; dense, nothing negated or transposed, K 64.
        if (bits(7, 3) != 1 || bits(10, 2) != 1 || bits(23, 1) != (scales == 2) || bits(0, 4) || bits(6, 1) || bits(12, 5) || bits(24, 3) || bits(31, 1))
            fault("an instruction descriptor of what is not known");
        const int rows[2] = {bits(27, 2) * 128, bits(17, 6) * 8}, part[2] = {bits(29, 2), bits(4, 2)};
        if (rows[0] != 128 || rows[1] == 0 || rows[1] > 256) fault("tcgen05.mma of another shape");
        for (int side = 0; side < 2; side++)
            if (part[side] % (scales == 2 ? 2 : 4)) fault("tcgen05.mma: scales that begin in another byte");
        if (lane_of(d) || lane_of(at[0]) || lane_of(at[1])) fault("tcgen05.mma: tensor memory from another lane on");
        const uint32_t number = standin::next_operation();
        const uint64_t shape = (uint64_t)d << 32 | (uint32_t)rows[0] << 16 | (uint32_t)rows[1];
        for (int side = 0; side < 2; side++) {
            for (int r = 0; r < rows[side]; r++)
                for (int byte = 0; byte < 32; byte += 16) descriptor_bytes(area, core_address(matrix[side], r, byte), 16, number);
            for (int l = 0; l < 128; l++)
                for (int c = 0; c < (rows[side] + 31) / 32; c++)
                    if (c * 32 + l % 32 < rows[side]) standin::operation_reads(number, true, shape, l, column_of(at[side]) + c);
        }
        for (int l = 0; l < 128; l++)
            for (int c = 0; c < rows[1]; c++) {
                if (add && !standin::cell(l, column_of(d) + c, "tcgen05.mma").written) fault("tcgen05.mma adds to what nobody wrote");
                standin::operation_writes(number, true, shape, l, column_of(d) + c);
            }
        const int count[2] = {rows[0], rows[1]}, first[2] = {part[0], part[1]};
        const uint64_t from[2] = {matrix[0], matrix[1]};
        const uint32_t columns[2] = {at[0], at[1]};
        auto run = [=, n0 = count[0], n1 = count[1]] {
            static const int twice[8] = {0, 1, 2, 3, 4, 6, 8, 12};
            static int element[2][256][64];
            static Term factor[2][256][4];
            static bool nan[2][256][4];
            for (int side = 0; side < 2; side++) {
                // Lanes and columns to rows: column c of a quarter's lane l has row 32c + l.
                for (int l = 0; l < 128; l++)
                    for (int c = 0; c < (count[side] + 31) / 32; c++) {
                        const int r = 32 * c + l % 32;
                        if (r >= count[side]) continue;
                        const uint32_t word = standin::cell(l, column_of(columns[side]) + c, "").value;
                        if (word != standin::cell(l % 32, column_of(columns[side]) + c, "").value) fault("tcgen05.mma: quarters have other scales");
                        for (int g = 0; g < 4; g++) {
                            const double v = scale_code(scales == 2, word >> 8 * (first[side] + g * scales / 4) & 255);
                            nan[side][r][g] = v != v, factor[side][r][g] = term_of(v);
                        }
                    }
                for (int r = 0; r < count[side]; r++)
                    for (int k = 0; k < 64; k++) {
                        const uint8_t byte = descriptor_bytes(area, core_address(from[side], r, k / 2), 16, 0)[k / 2 % 16];
                        const uint32_t code = k & 1 ? byte >> 4 : byte & 15;
                        element[side][r][k] = code & 8 ? -twice[code & 7] : twice[code & 7];
                    }
            }
            for (int l = 0; l < n0; l++)
                for (int c = 0; c < n1; c++) {
                    standin::Cell& to = standin::cell(l, column_of(d) + c, "");
                    const float before = add ? get<float>(to.value) : 0.0f;
                    Term terms[5] = {term_of(before)};
                    bool broken = before != before;
                    for (int g = 0; g < 4; g++) {
                        int sum = 0;
                        for (int k = 16 * g; k < 16 * g + 16; k++) sum += element[0][l][k] * element[1][c][k];
                        const Term &x = factor[0][l][g], &y = factor[1][c][g];
                        broken |= nan[0][l][g] || nan[1][c][g];
                        terms[1 + g] = {sum * 0.25 * x.significand * y.significand, sum ? x.exponent + y.exponent : -1000};
                    }
                    to.value = (uint32_t)put(broken ? NAN : std::isinf(before) ? before : cut_off(terms, 35));
                }
        };
        standin::enqueue(true, shape, run);
    }
}

// Matrices of 8 rows of 16 bytes; lanes 8m..8m+7 have the addresses of matrix m.
static void ldmatrix(const Instruction& i, Warp& w, uint32_t) {
    for (int m = 0; m < i.count; m++) {
        uint16_t v[8][8];
        for (int row = 0; row < 8; row++) {
            const int lane = 8 * m + row;
            const Place p = place(w, lane, i, Space::Shared, w.slot(i.s[0])[lane] + i.offset, 16);
            read(w, lane, p, 16, false);
            memcpy(v[row], p.bytes, 16);
        }
        for (int lane = 0; lane < 32; lane++) {
            const int r = lane / 4, c = lane % 4 * 2;
            w.slot(i.d[m])[lane] = i.transposed ? v[c][r] | (uint32_t)v[c + 1][r] << 16 : v[r][c] | (uint32_t)v[r][c + 1] << 16;
        }
    }
}

// --- decoding ---

struct Error { string what; };
static std::vector<string> split(const string& s, char by) {
    std::vector<string> parts(1);
    for (size_t i = 0; i < s.size(); i++) {
        if (s[i] == by && !(by == '.' && s[i - 1] == ':')) parts.emplace_back();
        else parts.back() += s[i];
    }
    return parts;
}
static string strip(const string& s) {
    const size_t from = s.find_first_not_of(" \t\n\r"), to = s.find_last_not_of(" \t\n\r");
    return from == string::npos ? "" : s.substr(from, to - from + 1);
}
static int width(const string& type) {
    if (type == "pred") return 1;
    const int bits = type.size() > 1 ? atoi(type.c_str() + 1) : 0;
    if (bits != 8 && bits != 16 && bits != 32 && bits != 64) throw Error{"type " + type};
    return bits / 8;
}

// The comparison `name` of two values; null if there is none.
template <class T> static bool (*comparison(const string& name))(T, T) {
    constexpr bool real = std::is_floating_point_v<T>;
    static const std::map<string, bool (*)(T, T)> all = [] {
        std::map<string, bool (*)(T, T)> m{
            {"eq", [](T a, T b) { return a == b; }}, {"ne", [](T a, T b) { return real ? a < b || a > b : a != b; }},
            {"lt", [](T a, T b) { return a < b; }}, {"le", [](T a, T b) { return a <= b; }},
            {"gt", [](T a, T b) { return a > b; }}, {"ge", [](T a, T b) { return a >= b; }}};
        if constexpr (real) {
            m["equ"] = [](T a, T b) { return !(a < b || a > b); }, m["neu"] = [](T a, T b) { return a != b; };
            m["ltu"] = [](T a, T b) { return !(a >= b); }, m["leu"] = [](T a, T b) { return !(a > b); };
            m["gtu"] = [](T a, T b) { return !(a <= b); }, m["geu"] = [](T a, T b) { return !(a < b); };
            m["num"] = [](T a, T b) { return a == a && b == b; }, m["nan"] = [](T a, T b) { return a != a || b != b; };
        } else if constexpr (std::is_unsigned_v<T>) {
            m["lo"] = m["lt"], m["ls"] = m["le"], m["hi"] = m["gt"], m["hs"] = m["ge"];
        }
        return m;
    }();
    auto found = all.find(name);
    return found == all.end() ? nullptr : found->second;
}
static const std::vector<string> COMPARISONS{"eq", "ne",  "lt",  "le",  "gt",  "ge",  "lo",  "ls",  "hi",
                                             "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
static const std::vector<string> BOOLEANS{"", "and", "or", "xor"};
// `mode`: comparison · 4 + how it is combined with a third predicate.
template <class T> static void compare(const Instruction& i, Warp& w, uint32_t on) {
    const auto f = comparison<T>(COMPARISONS[i.mode / 4]);
    const int with = i.mode % 4;
    LANES(on) {
        const bool r = f(get<T>(w.slot(i.s[0])[lane]), get<T>(w.slot(i.s[1])[lane]));
        const bool c = with ? (w.slot(i.s[2])[lane] ^ (i.flip >> 2 & 1)) & 1 : false;
        auto combined = [&](bool x) { return with == 1 ? x && c : with == 2 ? x || c : with == 3 ? x != c : x; };
        w.slot(i.d[0])[lane] = combined(r);
        if (i.count > 1) w.slot(i.d[1])[lane] = combined(!r);
    }
}
template <class T> static Handler comparing(const string& type, const string& name) {
    return is<T>(type) && comparison<T>(name) ? compare<T> : nullptr;
}

template <class D, class S> static Handler converting(const string& rounding) {
    constexpr bool to_real = std::is_floating_point_v<D>, from_real = std::is_floating_point_v<S>;
    if constexpr (!to_real && !from_real) {
        if (rounding == "") return each<S>([](S x) { return (D)x; });
    } else if constexpr (to_real && !from_real) {
        if (rounding == "rn") return each<S>([](S x) { return (D)x; });
    } else if constexpr (!to_real && from_real) {
        if (rounding == "rzi") return each<S>([](S x) { return to_int<D>(std::trunc(x)); });
        if (rounding == "rni") return each<S>([](S x) { return to_int<D>(std::nearbyint(x)); });
        if (rounding == "rmi") return each<S>([](S x) { return to_int<D>(std::floor(x)); });
        if (rounding == "rpi") return each<S>([](S x) { return to_int<D>(std::ceil(x)); });
    } else if constexpr (std::is_same_v<D, S>) {
        if (rounding == "rzi") return each<S>([](S x) { return std::trunc(x); });
        if (rounding == "rni") return each<S>([](S x) { return std::nearbyint(x); });
        if (rounding == "rmi") return each<S>([](S x) { return std::floor(x); });
        if (rounding == "rpi") return each<S>([](S x) { return std::ceil(x); });
    } else {
        if (rounding == (sizeof(D) > sizeof(S) ? "" : "rn")) return each<S>([](S x) { return (D)x; });
    }
    return nullptr;
}
template <class D> static Handler converting_to(const string& d, const string& s, const string& rounding) {
    if (!is<D>(d)) return nullptr;
    Handler h = nullptr;
    auto from = [&]<class S>(S) { if (is<S>(s)) h = converting<D, S>(rounding); };
    from(uint8_t()), from(int8_t()), from(uint16_t()), from(int16_t()), from(uint32_t()), from(int32_t()), from(uint64_t()),
        from(int64_t());
    from(float()), from(double());
    return h;
}
static Handler conversion(const string& d, const string& s, const string& rounding) {
    if (d == "bf16x2" && s == "f32" && rounding == "rn")
        return each<float, float>([](float high, float low) { return bf16_of(high) << 16 | bf16_of(low); });
    if (d == "bf16" && s == "f32" && rounding == "rn") return each<float>([](float x) { return bf16_of(x); });
    if (d == "f32" && s == "bf16" && rounding == "") return each<uint32_t>([](uint32_t x) { return from_bf16(x); });
    if (d == "f32" && s == "f16" && rounding == "") return each<uint32_t>([](uint32_t x) { return from_f16(x); });
    Handler h = nullptr;
    auto to = [&]<class D>(D) { if (!h) h = converting_to<D>(d, s, rounding); };
    to(uint8_t()), to(int8_t()), to(uint16_t()), to(int16_t()), to(uint32_t()), to(int32_t()), to(uint64_t()), to(int64_t()),
        to(float()), to(double());
    return h;
}

template <class T>
using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
// The handler of an instruction whose inputs and one output are plain; null if it is not known. `mods`: what stands between
// its name and its type.
static Handler arithmetic(const string& op, const string& mods, const string& type) {
    const bool real = type[0] == 'f', plain = mods == "", near = mods == "rn" || plain;
#define BOTH(T, ...) [](T a, T b) { return __VA_ARGS__; }
    if (op == "mov" && plain) return each<uint64_t>([](uint64_t a) { return a; });
    if (op == "selp" && plain) return each<uint64_t, uint64_t, bool>([](uint64_t a, uint64_t b, bool p) { return p ? a : b; });
    if (real) {
        if (op == "add" && near) return of_floats<2>(BOTH(auto, a + b), type);
        if (op == "sub" && near) return of_floats<2>(BOTH(auto, a - b), type);
        if (op == "mul" && near) return of_floats<2>(BOTH(auto, a * b), type);
        if (op == "fma" && mods == "rn") return of_floats<3>([](auto a, auto b, auto c) { return std::fma(a, b, c); }, type);
        if (op == "div" && mods == "rn") return of_floats<2>(BOTH(auto, a / b), type);
        if (op == "sqrt" && mods == "rn") return of_floats<1>([](auto a) { return std::sqrt(a); }, type);
        if (op == "rcp" && mods == "rn") return of_floats<1>([](auto a) { return decltype(a)(1) / a; }, type);
        if (op == "min" && plain) return of_floats<2>(BOTH(auto, minimum(a, b)), type);
        if (op == "max" && plain) return of_floats<2>(BOTH(auto, maximum(a, b)), type);
        const uint64_t sign = type == "f32" ? 1ull << 31 : 1ull << 63;
        if (op == "neg" && plain)
            return sign >> 32 ? each<uint64_t>([](uint64_t a) { return a ^ 1ull << 63; })
                              : each<uint32_t>([](uint32_t a) { return a ^ 1u << 31; });
        if (op == "abs" && plain)
            return sign >> 32 ? each<uint64_t>([](uint64_t a) { return a & ~(1ull << 63); })
                              : each<uint32_t>([](uint32_t a) { return a & ~(1u << 31); });
        if (op == "copysign" && type == "f32") return each<uint32_t, uint32_t>(BOTH(uint32_t, (a & 1u << 31) | (b & ~(1u << 31))));
        return nullptr;
    }
    if (type == "bf16x2") {
        if (op == "fma" && mods == "rn")
            return each<uint32_t, uint32_t, uint32_t>(
                [](uint32_t a, uint32_t b, uint32_t c) { return fma_bf16(a, b, c) | fma_bf16(a >> 16, b >> 16, c >> 16) << 16; });
        if (op == "mul" && near)
            return each<uint32_t, uint32_t>(BOTH(uint32_t, fma_bf16(a, b, 0x8000) | fma_bf16(a >> 16, b >> 16, 0x8000) << 16));
        return nullptr;
    }
    if (type == "pred") {
        if (!plain) return nullptr;
        if (op == "and") return each<bool, bool>(BOTH(bool, a && b));
        if (op == "or") return each<bool, bool>(BOTH(bool, a || b));
        if (op == "xor") return each<bool, bool>(BOTH(bool, a != b));
        if (op == "not") return each<bool>([](bool a) { return !a; });
        return nullptr;
    }
    if (plain) {
        if (op == "add") return of_ints<2>(BOTH(auto, decltype(a)((uint64_t)a + (uint64_t)b)), type);
        if (op == "sub") return of_ints<2>(BOTH(auto, decltype(a)((uint64_t)a - (uint64_t)b)), type);
        if (op == "and") return of_ints<2>(BOTH(auto, decltype(a)(a & b)), type);
        if (op == "or") return of_ints<2>(BOTH(auto, decltype(a)(a | b)), type);
        if (op == "xor") return of_ints<2>(BOTH(auto, decltype(a)(a ^ b)), type);
        if (op == "min") return of_ints<2>(BOTH(auto, a < b ? a : b), type);
        if (op == "max") return of_ints<2>(BOTH(auto, a > b ? a : b), type);
        if (op == "not") return of_ints<1>([](auto a) { return decltype(a)(~a); }, type);
        if (op == "neg") return of_ints<1>([](auto a) { return decltype(a)(-(uint64_t)a); }, type);
        if (op == "abs") return of_ints<1>([](auto a) { return decltype(a)(a < 0 ? -(uint64_t)a : (uint64_t)a); }, type);
        // A divisor of zero has no defined result.
        if (op == "div") return of_ints<2>(BOTH(auto, b == 0 ? decltype(a)(-1) : decltype(a)((Wide<decltype(a)>)a / b)), type);
        if (op == "rem") return of_ints<2>(BOTH(auto, b == 0 ? decltype(a)(-1) : decltype(a)((Wide<decltype(a)>)a % b)), type);
        if (op == "shl") {
            if (width(type) == 2)
                return each<uint16_t, uint32_t>([](uint16_t a, uint32_t b) { return uint16_t(b > 15 ? 0 : a << b); });
            if (width(type) == 4) return each<uint32_t, uint32_t>([](uint32_t a, uint32_t b) { return b > 31 ? 0u : a << b; });
            return each<uint64_t, uint32_t>([](uint64_t a, uint32_t b) { return b > 63 ? 0ull : a << b; });
        }
        if (op == "shr") {
            // Further than the type is wide: zeros, or the sign.
            auto shift = [](auto a, uint32_t b) { return decltype(a)(b < sizeof(a) * 8 ? a >> b : a < 0 ? -1 : 0); };
            if (is<uint16_t>(type)) return each<uint16_t, uint32_t>(shift);
            if (is<int16_t>(type)) return each<int16_t, uint32_t>(shift);
            if (is<uint32_t>(type)) return each<uint32_t, uint32_t>(shift);
            if (is<int32_t>(type)) return each<int32_t, uint32_t>(shift);
            if (is<uint64_t>(type)) return each<uint64_t, uint32_t>(shift);
            if (is<int64_t>(type)) return each<int64_t, uint32_t>(shift);
        }
        if (op == "popc")
            return type == "b32" ? each<uint32_t>([](uint32_t a) { return std::popcount(a); })
                                 : each<uint64_t>([](uint64_t a) { return std::popcount(a); });
        if (op == "clz")
            return type == "b32" ? each<uint32_t>([](uint32_t a) { return std::countl_zero(a); })
                                 : each<uint64_t>([](uint64_t a) { return std::countl_zero(a); });
        if (op == "brev" && type == "b32")
            return each<uint32_t>([](uint32_t a) {
                uint32_t r = 0;
                for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i);
                return r;
            });
        auto field = [](auto a, uint32_t pos, uint32_t len) {
            constexpr uint32_t bits = sizeof(a) * 8;
            pos &= 255, len &= 255;
            using U = std::make_unsigned_t<decltype(a)>;
            const uint32_t last = std::min(pos + len - 1, bits - 1);
            const U sign = !std::is_signed_v<decltype(a)> || len == 0 ? 0 : ((U)a >> last & 1 ? ~U(0) : 0);
            if (len == 0) return decltype(a)(0);
            const U v = pos < bits ? (U)a >> pos : 0;
            const uint32_t have = pos < bits ? std::min(len, bits - pos) : 0;
            return decltype(a)(have >= bits ? v : (v & ((U(1) << have) - 1)) | (sign & ~((U(1) << have) - 1)));
        };
        if (op == "bfe") {
            if (type == "u32") return each<uint32_t, uint32_t, uint32_t>(field);
            if (type == "s32") return each<int32_t, uint32_t, uint32_t>(field);
            if (type == "u64") return each<uint64_t, uint32_t, uint32_t>(field);
            if (type == "s64") return each<int64_t, uint32_t, uint32_t>(field);
        }
        auto insert = [](auto a, auto b, uint32_t pos, uint32_t len) {
            pos &= 255, len &= 255;
            for (uint32_t i = 0; i < len && pos + i < sizeof(a) * 8; i++)
                b = (b & ~(decltype(b)(1) << (pos + i))) | (a >> i & 1) << (pos + i);
            return b;
        };
        if (op == "bfi" && type == "b32") return each<uint32_t, uint32_t, uint32_t, uint32_t>(insert);
        if (op == "bfi" && type == "b64") return each<uint64_t, uint64_t, uint32_t, uint32_t>(insert);
        if (op == "prmt" && type == "b32")
            return each<uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t selector) {
                const uint64_t bytes = (uint64_t)b << 32 | a;
                uint32_t d = 0;
                for (int i = 0; i < 4; i++) {
                    const uint32_t n = selector >> (4 * i) & 15, byte = (uint32_t)(bytes >> (n & 7) * 8) & 255;
                    d |= (n & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
                }
                return d;
            });
        if (op == "lop3" && type == "b32")
            return each<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
                uint32_t d = 0;
                for (int i = 0; i < 8; i++)
                    if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
                return d;
            });
        return nullptr;
    }
    if (mods == "lo") {
        if (op == "mul") return of_ints<2>(BOTH(auto, decltype(a)((uint64_t)a * (uint64_t)b)), type);
        if (op == "mad")
            return of_ints<3>([](auto a, auto b, auto c) { return decltype(a)((uint64_t)a * (uint64_t)b + (uint64_t)c); }, type);
    }
    if (mods == "hi") {
        if (op == "mul") return of_ints<2>(BOTH(auto, decltype(a)((Wide<decltype(a)>)a * b >> 8 * sizeof(a))), type);
        if (op == "mad")
            return of_ints<3>(
                [](auto a, auto b, auto c) {
                    return decltype(a)(decltype(a)((Wide<decltype(a)>)a * b >> 8 * sizeof(a)) + (uint64_t)c);
                },
                type);
    }
    if (mods == "wide") {
        if (op == "mul") {
            if (type == "u16") return each<uint16_t, uint16_t>(BOTH(uint32_t, a * b));
            if (type == "s16") return each<int16_t, int16_t>(BOTH(int32_t, a * b));
            if (type == "u32") return each<uint32_t, uint32_t>(BOTH(uint64_t, a * b));
            if (type == "s32") return each<int32_t, int32_t>(BOTH(int64_t, a * b));
        }
        if (op == "mad") {
            if (type == "u32")
                return each<uint32_t, uint32_t, uint64_t>([](uint64_t a, uint64_t b, uint64_t c) { return a * b + c; });
            if (type == "s32")
                return each<int32_t, int32_t, int64_t>(
                    [](int64_t a, int64_t b, int64_t c) { return (int64_t)((uint64_t)(a * b) + (uint64_t)c); });
            if (type == "u16")
                return each<uint16_t, uint16_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t c) { return a * b + c; });
            if (type == "s16")
                return each<int16_t, int16_t, uint32_t>(
                    [](int32_t a, int32_t b, uint32_t c) { return (int32_t)((uint32_t)(a * b) + c); });
        }
    }
    if (op == "shf" && type == "b32") {
        if (mods == "l.wrap")
            return each<uint32_t, uint32_t, uint32_t>(
                [](uint32_t a, uint32_t b, uint32_t c) { return (uint32_t)(((uint64_t)b << 32 | a) << (c & 31) >> 32); });
        if (mods == "r.wrap")
            return each<uint32_t, uint32_t, uint32_t>(
                [](uint32_t a, uint32_t b, uint32_t c) { return (uint32_t)(((uint64_t)b << 32 | a) >> (c & 31)); });
        if (mods == "l.clamp")
            return each<uint32_t, uint32_t, uint32_t>(
                [](uint32_t a, uint32_t b, uint32_t c) { return (uint32_t)(((uint64_t)b << 32 | a) << std::min(c, 32u) >> 32); });
        if (mods == "r.clamp")
            return each<uint32_t, uint32_t, uint32_t>(
                [](uint32_t a, uint32_t b, uint32_t c) { return (uint32_t)(((uint64_t)b << 32 | a) >> std::min(c, 32u)); });
    }
#undef BOTH
    return nullptr;
}

static void pack(const Instruction& i, Warp& w, uint32_t on) {
    LANES(on) {
        uint64_t v = 0;
        for (int e = 0; e < i.count; e++) v |= (w.slot(i.s[e])[lane] & (~0ull >> (64 - 8 * i.bytes))) << (8 * i.bytes * e);
        w.slot(i.d[0])[lane] = v;
    }
}
static void unpack(const Instruction& i, Warp& w, uint32_t on) {
    LANES(on) {
        const uint64_t v = w.slot(i.s[0])[lane];
        for (int e = 0; e < i.count; e++) w.slot(i.d[e])[lane] = v >> (8 * i.bytes * e) & (~0ull >> (64 - 8 * i.bytes));
    }
}
static void nothing(const Instruction&, Warp&, uint32_t) {}

struct Module {
    std::map<string, Kernel> kernels;
    std::map<string, Variable> globals, shared;
    string dynamic;
};
static void add_variable(std::map<string, Variable>& all, size_t& bytes, const string& name, size_t size) {
    // 256 bytes apart: an access that leaves one does not end in its neighbour.
    all[name] = {bytes, size};
    bytes = (bytes + size + 511) / 256 * 256;
}

class Parser {
    struct Operand {
        std::vector<int> slots;
        bool address = false, vector = false, negated = false;
        int64_t offset = 0;
    };
    Module& module;
    string text;
    size_t at = 0;
    Kernel* kernel = nullptr;
    std::vector<std::map<string, int>> scopes;
    std::map<string, int> labels;
    std::vector<std::pair<int, string>> jumps;
    std::map<uint64_t, int> constants;
    std::map<string, int> specials;

    static bool in_word(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.' || c == ':'; }
    void space() { while (at < text.size() && isspace((unsigned char)text[at])) at++; }
    string until(char end) {
        const size_t from = at;
        while (at < text.size() && text[at] != end) at++;
        if (at == text.size()) throw Error{string("no ") + end};
        return strip(text.substr(from, at++ - from));
    }
    string word() {
        space();
        const size_t from = at;
        while (at < text.size() && in_word(text[at])) at++;
        return text.substr(from, at - from);
    }
    // ".align 4 .b8 name[16]": its name, all its bytes, those of an element.
    struct Declared { string name; size_t size; int unit; };
    static Declared declared(const string& s) {
        std::istringstream in(s);
        string w, type, name;
        while (in >> w) {
            if (w == ".align") in >> w;
            else if (w == ".ptr" || w == ".param" || w == ".shared" || w == ".global" || w == ".local" || w == ".const") continue;
            else if (w[0] == '.') type = w.substr(1);
            else { name = w; break; }
        }
        const size_t bracket = name.find('[');
        const size_t count = bracket == string::npos ? 1 : strtoul(name.c_str() + bracket + 1, nullptr, 10);
        if (name.find("][") != string::npos) throw Error{"array " + name};
        return {name.substr(0, bracket), count * width(type), width(type)};
    }
    int new_slot() { return kernel->slots++; }
    int constant(uint64_t v) {
        auto [found, fresh] = constants.try_emplace(v, 0);
        if (fresh) found->second = new_slot(), kernel->constants.push_back({found->second, v});
        return found->second;
    }
    bool symbol(const string& name, uint64_t& v) const {
        for (auto* m : {&kernel->params, &kernel->shared, &kernel->local, &module.globals}) {
            auto found = m->find(name);
            if (found != m->end()) { v = found->second.at; return true; }
        }
        return false;
    }
    int slot(const string& name) {
        if (name == "_") return new_slot();
        uint64_t v;
        if (symbol(name, v)) return constant(v);
        if (name == "WARP_SZ") return constant(32);
        static const std::set<string> known{"%tid.x",   "%tid.y",   "%tid.z",    "%ntid.x",   "%ntid.y",   "%ntid.z", "%ctaid.x",
                                            "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid"};
        if (known.count(name)) {
            auto [found, fresh] = specials.try_emplace(name, 0);
            if (fresh) found->second = new_slot(), kernel->specials.push_back({found->second, name});
            return found->second;
        }
        for (size_t i = scopes.size(); i-- > 0;) {
            auto found = scopes[i].find(name);
            if (found != scopes[i].end()) return found->second;
        }
        if (isdigit((unsigned char)name[0]) || name[0] == '-') {
            if (name.substr(0, 2) == "0f" || name.substr(0, 2) == "0F") return constant(strtoull(name.c_str() + 2, nullptr, 16));
            if (name.substr(0, 2) == "0d" || name.substr(0, 2) == "0D") return constant(strtoull(name.c_str() + 2, nullptr, 16));
            char* end;
            const uint64_t v = name[0] == '-' ? (uint64_t)-strtoll(name.c_str() + 1, &end, 0) : strtoull(name.c_str(), &end, 0);
            if (*end == 'U') end++;
            if (!*end) return constant(v);
        }
        throw Error{"operand " + name};
    }
    Operand operand(string s) {
        Operand o;
        s = strip(s);
        if (s.empty()) throw Error{"an operand is missing"};
        if (s[0] == '!') o.negated = true, s = strip(s.substr(1));
        if (s[0] == '[') {
            o.address = true;
            s = strip(s.substr(1, s.size() - 2));
            const size_t plus = s.find('+');
            if (plus != string::npos) o.offset = strtoll(s.c_str() + plus + 1, nullptr, 0), s = strip(s.substr(0, plus));
            o.slots.push_back(slot(s));
        } else if (s[0] == '{') {
            o.vector = true;
            for (auto& part : split(s.substr(1, s.size() - 2), ',')) o.slots.push_back(slot(strip(part)));
        } else if (s.find('|') != string::npos) {
            for (auto& part : split(s, '|')) o.slots.push_back(slot(strip(part)));
        } else {
            o.slots.push_back(slot(s));
        }
        return o;
    }

    void registers(const string& s) {  // ".b32 %r<10>" or ".b16 a, b"
        const string names = strip(s.substr(s.find_first_of(" \t")));
        for (auto& part : split(names, ',')) {
            const string name = strip(part);
            const size_t range = name.find('<');
            if (range == string::npos) { scopes.back()[name] = new_slot(); continue; }
            const int count = atoi(name.c_str() + range + 1);
            for (int i = 0; i < count; i++) scopes.back()[name.substr(0, range) + std::to_string(i)] = new_slot();
        }
    }

    void instruction(string s) {
        Instruction i;
        const string whole = s;
        if (s[0] == '@') {
            const size_t end = s.find_first_of(" \t\n");
            string p = s.substr(1, end - 1);
            if (p[0] == '!') i.negated = true, p = p.substr(1);
            i.guard = slot(p);
            s = strip(s.substr(end));
        }
        const size_t end = std::min(s.find_first_of(" \t\n"), s.size());
        const string opcode = s.substr(0, end);
        // Operands, commas within braces and brackets apart.
        std::vector<string> words;
        int depth = 0;
        for (char c : s.substr(end)) {
            if (c == '{' || c == '[') depth++;
            if (c == '}' || c == ']') depth--;
            if (words.empty() && !isspace((unsigned char)c)) words.emplace_back();
            if (c == ',' && depth == 0) words.emplace_back();
            else if (!words.empty()) words.back() += c;
        }
        std::vector<string> parts = split(opcode, '.');
        decode(i, parts, words);
        kernel->code.push_back(i);
        kernel->text.push_back(whole);
    }
    static void outputs(Instruction& i, const Operand& o) {
        if (o.slots.size() > 4) throw Error{"too many outputs"};
        std::copy(o.slots.begin(), o.slots.end(), i.d);
        i.count = (int)o.slots.size();
    }
    static void input(Instruction& i, const Operand& o) {
        if (i.inputs + o.slots.size() > 12) throw Error{"too many inputs"};
        if (o.negated) i.flip |= 1u << i.inputs;
        for (int s : o.slots) i.s[i.inputs++] = s;
    }
    static int number(const string& s) {
        char* end;
        const string v = strip(s);
        const long n = strtol(v.c_str(), &end, 0);
        if (v.empty() || *end) throw Error{"number " + v};
        return (int)n;
    }
    static bool cache_hint(const string& m) {
        static const std::set<string> hints{"ca", "cg", "cs", "lu", "wb", "wt"};
        return hints.count(m) || m.substr(0, 4) == "L1::" || m.substr(0, 4) == "L2::";
    }
    // tcgen05, mbarriers and the fences around them.
    void tensor(Instruction& i, const std::vector<string>& parts, const std::vector<string>& words) {
        string name;
        for (auto& part : parts) name += (name.empty() ? "" : ".") + part;
        // Operands, of which those with 'a' are addresses; whether all lanes take part; what runs, and its mode.
        struct Known { string operands; bool collective; Handler run; int mode; };
        static const std::map<string, Known> all{
            {"tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32", {"ar", true, tensor_alloc, 0}},
            {"tcgen05.dealloc.cta_group::1.sync.aligned.b32", {"rr", true, tensor_free, 0}},
            {"tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned", {"", true, tensor_relinquish, 0}},
            {"tcgen05.ld.sync.aligned.32x32b.x8.b32", {"8a", true, tensor_load, 0}},
            {"tcgen05.ld.sync.aligned.32x32b.x32.b32", {"3a", true, tensor_load, 0}},
            {"tcgen05.wait::ld.sync.aligned", {"", true, tensor_wait, 0}},
            {"tcgen05.fence::before_thread_sync", {"", false, tensor_fence, 0}},
            {"tcgen05.fence::after_thread_sync", {"", false, tensor_fence, 1}},
            {"tcgen05.cp.cta_group::1.32x128b.warpx4", {"ar", false, tensor_copy, 0}},
            {"tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16", {"arrraar", false, tensor_mma, 4}},
            {"tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32", {"arrraar", false, tensor_mma, 2}},
            {"tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64", {"a", false, tensor_commit, 0}},
            {"mbarrier.init.shared::cta.b64", {"ar", false, mbarrier_make, 0}},
            {"mbarrier.try_wait.parity.shared::cta.b64", {"oarr", false, mbarrier_ask, 0}},
            {"fence.mbarrier_init.release.cluster", {"", false, mbarrier_fence, 0}},
            {"fence.proxy.async.shared::cta", {"", false, proxy_fence, 0}}};
        const auto known = all.find(name);
        if (known == all.end() || known->second.operands.size() != words.size()) throw Error{"not known"};
        for (size_t n = 0; n < words.size(); n++) {
            const Operand o = operand(words[n]);
            const char kind = known->second.operands[n];
            if (kind == '8' || kind == '3') {
                if (o.slots.size() != (kind == '8' ? 8 : 32)) throw Error{"another number of registers"};
                i.wide = std::make_shared<std::vector<int>>(o.slots);
                continue;
            }
            if (o.address != (kind == 'a') || o.slots.size() != 1 || o.offset || o.negated) throw Error{"operand " + words[n]};
            if (kind == 'o') outputs(i, o);
            else input(i, o);
        }
        if (known->second.collective) i.kind = Kind::Collective;
        i.run = known->second.run, i.mode = known->second.mode, i.space = Space::Shared;
    }
    void decode(Instruction& i, std::vector<string>& parts, const std::vector<string>& words) {
        const string op = parts[0], type = parts.back();
        std::vector<string> mods(parts.begin() + 1, parts.size() > 1 ? parts.end() - 1 : parts.end());
        string between;
        for (auto& m : mods) between += (between.empty() ? "" : ".") + m;
        auto all = [&] { std::vector<Operand> o; for (auto& w : words) o.push_back(operand(w)); return o; };
        auto need = [&](bool good) { if (!good) throw Error{"not known"}; };

        if (op == "bra") {
            need(parts.size() == 1 || (parts.size() == 2 && type == "uni"));
            i.kind = Kind::Branch;
            jumps.push_back({(int)kernel->code.size(), words.at(0)});
            return;
        }
        if (op == "ret" || op == "exit") { need(parts.size() == 1 || type == "uni"); i.kind = Kind::Exit; return; }
        if (op == "bar" || op == "barrier") {
            const string rest = between.empty() ? type : between + "." + type;
            if (rest == "warp.sync") {
                i.kind = Kind::Collective, i.run = warp_barrier, i.members = operand(words.at(0)).slots[0];
                return;
            }
            need((rest == "sync" || rest == "cta.sync" || rest == "sync.aligned" || rest == "cta.sync.aligned") &&
                 words.size() == 1 && strip(words[0]) == "0");
            i.kind = Kind::Barrier;
            return;
        }
        if (op == "ld" || op == "ldu" || op == "st") {
            need(op != "ldu");
            for (auto& m : mods) {
                if (m == "global" || m == "const") i.space = Space::Global;
                else if (m == "shared" || m == "shared::cta") i.space = Space::Shared;
                else if (m == "local") i.space = Space::Local;
                else if (m == "param") i.space = Space::Param;
                else if (m == "nc" && op == "ld") i.constant = true;
                else if (m == "v2") i.count = 2;
                else if (m == "v4") i.count = 4;
                else need(cache_hint(m));
            }
            need(op == "ld" || i.space != Space::Param);
            const auto o = all();
            need(o.size() == 2);
            const Operand &address = o[op == "ld"], &value = o[op == "st"];
            need(address.address && value.slots.size() == (size_t)i.count);
            i.bytes = width(type), i.is_signed = type[0] == 's', i.offset = address.offset;
            input(i, address);
            if (op == "ld") outputs(i, value);
            else input(i, value);
            i.run = op == "ld" ? load : store;
            return;
        }
        if (op == "cp") {
            need(parts.size() > 2 && parts[1] == "async");
            const std::vector<string> rest(parts.begin() + 2, parts.end());
            if (rest == std::vector<string>{"commit_group"}) { i.run = copy_commit; return; }
            if (rest == std::vector<string>{"wait_all"}) { i.run = copy_wait, i.mode = -1; return; }
            if (rest == std::vector<string>{"wait_group"}) { i.run = copy_wait, i.mode = number(words.at(0)); return; }
            need((rest[0] == "ca" || rest[0] == "cg") && rest.size() >= 3 && (rest[1] == "shared" || rest[1] == "shared::cta") &&
                 rest[2] == "global");
            for (size_t m = 3; m < rest.size(); m++) need(cache_hint(rest[m]));
            const auto o = all();
            need(o.size() == 3 || o.size() == 4);
            need(o[0].address && o[1].address);
            i.bytes = number(words[2]);
            need(i.bytes == 16 || (rest[0] == "ca" && (i.bytes == 4 || i.bytes == 8)));
            input(i, o[0]), input(i, o[1]);
            i.offset = o[0].offset, i.offset2 = o[1].offset;
            if (o.size() == 4) input(i, o[3]);
            i.run = copy_async;
            return;
        }
        if (op == "ldmatrix") {
            need(mods.size() >= 4 && mods[0] == "sync" && mods[1] == "aligned" && mods[2] == "m8n8" && type == "b16");
            size_t m = 4;
            i.transposed = mods[m] == "trans";
            if (i.transposed) m++;
            need(m + 1 == mods.size() && (mods[m] == "shared" || mods[m] == "shared::cta"));
            const auto o = all();
            need(o.size() == 2 && o[1].address);
            outputs(i, o[0]), input(i, o[1]), i.offset = o[1].offset;
            need(mods[3] == "x" + std::to_string(i.count));
            i.kind = Kind::Collective, i.run = ldmatrix;
            return;
        }
        if (op == "tcgen05" || op == "mbarrier" || op == "fence") { tensor(i, parts, words); return; }
        if (op == "mma" && (type == "ue4m3" || type == "ue8m0")) {
            // Scales of a row in the instruction.
            static const std::map<string, int> kinds{
                {"ue4m3:sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32", 4},
                {"ue8m0:sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32", 2},
                {"ue8m0:sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32", 1}};
            auto kind = kinds.find(type + ":" + between);
            need(kind != kinds.end() && words.size() == 8);
            i.mode = kind->second;
            for (int n : {0, 1, 2, 3, 4, 6}) {
                const Operand o = operand(words[n]);
                need((int)o.slots.size() == (n == 2 ? 2 : n < 4 ? 4 : 1));
                if (n == 0) outputs(i, o);
                else input(i, o);
            }
            auto selector = [&](const string& s, int threads) {
                const string v = strip(s);
                need(v.size() > 2 && v[0] == '{' && v.back() == '}');
                const auto two = split(v.substr(1, v.size() - 2), ',');
                need(two.size() == 2);
                const int byte = number(two[0]), thread = number(two[1]);
                need(byte >= 0 && byte < 4 && byte % i.mode == 0 && thread >= 0 && thread < threads);
                return byte | thread << 8;
            };
            i.bytes = selector(words[5], 2) | selector(words[7], 4) << 16;
            i.kind = Kind::Collective, i.run = i.mode == 1 ? mma_16832 : mma_16864;
            return;
        }
        if (op == "mma") {
            need(between == "sync.aligned.m16n8k16.row.col.f32.bf16.bf16" && type == "f32");
            const auto o = all();
            need(o.size() == 4 && o[0].slots.size() == 4 && o[1].slots.size() == 4 && o[2].slots.size() == 2 &&
                 o[3].slots.size() == 4);
            outputs(i, o[0]), input(i, o[1]), input(i, o[2]), input(i, o[3]);
            i.kind = Kind::Collective, i.run = mma_16816;
            return;
        }
        if (op == "shfl") {
            need(mods.size() == 2 && mods[0] == "sync" && type == "b32");
            static const std::map<string, int> modes{{"bfly", BFLY}, {"idx", IDX}, {"up", UP}, {"down", DOWN}};
            need(modes.count(mods[1]));
            const auto o = all();
            need(o.size() == 5);
            outputs(i, o[0]);
            for (int n = 1; n < 5; n++) input(i, o[n]);
            i.mode = modes.at(mods[1]), i.members = i.s[3], i.kind = Kind::Collective, i.run = shuffle;
            return;
        }
        if (op == "vote") {
            need(mods.size() == 2 && mods[0] == "sync");
            static const std::map<string, int> modes{{"ballot", BALLOT}, {"all", ALL}, {"any", ANY}};
            need(modes.count(mods[1]) && type == (mods[1] == "ballot" ? "b32" : "pred"));
            const auto o = all();
            need(o.size() == 3);
            outputs(i, o[0]), input(i, o[1]), input(i, o[2]);
            i.mode = modes.at(mods[1]), i.members = i.s[1], i.kind = Kind::Collective, i.run = vote;
            return;
        }
        if (op == "setp") {
            need(mods.size() == 1 || mods.size() == 2);
            const auto o = all();
            const size_t how = mods.size() == 2 ? std::find(BOOLEANS.begin(), BOOLEANS.end(), mods[1]) - BOOLEANS.begin() : 0;
            need(how < 4 && o.size() == (how ? 4 : 3));
            outputs(i, o[0]);
            for (size_t n = 1; n < o.size(); n++) input(i, o[n]);
            i.mode = (int)(std::find(COMPARISONS.begin(), COMPARISONS.end(), mods[0]) - COMPARISONS.begin()) * 4 + (int)how;
            auto with = [&]<class T>(T) { if (!i.run) i.run = comparing<T>(type, mods[0]); };
            with(uint16_t()), with(int16_t()), with(uint32_t()), with(int32_t()), with(uint64_t()), with(int64_t()), with(float()),
                with(double());
            need(i.run);
            return;
        }
        if (op == "cvt") {
            need(mods.size() >= 1 && mods.size() <= 2);
            const auto o = all();
            i.run = conversion(mods.back(), type, mods.size() == 2 ? mods[0] : "");
            need(i.run && o.size() == (mods.back() == "bf16x2" ? 3 : 2));
            outputs(i, o[0]);
            for (size_t n = 1; n < o.size(); n++) input(i, o[n]);
            return;
        }
        if (op == "cvta") {
            const auto o = all();
            need(o.size() == 2 && type == "u64" && mods.size() >= 1 && mods.size() <= 2);
            const string& space = mods.back();
            const uint64_t window = space == "shared" ? SHARED_WINDOW : space == "local" ? LOCAL_WINDOW : 0;
            need(window || space == "global" || space == "const" || space == "param");
            outputs(i, o[0]), input(i, o[1]);
            i.s[1] = constant(mods[0] == "to" ? -window : window);
            i.run = each<uint64_t, uint64_t>([](uint64_t a, uint64_t b) { return a + b; });
            return;
        }
        const auto o = all();
        need(o.size() >= 2);
        if (op == "mov" && between.empty() && (o[0].vector || o[1].vector)) {
            need(o[0].vector != o[1].vector && o.size() == 2);
            const int count = (int)std::max(o[0].slots.size(), o[1].slots.size());
            i.bytes = width(type) / count;
            need(i.bytes * count == width(type));
            outputs(i, o[0]), input(i, o[1]);
            i.count = count, i.run = o[0].vector ? unpack : pack;
            return;
        }
        outputs(i, o[0]);
        need(i.count == 1);
        for (size_t n = 1; n < o.size(); n++) need(!o[n].address && !o[n].vector), input(i, o[n]);
        need(i.flip == 0);
        i.run = arithmetic(op, between, type);
        static const std::map<string, int> inputs{{"mov", 1},  {"not", 1},  {"neg", 1},  {"abs", 1},  {"popc", 1}, {"clz", 1},
                                                  {"brev", 1}, {"sqrt", 1}, {"rcp", 1},  {"fma", 3},  {"mad", 3},  {"shf", 3},
                                                  {"bfe", 3},  {"bfi", 4},  {"selp", 3}, {"prmt", 3}, {"lop3", 4}};
        auto expected = inputs.find(op);
        need(i.run && i.inputs == (expected == inputs.end() ? 2 : expected->second));
    }

    void body() {
        int depth = 1;
        scopes.assign(1, {});
        labels.clear(), jumps.clear(), constants.clear(), specials.clear();
        while (depth) {
            space();
            if (at >= text.size()) throw Error{"no end"};
            const char c = text[at];
            if (c == '{') { depth++, at++, scopes.emplace_back(); continue; }
            if (c == '}') { depth--, at++, scopes.pop_back(); continue; }
            const size_t from = at;
            const string w = word();
            if (!w.empty() && w.back() == ':') { labels[w.substr(0, w.size() - 1)] = (int)kernel->code.size(); continue; }
            at = from;
            const string s = until(';');
            if (s.empty()) continue;
            if (s[0] != '.') {
                try { instruction(s); } catch (Error& e) { throw Error{e.what + ": " + s}; }
                continue;
            }
            if (s.substr(0, 5) == ".reg ") registers(s.substr(5));
            else if (s.substr(0, 8) == ".shared ") {
                auto [name, size, unit] = declared(s);
                add_variable(kernel->shared, kernel->shared_bytes, name, size);
            } else if (s.substr(0, 7) == ".local ") {
                auto [name, size, unit] = declared(s);
                add_variable(kernel->local, kernel->local_bytes, name, size);
            } else if (s.substr(0, 7) != ".pragma") throw Error{"directive " + s};
        }
        kernel->code.push_back(Instruction{.kind = Kind::Exit});
        kernel->text.push_back("}");
        for (auto& [i, name] : jumps) {
            auto found = labels.find(name);
            if (found == labels.end()) throw Error{"label " + name};
            kernel->code[i].target = found->second;
        }
    }
    void entry() {
        const string name = word();
        Kernel& k = module.kernels[name];
        kernel = &k, k.name = name;
        // What the launch gives stands before the rest, with as much room as there may be; only in kernels that name it.
        const size_t end = std::min(text.find(".entry", at), text.size());
        for (auto& [n, v] : module.shared) {
            if (n != module.dynamic) add_variable(k.shared, k.shared_bytes, n, v.size);
            else if (text.substr(at, end - at).find(n) != string::npos) add_variable(k.shared, k.shared_bytes, n, MOST_DYNAMIC), k.dynamic = n;
        }
        space();
        if (text[at] == '(') {
            at++;
            for (auto& p : split(until(')'), ',')) {
                if (strip(p).empty()) continue;
                auto [n, size, unit] = declared(strip(p));
                const size_t aligned = size > 8 ? 16 : size;
                k.param_bytes = (k.param_bytes + aligned - 1) / aligned * aligned;
                k.params[n] = {k.param_bytes, size}, k.param_order.push_back(n);
                k.param_bytes += size;
            }
        }
        const string directives = until('{');
        std::istringstream in(directives);
        string w;
        while (in >> w) if (w == ".maxntid" || w == ".reqntid") in >> k.threads;
        body();
    }
    void global(const string& s) {  // ".align 4 .b8 name[8] = {1, 2}"
        const size_t equals = s.find('=');
        auto [name, size, unit] = declared(s.substr(0, equals));
        char* p = (char*)standin::allocate(std::max<size_t>(size, 1), true);
        module.globals[name] = {(uint64_t)p, size};
        if (equals == string::npos) return;
        size_t to = 0;
        for (auto& part : split(s.substr(equals + 1), ',')) {
            string v = strip(part);
            v.erase(std::remove_if(v.begin(), v.end(), [](char c) { return c == '{' || c == '}' || isspace((unsigned char)c); }),
                    v.end());
            const bool real = v.substr(0, 2) == "0f" || v.substr(0, 2) == "0d";
            char* end;
            const uint64_t value = real ? strtoull(v.c_str() + 2, &end, 16) : (uint64_t)strtoll(v.c_str(), &end, 0);
            if (*end || v.empty() || to + unit > size) throw Error{"value of " + name};
            memcpy(p + to, &value, unit), to += unit;
        }
    }

public:
    Parser(Module& m, const string& source) : module(m) {
        for (size_t i = 0; i < source.size(); i++) {
            if (source.compare(i, 2, "//") == 0) while (i < source.size() && source[i] != '\n') i++;
            if (source.compare(i, 2, "/*") == 0) i = source.find("*/", i) + 2;
            if (i < source.size()) text += source[i];
        }
    }
    void parse() {
        bool external = false;
        for (;;) {
            space();
            if (at >= text.size()) return;
            const size_t from = at;
            const string w = word();
            if (w == ".version" || w == ".target" || w == ".address_size") while (at < text.size() && text[at] != '\n') at++;
            else if (w == ".visible" || w == ".weak") continue;
            else if (w == ".extern") external = true;
            else if (w == ".entry") entry();
            else if (w == ".global" || w == ".const") global(until(';'));
            else if (w == ".shared") {
                auto [name, size, unit] = declared(until(';'));
                module.shared[name] = {0, size};
                if (external) module.dynamic = name;
                external = false;
            } else throw Error{"directive " + (w.empty() ? text.substr(from, 20) : w)};
        }
    }
};

// --- execution ---

// Registers that are still being loaded are for nobody.
void Warp::check_loading(const Instruction& i) const {
    bool touched = loading.count(i.guard);
    for (int n = 0; n < i.inputs; n++) touched |= loading.count(i.s[n]) > 0;
    for (int n = 0; i.run && !i.wide && n < i.count; n++) touched |= loading.count(i.d[n]) > 0;
    if (touched) fault("a register is touched that tcgen05.ld fills, without tcgen05.wait::ld");
}

void Warp::run() {
    const std::vector<Instruction>& code = kernel->code;
    long count = 0;
    for (;;) {
        const uint32_t ready = live & ~waiting & ~barrier;
        if (!ready) break;
        int here = INT32_MAX, next = INT32_MAX;
        LANES(ready) here = std::min(here, pc[lane]);
        uint32_t mask = 0;
        LANES(ready) {
            if (pc[lane] == here) mask |= 1u << lane;
            else next = std::min(next, pc[lane]);
        }
        auto put_back = [&](uint32_t some, int to) { LANES(some) pc[lane] = to; };
        while (mask) {
            if (here >= next) { put_back(mask, here); break; }
            const Instruction& i = code[here];
            at = here;
            if (++count > ENDLESS) fault("no end");
            uint32_t on = mask;
            if (i.guard >= 0) {
                const uint64_t* p = slot(i.guard);
                on = 0;
                LANES(mask) on |= (uint32_t)((p[lane] ^ (uint64_t)i.negated) & 1) << lane;
            }
            if (!loading.empty()) check_loading(i);
            if (i.kind == Kind::Plain) {
                if (on) i.run(i, *this, on);
                here++;
                if (yields) return put_back(mask, here);
            } else if (on == 0) {
                here++;
            } else if (i.kind == Kind::Branch) {
                if (on == mask) { here = i.target; if (here <= at || here >= next) { put_back(mask, here); break; } continue; }
                put_back(on, i.target), put_back(mask & ~on, here + 1);
                break;
            } else if (i.kind == Kind::Exit) {
                LANES(on)
                if (!copies[lane].empty()) as_thread(*this, lane), fault("left while copies of its own were on their way");
                live &= ~on, mask &= ~on, here++;
            } else if (i.kind == Kind::Barrier) {
                put_back(on, here + 1), barrier |= on, mask &= ~on, here++;
            } else {
                put_back(on, here), waiting |= on;
                uint32_t arrived = 0;
                LANES(waiting) if (pc[lane] == here) arrived |= 1u << lane;
                uint32_t members = ~0u;
                LANES(on) {
                    members = i.members < 0 ? ~0u : (uint32_t)slot(i.members)[lane];
                    as_thread(*this, lane);
                    if (!(members >> lane & 1)) fault("a lane takes part that is not named");
                }
                mask &= ~on;
                if ((arrived & members) == members) {
                    i.run(i, *this, members);
                    waiting &= ~members;
                    put_back(members, here + 1);
                    // The usual case: all lanes go on.
                    if (mask == 0 && members == on && here + 1 < next) { mask = on, here++; continue; }
                    put_back(mask, here + 1);
                    break;
                }
                put_back(mask, here + 1);
                break;
            }
        }
    }
    if (waiting) {
        int lane = std::countr_zero(waiting);
        as_thread(*this, lane), at = pc[lane];
        fault("lanes " + std::to_string(std::popcount(waiting)) + " of 32 wait for ever for the others of their warp");
    }
}

inline Module MODULE;

// Reads a file of PTX; what is wrong with it, or nothing.
static string load_module(const string& path) {
    std::ifstream in(path);
    if (!in) return "cannot read " + path;
    std::ostringstream text;
    text << in.rdbuf();
    Parser parser(MODULE, text.str());
    try { parser.parse(); } catch (const Error& e) { return path + ": " + e.what; }
    return "";
}

// As standin::launch: runs a kernel over a grid, with `dynamic` bytes of shared memory beside what it declares.
static string launch(const string& name, int gx, int gy, int gz, int threads, void** args, size_t dynamic = 0) {
    auto found = MODULE.kernels.find(name);
    if (found == MODULE.kernels.end()) return name + ": not in the PTX";
    const Kernel& k = found->second;
    if (k.threads && k.threads != threads)
        return name + ": launched with " + std::to_string(threads) + " threads, made for " + std::to_string(k.threads);
    if (threads % 32) return name + ": a warp is not full";
    std::vector<uint8_t> params(k.param_bytes);
    for (size_t i = 0; i < k.param_order.size(); i++) {
        const Variable& p = k.params.at(k.param_order[i]);
        memcpy(params.data() + p.at, args[i], p.size);
    }
    standin::Block block;
    block.launch = ++standin::LAUNCHES, block.gx = gx, block.gy = gy, block.gz = gz;
    block.fibers.resize(threads);
    SharedArea shared;
    for (auto& [n, v] : k.shared) shared.variables.push_back({v.at, n == k.dynamic ? dynamic : v.size});
    const size_t shared_bytes = k.shared_bytes;
    if (k.dynamic.empty() ? dynamic > 0 : dynamic > MOST_DYNAMIC) return name + ": launched with shared memory that it has no use for";
    static std::vector<Warp> warps;  // with their slots, they outlive launches
    warps.resize(threads / 32);
    for (auto& w : warps) w.slots.assign((size_t)k.slots * 32, 0xcbcbcbcbcbcbcbcbull);
    standin::B = &block;
    const Warp* running = nullptr;
    string result;
    try {
        for (int z = 0; z < gz; z++) for (int y = 0; y < gy; y++) for (int x = 0; x < gx; x++) {
            block.x = x, block.y = y, block.z = z, block.index = (z * gy + y) * gx + x;
            const std::map<string, uint64_t> special{
                {"%tid.y", 0}, {"%tid.z", 0}, {"%ntid.x", threads}, {"%ntid.y", 1}, {"%ntid.z", 1}, {"%ctaid.x", x},
                {"%ctaid.y", y}, {"%ctaid.z", z}, {"%nctaid.x", gx}, {"%nctaid.y", gy}, {"%nctaid.z", gz}};
            shared.bytes.assign(shared_bytes, 0xcb), shared.in_flight.assign(shared_bytes, 0);
            shared.shadow = std::make_unique<standin::Shadow>(shared_bytes, true, false);
            for (auto& f : block.fibers) f.block_epoch = f.warp_epoch = 0;
            block.knows.assign(threads, standin::Knows()), block.tensor.clear();
            for (size_t n = 0; n < warps.size(); n++) {
                Warp& w = warps[n];
                w.kernel = &k, w.shared = &shared, w.params = &params, w.index = (int)n;
                w.live = ~0u, w.waiting = w.barrier = 0;
                std::fill(w.pc, w.pc + 32, 0), std::fill(w.groups, w.groups + 32, 0);
                for (auto& c : w.copies) c.clear();
                w.loading.clear(), w.yields = false;
                w.local.assign(k.local_bytes * 32, 0xcb), w.local_written.assign(k.local_bytes * 32, 0);
                for (auto& [s, v] : k.constants) std::fill(w.slot(s), w.slot(s) + 32, v);
                for (auto& [s, what] : k.specials)
                    for (int lane = 0; lane < 32; lane++)
                        w.slot(s)[lane] = what == "%tid.x" ? n * 32 + lane : what == "%laneid" ? (uint64_t)lane : special.at(what);
            }
            for (;;) {
                bool again = false;
                for (auto& w : warps) running = &w, w.yields = false, w.run(), again |= w.yields;
                if (again) continue;
                int at_barrier = 0, left = 0;
                std::set<int> sites;
                for (auto& w : warps) {
                    at_barrier += std::popcount(w.barrier), left += 32 - std::popcount(w.live);
                    LANES(w.barrier) sites.insert(w.pc[lane]);
                }
                if (left == threads) break;
                if (at_barrier < threads || sites.size() > 1) {
                    running = nullptr;
                    block.current = 0;
                    fault(std::to_string(at_barrier) + " of " + std::to_string(threads) + " threads wait for ever at a barrier" +
                          (sites.size() > 1 ? "s of different places" : ""));
                }
                for (auto& w : warps) w.barrier = 0;
                for (int t = 0; t < threads; t++) standin::reach_barrier(t);
                for (int t = 0; t < threads; t++) block.fibers[t].block_epoch++, standin::leave_barrier(t);
            }
            running = nullptr;
            const string left = standin::left_behind();
            if (!left.empty()) fault(left);
        }
    } catch (const standin::Fault& f) {
        result = name + ": " + f.what + (running ? ": " + k.text[running->at] : "");
    }
    standin::B = nullptr;
    return result;
}
#undef LANES

}  // namespace ptx
