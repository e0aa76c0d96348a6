// Vec: eight doubles, the unit of every inner loop, as one, two, four or eight registers of the ISA level. Its
// arithmetic is plain IEEE (contraction is off), so every level computes the same bits; `fma_exact` may fuse, and is
// used only where the product is exact, so that fusing changes nothing. Included by kernels.cpp alone: code here is
// compiled once per level, in that level's namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#endif

// Arrays of registers stay registers only where the loops over them disappear.
#if defined(__clang__)
#define PARA_UNROLL _Pragma("clang loop unroll(full)")
#define PARA_UNROLL_SOME _Pragma("clang loop unroll_count(4)")
#elif defined(__GNUC__)
#define PARA_UNROLL _Pragma("GCC unroll 32")
#define PARA_UNROLL_SOME _Pragma("GCC unroll 4")
#else
#define PARA_UNROLL
#define PARA_UNROLL_SOME
#endif
#if defined(__GNUC__)
#define PARA_INLINE __attribute__((always_inline)) inline
#define PARA_NOINLINE __attribute__((noinline))
#else
#define PARA_INLINE inline
#define PARA_NOINLINE
#endif

namespace para {
namespace PARA_ISA {
namespace {

constexpr int64_t LANES = 8;

// Part: one register. Truth: what comparing two gives, all ones or zeros in each lane. Another size than the level's
// own may be forced, to try the code of wide registers on a machine that has none.
#if defined(__GNUC__)

#if !defined(PARA_PART_BYTES)
#if defined(__AVX512F__)
#define PARA_PART_BYTES 64
#elif defined(__AVX2__)
#define PARA_PART_BYTES 32
#else
#define PARA_PART_BYTES 16
#endif
#endif
constexpr int PART_BYTES = PARA_PART_BYTES;
typedef double Part __attribute__((vector_size(PART_BYTES)));
typedef int64_t Truth __attribute__((vector_size(PART_BYTES)));

inline void fill(Part& part, double x) {
    part = x - Part{};  // subtracting +0 changes nothing, not even the sign of -0
}
inline Part select(Truth truth, Part yes, Part no) {
    return truth ? yes : no;
}
#if defined(__AVX512F__) && PARA_PART_BYTES == 64
inline Part square_root(Part x) {
    return (Part)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
}
inline Part fma_exact(Part a, Part b, Part c) {
    return (Part)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__) && defined(__FMA__) && PARA_PART_BYTES == 32
inline Part square_root(Part x) {
    return (Part)_mm256_sqrt_pd((__m256d)x);
}
inline Part fma_exact(Part a, Part b, Part c) {
    return (Part)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
inline Part square_root(Part x) {
#if defined(__SSE2__) && PARA_PART_BYTES == 16
    return (Part)_mm_sqrt_pd((__m128d)x);
#else
    Part out;
    for (int i = 0; i < PART_BYTES / 8; ++i) out[i] = std::sqrt(x[i]);
    return out;
#endif
}
inline Part fma_exact(Part a, Part b, Part c) {
    return a * b + c;
}
#endif

#else

using Part = double;
using Truth = int64_t;
constexpr int PART_BYTES = 8;
inline void fill(Part& part, double x) {
    part = x;
}
inline Part select(Truth truth, Part yes, Part no) {
    return truth ? yes : no;
}
inline Part square_root(Part x) {
    return std::sqrt(x);
}
inline Part fma_exact(Part a, Part b, Part c) {
    return a * b + c;
}

#endif

// Two halves that compute alike: registers stay registers, which wider compiler vectors do not on narrow machines.
template <class H>
struct Two {
    H low, high;
};
template <class H>
inline Two<H> operator+(Two<H> x, Two<H> y) {
    return {x.low + y.low, x.high + y.high};
}
template <class H>
inline Two<H> operator-(Two<H> x, Two<H> y) {
    return {x.low - y.low, x.high - y.high};
}
template <class H>
inline Two<H> operator*(Two<H> x, Two<H> y) {
    return {x.low * y.low, x.high * y.high};
}
template <class H>
inline Two<H> operator/(Two<H> x, Two<H> y) {
    return {x.low / y.low, x.high / y.high};
}
template <class H>
inline Two<H> operator-(Two<H> x) {
    return {-x.low, -x.high};
}
template <class H>
inline Two<H> operator|(Two<H> x, Two<H> y) {
    return {x.low | y.low, x.high | y.high};
}
template <class H>
inline void operator+=(Two<H>& x, Two<H> y) {
    x = x + y;
}
template <class H>
struct Compared;
template <>
struct Compared<Part> {
    using type = Truth;
};
template <class H>
struct Compared<Two<H>> {
    using type = Two<typename Compared<H>::type>;
};
template <class H>
inline typename Compared<Two<H>>::type operator>(Two<H> x, Two<H> y) {
    return {x.low > y.low, x.high > y.high};
}
template <class H>
inline void fill(Two<H>& x, double value) {
    fill(x.low, value);
    fill(x.high, value);
}
template <class T, class H>
inline Two<H> select(Two<T> truth, Two<H> yes, Two<H> no) {
    return {select(truth.low, yes.low, no.low), select(truth.high, yes.high, no.high)};
}
template <class H>
inline Two<H> square_root(Two<H> x) {
    return {square_root(x.low), square_root(x.high)};
}
template <class H>
inline Two<H> fma_exact(Two<H> a, Two<H> b, Two<H> c) {
    return {fma_exact(a.low, b.low, c.low), fma_exact(a.high, b.high, c.high)};
}

// Register by register: copying eight doubles at once would go through the stack.
inline void read(Part& part, const double* p) {
    std::memcpy(&part, p, sizeof part);
}
inline void write(const Part& part, double* p) {
    std::memcpy(p, &part, sizeof part);
}
template <class H>
inline void read(Two<H>& x, const double* p) {
    read(x.low, p);
    read(x.high, p + sizeof(H) / sizeof(double));
}
template <class H>
inline void write(const Two<H>& x, double* p) {
    write(x.low, p);
    write(x.high, p + sizeof(H) / sizeof(double));
}

template <class P, int bytes>
struct Widened {
    using type = Two<typename Widened<P, bytes * 2>::type>;
};
template <class P>
struct Widened<P, 64> {
    using type = P;
};

using Vec = Widened<Part, PART_BYTES>::type;
using Mask = Widened<Truth, PART_BYTES>::type;
static_assert(sizeof(Vec) == LANES * sizeof(double), "a Vec is eight doubles");

template <class V>
inline V filled(double x) {
    V v;
    fill(v, x);
    return v;
}
template <class V>
inline V loaded(const double* p) {
    V v;
    read(v, p);
    return v;
}
template <class V>
inline void store(double* p, V v) {
    write(v, p);
}
inline Vec splat(double x) {
    return filled<Vec>(x);
}
inline Vec load(const double* p) {
    return loaded<Vec>(p);
}

struct Flags {
    int64_t lane[LANES];
};
inline Flags flags(Mask mask) {
    Flags out;
    std::memcpy(&out, &mask, sizeof out);
    return out;
}
inline bool any(Mask mask) {
    const Flags f = flags(mask);
    return (f.lane[0] | f.lane[1] | f.lane[2] | f.lane[3] | f.lane[4] | f.lane[5] | f.lane[6] | f.lane[7]) != 0;
}

inline Vec absolute(Vec x) {
    return select(splat(0) > x, -x, x);
}

// A fixed tree.
inline double sum(Vec v) {
    double x[LANES];
    store(x, v);
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Registers by themselves, where a loop runs over more of them than eight doubles fill.
constexpr int64_t PART = PART_BYTES / 8;  // doubles of a register

inline Part part(double x) {
    return filled<Part>(x);
}
inline Part load_part(const double* p) {
    return loaded<Part>(p);
}

// rows [PART, PART] ← its transpose, by exchanging blocks of 1, 2, 4 off the diagonal.
#if defined(__GNUC__)
#if defined(__clang__)
#define PARA_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define PARA_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (Truth){__VA_ARGS__})
#endif
#define PARA_EXCHANGE(i, j, low, high)                    \
    {                                                     \
        const Part x = rows[i], y = rows[j];              \
        rows[i] = PARA_SHUFFLE(x, y, PARA_UNPACKED low);  \
        rows[j] = PARA_SHUFFLE(x, y, PARA_UNPACKED high); \
    }
#define PARA_UNPACKED(...) __VA_ARGS__
inline void transpose(Part (&rows)[PART]) {
#if PARA_PART_BYTES == 64
    PARA_EXCHANGE(0, 1, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
    PARA_EXCHANGE(2, 3, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
    PARA_EXCHANGE(4, 5, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
    PARA_EXCHANGE(6, 7, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
    PARA_EXCHANGE(0, 2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
    PARA_EXCHANGE(1, 3, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
    PARA_EXCHANGE(4, 6, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
    PARA_EXCHANGE(5, 7, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
    PARA_EXCHANGE(0, 4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
    PARA_EXCHANGE(1, 5, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
    PARA_EXCHANGE(2, 6, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
    PARA_EXCHANGE(3, 7, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
#elif PARA_PART_BYTES == 32
    PARA_EXCHANGE(0, 1, (0, 4, 2, 6), (1, 5, 3, 7))
    PARA_EXCHANGE(2, 3, (0, 4, 2, 6), (1, 5, 3, 7))
    PARA_EXCHANGE(0, 2, (0, 1, 4, 5), (2, 3, 6, 7))
    PARA_EXCHANGE(1, 3, (0, 1, 4, 5), (2, 3, 6, 7))
#else
    PARA_EXCHANGE(0, 1, (0, 2), (1, 3))
#endif
}
#else
inline void transpose(Part (&)[PART]) {}
#endif

template <class T>
inline void exchange(T& x, T& y) {
    const T held = x;
    x = y;
    y = held;
}

inline int64_t round_up(int64_t x, int64_t multiple) {
    return (x + multiple - 1) / multiple * multiple;
}

}  // namespace
}  // namespace PARA_ISA
}  // namespace para
