// CUDA C++ on the CPU. A block's threads are fibers that run in turn, and every access to memory goes through here, so that
// what a GPU would do in silence is an error: accesses out of bounds, misaligned, or of what was never written; outputs
// written twice; races between two barriers; barriers that not all threads reach, or reach at different places.
#pragma once
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#define DEV static inline
// What every access goes through: compiled into it, with the sizes that are known there.
#define INLINE static inline __attribute__((always_inline))
#define UNROLL
using std::max;
using std::min;
struct alignas(16) U4 { uint32_t x, y, z, w; };

namespace standin {

struct Fault { std::string what; };

// Where in a launch something happened: enough to tell whether two accesses are ordered by barriers; and how many fences between proxies
// its thread had passed.
struct When { uint32_t launch = 0; int32_t block = -1, thread = -1; uint32_t block_epoch = 0, warp_epoch = 0, fences = 0; };
// `MANY`: several threads, none of which can be named. `OF_WARP - w`: several of warp w, all between the same of its barriers.
constexpr int32_t MANY = -2, OF_WARP = -3;
DEV int32_t warp_of(const When& w) { return w.thread >= 0 ? w.thread / 32 : w.thread <= OF_WARP ? OF_WARP - w.thread : -1; }

DEV bool ordered(const When& before, const When& now) {
    if (before.launch != now.launch || before.launch == 0) return true;
    if (before.block != now.block) return false;
    if (before.thread == now.thread) return true;
    if (before.block_epoch < now.block_epoch) return true;
    return warp_of(before) == now.thread / 32 && before.warp_epoch < now.warp_epoch;
}

// What is known of the bytes of some memory.
struct Shadow {
    std::vector<uint8_t> written;
    std::vector<When> writes, reads;  // only where races are looked for
    std::vector<uint8_t> pending;     // of shared memory: a copy to it is on its way
    std::vector<uint32_t> operations; // of shared memory: the last operation of tensor cores that reads it
    bool global = true;
    Shadow(size_t bytes, bool races, bool global) : written(bytes), pending(global ? 0 : bytes), global(global) {
        if (races) { writes.resize(bytes); reads.resize(bytes); }
    }
};

struct Region { char* lo; size_t size; std::unique_ptr<Shadow> shadow; };

// All allocations, by address; changed between launches only.
inline std::map<const char*, Region> REGIONS;
inline size_t GENERATION = 0;  // of REGIONS
inline bool STRICT = false;  // look for races and for outputs written twice; blocks then run on one thread

DEV void* allocate(size_t bytes, bool zero_is_written = false) {
    // Guard bytes between allocations: an access that leaves one does not end in its neighbour.
    char* p = (char*)aligned_alloc(256, (bytes + 511) / 256 * 256);
    if (!p) return nullptr;
    memset(p, 0xcb, bytes);
    auto shadow = std::make_unique<Shadow>(bytes, STRICT, true);
    if (zero_is_written) { memset(p, 0, bytes); memset(shadow->written.data(), 1, bytes); }
    REGIONS[p] = Region{p, bytes, std::move(shadow)};
    GENERATION++;
    return p;
}
inline thread_local Region* LAST __attribute__((tls_model("initial-exec"))) = nullptr;
inline thread_local size_t LAST_GENERATION __attribute__((tls_model("initial-exec"))) = 0;
inline Region* find_region(const char* c, size_t n) {
    auto after = REGIONS.upper_bound(c);
    if (after == REGIONS.begin()) return nullptr;
    Region& r = std::prev(after)->second;
    if (c + n > r.lo + r.size) return nullptr;
    LAST = &r, LAST_GENERATION = GENERATION;
    return &r;
}
INLINE Region* region_of(const void* p, size_t n) {
    const char* c = (const char*)p;
    if (LAST && LAST_GENERATION == GENERATION && c >= LAST->lo && c + n <= LAST->lo + LAST->size) return LAST;
    return find_region(c, n);
}
DEV bool release(void* p) {
    if (!REGIONS.erase((const char*)p)) return false;
    GENERATION++;
    free(p);
    return true;
}

}  // namespace standin
#include "tensor.h"
namespace standin {

// --- fibers ---

#if defined(__x86_64__)
extern "C" void standin_switch(void** from, void* to);
asm(R"(
.text
.globl standin_switch
.type standin_switch,@function
standin_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
struct Stack {
    void* sp = nullptr;
    static void jump(Stack& from, Stack& to) { standin_switch(&from.sp, to.sp); }
    void begin(char* memory, size_t size, void (*entry)()) {
        uintptr_t top = ((uintptr_t)memory + size) & ~(uintptr_t)15;
        void** s = (void**)top;
        *--s = nullptr;                 // as if `entry` had been called: misaligned by one word
        *--s = (void*)entry;
        for (int i = 0; i < 6; i++) *--s = nullptr;
        sp = s;
    }
};
#else
#include <ucontext.h>
struct Stack {
    ucontext_t c;
    static void jump(Stack& from, Stack& to) { swapcontext(&from.c, &to.c); }
    void begin(char* memory, size_t size, void (*entry)()) {
        getcontext(&c);
        c.uc_stack.ss_sp = memory, c.uc_stack.ss_size = size, c.uc_link = nullptr;
        makecontext(&c, entry, 0);
    }
};
#endif

enum class Wait { None, Warp, Block };
// Bytes on their way to shared memory.
struct Copy { char* to; Shadow* shadow; size_t at, n; const char* from; };
struct Fiber {
    Stack stack;
    std::unique_ptr<char[]> memory;
    Wait wait = Wait::None;
    int site = 0;
    bool done = false;
    uint32_t warp_epoch = 0, block_epoch = 0, collectives = 0;
    std::vector<Copy> open;                 // not committed yet
    std::vector<std::vector<Copy>> groups;  // committed, not waited for
};
struct Warp {
    int arrived = 0;
    uint32_t epoch = 0;
    // Two sets, used in turn: a set is written again only after all lanes have left the collective after it.
    alignas(32) uint32_t values[2][32][8];
    alignas(32) float results[2][32][4];
};
// `address`: where it begins for descriptors, which know all of a block's shared memory as one.
struct SharedMemory { std::unique_ptr<char[]> bytes; std::unique_ptr<Shadow> shadow; size_t size; uint64_t address; };

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Stack main;
    int current = 0, arrived = 0;
    uint32_t epoch = 0;
    uint32_t launch = 0;
    int index = 0;
    int x = 0, y = 0, z = 0, gx = 1, gy = 1, gz = 1;
    std::map<int, SharedMemory> shared;
    size_t dynamic = 0;  // bytes of shared memory that the launch gives
    Tensor tensor;
    std::vector<Knows> knows;
    std::function<void()> body;
    std::string fault;
};
// At a fixed distance from the thread's own register, also in a library: every access asks for it.
inline thread_local Block* B __attribute__((tls_model("initial-exec"))) = nullptr;

DEV Tensor& tensor() { return B->tensor; }
DEV Knows& knows(int thread) { return B->knows[thread]; }
DEV uint32_t epoch_of(int thread) { return B->fibers[thread].block_epoch; }
DEV int this_thread() { return B->current; }
DEV When now() {
    Fiber& f = B->fibers[B->current];
    return When{B->launch, B->index, B->current, f.block_epoch, f.warp_epoch, B->knows[B->current].proxy_fences};
}
[[noreturn]] DEV void fault(const std::string& what) {
    char where[96];
    snprintf(where, sizeof where, " (block %d,%d,%d thread %d)", B->x, B->y, B->z, B->current);
    throw Fault{what + where};
}

DEV bool runnable(const Fiber& f, int thread) {
    if (f.done) return false;
    if (f.wait == Wait::Warp) return B->warps[thread / 32].epoch != f.warp_epoch;
    if (f.wait == Wait::Block) return B->epoch != f.block_epoch;
    return true;
}
// Goes on with another fiber; comes back when this one can go on.
DEV void give_way() {
    const int me = B->current, n = (int)B->fibers.size();
    for (int i = 1; i <= n; i++) {
        const int next = (me + i) % n;
        if (!runnable(B->fibers[next], next)) continue;
        if (next != me) {
            B->current = next;
            Stack::jump(B->fibers[me].stack, B->fibers[next].stack);
        }
        return;
    }
    // Nobody can: the main program says who waits where.
    Stack::jump(B->fibers[me].stack, B->main);
}
DEV void check_sites(int from, int to, Wait wait, int site) {
    for (int i = from; i < to; i++) {
        Fiber& f = B->fibers[i];
        if (i != B->current && f.wait == wait && f.site != site)
            fault("threads wait for each other at different places: lines " + std::to_string(f.site) + " and " + std::to_string(site));
    }
}
DEV void sync_warp(int site) {
    Fiber& f = B->fibers[B->current];
    Warp& w = B->warps[B->current / 32];
    const int first = B->current / 32 * 32;
    f.wait = Wait::Warp, f.site = site;
    if (++w.arrived == 32) {
        check_sites(first, first + 32, Wait::Warp, site);
        w.arrived = 0, w.epoch++;
    } else {
        give_way();
    }
    f.wait = Wait::None, f.warp_epoch++;
}
DEV void sync_block(int site) {
    Fiber& f = B->fibers[B->current];
    const int n = (int)B->fibers.size();
    f.wait = Wait::Block, f.site = site;
    reach_barrier(B->current);
    if (++B->arrived == n) {
        check_sites(0, n, Wait::Block, site);
        B->arrived = 0, B->epoch++;
    } else {
        give_way();
    }
    f.wait = Wait::None, f.block_epoch++;
    leave_barrier(B->current);
}

inline void entry() {
    const int me = B->current;
    try {
        B->body();
        for (auto& g : B->fibers[me].groups) if (!g.empty()) fault("the thread ends before its copies were waited for");
        if (!B->fibers[me].open.empty()) fault("the thread ends before its copies were committed");
    } catch (const Fault& f) {
        if (B->fault.empty()) B->fault = f.what;
        Stack::jump(B->fibers[me].stack, B->main);
    }
    B->fibers[me].done = true;
    Block* b = B;
    const int n = (int)b->fibers.size();
    for (int i = 1; i <= n; i++) {
        const int next = (me + i) % n;
        if (runnable(b->fibers[next], next)) {
            b->current = next;
            Stack::jump(b->fibers[me].stack, b->fibers[next].stack);
        }
    }
    Stack::jump(b->fibers[me].stack, b->main);
}

constexpr size_t STACK = 96 << 10;

// Runs one block to its end; the fault, if there was one.
DEV std::string run_block(Block& b, int threads) {
    if ((int)b.fibers.size() != threads) {
        b.fibers.clear();
        b.fibers.resize(threads);
        for (auto& f : b.fibers) f.memory.reset(new char[STACK]);
        b.warps.resize((threads + 31) / 32);
    }
    for (auto& f : b.fibers) {
        f.wait = Wait::None, f.done = false, f.warp_epoch = f.block_epoch = f.collectives = 0;
        f.open.clear(), f.groups.clear();
        f.stack.begin(f.memory.get(), STACK, entry);
    }
    for (auto& w : b.warps) w.arrived = 0, w.epoch = 0;
    b.knows.assign(threads, Knows()), b.tensor.clear();
    b.arrived = 0, b.epoch = 0, b.shared.clear(), b.fault.clear();
    Block* outer = B;
    B = &b;
    b.current = 0;
    Stack::jump(b.main, b.fibers[0].stack);
    if (b.fault.empty()) b.fault = left_behind();
    B = outer;
    if (b.fault.empty()) {
        std::map<std::pair<Wait, int>, int> waiting;
        for (auto& f : b.fibers) if (!f.done) waiting[{f.wait, f.site}]++;
        for (auto& [where, count] : waiting)
            b.fault += std::to_string(count) + " threads wait for ever at the " + (where.first == Wait::Warp ? "warp" : "block") +
                       "'s barrier of line " + std::to_string(where.second) + "; ";
    }
    return b.fault;
}

// --- kernels ---

struct Kernel { std::string name; int threads; std::function<std::function<void()>(void**)> bind; };
inline std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}
struct Registration {
    template <class... A> Registration(const char* name, int threads, void (*f)(A...)) {
        kernels()[name] = Kernel{name, threads, [f](void** args) -> std::function<void()> {
            std::tuple<A...> values;
            int i = 0;
            std::apply([&](auto&... v) { (memcpy(&v, args[i++], sizeof v), ...); }, values);
            return [f, values] { std::apply(f, values); };
        }};
    }
};

inline uint32_t LAUNCHES = 0;

// Runs a kernel, its arguments bound, over a grid; the first fault, if there was one.
DEV std::string launch(const Kernel& kernel, int gx, int gy, int gz, int threads, const std::function<void()>& body,
                       size_t dynamic = 0) {
    if (threads != kernel.threads)
        return kernel.name + ": launched with " + std::to_string(threads) + " threads, made for " + std::to_string(kernel.threads);
    const uint32_t id = ++LAUNCHES;
    const long blocks = (long)gx * gy * gz;
    static const int cores = [] {
        const char* told = getenv("STANDIN_THREADS");
        return told ? atoi(told) : (int)std::thread::hardware_concurrency();
    }();
    const int workers = STRICT ? 1 : (int)std::min<long>(blocks, max(1, cores));
    std::atomic<long> next{0};
    std::atomic<bool> failed{false};
    std::string found;
    // Blocks, with the stacks of their threads, outlive launches.
    static std::mutex lock;
    static std::map<int, std::vector<std::unique_ptr<Block>>> idle;
    auto work = [&] {
        std::unique_ptr<Block> own;
        {
            std::lock_guard<std::mutex> guard(lock);
            auto& blocks = idle[threads];
            if (!blocks.empty()) own = std::move(blocks.back()), blocks.pop_back();
        }
        if (!own) own = std::make_unique<Block>();
        Block& block = *own;
        block.body = body, block.launch = id, block.dynamic = dynamic, block.gx = gx, block.gy = gy, block.gz = gz;
        for (long i; !failed && (i = next++) < blocks;) {
            block.index = (int)i;
            block.x = (int)(i % gx), block.y = (int)(i / gx % gy), block.z = (int)(i / gx / gy);
            std::string f = run_block(block, threads);
            if (!f.empty() && !failed.exchange(true)) found = kernel.name + ": " + f;
        }
        block.body = nullptr;
        std::lock_guard<std::mutex> guard(lock);
        idle[threads].push_back(std::move(own));
    };
    if (workers <= 1) {
        work();
    } else {
        std::vector<std::thread> pool;
        for (int i = 0; i < workers; i++) pool.emplace_back(work);
        for (auto& t : pool) t.join();
    }
    return found;
}

DEV std::string launch(const Kernel& kernel, int gx, int gy, int gz, int threads, void** args, size_t dynamic = 0) {
    return launch(kernel, gx, gy, gz, threads, kernel.bind(args), dynamic);
}

// --- accesses ---

// Whether all of `n` bytes, which are 0 or 1, are `value`: in words, as every access asks it and `n` is known where it does.
DEV bool all_are(const uint8_t* bytes, size_t n, uint8_t value) {
    const uint64_t ones = 0x0101010101010101 * value;
    for (; n >= 8; bytes += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, bytes, 8);
        if (word != ones) return false;
    }
    for (; n; bytes++, n--) if (*bytes != value) return false;
    return true;
}
INLINE void check_pending(const Shadow& s, size_t at, size_t n, const char* what) {
    if (!s.pending.empty() && !all_are(s.pending.data() + at, n, 0)) fault(std::string(what) + ": a copy to it is on its way, byte " + std::to_string(at));
}
void read_races(Shadow& s, size_t at, size_t n, bool constant, const char* what);
void write_races(Shadow& s, size_t at, size_t n, const char* what);
INLINE void read_shadow(Shadow& s, size_t at, size_t n, bool constant, const char* what) {
    check_pending(s, at, n, what);
    if (!all_are(s.written.data() + at, n, 1))
        fault(std::string(what) + ": read before anything was written, byte " + std::to_string((const uint8_t*)memchr(s.written.data() + at, 0, n) - s.written.data()));
    if (!s.writes.empty()) read_races(s, at, n, constant, what);
}
inline void read_races(Shadow& s, size_t at, size_t n, bool constant, const char* what) {
    const When t = now();
    for (size_t i = at; i < at + n; i++) {
        if (constant && s.writes[i].launch == t.launch) fault(std::string(what) + ": read as constant, but this launch writes it");
        if (!ordered(s.writes[i], t)) fault(std::string(what) + ": race, read while thread " + std::to_string(s.writes[i].thread) + " writes, byte " + std::to_string(i));
        When& r = s.reads[i];
        if (!ordered(r, t) || (r.launch == t.launch && r.thread != t.thread && r.block_epoch == t.block_epoch)) {
            const bool other_block = r.block != t.block, same_warp = !other_block && warp_of(r) == t.thread / 32;
            const bool later = r.warp_epoch < t.warp_epoch;
            r = t;
            // Whoever comes after the later of two reads of a warp comes after both.
            if (!same_warp) r.thread = MANY;
            else if (!later) r.thread = OF_WARP - t.thread / 32;
            if (other_block) r.block = MANY;
        } else {
            r = t;
        }
    }
}
INLINE void write_shadow(Shadow& s, size_t at, size_t n, const char* what) {
    check_pending(s, at, n, what);
    if (!s.operations.empty() && !MUTE)
        for (size_t i = at; i < at + n; i++)
            if (s.operations[i] > knows(B->current).seen) fault(std::string(what) + ": written while an operation of tensor cores reads it, byte " + std::to_string(i));
    if (!s.writes.empty()) write_races(s, at, n, what);
    memset(s.written.data() + at, 1, n);
}
inline void write_races(Shadow& s, size_t at, size_t n, const char* what) {
    const When t = now();
    for (size_t i = at; i < at + n; i++) {
        if (s.global && s.writes[i].launch == t.launch) fault(std::string(what) + ": written twice in one launch, byte " + std::to_string(i));
        if (!ordered(s.writes[i], t)) fault(std::string(what) + ": race, two threads write byte " + std::to_string(i));
        if (!ordered(s.reads[i], t)) fault(std::string(what) + ": race, written while another thread reads, byte " + std::to_string(i));
        s.writes[i] = t;
    }
}
INLINE Region& checked(const void* p, size_t n, const char* what) {
    if ((uintptr_t)p % n) fault(std::string(what) + ": misaligned access of " + std::to_string(n) + " bytes");
    Region* r = region_of(p, n);
    if (!r) fault(std::string(what) + ": access of " + std::to_string(n) + " bytes outside of every allocation");
    return *r;
}

template <class T> struct Ref {
    char* p; Shadow* s; size_t at;
    operator T() const { read_shadow(*s, at, sizeof(T), false, "shared memory"); T v; memcpy(&v, p + at, sizeof v); return v; }
    Ref& operator=(T v) { write_shadow(*s, at, sizeof(T), "shared memory"); memcpy(p + at, &v, sizeof v); return *this; }
    Ref& operator=(const Ref& o) { return *this = (T)o; }
};
template <class T> struct Shared {
    char* p; Shadow* s; int n;
    uint64_t address;
    Ref<T> operator[](int i) const {
        if (i < 0 || i >= n) fault("shared memory: index " + std::to_string(i) + " of " + std::to_string(n));
        return Ref<T>{p, s, (size_t)i * sizeof(T)};
    }
};
template <class T> Shared<T> shared(int count, int site) {
    SharedMemory& m = B->shared[site];
    if (!m.bytes) {
        m.size = sizeof(T) * count;
        m.bytes.reset(new char[m.size]);
        m.shadow = std::make_unique<Shadow>(m.size, STRICT, false);
        // Apart from each other: an access that leaves one does not end in the next.
        for (auto& [other, o] : B->shared) if (other != site) m.address = max(m.address, (o.address + o.size + 511) / 256 * 256);
    }
    return Shared<T>{m.bytes.get(), m.shadow.get(), count, m.address};
}
// The shared memory whose size the launch gives.
template <class T> Shared<T> dynamic(int count, int site) {
    if (sizeof(T) * count != B->dynamic) fault("shared memory: launched with " + std::to_string(B->dynamic) + " bytes, made for " + std::to_string(sizeof(T) * count));
    return shared<T>(count, site);
}
// Where `n` bytes at this address of shared memory are.
struct Place { char* bytes; Shadow* shadow; size_t at; };
DEV Place shared_place(uint64_t address, size_t n) {
    for (auto& [site, m] : B->shared)
        if (address >= m.address && address + n <= m.address + m.size) return {m.bytes.get() + (address - m.address), m.shadow.get(), (size_t)(address - m.address)};
    fault("a descriptor names " + std::to_string(n) + " bytes outside of shared memory, at " + std::to_string(address));
}

}  // namespace standin

#define KERNEL(name, threads, params)                                              \
    static void name params;                                                       \
    static const standin::Registration registration_##name(#name, threads, name); \
    static void name params
#define KERNEL_OF(blocks, name, threads, params) KERNEL(name, threads, params)
#define SHARED(type, name, count) auto name = standin::shared<type>(count, __COUNTER__)
#define DYNAMIC(type, name, count) auto name = standin::dynamic<type>(count, __COUNTER__)
template <class T> using SharedArray = standin::Shared<T>;

DEV int thread_index() { return standin::B->current; }
DEV int block_x() { return standin::B->x; }
DEV int block_y() { return standin::B->y; }
DEV int block_z() { return standin::B->z; }
DEV int grid_x() { return standin::B->gx; }
DEV void block_sync(int site = __builtin_LINE()) { standin::sync_block(site); }
DEV void warp_sync(int site = __builtin_LINE()) { standin::sync_warp(site); }

template <class T> DEV T ld(const T* p) {
    standin::Region& r = standin::checked(p, sizeof(T), "global memory");
    standin::read_shadow(*r.shadow, (const char*)p - r.lo, sizeof(T), true, "global memory");
    return *p;
}
template <class T> DEV T ld_stream(const T* p) { return ld(p); }
template <class T> DEV T get(const T* p) {
    standin::Region& r = standin::checked(p, sizeof(T), "global memory");
    standin::read_shadow(*r.shadow, (const char*)p - r.lo, sizeof(T), false, "global memory");
    return *p;
}
template <class T> DEV void st(T* p, T v) {
    standin::Region& r = standin::checked(p, sizeof(T), "global memory");
    standin::write_shadow(*r.shadow, (char*)p - r.lo, sizeof(T), "global memory");
    *p = v;
}

// --- copies that run while the thread goes on ---
// The destination has no content from the call on until the thread waits: only then are the bytes copied. Both the call and
// the wait count as writes by the thread.

namespace standin {
template <class T> void copy_async(SharedArray<T> to, int i, const T* from) {
    Region& r = checked(from, sizeof(T), "global memory");
    read_shadow(*r.shadow, (const char*)from - r.lo, sizeof(T), true, "global memory");
    const Ref<T> d = to[i];
    write_shadow(*d.s, d.at, sizeof(T), "shared memory");
    memset(d.s->written.data() + d.at, 0, sizeof(T)), memset(d.s->pending.data() + d.at, 1, sizeof(T));
    B->fibers[B->current].open.push_back({d.p + d.at, d.s, d.at, sizeof(T), (const char*)from});
}
}  // namespace standin
DEV void cp_async(SharedArray<U4> to, int i, const U4* from) { standin::copy_async(to, i, from); }
DEV void cp_async(SharedArray<uint32_t> to, int i, const uint32_t* from) { standin::copy_async(to, i, from); }
DEV void cp_commit() {
    standin::Fiber& f = standin::B->fibers[standin::B->current];
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}
template <int N> DEV void cp_wait() {
    using namespace standin;
    auto& groups = B->fibers[B->current].groups;
    while ((int)groups.size() > N) {
        for (const Copy& c : groups.front()) {
            memset(c.shadow->pending.data() + c.at, 0, c.n);
            write_shadow(*c.shadow, c.at, c.n, "shared memory");
            memcpy(c.to, c.from, c.n);
        }
        groups.erase(groups.begin());
    }
}

// --- collectives of a warp ---

namespace standin {
template <class T> T exchange(T v, int from, int site) {
    static_assert(sizeof(T) <= sizeof(Warp{}.values[0][0]));
    Fiber& f = B->fibers[B->current];
    Warp& w = B->warps[B->current / 32];
    auto& values = w.values[f.collectives++ & 1];
    memcpy(&values[B->current % 32][0], &v, sizeof v);
    sync_warp(site);
    T out;
    memcpy(&out, &values[from & 31][0], sizeof out);
    return out;
}
DEV float bf(uint32_t h) { uint32_t u = h << 16; float f; memcpy(&f, &u, 4); return f; }
}  // namespace standin
template <class T> DEV T shfl_xor(T v, int mask, int site = __builtin_LINE()) { return standin::exchange(v, (thread_index() & 31) ^ mask, site); }
template <class T> DEV T shfl(T v, int lane, int site = __builtin_LINE()) { return standin::exchange(v, lane, site); }

// --- arithmetic of the header of inline PTX ---

DEV uint32_t rotr(uint32_t u, int r) { return u >> r | u << (32 - r); }
DEV uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t v = 0;
    for (int i = 0; i < 4; i++) v |= (uint32_t)(((uint64_t)b << 32 | a) >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return v;
}
DEV uint32_t bits_of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
DEV float float_of(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
DEV uint64_t bits_of(double d) { uint64_t u; memcpy(&u, &d, 8); return u; }
DEV double double_of(uint64_t u) { double d; memcpy(&d, &u, 8); return d; }
DEV uint32_t to_bf16(float f) {
    const uint32_t u = bits_of(f);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
DEV uint32_t to_bf16x2(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
DEV uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    using standin::bf;
    return to_bf16(bf(a & 0xffff) * bf(b & 0xffff)) | to_bf16(bf(a >> 16) * bf(b >> 16)) << 16;
}
namespace standin {
// d[16,8] += a[16,K] · b[K,8], products one after another in f32: lane 4g+t holds rows g and g+8, columns 2t and 2t+1 of d. The last
// lane to come computes for all, from matrices that `fill` makes of the words of all.
template <int K, class Fill> void multiply(float (&d)[4], const uint32_t (&mine)[8], const Fill& fill, int site) {
    Fiber& f = B->fibers[B->current];
    Warp& w = B->warps[B->current / 32];
    const int lane = B->current & 31, set = f.collectives++ & 1;
    memcpy(w.values[set][lane], mine, 32);
    memcpy(w.results[set][lane], d, 16);
    if (w.arrived == 31) {
        float A[16][K], Bm[K][8], D[16][8];
        fill(w.values[set], A, Bm);
        auto place = [&](int l, int i) -> float& { return D[(l >> 2) + (i >> 1) * 8][(l & 3) * 2 + (i & 1)]; };
        for (int l = 0; l < 32; l++) for (int i = 0; i < 4; i++) place(l, i) = w.results[set][l][i];
        // Eight rows side by side: their sums do not wait for each other, and have room in registers.
        for (int half = 0; half < 16; half += 8)
            for (int k = 0; k < K; k++)
                for (int r = half; r < half + 8; r++)
                    for (int c = 0; c < 8; c++) D[r][c] += A[r][k] * Bm[k][c];
        for (int l = 0; l < 32; l++) for (int i = 0; i < 4; i++) w.results[set][l][i] = place(l, i);
    }
    sync_warp(site);
    memcpy(d, w.results[set][lane], 16);
}
DEV float e2m1(uint32_t code) {
    static const float v[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    return code & 8 ? -v[code & 7] : v[code & 7];
}
DEV float e8m0(uint32_t code) { return code == 255 ? NAN : ldexpf(1, (int)code - 127); }
DEV float ue4m3(uint32_t code) {
    const int e = code >> 3 & 15, m = code & 7;
    return (code & 127) == 127 ? NAN : e ? ldexpf(8 + m, e - 10) : ldexpf(m, -9);
}
}  // namespace standin
// What is where is said in prim.cuh.
DEV void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int site = __builtin_LINE()) {
    using standin::bf;
    auto fill = [](const uint32_t (&words)[32][8], float (&A)[16][16], float (&Bm)[16][8]) {
        for (int l = 0; l < 32; l++) {
            const int g = l >> 2, t = l & 3;
            const uint32_t* v = words[l];
            for (int i = 0; i < 4; i++) {
                const int row = g + (i & 1) * 8, k = t * 2 + (i >> 1) * 8;
                A[row][k] = bf(v[i] & 0xffff), A[row][k + 1] = bf(v[i] >> 16);
            }
            for (int i = 0; i < 2; i++) Bm[t * 2 + i * 8][g] = bf(v[4 + i] & 0xffff), Bm[t * 2 + i * 8 + 1][g] = bf(v[4 + i] >> 16);
        }
    };
    standin::multiply<16>(d, {a[0], a[1], a[2], a[3], b0, b1, 0, 0}, fill, site);
}
template <bool MX, int PART>
DEV void mma_e2m1(float (&d)[4], const U4& a, uint32_t b0, uint32_t b1, uint32_t a_scales, uint32_t b_scales, int site = __builtin_LINE()) {
    using namespace standin;
    auto fill = [](const uint32_t (&words)[32][8], float (&A)[16][64], float (&Bm)[64][8]) {
        // The scale of a row's or column's element k, from the lane that has it.
        auto scale = [&](int from, int of, int k) {
            const uint32_t word = words[from][of];
            return MX ? e8m0(word >> 8 * (2 * PART + k / 32) & 255) : ue4m3(word >> 8 * (k / 16) & 255);
        };
        for (int l = 0; l < 32; l++) {
            const int g = l >> 2, t = l & 3;
            for (int e = 0; e < 32; e++) {
                const int row = g + e / 8 % 2 * 8, k = t * 8 + e % 8 + e / 16 * 32;
                A[row][k] = e2m1(words[l][e / 8] >> 4 * (e % 8)) * scale(4 * g + e / 8 % 2 + (MX ? 0 : 2 * PART), 6, k);
            }
            for (int e = 0; e < 16; e++) {
                const int k = t * 8 + e % 8 + e / 8 * 32;
                Bm[k][g] = e2m1(words[l][4 + e / 8] >> 4 * (e % 8)) * scale(4 * g + (MX ? 0 : PART), 7, k);
            }
        }
    };
    multiply<64>(d, {a.x, a.y, a.z, a.w, b0, b1, a_scales, b_scales}, fill, site);
}
template <int PART>
DEV void mma_e4m3(float (&d)[4], const U4& a, uint32_t b0, uint32_t b1, uint32_t a_scales, uint32_t b_scales, int site = __builtin_LINE()) {
    using namespace standin;
    auto fill = [](const uint32_t (&words)[32][8], float (&A)[16][32], float (&Bm)[32][8]) {
        auto element = [](uint32_t code) { return code & 128 ? -ue4m3(code & 127) : ue4m3(code & 127); };
        auto scale = [&](int from, int of) { return e8m0(words[from][of] >> 8 * PART & 255); };
        for (int l = 0; l < 32; l++) {
            const int g = l >> 2, t = l & 3;
            for (int e = 0; e < 16; e++)
                A[g + e / 4 % 2 * 8][t * 4 + e % 4 + e / 8 * 16] = element(words[l][e / 4] >> 8 * (e % 4) & 255) * scale(4 * g + e / 4 % 2, 6);
            for (int e = 0; e < 8; e++) Bm[t * 4 + e % 4 + e / 4 * 16][g] = element(words[l][4 + e / 4] >> 8 * (e % 4) & 255) * scale(4 * g, 7);
        }
    };
    multiply<32>(d, {a.x, a.y, a.z, a.w, b0, b1, a_scales, b_scales}, fill, site);
}

// --- tensor memory and what works on it: tcgen05, sm_100 and its family. Who may touch what when is in tensor.h; what is where in memory,
// here. ---

// Tries until a wait is given up.
constexpr int TRIES = 64;
DEV SharedArray<uint32_t> as_words(SharedArray<U4> a) { return {a.p, a.s, a.n * 4, a.address}; }
DEV uint32_t shared_address(SharedArray<U4> a, int i) { return (uint32_t)(a.address + 16 * (uint64_t)i); }
namespace standin {
// What the lanes of a warp do together, once: the last to come does it, and gives what comes of it to all.
template <class F> uint32_t together(const F& f, int site) {
    Fiber& fiber = B->fibers[B->current];
    Warp& w = B->warps[B->current / 32];
    const int set = fiber.collectives++ & 1;
    if (w.arrived == 31) w.values[set][0][0] = f();
    sync_warp(site);
    return w.values[set][0][0];
}
}  // namespace standin
template <int COLUMNS> DEV void tensor_alloc(SharedArray<uint32_t> to, int site = __builtin_LINE()) {
    const uint32_t at = standin::together([] { return standin::allocate_columns(standin::B->current / 32, COLUMNS); }, site);
    if ((thread_index() & 31) == 0) to[0] = at;
}
DEV void tensor_relinquish(int site = __builtin_LINE()) {
    standin::together([] { standin::tensor().relinquished = true; return 0u; }, site);
}
template <int COLUMNS> DEV void tensor_free(uint32_t at, int site = __builtin_LINE()) {
    standin::together([=] { standin::free_columns(standin::B->current / 32, at, COLUMNS); return 0u; }, site);
}
DEV void mbarrier_init(SharedArray<uint64_t> b, int i, int count) {
    (void)b[i];
    standin::make_mbarrier(b.address + 8 * (uint64_t)i, count), standin::fence_mbarriers();
}
DEV bool mbarrier_passed(SharedArray<uint64_t> b, int i, int parity) {
    (void)b[i];
    const bool passed = standin::ask(b.address + 8 * (uint64_t)i, parity);
    if (!passed && !standin::MUTE) standin::give_way();
    return passed;
}
DEV void async_fence() { standin::fence_proxies(); }
DEV void tensor_fence_before() { standin::fence_before(); }
DEV void tensor_fence_after() { standin::fence_after(); }
DEV void tensor_commit(SharedArray<uint64_t> b, int i) { (void)b[i]; standin::commit_to(b.address + 8 * (uint64_t)i); }

namespace standin {
// A matrix in shared memory: rows of 16-byte units, of which eight rows are together; no swizzling.
struct Matrix {
    uint64_t start, leading, stride;
    explicit Matrix(uint64_t d) : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4) {
        if (d >> 46 != 1) fault("a matrix descriptor has another version, base, mode or swizzling");
    }
    uint64_t at(int row, int unit) const { return start + row / 8 * stride + row % 8 * 16 + unit * leading; }
};
}  // namespace standin
// 32 rows of 16 bytes of shared memory to four columns of tensor memory, in each of its quarters.
DEV void tensor_copy(uint32_t to, uint64_t from) {
    using namespace standin;
    const Matrix m(from);
    const uint32_t number = next_operation();
    for (int row = 0; row < 32; row++) {
        const Place p = shared_place(m.at(row, 0), 16);
        operation_reads_shared(number, *p.shadow, p.at, 16);
        for (int lane = row; lane < 128; lane += 32)
            for (int i = 0; i < 4; i++) operation_writes(number, false, 0, lane, to + i);
    }
    enqueue(false, 0, [=] {
        for (int row = 0; row < 32; row++) {
            const Place p = shared_place(m.at(row, 0), 16);
            for (int lane = row; lane < 128; lane += 32)
                for (int i = 0; i < 4; i++) memcpy(&cell(lane, to + i, "").value, p.bytes + 4 * i, 4);
        }
    });
}
// d[128,N] = (scaled a)[128,64] · (scaled b)[N,64]^T, with what it is if `add`; N and the scales' bytes are in the instruction's descriptor.
template <bool MX> DEV void mma_scaled(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, uint32_t a_scales, uint32_t b_scales, bool add) {
    using namespace standin;
    const int n = (instruction >> 17 & 63) * 8, m = (instruction >> 24 & 31) * 16, a_part = instruction >> 29 & 3, b_part = instruction >> 4 & 3;
    const uint32_t fixed = 1u << 7 | 1u << 10 | (MX ? 1u << 23 : 0);
    if ((instruction & ~(63u << 17 | 31u << 24 | 3u << 29 | 3u << 4)) != fixed) fault("tcgen05.mma: another format or shape in its descriptor");
    if (m != 128 || n < 8 || n > 256) fault("tcgen05.mma: no such shape");
    if (MX ? (a_part | b_part) & 1 : a_part | b_part) fault("tcgen05.mma: no such scales");
    const Matrix ma(a), mb(b);
    const uint32_t number = next_operation();
    const uint64_t shape = (uint64_t)(instruction & (63u << 17 | 31u << 24)) << 32 | d;
    for (auto [x, rows] : {std::pair{ma, m}, std::pair{mb, n}})
        for (int row = 0; row < rows; row++)
            for (int unit = 0; unit < 2; unit++) {
                const Place p = shared_place(x.at(row, unit), 16);
                operation_reads_shared(number, *p.shadow, p.at, 16);
            }
    for (auto [at, rows] : {std::pair{a_scales, m}, std::pair{b_scales, n}})
        for (int row = 0; row < rows; row++)
            for (int quarter = 0; quarter < 4; quarter++) operation_reads(number, true, shape, quarter * 32 + row % 32, at + row / 32);
    for (int row = 0; row < m; row++)
        for (int column = 0; column < n; column++) {
            if (add && !cell(row, d + column, "tcgen05.mma").written) fault("tcgen05.mma: adds to what nobody wrote");
            operation_writes(number, true, shape, row, d + column);
        }
    enqueue(true, shape, [=] {
        // Scaled elements of a row, 64; whether none of them counts.
        auto scaled = [](const Matrix& x, int row, uint32_t scales, int part, float* out) {
            uint32_t words[8];
            for (int unit = 0; unit < 2; unit++) memcpy(words + 4 * unit, shared_place(x.at(row, unit), 16).bytes, 16);
            const uint32_t word = cell(row % 32, scales + row / 32, "").value;
            bool nothing = true;
            for (int k = 0; k < 64; k++) {
                const float s = MX ? e8m0(word >> 8 * (part + k / 32) & 255) : ue4m3(word >> 8 * (k / 16) & 255);
                out[k] = e2m1(words[k / 8] >> 4 * (k % 8)) * s;
                nothing &= out[k] == 0;
            }
            return nothing;
        };
        std::vector<float> memory(64 + 64 * 256);
        float* const A = memory.data();
        auto Bt = (float (*)[256])(A + 64);
        float D[256];
        bool counts[256];
        int last = 0;
        for (int column = 0; column < n; column++) {
            float v[64];
            counts[column] = !scaled(mb, column, b_scales, b_part, v);
            // Rows that are the same ones in memory, with scales of nothing beside them, need no sums of their own.
            if (counts[column]) last = column + 1;
            for (int k = 0; k < 64; k++) Bt[k][column] = v[k];
        }
        last = (last + 7) / 8 * 8;
        for (int row = 0; row < 128; row++) {
            const bool nothing = scaled(ma, row, a_scales, a_part, A);
            Cell* to = &cell(row, d, "");
            for (int column = 0; column < n; column++) D[column] = add ? float_of(to[column].value) : 0.0f;
            if (!nothing)
                for (int k = 0; k < 64; k++)
                    for (int column = 0; column < last; column++) D[column] += A[k] * Bt[k][column];
            for (int column = 0; column < n; column++) to[column].value = bits_of(D[column]);
        }
    });
}
// N columns of this thread's lane of tensor memory, which is one of the quarter that its warp reaches.
template <int N> DEV void tensor_load(uint32_t from, float (&v)[N], int site = __builtin_LINE()) {
    using namespace standin;
    const int warp = B->current / 32;
    if ((int)(from >> 16) != warp % 4 * 32) fault("tcgen05.ld: lanes that the warp does not reach");
    sync_warp(site);
    knows(B->current).loads++;
    for (int i = 0; i < N; i++) v[i] = float_of(load_cell(warp % 4 * 32 + (B->current & 31), (from & 0xffff) + i));
    wait_loads();
}
