// A libnccl.so.2 without GPUs: the calls that Recoup makes, over the memory of the stand-in for the driver (libcuda.cc), between
// threads and between processes of one machine, by files in shared memory. What NVIDIA's would hang on or do in silence is an error:
// two ranks on one device, a message of another length than is waited for, memory that nobody wrote, a rank that does not come.
// scripts/cuda-standin.sh builds it.
//
// STANDIN_NCCL_VERSION=N   its version (default 23203, which is 2.32.3)
// STANDIN_NCCL_SECONDS=N   how long a rank waits for another (default 60)
// STANDIN_NCCL_LOG=FILE    gets a line of what each rank sent in all, when it leaves
// STANDIN_NCCL_WRONG=1     the last byte of what is sent is another
// STANDIN_FAIL             counts its calls as well, see libcuda.cc
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

typedef int Status;
enum { OK = 0, UNHANDLED_CUDA = 1, SYSTEM = 2, INTERNAL = 3, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE = 6 };
typedef struct { char internal[128]; } UniqueId;
struct Comm {
    std::string folder;
    int ranks, rank;
    // How many messages went to, and came from, each.
    std::map<int, uint64_t> sent, received;
    uint64_t messages = 0, bytes = 0;
};
struct Waiting { bool sends; uint64_t at; size_t bytes; int peer; Comm* comm; };
static thread_local int DEPTH = 0;
static thread_local std::vector<Waiting> QUEUE;

// The driver's part, of the library that is loaded already.
template <class F> static F driver(const char* name) {
    static void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    return library ? (F)dlsym(library, name) : nullptr;
}
static Status refuse(Status status, const std::string& what) {
    fprintf(stderr, "stand-in: NCCL: %s\n", what.c_str());
    return status;
}
static Status called() {
    static auto call = driver<int (*)()>("standin_called");
    if (!call) return refuse(INTERNAL, "the driver is not the stand-in");
    return call() ? UNHANDLED_CUDA : OK;
}
static int look(uint64_t p, size_t n, char how, const char* what) {
    static auto call = driver<int (*)(uint64_t, size_t, char, const char*)>("standin_look");
    return call ? call(p, n, how, what) : 1;
}
static int number(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text && *text ? atoi(text) : otherwise;
}
#define CALL if (Status failed = called()) return failed

static bool exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }
// A file that is there in whole or not at all.
static bool put(const std::string& path, const void* data, size_t n) {
    const std::string part = path + ".part";
    FILE* file = fopen(part.c_str(), "wb");
    if (!file) return false;
    const bool all = fwrite(data, 1, n, file) == n;
    return fclose(file) == 0 && all && rename(part.c_str(), path.c_str()) == 0;
}
static bool get(const std::string& path, std::vector<char>& data) {
    FILE* file = fopen(path.c_str(), "rb");
    if (!file) return false;
    fseek(file, 0, SEEK_END);
    data.resize(ftell(file));
    rewind(file);
    const bool all = fread(data.data(), 1, data.size(), file) == data.size();
    fclose(file);
    return all;
}
static bool wait_for(const std::string& path) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(number("STANDIN_NCCL_SECONDS", 60));
    for (int tries = 0; !exists(path); tries++) {
        if (std::chrono::steady_clock::now() > end) return false;
        if (tries > 100) std::this_thread::sleep_for(std::chrono::microseconds(50));
        else std::this_thread::yield();
    }
    return true;
}
static std::string message(const Comm* c, int from, int to, uint64_t n) {
    return c->folder + "/" + std::to_string(from) + "-" + std::to_string(to) + "-" + std::to_string(n);
}

static Status send(const Waiting& w) {
    if (look(w.at, w.bytes, 'r', "what is sent to another rank")) return UNHANDLED_CUDA;
    std::vector<char> data((const char*)w.at, (const char*)w.at + w.bytes);
    if (number("STANDIN_NCCL_WRONG", 0)) data.back() ^= 1;
    Comm* c = w.comm;
    c->messages++;
    c->bytes += w.bytes;
    return put(message(c, c->rank, w.peer, c->sent[w.peer]++), data.data(), data.size()) ? OK : refuse(SYSTEM, "no room in shared memory");
}
static Status receive(const Waiting& w) {
    Comm* c = w.comm;
    const std::string path = message(c, w.peer, c->rank, c->received[w.peer]++);
    std::vector<char> data;
    if (!wait_for(path)) return refuse(REMOTE, "rank " + std::to_string(w.peer) + " sends nothing");
    if (!get(path, data)) return refuse(SYSTEM, "what was sent cannot be read");
    unlink(path.c_str());
    if (data.size() != w.bytes)
        return refuse(INVALID_USAGE, std::to_string(data.size()) + " bytes were sent, and " + std::to_string(w.bytes) + " waited for");
    if (look(w.at, w.bytes, 'w', "where something is received")) return UNHANDLED_CUDA;
    memcpy((void*)w.at, data.data(), w.bytes);
    return OK;
}
static Status run(std::vector<Waiting> all) {
    for (auto& w : all)
        if (w.sends)
            if (Status failed = send(w)) return failed;
    for (auto& w : all)
        if (!w.sends)
            if (Status failed = receive(w)) return failed;
    return OK;
}
static Status add(bool sends, uint64_t at, size_t count, int type, int peer, Comm* c) {
    CALL;
    if (!c || peer < 0 || peer >= c->ranks || peer == c->rank) return refuse(INVALID_ARGUMENT, "no such rank to exchange with");
    if (type != 1) return refuse(INVALID_ARGUMENT, "only bytes are exchanged here");
    QUEUE.push_back({sends, at, count, peer, c});
    if (DEPTH) return OK;
    std::vector<Waiting> all;
    all.swap(QUEUE);
    return run(std::move(all));
}

extern "C" {
Status ncclGetVersion(int* version) { *version = number("STANDIN_NCCL_VERSION", 23203); return OK; }
const char* ncclGetErrorString(Status status) {
    switch (status) {
        case OK: return "no error";
        case UNHANDLED_CUDA: return "unhandled cuda error";
        case SYSTEM: return "unhandled system error";
        case INVALID_ARGUMENT: return "invalid argument";
        case INVALID_USAGE: return "invalid usage";
        case REMOTE: return "remote process exited or there was a network error";
        default: return "internal error";
    }
}
Status ncclGetUniqueId(UniqueId* id) {
    CALL;
    memset(id, 0, sizeof *id);
    std::random_device random;
    snprintf(id->internal, sizeof id->internal, "standin-nccl-%08x%08x", random(), random());
    return OK;
}
Status ncclCommInitRank(Comm** out, int ranks, UniqueId id, int rank) {
    CALL;
    if (ranks < 1 || rank < 0 || rank >= ranks || strncmp(id.internal, "standin-nccl-", 13)) return refuse(INVALID_ARGUMENT, "no such rank");
    static auto device = driver<int (*)()>("standin_device");
    const int own = device ? device() : 0;
    if (!own) return refuse(INVALID_USAGE, "no device is current");
    Comm* c = new Comm{"/dev/shm/" + std::string(id.internal), ranks, rank};
    if (system(("mkdir -p " + c->folder).c_str())) return refuse(SYSTEM, "no shared memory");
    const std::string mine = c->folder + "/rank-" + std::to_string(rank);
    if (exists(mine)) return refuse(INVALID_USAGE, "two are one rank");
    if (!put(mine, &own, sizeof own)) return refuse(SYSTEM, "no room in shared memory");
    std::map<int, int> devices;
    for (int r = 0; r < ranks; r++) {
        const std::string path = c->folder + "/rank-" + std::to_string(r);
        std::vector<char> data;
        if (!wait_for(path) || !get(path, data)) return refuse(REMOTE, "rank " + std::to_string(r) + " does not come");
        int there;
        memcpy(&there, data.data(), sizeof there);
        if (devices.count(there)) return refuse(INVALID_USAGE, "ranks " + std::to_string(devices[there]) + " and " + std::to_string(r) + " have one device");
        devices[there] = r;
    }
    *out = c;
    return OK;
}
Status ncclCommDestroy(Comm* c) {
    if (const char* log = getenv("STANDIN_NCCL_LOG")) {
        if (FILE* file = fopen(log, "a")) {
            fprintf(file, "rank %d of %d sent %llu bytes in %llu messages\n", c->rank, c->ranks, (unsigned long long)c->bytes, (unsigned long long)c->messages);
            fclose(file);
        }
    }
    // Whoever is the last to leave takes the folder along.
    const std::string mine = c->folder + "/left-" + std::to_string(c->rank);
    put(mine, "", 0);
    bool last = true;
    for (int r = 0; r < c->ranks; r++) last = last && exists(c->folder + "/left-" + std::to_string(r));
    if (last && system(("rm -rf " + c->folder).c_str())) return SYSTEM;
    delete c;
    return OK;
}
Status ncclGroupStart() { DEPTH++; return OK; }
Status ncclGroupEnd() {
    if (!DEPTH) return refuse(INVALID_USAGE, "a group ends that did not begin");
    if (--DEPTH) return OK;
    std::vector<Waiting> all;
    all.swap(QUEUE);
    return run(std::move(all));
}
Status ncclSend(const void* from, size_t count, int type, int peer, Comm* c, void*) { return add(true, (uint64_t)from, count, type, peer, c); }
Status ncclRecv(void* to, size_t count, int type, int peer, Comm* c, void*) { return add(false, (uint64_t)to, count, type, peer, c); }
}
