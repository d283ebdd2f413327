// Runs CUDA kernels on the host: included before the kernels' own source, which g++ then compiles.
//
// A block's threads are fibers of one thread of the CPU: each runs until it waits at a barrier, and
// goes on when all others have come there. In which order they run between barriers is chosen from
// outside, as is the order of the blocks: code that relies on an order gives another result, or the
// same by chance in few of them. Before each block, shared memory is filled with NaN.
//
// What this cannot see: two warps that do race, but with the same result in every order tried;
// anything about speed; alignment beyond what the CPU asks for; the arithmetic of CUDA's own
// functions. That is what compute-sanitizer and the tests marked gpu are for.

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>
#include <sys/mman.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }

static inline int min(int a, int b) { return a < b ? a : b; }

static inline float __int_as_float(int bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// All threads are one, so any read-modify-write is atomic.
template <typename T> static T atomicAdd(T* address, T value)
{
    const T old = *address;
    *address = old + value;
    return old;
}

struct Index { unsigned int x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;

extern unsigned char dynamic_shared[];

namespace host {

enum Wait { RUNNING, AT_BLOCK, AT_WARP, FINISHED };

// A Turing block may have 48 KiB unasked; what lies behind what was asked for is checked.
constexpr int SHARED = 48 * 1024, GUARD = 4096, STACK = 64 * 1024, WARP_SIZE = 32;

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool started;
    Wait wait;
    unsigned char* stack;
    int shuffle;
    unsigned char lane[2][16]; // what it shows its warp, in this shuffle and in the one before
};

static std::vector<Fiber> fibers;
static void (*kernel)(void** given);
static void** arguments;
static jmp_buf scheduler;
static int current;
static const char* problem;

// Jumps between contexts that exist are left to _setjmp: swapcontext asks the kernel each time.
static void to_scheduler()
{
    if (!_setjmp(fibers[current].at))
        _longjmp(scheduler, 1);
}

static void body()
{
    for (;;) {
        kernel(arguments);
        fibers[current].wait = FINISHED;
        to_scheduler(); // which comes back with the next block
    }
}

static void run(int n)
{
    current = n;
    threadIdx = {(unsigned int)n, 0, 0};
    Fiber& fiber = fibers[n];
    fiber.wait = RUNNING;
    if (_setjmp(scheduler))
        return;
    if (fiber.started)
        _longjmp(fiber.at, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = STACK - n % 256 * 64; // else all stacks share a few lines of the CPU's cache
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, body, 0);
    setcontext(&fiber.start);
}

static void wait(Wait where)
{
    fibers[current].wait = where;
    to_scheduler();
}

static uint32_t state;

static uint32_t random() // xorshift: the header <random> takes the compiler as long as all kernels do
{
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
}

static void shuffled(std::vector<int>& order, int how)
{
    for (int n = 0; n < (int)order.size(); ++n)
        order[n] = how == 1 ? (int)order.size() - 1 - n : n;
    if (how > 1)
        for (int n = (int)order.size() - 1; n > 0; --n)
            std::swap(order[n], order[random() % (n + 1)]);
}

// how: 0 first to last, 1 last to first, other numbers are seeds of a random order
static void run_block(int threads, int how)
{
    while ((int)fibers.size() < threads) {
        fibers.emplace_back();
        fibers.back().stack = (unsigned char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    for (int n = 0; n < threads; ++n)
        fibers[n].wait = RUNNING, fibers[n].shuffle = 0;
    std::vector<int> order(threads);
    for (;;) {
        shuffled(order, how);
        for (int n : order)
            if (fibers[n].wait == RUNNING)
                run(n);
        // all lanes of a warp at a warp's barrier go on; if none is, all threads of the block
        bool any = false;
        for (int warp = 0; warp < threads; warp += WARP_SIZE) {
            int waiting = 0, size = min(WARP_SIZE, threads - warp);
            for (int n = warp; n < warp + size; ++n)
                waiting += fibers[n].wait == AT_WARP;
            if (waiting == 0)
                continue;
            if (waiting != size)
                problem = "some lanes of a warp wait for others that do not come";
            any = true;
            for (int n = warp; n < warp + size; ++n)
                fibers[n].wait = RUNNING;
        }
        if (problem)
            return;
        if (any)
            continue;
        int waiting = 0, finished = 0;
        for (int n = 0; n < threads; ++n)
            waiting += fibers[n].wait == AT_BLOCK, finished += fibers[n].wait == FINISHED;
        if (finished == threads)
            return;
        if (waiting != threads) {
            problem = "some threads wait at a barrier that others have passed by";
            return;
        }
        for (int n = 0; n < threads; ++n)
            fibers[n].wait = RUNNING;
    }
}

static const char* launch(void (*function)(void**), void** given, long long blocks, int threads, int shared_bytes,
                          int how)
{
    problem = nullptr;
    if (blocks < 1 || blocks > 2147483647LL || threads < 1 || threads > 1024 || shared_bytes > SHARED)
        return "the grid, the block or its shared memory is of no size that a GPU takes";
    kernel = function, arguments = given;
    state = how + 1;
    gridDim = {(unsigned int)blocks, 1, 1};
    blockDim = {(unsigned int)threads, 1, 1};
    std::vector<int> order(blocks);
    shuffled(order, how);
    std::memset(dynamic_shared, 0xff, SHARED + GUARD);
    for (int block : order) {
        blockIdx = {(unsigned int)block, 0, 0};
        std::memset(dynamic_shared, 0xff, shared_bytes);
        run_block(threads, how);
        if (problem)
            break;
    }
    static const std::vector<unsigned char> untouched(SHARED + GUARD, 0xff);
    if (!problem && std::memcmp(dynamic_shared + shared_bytes, untouched.data(), SHARED + GUARD - shared_bytes))
        problem = "written behind the shared memory that was asked for";
    if (problem)
        for (Fiber& fiber : fibers)
            fiber.started = false; // it may have been left within the kernel
    return problem;
}

} // namespace host

alignas(16) unsigned char dynamic_shared[host::SHARED + host::GUARD];

static inline void __syncthreads() { host::wait(host::AT_BLOCK); }
static inline void __syncwarp(unsigned int = 0xffffffffu) { host::wait(host::AT_WARP); }

template <typename T> static T __shfl_down_sync(unsigned int, T value, int apart)
{
    const int n = host::current, from = n % 32 + apart < 32 ? n + apart : n;
    const int turn = host::fibers[n].shuffle ^= 1; // some lanes still read what was shown before
    std::memcpy(host::fibers[n].lane[turn], &value, sizeof value);
    host::wait(host::AT_WARP);
    T result;
    std::memcpy(&result, host::fibers[from].lane[turn], sizeof result);
    return result;
}
