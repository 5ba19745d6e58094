// A libcuda.so.1 without a GPU: the part of the driver's interface that Recoup uses, over the kernels compiled for the CPU. The
// product is unchanged; it finds this library where it looks for the driver's. scripts/cuda-standin.sh builds it.
//
// STANDIN_STRICT=1      looks for races and for outputs written twice (slow)
// STANDIN_FAIL=N[:CODE] call number N of those that can fail returns CODE (default 2, out of memory), and every later call
//                       too if CODE is 719 or another that ends a context
// STANDIN_MEMORY=BYTES  memory of the device (default 8 GiB)
// STANDIN_VERSION=N     version of the driver (default 13000)
// STANDIN_CAPABILITY=N  compute capability times ten (default 80): 120 has FP4 and FP8 tensor cores, 100 FP4's by tcgen05, with the
//                       kernels for them
// STANDIN_THREADS=N     blocks of a launch that run at once (default one for each core)
// STANDIN_MUTE=1        what tcgen05 does is never heard of: every wait for it is in vain
// STANDIN_SWAP=A:B      gives the kernel with B in its name where A is asked for: wrong results, or lost devices
#include "../kernels/all.cu"

#include <deque>
#include <mutex>

using standin::Kernel;
typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
struct Node { const Kernel* kernel; int grid[3], threads; size_t shared; std::function<void()> body; };
// Nodes in a row, each after the one before.
struct Graph { std::vector<std::unique_ptr<Node>> nodes; };
struct Exec { const Graph* of; std::vector<Node> nodes; std::map<const Node*, size_t> index; };
struct KernelParams { const Kernel* func; unsigned grid[3], block[3], shared; void** params; void** extra; void* kern; void* ctx; };

static std::recursive_mutex LOCK;
static size_t USED = 0;
static std::map<CUdeviceptr, size_t> SIZES;
// Bytes of shared memory that launches of a kernel may give.
static std::map<const Kernel*, size_t> ALLOWED;
static int LOST = 0;  // the error that ended the context

static long number(const char* name, long otherwise) {
    const char* v = getenv(name);
    return v ? atol(v) : otherwise;
}
// As the real one: a list that is empty hides every device.
static int devices() {
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    return visible && !*visible ? 0 : (int)number("STANDIN_DEVICES", 1);
}
static int capability() { return (int)number("STANDIN_CAPABILITY", 80); }
static size_t memory() { return (size_t)number("STANDIN_MEMORY", 8L << 30); }

// Each call goes through here first.
static CUresult called() {
    static long count = 0;
    static const char* plan = getenv("STANDIN_FAIL");
    if (LOST) return LOST;
    count++;
    if (plan && count == atol(plan)) {
        const char* colon = strchr(plan, ':');
        const int code = colon ? atoi(colon + 1) : 2;
        if (code >= 700) LOST = code;
        return code;
    }
    return 0;
}
// Copies to and from page-locked memory, which wait as long as they may: until something comes after them in the stream, or somebody
// waits for them. Who touches such memory too early sees it.
struct Copy { void* to; const void* from; size_t n; bool to_device; };
static std::deque<Copy> WAITING;
static uint64_t SENT = 0;  // copies so far, those that wait last
static std::map<const char*, size_t> PAGE_LOCKED;
static bool page_locked(const void* p, size_t n) {
    auto after = PAGE_LOCKED.upper_bound((const char*)p);
    return after != PAGE_LOCKED.begin() && (const char*)p + n <= std::prev(after)->first + std::prev(after)->second;
}
extern "C" { static CUresult arrive_all(uint64_t upto); }
static CUresult arrive(uint64_t upto = UINT64_MAX) { return arrive_all(upto); }
#define LATER                                             \
    std::lock_guard<std::recursive_mutex> guard(LOCK);    \
    if (CUresult failed = called()) return failed
#define CALL                                              \
    LATER;                                                \
    if (CUresult failed = arrive()) return failed

static CUresult run(const Kernel& k, int gx, int gy, int gz, int threads, size_t shared, const std::function<void()>& body) {
    if (gx < 1 || gy < 1 || gz < 1 || gy > 65535 || gz > 65535) {
        fprintf(stderr, "stand-in: %s: grid %d x %d x %d\n", k.name.c_str(), gx, gy, gz);
        return 1;
    }
    const auto allowed = ALLOWED.find(&k);
    if (shared > (allowed == ALLOWED.end() ? 48 << 10 : allowed->second)) {
        fprintf(stderr, "stand-in: %s: %zu bytes of shared memory\n", k.name.c_str(), shared);
        return 1;
    }
    const std::string fault = standin::launch(k, gx, gy, gz, threads, body, shared);
    if (fault.empty()) return 0;
    fprintf(stderr, "stand-in: %s\n", fault.c_str());
    LOST = 719;
    return 719;
}

extern "C" {
CUresult cuInit(unsigned) { CALL; standin::MUTE = number("STANDIN_MUTE", 0) != 0; standin::STRICT = number("STANDIN_STRICT", 0) != 0; return devices() ? 0 : 100; }
CUresult cuDriverGetVersion(int* v) { CALL; *v = (int)number("STANDIN_VERSION", 13000); return 0; }
CUresult cuDeviceGetCount(int* n) { CALL; *n = devices(); return 0; }
CUresult cuDeviceGet(CUdevice* d, int i) { CALL; *d = i; return i < devices() ? 0 : 101; }
CUresult cuDeviceGetName(char* name, int n, CUdevice) { CALL; snprintf(name, n, "stand-in (CPU, " __DATE__ " " __TIME__ ")"); return 0; }
CUresult cuDeviceTotalMem_v2(size_t* n, CUdevice) { CALL; *n = memory(); return 0; }
CUresult cuDeviceGetAttribute(int* v, int attribute, CUdevice) {
    CALL;
    // Two multiprocessors.
    *v = attribute == 75 ? capability() / 10 : attribute == 76 ? capability() % 10 : attribute == 16 ? 2 : 0;
    return 0;
}
CUresult cuDeviceGetUuid_v2(char* uuid, CUdevice d) { CALL; memset(uuid, 0, 16); uuid[15] = (char)(d + 1); return 0; }
// A context is its device's number, from 1.
CUresult cuDevicePrimaryCtxRetain(void** c, CUdevice d) { CALL; *c = (void*)(uintptr_t)(d + 1); return 0; }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return 0; }
static thread_local void* CONTEXT = nullptr;
CUresult cuCtxSetCurrent(void* c) { CALL; CONTEXT = c; return 0; }
// For libnccl.cc: the device whose context is current, from 1; 0: none.
int standin_device() { return (int)(uintptr_t)CONTEXT; }
CUresult cuMemGetInfo_v2(size_t* free, size_t* total) { CALL; *total = memory(); *free = memory() - USED; return 0; }
CUresult cuMemAlloc_v2(CUdeviceptr* p, size_t n) {
    CALL;
    if (n == 0) return 1;
    if (USED + n > memory()) return 2;
    void* m = standin::allocate(n);
    if (!m) return 2;
    USED += n, SIZES[(CUdeviceptr)m] = n;
    *p = (CUdeviceptr)m;
    return 0;
}
CUresult cuMemFree_v2(CUdeviceptr p) {
    std::lock_guard<std::recursive_mutex> guard(LOCK);
    // Waits for whatever uses it.
    arrive();
    auto size = SIZES.find(p);
    if (size == SIZES.end()) return 1;
    USED -= size->second;
    SIZES.erase(size);
    return standin::release((void*)p) ? 0 : 1;
}
// For the stand-in of cuBLAS beside this library: a call of its is one of those that can fail, and its operands lie in this memory.
CUresult standin_called() { CALL; return 0; }
static standin::Region* whole(CUdeviceptr p, size_t n, const char* what) {
    standin::Region* r = standin::region_of((void*)p, n);
    if (!r) fprintf(stderr, "stand-in: %s of %zu bytes outside of every allocation\n", what, n);
    return r;
}
// Whether `n` bytes at `p` lie in one allocation; with 'r' whether they were written, with 'w' they are from now on.
CUresult standin_look(CUdeviceptr p, size_t n, char how, const char* what) {
    std::lock_guard<std::recursive_mutex> guard(LOCK);
    standin::Region* r = whole(p, n, what);
    if (!r) return 1;
    uint8_t* written = r->shadow->written.data() + ((char*)p - r->lo);
    if (how == 'w') memset(written, 1, n);
    if (how == 'r' && memchr(written, 0, n)) {
        fprintf(stderr, "stand-in: %s has bytes that nobody wrote\n", what);
        return 719;
    }
    return 0;
}
static CUresult to_device(CUdeviceptr to, const void* from, size_t n) {
    standin::Region* r = whole(to, n, "copy to the device");
    if (!r) return 1;
    memcpy((void*)to, from, n);
    memset(r->shadow->written.data() + ((char*)to - r->lo), 1, n);
    return 0;
}
static CUresult to_host(void* to, CUdeviceptr from, size_t n) {
    standin::Region* r = whole(from, n, "copy to the host");
    if (!r) return 1;
    if (const void* hole = memchr(r->shadow->written.data() + ((char*)from - r->lo), 0, n)) {
        fprintf(stderr, "stand-in: copy to the host of bytes that nobody wrote, byte %td of %zu\n",
                (const uint8_t*)hole - r->shadow->written.data(), r->size);
        return 719;
    }
    memcpy(to, (void*)from, n);
    return 0;
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t n, void*) {
    LATER;
    SENT++;
    if (page_locked(from, n)) return WAITING.push_back({(void*)to, from, n, true}), 0;
    CUresult failed = arrive();
    return failed ? failed : to_device(to, from, n);
}
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t n, void*) {
    LATER;
    SENT++;
    if (page_locked(to, n)) return WAITING.push_back({to, (void*)from, n, false}), 0;
    CUresult failed = arrive();
    return failed ? failed : to_host(to, from, n);
}
CUresult cuMemHostAlloc(void** p, size_t n, unsigned) {
    CALL;
    *p = malloc(n);
    if (!*p) return 2;
    memset(*p, 0xcb, n);
    PAGE_LOCKED[(const char*)*p] = n;
    return 0;
}
CUresult cuMemFreeHost(void* p) {
    std::lock_guard<std::recursive_mutex> guard(LOCK);
    if (!PAGE_LOCKED.erase((const char*)p)) return 1;
    return free(p), 0;
}
// An event is how many copies were sent before it.
CUresult cuEventCreate(uint64_t** e, unsigned) { CALL; *e = new uint64_t(0); return 0; }
CUresult cuEventRecord(uint64_t* e, void*) { LATER; *e = SENT; return 0; }
CUresult cuEventSynchronize(uint64_t* e) { LATER; return arrive(*e); }
CUresult cuEventDestroy_v2(uint64_t* e) { delete e; return 0; }
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t n, void*) {
    CALL;
    standin::Region *a = whole(to, n, "copy on the device"), *b = whole(from, n, "copy on the device");
    if (!a || !b) return 1;
    memcpy((void*)to, (void*)from, n);
    memcpy(a->shadow->written.data() + ((char*)to - a->lo), b->shadow->written.data() + ((char*)from - b->lo), n);
    return 0;
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char v, size_t n, void*) {
    CALL;
    standin::Region* r = whole(to, n, "fill");
    if (!r) return 1;
    memset((void*)to, v, n);
    memset(r->shadow->written.data() + ((char*)to - r->lo), 1, n);
    return 0;
}
static CUresult arrive_all(uint64_t upto) {
    while (!WAITING.empty() && SENT - WAITING.size() < upto) {
        const Copy c = WAITING.front();
        WAITING.pop_front();
        const CUresult failed = c.to_device ? to_device((CUdeviceptr)c.to, c.from, c.n) : to_host(c.to, (CUdeviceptr)c.from, c.n);
        if (failed) return LOST = failed;
    }
    return 0;
}
CUresult cuStreamCreate(void** s, unsigned) { CALL; *s = (void*)1; return 0; }
CUresult cuStreamDestroy_v2(void*) { return 0; }
CUresult cuStreamSynchronize(void*) { CALL; return 0; }
CUresult cuModuleLoadData(void** m, const void* image) { CALL; *m = (void*)image; return image ? 0 : 200; }
CUresult cuModuleUnload(void*) { return 0; }
CUresult cuModuleGetFunction(const Kernel** f, void*, const char* name) {
    CALL;
    std::string wanted = name;
    // As in images, of which only those for this family have them.
    const bool narrow = wanted.find("_fp4_") != std::string::npos || (wanted.find("_fp8") != std::string::npos && wanted.find("attention") != 0);
    const bool tcgen = wanted.find("_tcgen_") != std::string::npos || wanted == "sum_slices";
    if ((narrow && capability() / 10 != 12) || (tcgen && capability() / 10 != 10 && capability() / 10 != 11)) return 500;
    if (const char* swap = getenv("STANDIN_SWAP"))
        if (const char* colon = strchr(swap, ':'))
            if (const size_t at = wanted.find(std::string(swap, colon)); at != std::string::npos) wanted.replace(at, colon - swap, colon + 1);
    auto k = standin::kernels().find(wanted);
    if (k == standin::kernels().end()) return 500;
    *f = &k->second;
    return 0;
}
CUresult cuFuncSetAttribute(const Kernel* f, int attribute, int value) {
    CALL;
    // The most that a block of any device since sm_90 can have.
    if (attribute != 8 || value < 0 || value > 227 << 10) return 1;
    // Of two names that STANDIN_SWAP gives one kernel, the larger.
    ALLOWED[f] = std::max(ALLOWED[f], (size_t)value);
    return 0;
}
CUresult cuLaunchKernel(const Kernel* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned, unsigned, unsigned shared, void*, void** args, void**) {
    CALL;
    return run(*f, (int)gx, (int)gy, (int)gz, (int)bx, shared, f->bind(args));
}
static std::map<Graph*, std::unique_ptr<Graph>> GRAPHS;
static std::map<Exec*, std::unique_ptr<Exec>> EXECS;
static CUresult refuse(const char* what) {
    fprintf(stderr, "stand-in: %s\n", what);
    return 1;
}
static Node node_of(const KernelParams* p) {
    return Node{p->func, {(int)p->grid[0], (int)p->grid[1], (int)p->grid[2]}, (int)p->block[0], p->shared, p->func->bind(p->params)};
}
CUresult cuGraphCreate(Graph** g, unsigned) {
    CALL;
    auto graph = std::make_unique<Graph>();
    *g = graph.get(), GRAPHS[*g] = std::move(graph);
    return 0;
}
CUresult cuGraphAddKernelNode_v2(Node** n, Graph* g, Node* const* after, size_t count, const KernelParams* p) {
    CALL;
    if (!GRAPHS.count(g)) return refuse("a node for no graph");
    // Nodes that are not in a row could run in any order.
    const bool in_row = g->nodes.empty() ? count == 0 : count == 1 && after[0] == g->nodes.back().get();
    if (!in_row) return refuse("a node that does not come after the one before");
    if (p->block[1] != 1 || p->block[2] != 1 || p->extra) return refuse("a node of another kind");
    g->nodes.push_back(std::make_unique<Node>(node_of(p)));
    *n = g->nodes.back().get();
    return 0;
}
CUresult cuGraphInstantiateWithFlags(Exec** e, Graph* g, unsigned long long) {
    CALL;
    if (!GRAPHS.count(g) || g->nodes.empty()) return refuse("no graph to make anything of");
    auto exec = std::make_unique<Exec>();
    exec->of = g;
    for (auto& n : g->nodes) exec->index[n.get()] = exec->nodes.size(), exec->nodes.push_back(*n);
    *e = exec.get(), EXECS[*e] = std::move(exec);
    return 0;
}
CUresult cuGraphExecKernelNodeSetParams_v2(Exec* e, Node* n, const KernelParams* p) {
    CALL;
    if (!EXECS.count(e) || !e->index.count(n)) return refuse("a node that is not of the graph");
    Node& node = e->nodes[e->index[n]];
    if (node.kernel != p->func) return refuse("another kernel for a node");
    node = node_of(p);
    return 0;
}
CUresult cuGraphLaunch(Exec* e, void*) {
    CALL;
    if (!EXECS.count(e)) return refuse("no graph to launch");
    for (auto& n : e->nodes) if (CUresult failed = run(*n.kernel, n.grid[0], n.grid[1], n.grid[2], n.threads, n.shared, n.body)) return failed;
    return 0;
}
CUresult cuGraphExecDestroy(Exec* e) { CALL; return EXECS.erase(e) ? 0 : 1; }
CUresult cuGraphDestroy(Graph* g) { CALL; return GRAPHS.erase(g) ? 0 : 1; }
CUresult cuGetErrorName(CUresult e, const char** s) {
    *s = e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : e == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : e == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR";
    return 0;
}
CUresult cuGetErrorString(CUresult e, const char** s) { return cuGetErrorName(e, s); }
}
