// What tcgen05 instructions work on, for device.h and ptx.h alike: tensor memory with a record of every cell, operations that are on
// their way until an mbarrier tells of them, and the orders between them and the threads. What stands where in memory is not said
// here: device.h and ptx.h each have it of their own.
//
// Operations of a block are numbered. Who issues one marks what it reads and writes with its number; it is carried out when somebody
// asks an mbarrier to which a commit was bound, in order, as late as may be. A thread knows of those up to `seen`: by an mbarrier, or
// by a barrier behind a thread that knew; tcgen05 instructions of its own see what it had seen at its last
// tcgen05.fence::after_thread_sync. To touch what belongs to a later one is an error, unless the pipeline of the PTX ISA orders the two:
// mma after mma of one thread, accumulator and shape, mma after cp of one thread.
#pragma once

namespace standin {

constexpr int TENSOR_LANES = 128, TENSOR_COLUMNS = 512;
// Commits never arrive: what a wrong assumption could do on a GPU. Threads that have given up do as they like then.
inline bool MUTE = false;

struct Cell {
    uint32_t value = 0, write = 0, read = 0;  // the last operations that write and read it
    int32_t loader = -1;                      // the thread that loaded it last
    uint32_t loaded = 0, load_epoch = 0;      // the number of that load among its thread's, and when
    bool written = false;
};
struct Operation {
    bool mma;
    int issuer;
    uint64_t shape;  // accumulator and instruction of an mma
    std::function<void()> run;
};
struct Mbarrier {
    int count, pending;
    uint32_t phase = 0, done = 0;  // `done`: operations known by the phases so far
    uint32_t commit = 0;           // the last operation of a commit that has not arrived yet
    bool open = false, asked = false, fenced = false;
    int thread;                    // who made it, and when
    uint32_t epoch;
};
// What a thread knows and has told.
struct Knows {
    uint32_t seen = 0, fenced = 0, after_epoch = 0;
    uint32_t loads = 0, loads_waited = 0, loads_told = 0, proxy_fences = 0;
    int asked = 0;                                // times in a row in vain
    std::vector<uint32_t> loads_at, fences_at;    // those told of, by barrier of the block
};
struct Tensor {
    std::vector<Cell> cells;  // none before the first allocation
    struct Columns { int first, count, warp; };
    std::vector<Columns> columns;
    bool relinquished = false;
    std::vector<Operation> operations{1};  // from number 1 on
    uint32_t carried_out = 0;
    std::map<uint64_t, Mbarrier> mbarriers;
    std::vector<uint32_t> seen_at;         // what the threads at a barrier know together

    void clear() {
        for (auto& c : columns) for (int l = 0; l < TENSOR_LANES; l++) for (int i = 0; i < c.count; i++) cells[l * TENSOR_COLUMNS + c.first + i] = Cell();
        columns.clear(), operations.resize(1), mbarriers.clear(), seen_at.clear();
        relinquished = false, carried_out = 0;
    }
};

DEV Tensor& tensor();
DEV Knows& knows(int thread);
DEV uint32_t epoch_of(int thread);
DEV int this_thread();
[[noreturn]] DEV void fault(const std::string& what);
DEV void check_pending(const Shadow& s, size_t at, size_t n, const char* what);

// --- tensor memory ---

DEV void allocate_columns_check(int count) {
    if (count < 32 || count > TENSOR_COLUMNS || (count & (count - 1))) fault("tensor memory: " + std::to_string(count) + " columns cannot be allocated");
}
// Once for a warp; the address.
DEV uint32_t allocate_columns(int warp, int count) {
    Tensor& t = tensor();
    allocate_columns_check(count);
    t.cells.resize(TENSOR_LANES * TENSOR_COLUMNS);
    if (t.relinquished) fault("tensor memory: allocated after the right to it was given up");
    for (int first = 0; first + count <= TENSOR_COLUMNS; first += count) {
        bool is_free = true;
        for (auto& c : t.columns) is_free &= first + count <= c.first || c.first + c.count <= first;
        if (!is_free) continue;
        t.columns.push_back({first, count, warp});
        return (uint32_t)first;
    }
    fault("tensor memory: waits for columns that nobody will free");
}
DEV Cell& cell(int lane, int column, const char* what) {
    Tensor& t = tensor();
    bool owned = false;
    for (auto& c : t.columns) owned |= column >= c.first && column < c.first + c.count;
    if (lane < 0 || lane >= TENSOR_LANES || !owned) fault(std::string(what) + ": tensor memory that is not allocated, lane " + std::to_string(lane) + " column " + std::to_string(column));
    return t.cells[lane * TENSOR_COLUMNS + column];
}
// Whether `thread`'s tcgen05 instructions come after the last load of the cell.
DEV bool after_loads(const Cell& c, int thread) {
    if (c.loader < 0 || MUTE) return true;
    const Knows& l = knows(c.loader);
    if (c.loader == thread) return l.loads_waited >= c.loaded;
    const uint32_t now = knows(thread).after_epoch;
    return c.load_epoch < now && l.loads_at[now - 1] >= c.loaded;
}
DEV void free_columns(int warp, uint32_t address, int count) {
    Tensor& t = tensor();
    allocate_columns_check(count);
    for (size_t i = 0; i < t.columns.size(); i++) {
        const Tensor::Columns c = t.columns[i];
        if (c.first != (int)address || c.count != count) continue;
        if (c.warp != warp) fault("tensor memory: freed by another warp than allocated it");
        for (int l = 0; l < TENSOR_LANES; l++)
            for (int n = c.first; n < c.first + count; n++) {
                Cell& cell = t.cells[l * TENSOR_COLUMNS + n];
                const uint32_t known = knows(this_thread()).fenced;
                if (!MUTE && std::max(cell.write, cell.read) > known) fault("tensor memory: freed while an operation on it is on its way");
                if (!after_loads(cell, this_thread())) fault("tensor memory: freed while a thread loads from it");
                cell = Cell();
            }
        t.columns.erase(t.columns.begin() + i);
        return;
    }
    fault("tensor memory: columns are freed that were not allocated so");
}
DEV uint32_t load_cell(int lane, int column) {
    Cell& c = cell(lane, column, "tcgen05.ld");
    Knows& k = knows(this_thread());
    if (!MUTE && c.write > k.fenced) fault(c.write > k.seen ? "tcgen05.ld: of what is on its way" : "tcgen05.ld: no fence after the wait for what it reads");
    if (!c.written && !MUTE) fault("tcgen05.ld: of what nobody wrote, lane " + std::to_string(lane) + " column " + std::to_string(column));
    c.loader = this_thread(), c.loaded = k.loads, c.load_epoch = epoch_of(this_thread());
    return c.value;
}

// --- operations ---

DEV uint32_t next_operation() { return (uint32_t)tensor().operations.size(); }
// Whether operation `before` is ordered before one that this thread issues now.
DEV bool pipelined(uint32_t before, bool mma, uint64_t shape) {
    if (before == 0 || before <= knows(this_thread()).fenced) return true;
    const Operation& o = tensor().operations[before];
    return o.issuer == this_thread() && mma && (!o.mma || o.shape == shape);
}
// The cell as operation `number`, an mma or a cp, reads it.
DEV void operation_reads(uint32_t number, bool mma, uint64_t shape, int lane, int column) {
    Cell& c = cell(lane, column, mma ? "tcgen05.mma" : "tcgen05.cp");
    if (!c.written) fault("tcgen05.mma: reads what nobody wrote, lane " + std::to_string(lane) + " column " + std::to_string(column));
    if (!pipelined(c.write, mma, shape)) fault("tcgen05.mma: reads what an operation before it may still write");
    c.read = number;
}
DEV void operation_writes(uint32_t number, bool mma, uint64_t shape, int lane, int column) {
    Cell& c = cell(lane, column, mma ? "tcgen05.mma" : "tcgen05.cp");
    const char* what = mma ? "tcgen05.mma" : "tcgen05.cp";
    if (!pipelined(c.write, mma, shape)) fault(std::string(what) + ": writes what an operation before it may still write");
    // That a cp follows the mma which reads what it writes is not among the orders that the PTX ISA names.
    if (!pipelined(c.read, false, 0)) fault(std::string(what) + ": writes what an operation before it may still read");
    if (!after_loads(c, this_thread())) fault(std::string(what) + ": writes what a thread loads, with no fences and barrier between");
    c.write = number, c.written = true, c.loader = -1;
}
// Bytes of shared memory that operation `number` of this thread reads.
DEV void operation_reads_shared(uint32_t number, Shadow& s, size_t at, size_t n) {
    check_pending(s, at, n, "an operation on shared memory");
    if (memchr(s.written.data() + at, 0, n)) fault("an operation reads shared memory that nobody wrote");
    if (s.operations.empty()) s.operations.resize(s.written.size());
    for (size_t i = at; i < at + n; i++) {
        s.operations[i] = number;
        if (s.writes.empty()) continue;
        const When& w = s.writes[i];
        const int me = this_thread();
        const bool told = w.thread == me ? knows(me).proxy_fences > w.fences
                                         : w.block_epoch < epoch_of(me) && knows(w.thread).fences_at[epoch_of(me) - 1] > w.fences;
        if (!told) fault("race, an operation reads shared memory that thread " + std::to_string(w.thread) + " wrote, with no fence between proxies or no barrier");
    }
}
DEV void enqueue(bool mma, uint64_t shape, std::function<void()> run) {
    tensor().operations.push_back({mma, this_thread(), shape, std::move(run)});
}
DEV void carry_out(uint32_t upto) {
    Tensor& t = tensor();
    while (t.carried_out < upto) {
        Operation& o = t.operations[++t.carried_out];
        o.run();
        o.run = nullptr;
    }
}

// --- mbarriers ---

DEV void make_mbarrier(uint64_t address, int count) {
    if (address % 8) fault("mbarrier: misaligned");
    if (count < 1) fault("mbarrier: of no arrivals");
    Tensor& t = tensor();
    if (t.mbarriers.count(address)) fault("mbarrier: made twice");
    Mbarrier b{};
    b.count = b.pending = count, b.thread = this_thread(), b.epoch = epoch_of(this_thread());
    t.mbarriers[address] = b;
}
DEV void fence_mbarriers() {
    for (auto& [at, b] : tensor().mbarriers) if (b.thread == this_thread()) b.fenced = true;
}
DEV Mbarrier& mbarrier(uint64_t address) {
    auto found = tensor().mbarriers.find(address);
    if (found == tensor().mbarriers.end()) fault("mbarrier: none was made there");
    Mbarrier& b = found->second;
    if (b.thread != this_thread() && b.epoch >= epoch_of(this_thread())) fault("mbarrier: race, used while a thread makes it");
    return b;
}
// Arrives when all operations of this thread so far are done.
DEV void commit_to(uint64_t address) {
    Mbarrier& b = mbarrier(address);
    if (!b.fenced) fault("tcgen05.commit: to an mbarrier whose making was not fenced");
    if (b.open) fault("tcgen05.commit: to an mbarrier whose last phase nobody waited for");
    Tensor& t = tensor();
    for (size_t i = t.operations.size(); i-- > 1;)
        if (t.operations[i].issuer == this_thread()) { b.commit = (uint32_t)i; break; }
    b.open = true, b.asked = false;
}
// Whether the phase of this parity is over; false at the first time for one that is not, even where it could be carried out.
DEV bool ask(uint64_t address, int parity) {
    Mbarrier& b = mbarrier(address);
    Knows& k = knows(this_thread());
    const bool open = (int)(b.phase & 1) == parity;
    if (open && (MUTE || !b.asked || !b.open)) {
        b.asked |= b.open;
        if (!MUTE && ++k.asked > 40) fault("mbarrier: waits for a phase that nothing will end");
        return false;
    }
    if (open) {
        carry_out(b.commit);
        b.open = false;
        if (--b.pending == 0) b.pending = b.count, b.phase++, b.done = std::max(b.done, b.commit);
        if ((int)(b.phase & 1) == parity) return false;
    }
    k.seen = std::max(k.seen, b.done), k.asked = 0;
    return true;
}

// --- the order between threads ---

DEV void fence_before() { Knows& k = knows(this_thread()); k.loads_told = k.loads_waited; }
DEV void fence_after() { Knows& k = knows(this_thread()); k.fenced = k.seen, k.after_epoch = epoch_of(this_thread()); }
DEV void wait_loads() { Knows& k = knows(this_thread()); k.loads_waited = k.loads; }
DEV void fence_proxies() { knows(this_thread()).proxy_fences++; }
// A thread comes to a barrier of the block, and leaves it when all are there.
DEV void reach_barrier(int thread) {
    Tensor& t = tensor();
    Knows& k = knows(thread);
    k.loads_at.push_back(k.loads_told), k.fences_at.push_back(k.proxy_fences);
    if (t.seen_at.size() < k.loads_at.size()) t.seen_at.push_back(0);
    t.seen_at[k.loads_at.size() - 1] = std::max(t.seen_at[k.loads_at.size() - 1], k.seen);
}
DEV void leave_barrier(int thread) {
    Knows& k = knows(thread);
    k.seen = std::max(k.seen, tensor().seen_at[k.loads_at.size() - 1]);
}
// What a block must have done at its end.
DEV std::string left_behind() {
    Tensor& t = tensor();
    if (!t.columns.empty()) return "ends with tensor memory that was not freed";
    if (!MUTE && t.carried_out + 1 < t.operations.size()) return "ends while tensor instructions are on their way";
    return "";
}

}  // namespace standin
