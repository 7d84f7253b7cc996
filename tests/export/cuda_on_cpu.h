/*
 * As much of CUDA as the generated kernels use, on a processor: the threads of a block are coroutines, one after the
 * other from barrier to barrier. So they run in the same order every time, in another if told to: with a barrier too few
 * the two differ. Needs ucontext, of glibc: it gives each its stack. From then on _longjmp changes between them, for
 * swapcontext asks the system for the signal mask each time, which takes longer than the kernels do. Nor are there
 * headers of C++: a compiler takes longer for them than for the kernels.
 */
#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

/* --- arithmetic -------------------------------------------------------------------------------------------------- */

template <class To, class From> To same_bits(From value)
{
    static_assert(sizeof(To) == sizeof(From), "bits are neither made up nor lost");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}

inline float __int_as_float(int bits) { return same_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }

/* Rounded up: what the nearest lacks, which is exact, says whether that is the next one. */
inline float __fadd_ru(float a, float b)
{
    const float sum = a + b, part = sum - a, rest = (a - (sum - part)) + (b - part);
    return rest > 0 ? nextafterf(sum, INFINITY) : sum;
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector)
{
    const unsigned long long bytes = (unsigned long long)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i)
        result |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift)
{
    return (unsigned)(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}

/* As wrong as they may be on a GPU. */
inline float __fdividef(float a, float b) { return a / b * (1 + 0x1p-22f); }
inline float __log2f(float x) { return log2f(x) * (1 + 0x1p-22f); }

/* Threads take turns at barriers alone. */
inline int atomicAdd(int *target, int value) { return (*target += value) - value; }
inline int atomicOr(int *target, int value)
{
    const int before = *target;
    *target |= value;
    return before;
}

inline unsigned atomicAdd(unsigned *target, unsigned value) { return (*target += value) - value; }
inline unsigned atomicMax(unsigned *target, unsigned value)
{
    const unsigned before = *target;
    *target = value > before ? value : before;
    return before;
}
inline unsigned atomicInc(unsigned *target, unsigned last)
{
    const unsigned before = *target;
    *target = before >= last ? 0 : before + 1;
    return before;
}
inline unsigned atomicExch(unsigned *target, unsigned value)
{
    const unsigned before = *target;
    *target = value;
    return before;
}
inline void __threadfence() {}

template <class T> T __ldcs(const T *source) { return *source; }
template <class T> T __ldcg(const T *source) { return *source; }
template <class T> void __stcs(T *target, T value) { *target = value; }

/* What stands for the instructions of PTX. */
inline float flushed(float value) { return fabsf(value) < 0x1p-126f ? copysignf(0, value) : value; }
inline float ptx_ex2(float x) { return flushed(exp2f(flushed(x))); }
inline float ptx_rcp(float x) { return flushed(1 / flushed(x)); }

inline int ptx_dp4a(unsigned tokens, int weights, int sum)
{
    unsigned total = (unsigned)sum;
    for (int i = 0; i < 4; ++i)
        total += (tokens >> 8 * i & 255) * (unsigned)(signed char)(weights >> 8 * i);
    return (int)total;
}

/* --- threads ------------------------------------------------------------------------------------------------------ */

struct Barrier {
    unsigned size = 0, arrived = 0, times_passed = 0;
    bool any = false, any_before = false;
};

struct Thread {
    ucontext_t context;
    jmp_buf place;
    void *stack;
    bool is_started, is_done;
};

struct { unsigned x; } threadIdx, blockIdx, gridDim;

static constexpr unsigned WARP_SIZE = 32, MOST_THREADS = 1024, STACK_BYTES = 256 * 1024;
static jmp_buf scheduler;
static Thread threads[MOST_THREADS];
static Barrier warps[MOST_THREADS / WARP_SIZE];
static unsigned exchanged[MOST_THREADS];
static Barrier block;
static unsigned num_events;
static void *kernel;
static void *const *arguments;
static unsigned num_arguments;
/* Pointers and numbers alike. */
typedef unsigned long long Argument;
static constexpr unsigned MOST_ARGUMENTS = 12;
static_assert(sizeof(Argument) == sizeof(void *), "they are passed alike");

static void leave(Thread &thread)
{
    if (!_setjmp(thread.place))
        _longjmp(scheduler, 1);
}

static void enter(Thread &thread)
{
    if (_setjmp(scheduler))
        return;
    if (thread.is_started)
        _longjmp(thread.place, 1);
    thread.is_started = true;
    setcontext(&thread.context);
}

static void wait_at(Barrier &barrier)
{
    const unsigned before = barrier.times_passed;
    Thread &own = threads[threadIdx.x];
    if (++barrier.arrived == barrier.size) {
        barrier.any_before = barrier.any;
        barrier.arrived = 0, barrier.any = false, ++barrier.times_passed, ++num_events;
    }
    while (barrier.times_passed == before)
        leave(own);
}

inline void __syncthreads() { wait_at(block); }
inline void __syncwarp() { wait_at(warps[threadIdx.x / WARP_SIZE]); }

inline int __syncthreads_or(int value)
{
    block.any |= value != 0;
    wait_at(block);
    return block.any_before;
}

inline int __any_sync(unsigned, int value)
{
    Barrier &own = warps[threadIdx.x / WARP_SIZE];
    own.any |= value != 0;
    wait_at(own);
    return own.any_before;
}

template <class T> T value_of(unsigned thread, T own)
{
    exchanged[threadIdx.x] = same_bits<unsigned>(own);
    __syncwarp();
    const T result = same_bits<T>(exchanged[thread]);
    __syncwarp();
    return result;
}

template <class T> T __shfl_sync(unsigned, T value, int lane, int width)
{
    return value_of(threadIdx.x / width * width + lane, value);
}

template <class T> T __shfl_xor_sync(unsigned, T value, int distance)
{
    return value_of(threadIdx.x ^ distance, value);
}

static void run_thread()
{
    for (Thread &own = threads[threadIdx.x];; leave(own)) {
        Argument a[MOST_ARGUMENTS] = {};
        for (unsigned i = 0; i < num_arguments; ++i)
            a[i] = (Argument)arguments[i];
        /* A kernel takes as many as it has parameters: whoever calls makes room for them, and clears it away. */
        ((void (*)(Argument, Argument, Argument, Argument, Argument, Argument, Argument, Argument, Argument, Argument,
                   Argument, Argument))kernel)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
        own.is_done = true;
        ++num_events;
    }
}

static void start_threads(unsigned size)
{
    for (Thread *thread = threads; thread != threads + size; ++thread) {
        if (!thread->stack)
            thread->stack = malloc(STACK_BYTES);
        thread->is_started = false;
        getcontext(&thread->context);
        thread->context.uc_stack.ss_sp = thread->stack;
        thread->context.uc_stack.ss_size = STACK_BYTES;
        makecontext(&thread->context, run_thread, 0);
    }
}

/* False where some threads wait at a barrier that others never reach. */
static bool run_block(unsigned size, bool is_backwards)
{
    block = {size};
    for (unsigned i = 0; i < size; ++i)
        threads[i].is_done = false, exchanged[i] = 0, warps[i / WARP_SIZE] = {WARP_SIZE};
    for (unsigned before = num_events - 1; before != num_events;) {
        before = num_events;
        for (unsigned i = 0; i < size; ++i) {
            threadIdx.x = is_backwards ? size - 1 - i : i;
            if (!threads[threadIdx.x].is_done)
                enter(threads[threadIdx.x]);
        }
    }
    for (unsigned i = 0; i < size; ++i)
        if (!threads[i].is_done)
            return false;
    return true;
}

extern "C" bool run_kernel(void *function, unsigned blocks, unsigned size, bool is_backwards, void *const *values,
                           unsigned count)
{
    if (size > MOST_THREADS || size % WARP_SIZE != 0 || count > MOST_ARGUMENTS)
        return false;
    kernel = function, arguments = values, num_arguments = count;
    start_threads(size);
    gridDim.x = blocks;
    for (unsigned i = 0; i < blocks; ++i) {
        blockIdx.x = is_backwards ? blocks - 1 - i : i;
        if (!run_block(size, is_backwards))
            return false;
    }
    return true;
}
