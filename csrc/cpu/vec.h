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

namespace para {
namespace PARA_ISA {
namespace {

constexpr int64_t LANES = 8;

// Part: one register. Truth: what comparing two gives, all ones or zeros in each lane.
#if defined(__GNUC__)

#if defined(__AVX512F__)
constexpr int PART_BYTES = 64;
#elif defined(__AVX2__)
constexpr int PART_BYTES = 32;
#else
constexpr int PART_BYTES = 16;
#endif
typedef double Part __attribute__((vector_size(PART_BYTES)));
typedef int64_t Truth __attribute__((vector_size(PART_BYTES)));

inline void fill(Part& part, double x) {
    part = x - Part{};  // subtracting +0 changes nothing, not even the sign of -0
}
inline Part select(Truth truth, Part yes, Part no) {
    return truth ? yes : no;
}
inline Part square_root(Part x) {
#if defined(__AVX512F__)
    return (Part)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif defined(__AVX2__)
    return (Part)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
    return (Part)_mm_sqrt_pd((__m128d)x);
#else
    return Part{std::sqrt(x[0]), std::sqrt(x[1])};
#endif
}
inline Part fma_exact(Part a, Part b, Part c) {
#if defined(__AVX512F__)
    return (Part)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
    return (Part)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return a * b + c;
#endif
}

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
inline auto operator>(Two<H> x, Two<H> y) -> Two<decltype(x.low > y.low)> {
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

inline Vec splat(double x) {
    Vec v;
    fill(v, x);
    return v;
}
inline Vec load(const double* p) {
    Vec v;
    read(v, p);
    return v;
}
inline void store(double* p, Vec v) {
    write(v, p);
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

// out [8, 8] ← the transpose of x [8, 8], rows x_stride and out_stride apart.
inline void transpose_eight(const double* x, int64_t x_stride, double* out, int64_t out_stride) {
#if defined(__AVX2__)
    for (int64_t i = 0; i < LANES; i += 4) {
        for (int64_t j = 0; j < LANES; j += 4) {
            const double* from = x + i * x_stride + j;
            const __m256d a = _mm256_loadu_pd(from), b = _mm256_loadu_pd(from + x_stride);
            const __m256d c = _mm256_loadu_pd(from + 2 * x_stride), d = _mm256_loadu_pd(from + 3 * x_stride);
            const __m256d ab_even = _mm256_unpacklo_pd(a, b), ab_odd = _mm256_unpackhi_pd(a, b);
            const __m256d cd_even = _mm256_unpacklo_pd(c, d), cd_odd = _mm256_unpackhi_pd(c, d);
            double* to = out + j * out_stride + i;
            _mm256_storeu_pd(to, _mm256_permute2f128_pd(ab_even, cd_even, 0x20));
            _mm256_storeu_pd(to + out_stride, _mm256_permute2f128_pd(ab_odd, cd_odd, 0x20));
            _mm256_storeu_pd(to + 2 * out_stride, _mm256_permute2f128_pd(ab_even, cd_even, 0x31));
            _mm256_storeu_pd(to + 3 * out_stride, _mm256_permute2f128_pd(ab_odd, cd_odd, 0x31));
        }
    }
#else
    for (int64_t i = 0; i < LANES; ++i) {
        for (int64_t j = 0; j < LANES; ++j) out[j * out_stride + i] = x[i * x_stride + j];
    }
#endif
}

inline int64_t round_up(int64_t x, int64_t multiple) {
    return (x + multiple - 1) / multiple * multiple;
}

}  // namespace
}  // namespace PARA_ISA
}  // namespace para
