// The kernels' launches, and what fits a device. Each launch returns nullptr, or what went wrong. Every array is in the
// device's memory; `modules` [count] are row numbers, `spans` [count, SPAN_COLUMNS].
#pragma once

#include "work.h"

namespace para::cuda {

// Bytes of shared memory that a block may have on the device of this number; 0 where there is none.
const char* unusable_device(int device);
int64_t shared_limit_of(int device);

const char* launch_gram(const Batch& batch, bool large, const int64_t* spans, int64_t count, int64_t shared_limit,
                        void* stream);
const char* launch_cores(const Batch& batch, const int64_t* modules, int64_t count, int64_t largest_rank,
                         int64_t shared_limit, void* stream);
const char* launch_svd(const Batch& batch, const int64_t* modules, int64_t count, int64_t largest_rank, void* stream);
const char* launch_transforms(const Batch& batch, int64_t modules, int64_t largest_rank, int64_t largest_new_rank,
                              void* stream);
const char* launch_truncate(const Batch& batch, const int64_t* spans, int64_t count, int64_t most_of_t, double* errors,
                            void* stream);

constexpr int64_t STATIC_SHARED = 1024;  // bytes that these kernels have beside their dynamic shared memory, at most

constexpr int64_t cores_shared(int64_t r, bool large) {
    return (3 * r + (r + 3) / 4 + (large ? 0 : 2 * triangle(r))) * 8;
}

constexpr bool fits_cores(int64_t r, int64_t shared_limit) {
    return cores_shared(r, false) + STATIC_SHARED / 2 <= shared_limit;
}

constexpr int64_t svd_shared(int64_t r) {
#ifdef PARA_BUG_OUT_OF_BOUNDS
    return (r * (r | 1) + r) * 8;
#else
    return (r * (r | 1) + 2 * r) * 8;
#endif
}

constexpr bool fits_svd(int64_t r, int64_t shared_limit) {
    return r <= LARGEST_SVD_RANK && svd_shared(r) + STATIC_SHARED <= shared_limit;
}

// Doubles of T [r, made] that `truncate` has in shared memory: all, or those for some columns of the factor.
PARA_HOST_DEVICE constexpr int64_t t_in_shared(int64_t r, int64_t made) {
    const int64_t all = round_up(r, 2) * round_up(made, TRUNCATE_TILE);
    return all <= MOST_OF_T ? all : MOST_INNER * round_up(made, TRUNCATE_TILE);
}

// Of `gram`: the most columns that one block takes, its threads that add up, and its shared memory.
struct GramShape {
    int whole, threads;
    int64_t shared;
};

constexpr GramShape gram_shape(bool large, int64_t shared_limit) {
    const auto bytes = [](int threads, int strip) { return (PANEL + int64_t{threads} * strip * strip) * 8; };
    if (!large) return {SMALL_STRIPS_RANK, GRAM_THREADS, bytes(GRAM_THREADS, SMALL_STRIP)};
    // 16 strips make 136 tiles; of 8 strips there are 36, or 64 beside the diagonal.
    if (bytes(136, LARGE_STRIP) + STATIC_SHARED <= shared_limit) return {128, 136, bytes(136, LARGE_STRIP)};
    return {COLUMN_BLOCK, 72, bytes(72, LARGE_STRIP)};
}

}  // namespace para::cuda
