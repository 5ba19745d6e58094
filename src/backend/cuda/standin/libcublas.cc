// A libcublas.so.13 without a GPU: the calls that Recoup makes, over the memory of the stand-in for the driver (libcuda.cc). Sums
// are plain loops; what NVIDIA's would do in silence is an error: operands beyond their allocation, leading dimensions that make
// rows overlap, numbers that nobody wrote, results over operands, settings that would let results differ from run to run.
// scripts/cuda-standin.sh builds it.
//
// STANDIN_CUBLAS_VERSION=N  its version (default 131000, which is 13.10)
// STANDIN_CUBLAS_WRONG=1    its products of BF16 lack their last term
// STANDIN_FAIL              counts its calls as well, see libcuda.cc
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <vector>

typedef int Status;
enum { OK = 0, NOT_INITIALIZED = 1, ALLOC_FAILED = 3, INVALID_VALUE = 7, EXECUTION_FAILED = 13, INTERNAL_ERROR = 14, NOT_SUPPORTED = 15 };
struct Handle { void* stream = nullptr; uint64_t workspace = 0; size_t workspace_bytes = 0; int math = 0, atomics = 0; };

static std::mutex LOCK;
static std::set<Handle*> HANDLES;

// The driver's part, of the library that is loaded already.
template <class F> static F driver(const char* name) {
    static void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    return library ? (F)dlsym(library, name) : nullptr;
}
static Status refuse(Status status, const char* what) {
    fprintf(stderr, "stand-in: cuBLAS: %s\n", what);
    return status;
}
static Status called() {
    static auto call = driver<int (*)()>("standin_called");
    if (!call) return refuse(NOT_INITIALIZED, "the driver is not the stand-in");
    const int code = call();
    return code == 0 ? OK : code == 2 ? ALLOC_FAILED : EXECUTION_FAILED;
}
static int look(uint64_t p, size_t n, char how, const char* what) {
    static auto call = driver<int (*)(uint64_t, size_t, char, const char*)>("standin_look");
    return call ? call(p, n, how, what) : 1;
}
#define CALL                                     \
    std::lock_guard<std::mutex> guard(LOCK);     \
    if (Status failed = called()) return failed
#define OF(h) \
    if (!HANDLES.count(h)) return refuse(NOT_INITIALIZED, "no handle")

// A matrix as cuBLAS sees it: by columns, `rows` of each, `stride` numbers from column to column.
struct Matrix {
    uint64_t at;
    int64_t rows, columns, stride;
    bool bf16;
    size_t size() const { return bf16 ? 2 : 4; }
    size_t bytes() const { return size() * ((columns - 1) * stride + rows); }
    float value(int64_t row, int64_t column) const {
        const char* p = (const char*)at + size() * (column * stride + row);
        uint32_t bits;
        if (bf16) {
            uint16_t half;
            memcpy(&half, p, 2);
            bits = (uint32_t)half << 16;
        } else {
            memcpy(&bits, p, 4);
        }
        float v;
        memcpy(&v, &bits, 4);
        return v;
    }
};
// Whether it can be read, in full.
static Status operand(const Matrix& m, const char* what) {
    if (m.stride < m.rows || m.stride < 1) return refuse(INVALID_VALUE, "a leading dimension is smaller than its matrix has rows");
    if (m.at % m.size()) return refuse(INVALID_VALUE, "an operand is not aligned to its numbers");
    return look(m.at, m.bytes(), 'r', what) ? EXECUTION_FAILED : OK;
}

extern "C" {
Status cublasCreate_v2(Handle** h) {
    CALL;
    *h = new Handle;
    HANDLES.insert(*h);
    return OK;
}
Status cublasDestroy_v2(Handle* h) {
    std::lock_guard<std::mutex> guard(LOCK);
    OF(h);
    HANDLES.erase(h);
    delete h;
    return OK;
}
Status cublasGetVersion_v2(Handle* h, int* version) {
    CALL;
    OF(h);
    const char* v = getenv("STANDIN_CUBLAS_VERSION");
    *version = v ? atoi(v) : 131000;
    return OK;
}
// As the real one: whoever sets the stream loses the workspace.
Status cublasSetStream_v2(Handle* h, void* stream) { CALL; OF(h); h->stream = stream, h->workspace = 0; return OK; }
Status cublasSetWorkspace_v2(Handle* h, uint64_t workspace, size_t bytes) {
    CALL;
    OF(h);
    if (workspace % 256) return refuse(INVALID_VALUE, "a workspace is not aligned to 256 bytes");
    h->workspace = workspace, h->workspace_bytes = bytes;
    return OK;
}
Status cublasSetMathMode(Handle* h, int mode) { CALL; OF(h); h->math = mode; return OK; }
Status cublasSetAtomicsMode(Handle* h, int mode) { CALL; OF(h); h->atomics = mode; return OK; }

Status cublasGemmEx(Handle* h, int op_a, int op_b, int m, int n, int k, const void* alpha, uint64_t a, int kind_a, int lda, uint64_t b,
                    int kind_b, int ldb, const void* beta, uint64_t c, int kind_c, int ldc, int compute, int algorithm) {
    CALL;
    OF(h);
    if (!h->stream) return refuse(INTERNAL_ERROR, "no stream was set");
    if (!h->workspace) return refuse(INTERNAL_ERROR, "no workspace since the stream was set: other runs may take other algorithms");
    if (h->math != 16 || h->atomics != 0) return refuse(INTERNAL_ERROR, "sums in less than f32, or by atomics, are allowed");
    if (look(h->workspace, h->workspace_bytes, '-', "a workspace")) return EXECUTION_FAILED;
    if (m <= 0 || n <= 0 || k <= 0 || op_a < 0 || op_a > 1 || op_b < 0 || op_b > 1) return refuse(INVALID_VALUE, "a shape or operation");
    const bool bf16 = kind_a == 14;
    if ((kind_a != 0 && kind_a != 14) || kind_b != kind_a || kind_c != 0 || compute != (bf16 ? 68 : 69) || algorithm != -1)
        return refuse(NOT_SUPPORTED, "types");
    const Matrix A{a, op_a ? k : m, op_a ? m : k, lda, bf16}, B{b, op_b ? n : k, op_b ? k : n, ldb, bf16}, C{c, m, n, ldc, false};
    if (Status failed = operand(A, "an operand")) return failed;
    if (Status failed = operand(B, "an operand")) return failed;
    float factor, keep;
    memcpy(&factor, alpha, 4), memcpy(&keep, beta, 4);
    if (C.stride < C.rows || C.at % 4) return refuse(INVALID_VALUE, "the result's leading dimension or alignment");
    if (keep != 0 && look(c, C.bytes(), 'r', "what is added to")) return EXECUTION_FAILED;
    if (look(c, C.bytes(), 'w', "a result")) return EXECUTION_FAILED;
    const auto apart = [&](const Matrix& x) { return c + C.bytes() <= x.at || x.at + x.bytes() <= c; };
    if (!apart(A) || !apart(B)) return refuse(INVALID_VALUE, "the result lies over an operand");
    // op(A) by columns, so that the inner loop has its numbers side by side; every sum goes through k in order.
    std::vector<float> left((size_t)m * k), sums(m);
    for (int64_t p = 0; p < k; p++)
        for (int64_t i = 0; i < m; i++) left[p * m + i] = op_a ? A.value(p, i) : A.value(i, p);
    const int64_t terms = bf16 && getenv("STANDIN_CUBLAS_WRONG") ? k - 1 : k;
    for (int64_t j = 0; j < n; j++) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t p = 0; p < terms; p++) {
            const float right = op_b ? B.value(j, p) : B.value(p, j);
            const float* column = &left[p * m];
            for (int64_t i = 0; i < m; i++) sums[i] += column[i] * right;
        }
        float* out = (float*)c + j * C.stride;
        for (int64_t i = 0; i < m; i++) out[i] = factor * sums[i] + (keep != 0 ? keep * out[i] : 0.0f);
    }
    return OK;
}
const char* cublasGetStatusString(Status s) {
    switch (s) {
        case OK: return "success";
        case NOT_INITIALIZED: return "the library was not initialized";
        case ALLOC_FAILED: return "the resource allocation failed";
        case INVALID_VALUE: return "an invalid value was used as an argument";
        case EXECUTION_FAILED: return "the function failed to launch on the GPU";
        case INTERNAL_ERROR: return "an internal operation failed";
        case NOT_SUPPORTED: return "the operation is not supported";
        default: return nullptr;
    }
}
}
