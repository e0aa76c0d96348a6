// Panels: blocks of a factor as packed fp64, and the way back to storage. Every conversion to fp64 is exact; every
// conversion from it rounds once, to nearest even, with subnormals and infinities as IEEE has them.
#pragma once

#include "../problem.h"
#include "vec.h"

namespace para {
namespace PARA_ISA {
namespace {

// As many storage elements as a register has doubles. Compilers know these conversions, but not that one instruction
// makes each.
#if defined(__GNUC__)
typedef float Floats __attribute__((vector_size(PART_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(PART_BYTES / 2)));
typedef uint16_t Halves __attribute__((vector_size(PART_BYTES / 4)));
#else
using Floats = float;
using Words = uint32_t;
using Halves = uint16_t;
#endif
#if defined(__AVX512F__) && PARA_PART_BYTES == 64
inline Part widened(Floats x) {
    return (Part)_mm512_maskz_cvtps_pd(0xff, (__m256)x);
}
inline Floats narrowed(Part x) {
    return (Floats)_mm512_maskz_cvtpd_ps(0xff, (__m512d)x);
}
inline Words widened(Halves x) {
    return (Words)_mm256_cvtepu16_epi32((__m128i)x);
}
inline Halves narrowed(Words x) {
    return (Halves)_mm256_cvtepi32_epi16((__m256i)x);
}
#elif defined(__AVX2__) && PARA_PART_BYTES == 32
inline Part widened(Floats x) {
    return (Part)_mm256_cvtps_pd((__m128)x);
}
inline Floats narrowed(Part x) {
    return (Floats)_mm256_cvtpd_ps((__m256d)x);
}
inline Words widened(Halves x) {
    return (Words)_mm_cvtepu16_epi32(_mm_cvtsi64_si128((int64_t)x));
}
inline Halves narrowed(Words x) {
    return (Halves)_mm_cvtsi128_si64(_mm_packus_epi32((__m128i)x, (__m128i)x));
}
#elif defined(__GNUC__)
inline Part widened(Floats x) {
    return __builtin_convertvector(x, Part);
}
inline Floats narrowed(Part x) {
    return __builtin_convertvector(x, Floats);
}
inline Words widened(Halves x) {
    return __builtin_convertvector(x, Words);
}
inline Halves narrowed(Words x) {
    return __builtin_convertvector(x, Halves);
}
#else
inline Part widened(Floats x) {
    return x;
}
inline Floats narrowed(Part x) {
    return static_cast<Floats>(x);
}
inline Words widened(Halves x) {
    return x;
}
inline Halves narrowed(Words x) {
    return static_cast<Halves>(x);
}
#endif

template <class To, class From>
inline To same_bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "nothing is converted");
    To out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}
template <class V>
inline V take(const void* from) {
    V out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

// x rounded to so many significant bits, to nearest even.
inline Part rounded_to_bits(Part x, int significant) {
    const int drop = 53 - significant;
    Truth bits = same_bits<Truth>(x);
    bits += ((int64_t{1} << (drop - 1)) - 1) + ((bits >> drop) & 1);
    return same_bits<Part>(bits & -(int64_t{1} << drop));
}

// The same, and to multiples of `step` where that is coarser (a format's subnormals).
template <int BITS>
inline Part rounded(Part x, double step) {
    const Truth sign = same_bits<Truth>(x) & INT64_MIN;
    const Part normal = rounded_to_bits(x, BITS);
    // Adding 1.5·2^52 steps leaves no room for anything below one step.
    const Part magic = part(0x1.8p52 * step);
    const Part subnormal = same_bits<Part>(same_bits<Truth>((x + magic) - magic) | sign);
    const Part magnitude = same_bits<Part>(same_bits<Truth>(x) & INT64_MAX);
    return select(part(step * static_cast<double>(int64_t{1} << (BITS - 1))) > magnitude, subnormal, normal);
}

// Formats: load reads PART elements, store writes PART and returns what was stored.
struct F32 {
    using Storage = float;
    static Part load(const float* from) { return widened(take<Floats>(from)); }
    static Part store(float* to, Part x) {
        const Floats stored = narrowed(x);
        std::memcpy(to, &stored, sizeof stored);
        return widened(stored);
    }
};

struct BF16 {
    using Storage = uint16_t;
    static Part load(const uint16_t* from) { return widened(same_bits<Floats>(widened(take<Halves>(from)) << 16)); }
    static Part store(uint16_t* to, Part x) {
        const Floats stored = narrowed(rounded<8>(x, 0x1p-133));
        const Halves halves = narrowed(same_bits<Words>(stored) >> 16);
        std::memcpy(to, &halves, sizeof halves);
        return widened(stored);
    }
};

struct F16 {
    using Storage = uint16_t;
    static Part load(const uint16_t* from) {
        const Words half = widened(take<Halves>(from));
        const Words magnitude = (half & 0x7fff) << 13;
        // Infinity and NaN keep their exponent.
        const Words special = select_words(magnitude >= 0x0f800000, 0x70000000);
        return widened(same_bits<Floats>((magnitude + special) | ((half & 0x8000) << 16))) * part(0x1p112);
    }
    static Part store(uint16_t* to, Part x) {
        const Floats stored = narrowed(rounded<11>(x, 0x1p-24));
        const Words bits = same_bits<Words>(stored);
        const Words magnitude = bits & 0x7fffffff;
        const Words infinite = select_words(magnitude >= 0x47800000, ~uint32_t{0});
        const Words subnormal = select_words(magnitude < 0x38800000, ~uint32_t{0});
        // A subnormal is a whole number of steps of 2^-24: adding ½ leaves that number in the last bits.
        const Words steps = same_bits<Words>(same_bits<Floats>(magnitude) + 0.5f) - 0x3f000000;
        const Words normal = (magnitude - 0x38000000) >> 13;
        const Words half = (infinite & 0x7c00) | (~infinite & ((subnormal & steps) | (~subnormal & normal)));
        const Halves halves = narrowed(half | ((bits >> 16) & 0x8000));
        std::memcpy(to, &halves, sizeof halves);
        return load(to);
    }

  private:
#if defined(__GNUC__)
    typedef int32_t Chosen __attribute__((vector_size(PART_BYTES / 2)));
    static Words select_words(Chosen truth, uint32_t yes) { return same_bits<Words>(truth) & yes; }
#else
    static Words select_words(bool truth, uint32_t yes) { return truth ? yes : 0; }
#endif
};

// The first `count` < PART elements; zeros behind them.
template <class T>
inline Part load_some(const typename T::Storage* from, int64_t count) {
    typename T::Storage all[PART] = {};
    std::memcpy(all, from, sizeof(all[0]) * static_cast<size_t>(count));
    return T::load(all);
}
template <class T>
inline Part store_some(typename T::Storage* to, Part x, int64_t count) {
    typename T::Storage all[PART];
    const Part stored = T::store(all, x);
    std::memcpy(to, all, sizeof(all[0]) * static_cast<size_t>(count));
    return stored;
}

// A matrix in one of the formats; strides in elements.
template <class T>
struct View {
    const typename T::Storage* data;
    int64_t rows, cols, row_stride, col_stride;

    const typename T::Storage* at(int64_t i, int64_t j) const { return data + i * row_stride + j * col_stride; }
    View transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

// Calls work(View) with x, or with its transpose.
template <class Work>
inline void with_view(const Matrix& x, bool transposed, Work work) {
    const int64_t rows = transposed ? x.cols : x.rows, cols = transposed ? x.rows : x.cols;
    const int64_t down = transposed ? x.col_stride : x.row_stride, across = transposed ? x.row_stride : x.col_stride;
    switch (x.dtype) {
        case DType::f32:
            return work(View<F32>{static_cast<const float*>(x.data), rows, cols, down, across});
        case DType::f16:
            return work(View<F16>{static_cast<const uint16_t*>(x.data), rows, cols, down, across});
        case DType::bf16:
            return work(View<BF16>{static_cast<const uint16_t*>(x.data), rows, cols, down, across});
    }
}

// Strips: a panel [count, columns] as strips of STRIP columns, `apart` doubles from one to the next, their rows `step`
// doubles from one to the next; zeros where there are no columns. With step = STRIP a product reads them from front to
// back, whatever the width; with apart = STRIP they are rows.
constexpr int64_t STRIP = PART < 4 ? 4 : PART;
constexpr int64_t PARTS = STRIP / PART;  // registers of a strip's row

// Rows whose elements lie side by side: one register after the other. So many rows at a time that their lines stay in
// the first cache while register after register is taken from them; far apart, rows would push each other out of it.
template <class T>
void pack_across(const View<T>& x, int64_t first, int64_t count, int64_t left, int64_t strips, double* out,
                 int64_t apart, int64_t step) {
    const int64_t all = strips * PARTS, there = (x.cols - left) / PART;
    const int64_t whole = there < all ? there : all, rest = whole < all ? x.cols - left - whole * PART : 0;
    // In locals: a store might change what x refers to, for all that the compiler knows.
    const int64_t down = x.row_stride, together = down <= 256 ? 16 : 1;
    for (int64_t begin = 0; begin < count; begin += together) {
        const int64_t rows = count - begin < together ? count - begin : together;
        const typename T::Storage* from = x.at(first + begin, left);
        const auto place = [&](int64_t q) { return out + q / PARTS * apart + q % PARTS * PART + begin * step; };
        if (rows == 1) {
            PARA_UNROLL_SOME
            for (int64_t q = 0; q < whole; ++q) store(place(q), T::load(from + q * PART));
        } else {
            for (int64_t q = 0; q < whole; ++q) {
                const typename T::Storage* line = from + q * PART;
                double* to = place(q);
                PARA_UNROLL_SOME
                for (int64_t i = 0; i < rows; ++i, line += down, to += step) store(to, T::load(line));
            }
        }
        if (whole == all) continue;
        for (int64_t i = 0; i < rows; ++i) {
            if (rest > 0) store(place(whole) + i * step, load_some<T>(from + i * down + whole * PART, rest));
            for (int64_t q = whole + (rest > 0); q < all; ++q) store(place(q) + i * step, part(0));
        }
    }
}

// Columns whose elements lie side by side: blocks of a register's size are transposed in registers.
template <class T>
void pack_down(const View<T>& x, int64_t first, int64_t count, int64_t left, int64_t strips, double* out, int64_t apart,
               int64_t step) {
    const int64_t next = x.col_stride;
    const typename T::Storage* end = x.at(x.rows - 1, x.cols - 1) + 1;
    for (int64_t q = 0; q < strips * PARTS; ++q) {
        double* to = out + q / PARTS * apart + q % PARTS * PART;
        const int64_t column = left + q * PART, given = x.cols - column;
        int64_t i = 0;
        if (given >= PART) {
            const typename T::Storage* from = x.at(first, column);
            Part block[PART];
            for (; i + PART <= count; i += PART, from += PART, to += PART * step) {
                PARA_UNROLL
                for (int c = 0; c < PART; ++c) block[c] = T::load(from + c * next);
                transpose(block);
                PARA_UNROLL
                for (int t = 0; t < PART; ++t) store(to + t * step, block[t]);
            }
            if (i < count) {
                // What is loaded of a neighbour's elements is not stored.
                for (int c = 0; c < PART; ++c) {
                    const typename T::Storage* line = from + c * next;
                    block[c] = end - line >= PART ? T::load(line) : load_some<T>(line, count - i);
                }
                transpose(block);
                for (int64_t t = 0; i < count; ++i, ++t) store(to + t * step, block[t]);
            }
        }
        for (; i < count; ++i, to += step) {
            typename T::Storage line[PART] = {};
            for (int64_t c = 0; c < PART && c < given; ++c) line[c] = *x.at(first + i, column + c);
            store(to, T::load(line));
        }
    }
}

// out ← rows first … first+count, columns of x from `left` on, `strips` strips of them.
template <class T>
void pack_strips(const View<T>& x, int64_t first, int64_t count, int64_t left, int64_t strips, double* out,
                 int64_t apart, int64_t step) {
    if (x.row_stride == 1) {
        pack_down(x, first, count, left, strips, out, apart, step);
    } else if (x.col_stride == 1) {
        pack_across(x, first, count, left, strips, out, apart, step);
    } else {
        // Neither: the rare view is first copied to where its elements do lie side by side.
        constexpr int64_t ROWS = 32;
        typename T::Storage line[ROWS * STRIP];
        for (int64_t s = 0; s < strips; ++s) {
            const int64_t column = left + s * STRIP, given = x.cols - column < STRIP ? x.cols - column : STRIP;
            for (int64_t i = 0; i < count; i += ROWS) {
                const int64_t rows = count - i < ROWS ? count - i : ROWS;
                for (int64_t t = 0; t < rows; ++t) {
                    for (int64_t c = 0; c < STRIP; ++c) {
                        line[t * STRIP + c] = c < given ? *x.at(first + i + t, column + c) : typename T::Storage{};
                    }
                }
                pack_across(View<T>{line, rows, STRIP, STRIP, 1}, 0, rows, 0, 1, out + s * apart + i * step, apart,
                            step);
            }
        }
    }
}

// Where the next panel lies, to be fetched while this one is worked on.
class Ahead {
  public:
    template <class T>
    Ahead(const View<T>& x, int64_t first, int64_t count, int64_t left, int64_t columns) {
        if (count <= 0 || columns <= 0) return;
        constexpr int64_t SIZE = sizeof(typename T::Storage);
        const bool down = x.row_stride == 1;
        data_ = reinterpret_cast<const char*>(x.at(first, left));
        runs_ = down ? columns : count;
        apart_ = (down ? x.col_stride : x.row_stride) * SIZE;
        length_ = (down ? count : columns) * SIZE;
        if (apart_ == length_) {
            length_ *= runs_;
            runs_ = 1;
        }
    }
    int64_t lines() const { return runs_ * ((length_ + LINE - 1) / LINE); }
    void fetch(int64_t lines) {
        for (; lines > 0 && run_ < runs_; --lines) {
#if defined(__GNUC__)
            __builtin_prefetch(data_ + run_ * apart_ + at_, 0, 2);
#endif
            at_ += LINE;
            if (at_ >= length_) {
                at_ = 0;
                ++run_;
            }
        }
    }

  private:
    static constexpr int64_t LINE = 64;
    const char* data_ = nullptr;
    int64_t runs_ = 0, apart_ = 0, length_ = 0, run_ = 0, at_ = 0;
};

}  // namespace
}  // namespace PARA_ISA
}  // namespace para
