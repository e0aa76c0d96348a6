// Panels: blocks of a factor as packed fp64, and the way back to storage. Every conversion to fp64 is exact; every
// conversion from it rounds once, to nearest even, with subnormals and infinities as IEEE has them.
#pragma once

#include "../problem.h"
#include "vec.h"

namespace para {
namespace PARA_ISA {
namespace {

inline float float_from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct F32 {
    using Storage = float;
    static double read(float x) { return x; }
    static float write(double x) { return static_cast<float>(x); }
};

// fp64 → fp32 by rounding to odd, after which rounding to any format of ≤ 22 significant bits is a single rounding
// (Boldo & Melquiond, IEEE Trans. Computers 57, 2008).
inline uint32_t bits_rounded_to_odd(double x) {
    const float nearest = static_cast<float>(x);
    uint32_t bits = bits_of_float(nearest);
    const double back = nearest;
    if (back != x && back == back) {
        if ((back > x) == (back > 0)) --bits;  // away from zero (overflow to infinity too): step towards zero
        bits |= 1;
    }
    return bits;
}

struct BF16 {
    using Storage = uint16_t;
    static double read(uint16_t x) { return float_from_bits(static_cast<uint32_t>(x) << 16); }
    static uint16_t write(double x) {
        const uint32_t bits = bits_rounded_to_odd(x);
        return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
};

struct F16 {
    using Storage = uint16_t;
    static double read(uint16_t x) {
        const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
        const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
        const uint32_t special = magnitude >= 0x0f800000 ? 0x70000000 : 0;  // infinity and NaN keep their exponent
        return static_cast<double>(float_from_bits((magnitude + special) | sign)) * (special ? 1.0 : 0x1p112);
    }
    static uint16_t write(double x) {
        const uint32_t bits = bits_rounded_to_odd(x);
        const uint32_t sign = (bits >> 16) & 0x8000;
        const uint32_t magnitude = bits & 0x7fffffff;
        uint32_t half;
        if (magnitude >= 0x47800000) {
            half = 0x7c00;  // 65536 and above
        } else if (magnitude >= 0x38800000) {
            half = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) - 0x38000000) >> 13;
        } else {
            // Subnormal: adding 0.5 aligns the significand to multiples of 2^-24, and the addition rounds to even.
            half = bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
        }
        return static_cast<uint16_t>(half | sign);
    }
};

// Eight elements that lie side by side, as fp64.
template <class T>
inline void read_eight(const typename T::Storage* from, double* to) {
    for (int64_t i = 0; i < LANES; ++i) to[i] = T::read(from[i]);
}

// out [count, width] ← rows first … first+count of x [·, columns], zero-padded to width. A matrix whose elements lie
// side by side along its columns (A transposed: A's columns are rows here) is read that way, in blocks of 8 × 8.
template <class T>
void pack(const typename T::Storage* x, int64_t row_stride, int64_t col_stride, int64_t first, int64_t count,
          int64_t columns, int64_t width, double* out) {
    x += first * row_stride;
    if (col_stride == 1) {
        for (int64_t i = 0; i < count; ++i) {
            const typename T::Storage* row = x + i * row_stride;
            double* to = out + i * width;
            int64_t j = 0;
            for (; j + LANES <= columns; j += LANES) read_eight<T>(row + j, to + j);
            for (; j < columns; ++j) to[j] = T::read(row[j]);
            for (; j < width; ++j) to[j] = 0;
        }
        return;
    }
    for (int64_t j = 0; j < width; j += LANES) {
        const int64_t given = columns - j < LANES ? columns - j : LANES;
        int64_t i = 0;
        if (row_stride == 1 && given == LANES) {
            for (; i + LANES <= count; i += LANES) {
                double block[LANES * LANES];
                for (int64_t c = 0; c < LANES; ++c) read_eight<T>(x + i + (j + c) * col_stride, block + c * LANES);
                transpose_eight(block, LANES, out + i * width + j, width);
            }
        }
        for (; i < count; ++i) {
            double* to = out + i * width + j;
            for (int64_t c = 0; c < LANES; ++c) {
                to[c] = c < given ? T::read(x[i * row_stride + (j + c) * col_stride]) : 0;
            }
        }
    }
}

// The same of a factor, or of its transpose.
inline void pack(const Matrix& x, bool transposed, int64_t first, int64_t count, int64_t width, double* out) {
    const int64_t row_stride = transposed ? x.col_stride : x.row_stride;
    const int64_t col_stride = transposed ? x.row_stride : x.col_stride;
    const int64_t columns = transposed ? x.rows : x.cols;
    switch (x.dtype) {
        case DType::f32:
            return pack<F32>(static_cast<const float*>(x.data), row_stride, col_stride, first, count, columns, width,
                             out);
        case DType::f16:
            return pack<F16>(static_cast<const uint16_t*>(x.data), row_stride, col_stride, first, count, columns, width,
                             out);
        case DType::bf16:
            return pack<BF16>(static_cast<const uint16_t*>(x.data), row_stride, col_stride, first, count, columns,
                              width, out);
    }
}

// Columns first … first+count of x, all of its rows: out [rows, width] with width ≥ count.
inline void pack_columns(const Matrix& x, int64_t first, int64_t count, int64_t width, double* out) {
    const Matrix part = {static_cast<const char*>(x.data) + first * x.col_stride * (x.dtype == DType::f32 ? 4 : 2),
                         x.rows,
                         count,
                         x.row_stride,
                         x.col_stride,
                         x.dtype};
    pack(part, false, 0, x.rows, width, out);
}

// to[i] ← from[i] rounded to storage; squared[i] receives the squared rounding error.
template <class T>
void write_row(const double* from, int64_t count, typename T::Storage* to, double* squared) {
    for (int64_t i = 0; i < count; ++i) {
        to[i] = T::write(from[i]);
        const double error = T::read(to[i]) - from[i];
        squared[i] = error * error;
    }
}

inline void write_row(const double* from, int64_t count, DType dtype, void* out, int64_t offset, double* squared) {
    switch (dtype) {
        case DType::f32:
            return write_row<F32>(from, count, static_cast<float*>(out) + offset, squared);
        case DType::f16:
            return write_row<F16>(from, count, static_cast<uint16_t*>(out) + offset, squared);
        case DType::bf16:
            return write_row<BF16>(from, count, static_cast<uint16_t*>(out) + offset, squared);
    }
}

}  // namespace
}  // namespace PARA_ISA
}  // namespace para
