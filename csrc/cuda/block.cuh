// What a thread block does together: read its rows of the tables, add up.
#pragma once

#include "platform.h"
#include "work.h"

namespace para::cuda {

// Copies `count` words to shared memory; __syncthreads before they are used.
__device__ __forceinline__ void share(const int64_t* from, int count, int64_t* shared) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
        shared[i] = read(from + i);
    }
}

// A module's rows of the tables, in shared memory.
struct Job {
    const int64_t* row;   // [COLUMNS]
    const int64_t* work;  // [WORK_COLUMNS]
    const double* scale;

    // Asked again after a barrier it is read again, and was not kept in registers meanwhile.
    __device__ __forceinline__ Problem problem() const { return problem_of(row, *scale); }
};

__device__ __forceinline__ Job shared_job(const Batch& batch, int64_t module) {
    PARA_SHARED(int64_t, row, COLUMNS);
    PARA_SHARED(int64_t, work, WORK_COLUMNS);
    PARA_SHARED(double, scale, 1);
    share(batch.rows + module * COLUMNS, COLUMNS, row);
    share(batch.work + module * WORK_COLUMNS, WORK_COLUMNS, work);
    if (threadIdx.x == 0) scale[0] = read(batch.scales + module);
    __syncthreads();
    return {row, work, scale};
}

// That of the module whose number the block has in `modules`.
__device__ __forceinline__ Job listed_job(const Batch& batch, const int64_t* modules) {
    PARA_SHARED(int64_t, module, 1);
    share(modules + blockIdx.x, 1, module);
    __syncthreads();
    return shared_job(batch, module[0]);
}

// Sums of x over groups of LANES neighbouring lanes, the same bits in each of them.
template <int LANES>
__device__ __forceinline__ double sum_of_lanes(double x) {
#pragma unroll
    for (int with = LANES / 2; with > 0; with /= 2) x += __shfl_xor_sync(~0u, x, with);
    return x;
}

// The largest value of the lanes, in each of them, and of equal ones the smallest index.
__device__ __forceinline__ void largest_of_warp(double& value, int& index) {
#pragma unroll
    for (int with = 16; with > 0; with /= 2) {
        const double other = __shfl_xor_sync(~0u, value, with);
        const int other_index = __shfl_xor_sync(~0u, index, with);
        if (other > value || (other == value && other_index < index)) {
            value = other;
            index = other_index;
        }
    }
}

// The sum of x over the block, in thread 0; `warps` [32] is shared memory, free again after the next barrier.
__device__ __forceinline__ double sum_of_block(double x, double* warps) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    x = sum_of_lanes<32>(x);
    if (lane == 0) warps[warp] = x;
    __syncthreads();
    double total = 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) total += warps[i];
    }
    return total;
}

}  // namespace para::cuda
