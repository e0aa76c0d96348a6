// What a thread block does together: read its rows of the tables, add up, multiply small matrices.
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

// A module's problem, and its row of the work table.
struct Job {
    Problem problem;
    const int64_t* work;  // [WORK_COLUMNS], shared
};

__device__ __forceinline__ Job shared_job(const Batch& batch, int64_t module) {
    PARA_SHARED(int64_t, row, COLUMNS);
    PARA_SHARED(int64_t, work, WORK_COLUMNS);
    PARA_SHARED(double, scale, 1);
    share(batch.rows + module * COLUMNS, COLUMNS, row);
    share(batch.work + module * WORK_COLUMNS, WORK_COLUMNS, work);
    if (threadIdx.x == 0) scale[0] = read(batch.scales + module);
    __syncthreads();
    return {problem_of(row, scale[0]), work};
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

// finish(i, j, Σ_l left(i, l) · right(l, j)) for i < rows, j < columns, l < inner; TILE × TILE per thread. `upper`:
// left is an upper triangle, 0 where l < i.
template <int TILE, bool upper = false, class Left, class Right, class Finish>
__device__ __forceinline__ void small_product(int rows, int columns, int inner, Left left, Right right, Finish finish) {
    const int high = (rows + TILE - 1) / TILE, wide = (columns + TILE - 1) / TILE;
    for (int tile = static_cast<int>(threadIdx.x); tile < high * wide; tile += static_cast<int>(blockDim.x)) {
        const int i = tile / wide * TILE, j = tile % wide * TILE;
        double sum[TILE][TILE] = {};
        for (int l = upper ? i : 0; l < inner; ++l) {
            double x[TILE], y[TILE];
#pragma unroll
            for (int t = 0; t < TILE; ++t) {  // beyond the edge the last one again
                x[t] = left(i + t < rows ? i + t : rows - 1, l);
                y[t] = right(l, j + t < columns ? j + t : columns - 1);
            }
#pragma unroll
            for (int s = 0; s < TILE; ++s) {
#pragma unroll
                for (int t = 0; t < TILE; ++t) sum[s][t] += x[s] * y[t];
            }
        }
#pragma unroll
        for (int s = 0; s < TILE; ++s) {
#pragma unroll
            for (int t = 0; t < TILE; ++t) {
                if (i + s < rows && j + t < columns) finish(i + s, j + t, sum[s][t]);
            }
        }
    }
}

}  // namespace para::cuda
