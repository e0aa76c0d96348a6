// The formats that factors are stored in. To fp64 every conversion is exact; from it, it rounds once, to nearest even,
// with subnormals and infinities as IEEE has them: the bits that csrc/cpu/panel-inl.h makes.
#pragma once

#include <cstring>

#include "../problem.h"
#include "platform.h"

namespace para::cuda {

template <class To, class From>
__device__ __forceinline__ To same_bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "nothing is converted");
    To out;
    memcpy(&out, &x, sizeof out);
    return out;
}

// x rounded to so many significant bits, to nearest even.
__device__ __forceinline__ double rounded_to_bits(double x, int significant) {
    const int drop = 53 - significant;
    auto bits = same_bits<uint64_t>(x);
    bits += ((uint64_t{1} << (drop - 1)) - 1) + ((bits >> drop) & 1);
    return same_bits<double>(bits & ~((uint64_t{1} << drop) - 1));
}

// Each: `load`, the value of an element's bits, and `store`, the bits that x becomes.
struct F32 {
    using Storage = uint32_t;
    static __device__ __forceinline__ double load(uint32_t bits) { return same_bits<float>(bits); }
    static __device__ __forceinline__ uint32_t store(double x) { return same_bits<uint32_t>(static_cast<float>(x)); }
};

struct F16 {
    using Storage = uint16_t;
    static __device__ __forceinline__ double load(uint16_t bits) { return half_to_float(bits); }
    static __device__ __forceinline__ uint16_t store(double x) { return double_to_half(x); }
};

struct BF16 {
    using Storage = uint16_t;
    static __device__ __forceinline__ double load(uint16_t bits) {
        return same_bits<float>(static_cast<uint32_t>(bits) << 16);
    }
    static __device__ __forceinline__ uint16_t store(double x) {
        // Below 2^-126 the last bit is worth 2^-133: adding ½ ulp's worth of it leaves no room for anything smaller.
        const double magic = 0x1.8p52 * 0x1p-133;
        const double rounded = fabs(x) < 0x1p-126 ? copysign((x + magic) - magic, x) : rounded_to_bits(x, 8);
        return static_cast<uint16_t>(same_bits<uint32_t>(static_cast<float>(rounded)) >> 16);
    }
};

__host__ __device__ constexpr int bytes_of(DType dtype) {
    return dtype == DType::f32 ? 4 : 2;
}

__device__ __forceinline__ int significand_bits(DType dtype) {
    return dtype == DType::f32 ? 24 : dtype == DType::f16 ? 11 : 8;
}

// Calls work(Format) with that of `dtype`.
template <class Work>
__device__ __forceinline__ void with_format(DType dtype, Work work) {
    switch (dtype) {
        case DType::f32:
            return work(F32());
        case DType::f16:
            return work(F16());
        case DType::bf16:
            return work(BF16());
    }
}

}  // namespace para::cuda
