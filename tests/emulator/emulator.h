// CUDA for a C++ compiler: what csrc/cuda/platform.h promises, so that the kernels' own source runs on the CPU.
//
// launch() runs the threads of one block at a time, each on a fiber, to their next synchronisation (scheduler.cpp). It
// returns the text of what it finds: a barrier or shuffle that some threads never reach, a shuffle from a thread that
// takes no part, a misaligned access, a write past shared memory. Shared memory starts as 0xFF: NaNs. What a kernel
// did is counted; the order of blocks, warps and lanes follows from a seed.
#pragma once

#include <math.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

// dladdr() finds the names of visible functions only.
#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "shared memory is declared with PARA_SHARED or PARA_DYNAMIC_SHARED");

#define PARA_DYNAMIC_SHARED(name) unsigned char* const name = para::emulator::dynamic_shared()
#define PARA_SHARED(type, name, count)         \
    static char name##_site;                   \
    auto& name = *static_cast<type(*)[count]>( \
        static_cast<void*>(para::emulator::static_shared(&name##_site, sizeof(type[count]))))

struct uint2 {
    alignas(8) unsigned x;
    unsigned y;
};
struct uint3 {
    unsigned x, y, z;
};
struct uint4 {
    alignas(16) unsigned x;
    unsigned y, z, w;
};
struct float2 {
    alignas(8) float x;
    float y;
};
struct float4 {
    alignas(16) float x;
    float y, z, w;
};
struct double2 {
    alignas(16) double x;
    double y;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
inline double2 make_double2(double x, double y) {
    return {x, y};
}

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace para::emulator {

struct Place {  // in the kernels' source
    const char* file;
    int line;
};

// As a default argument: where the function was called that has it.
constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
}

struct Launch {
    std::string kernel;  // "gram<float>", without namespaces
    dim3 grid, block;
    size_t shared = 0;            // bytes per block, static and dynamic: the most that a block had
    uint64_t read = 0;            // bytes of global memory, all blocks together
    uint64_t written = 0;         //
    uint64_t block_barriers = 0;  // __syncthreads, once per block
    uint64_t warp_barriers = 0;   // __syncwarp, once per warp
};

const std::vector<Launch>& launches();  // since the last reset(), in order
void reset();
void set_seed(uint64_t seed);         // 0, the default: in order. PARA_EMULATOR_SEED is the first value
void set_shared_limit(size_t bytes);  // of shared memory per block; at first that of an H100

// What follows is between this header and the scheduler.

extern unsigned lane;  // of the thread that runs, in its warp
extern std::atomic<uint64_t> bytes_read, bytes_written;

unsigned char* dynamic_shared();
unsigned char* static_shared(const void* site, size_t bytes);
[[noreturn]] void fail(const char* what, Place place);

bool wait_for_block(bool predicate, const char* word, Place place);  // whether any thread's predicate holds
void wait_for_warp(unsigned mask, Place place);
uint64_t exchange(unsigned mask, uint64_t bits, unsigned source_lane, const char* word, Place place);
unsigned vote(unsigned mask, bool predicate, const char* word, Place place);

const char* launch(const void* kernel, dim3 grid, dim3 block, size_t shared, void (*run)(void*), void* args);

// Not atomic as a whole, and need not be, since fibers share one thread; atomics only so that TSan sees no race here.
inline void count(std::atomic<uint64_t>& counter, size_t bytes) {
    counter.store(counter.load(std::memory_order_relaxed) + bytes, std::memory_order_relaxed);
}

template <class T>
void check_global(const T* global, Place place) {
    static_assert(sizeof(T) <= 16, "wider than the widest load and store");
    if (reinterpret_cast<uintptr_t>(global) % sizeof(T)) fail("a misaligned address in global memory", place);
}

template <class To, class From>
To bits_of(From value) {
    static_assert(sizeof(To) >= sizeof(From));
    To bits{};
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source_lane, const char* word, Place place) {
    static_assert(std::is_arithmetic<T>::value && sizeof(T) >= 4, "what CUDA can shuffle");
    const uint64_t bits = exchange(mask, bits_of<uint64_t>(value), source_lane, word, place);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace para::emulator

inline void __syncthreads(para::emulator::Place place = para::emulator::here()) {
    para::emulator::wait_for_block(false, "__syncthreads", place);
}

inline int __syncthreads_or(int predicate, para::emulator::Place place = para::emulator::here()) {
    return para::emulator::wait_for_block(predicate != 0, "__syncthreads_or", place);
}

inline void __syncwarp(unsigned mask = ~0u, para::emulator::Place place = para::emulator::here()) {
    para::emulator::wait_for_warp(mask, place);
}

// Shuffles stay within sections of `width` lanes, a power of two; where the source lies outside, a lane gets its own.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              para::emulator::Place place = para::emulator::here()) {
    const unsigned w = static_cast<unsigned>(width), section = para::emulator::lane & ~(w - 1);
    return para::emulator::shuffle(mask, value, section | (static_cast<unsigned>(source) & (w - 1)), "__shfl_sync",
                                   place);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32,
                  para::emulator::Place place = para::emulator::here()) {
    const unsigned lane = para::emulator::lane, source = lane ^ static_cast<unsigned>(with);
    const unsigned last = lane | (static_cast<unsigned>(width) - 1);
    return para::emulator::shuffle(mask, value, source <= last ? source : lane, "__shfl_xor_sync", place);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   para::emulator::Place place = para::emulator::here()) {
    const unsigned lane = para::emulator::lane, source = lane + by;
    const unsigned last = lane | (static_cast<unsigned>(width) - 1);
    return para::emulator::shuffle(mask, value, source <= last ? source : lane, "__shfl_down_sync", place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, para::emulator::Place place = para::emulator::here()) {
    return para::emulator::vote(mask, predicate != 0, "__ballot_sync", place);
}

inline int __any_sync(unsigned mask, int predicate, para::emulator::Place place = para::emulator::here()) {
    return para::emulator::vote(mask, predicate != 0, "__any_sync", place) != 0;
}

inline int __all_sync(unsigned mask, int predicate, para::emulator::Place place = para::emulator::here()) {
    return para::emulator::vote(mask, predicate == 0, "__all_sync", place) == 0;
}

template <class T, class = std::enable_if_t<std::is_integral<T>::value>>
T atomicAdd(T* address, std::common_type_t<T> value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
    static_assert(std::is_integral<T>::value, "CUDA has it for integers");
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (old < value &&
           !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

// The package has no atomics on floating-point numbers; the emulator's own test shows with these what a race is.
inline double atomicAdd(double* address, double value) {
    double old, sum;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do {
        sum = old + value;
    } while (!__atomic_compare_exchange(address, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

inline float atomicAdd(float* address, float value) {
    float old, sum;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do {
        sum = old + value;
    } while (!__atomic_compare_exchange(address, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

using std::max;
using std::min;

inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline int __clz(int x) {
    return x ? __builtin_clz(static_cast<unsigned>(x)) : 32;
}
inline unsigned __float_as_uint(float x) {
    return para::emulator::bits_of<unsigned>(x);
}
inline float __uint_as_float(unsigned x) {
    return para::emulator::bits_of<float>(x);
}
inline int __float_as_int(float x) {
    return para::emulator::bits_of<int>(x);
}
inline float __int_as_float(int x) {
    return para::emulator::bits_of<float>(x);
}
inline long long __double_as_longlong(double x) {
    return para::emulator::bits_of<long long>(x);
}
inline double __longlong_as_double(long long x) {
    return para::emulator::bits_of<double>(x);
}
inline double rsqrt(double x) {
    return 1 / sqrt(x);
}

namespace para::cuda {

using Stream = void*;

template <class T>
T read(const T* global, emulator::Place place = emulator::here()) {
    emulator::check_global(global, place);
    emulator::count(emulator::bytes_read, sizeof(T));
    return *global;
}

template <class T>
void write(T* global, std::common_type_t<T> value, emulator::Place place = emulator::here()) {
    emulator::check_global(global, place);
    emulator::count(emulator::bytes_written, sizeof(T));
    *global = value;
}

inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    return __uint_as_float(sign | magnitude << 13) * 0x1p112f;  // 112 between the biases; right for subnormals too
}

inline uint16_t double_to_half(double value) {
    const int sign = signbit(value) ? 0x8000 : 0;
    const double magnitude = fabs(value);
    if (magnitude != magnitude) return 0x7fff;
    if (magnitude >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
    const int exponent = magnitude < 0x1p-14 ? -14 : ilogb(magnitude);
    // In steps of the last bit; the leading one, where there is one, and a carry into the exponent add themselves.
    const int steps = static_cast<int>(nearbyint(ldexp(magnitude, 10 - exponent)));
    return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps));
}

inline uint16_t float_to_half(float value) {
    return double_to_half(value);
}

size_t shared_limit(int device);
inline const char* unusable(int) {
    return nullptr;
}

template <class... Parameters, class... Args>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream, Args&&... args) {
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> args;
    } call{kernel, std::tuple<Parameters...>(static_cast<Args&&>(args)...)};
    const auto run = [](void* call) { std::apply(static_cast<Call*>(call)->kernel, static_cast<Call*>(call)->args); };
    return emulator::launch(reinterpret_cast<const void*>(kernel), grid, block, shared, run, &call);
}

}  // namespace para::cuda
