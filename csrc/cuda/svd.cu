// Stage 2: M = U S Vᵀ by one-sided Jacobi (Hestenes 1958), a block per module, all of M in shared memory.
//
// First M = L·Qᵀ by Householder reflections of its rows, the largest that is left first: on the columns of L, graded
// and half empty, Jacobi needs half the sweeps (Drmač & Veselić 2008). Rows stay where they are, so L is lower
// triangular but for the order of its rows, and Q is never needed.
//
// In every step of a sweep the columns form disjoint pairs, eight lanes each (the round-robin order of Brent & Luk
// 1985), so a step needs one barrier. Once all pairs are orthogonal the norms of the columns are S, the normalised
// columns U; V is never needed.
#include "block.cuh"
#include "launches.h"

namespace para::cuda {

constexpr int MAX_SWEEPS = 40;
constexpr int PAIR_LANES = 8;

// The pair that a group of lanes takes in a step of the round-robin order of n columns, n even: the last stays, the
// others move on.
__device__ __forceinline__ void pair_of(int n, int step, int group, int& p, int& q) {
    const int others = n - 1;
    p = group == 0 ? others : (step + group) % others;
    q = (step + others - group) % others;
    if (p > q) {
        const int x = p;
        p = q;
        q = x;
    }
}

// Makes the columns x and y [r] orthogonal, together with seven other lanes; whether they were not so.
__device__ __forceinline__ bool rotate(double* x, double* y, int r, int lane, double squared_tolerance) {
    double alpha = 0, beta = 0, gamma = 0;
    for (int i = lane; i < r; i += PAIR_LANES) {
        const double u = x[i], v = y[i];
        alpha += u * u;
        beta += v * v;
        gamma += u * v;
    }
    alpha = sum_of_lanes<PAIR_LANES>(alpha);
    beta = sum_of_lanes<PAIR_LANES>(beta);
    gamma = sum_of_lanes<PAIR_LANES>(gamma);
    if (!(gamma * gamma > squared_tolerance * alpha * beta)) return false;
    const double difference = beta - alpha, twice = gamma + gamma;
    const double root = sqrt(difference * difference + twice * twice);
    const double t = twice / (difference + (difference < 0 ? -root : root));
    const double cosine = 1 / sqrt(1 + t * t), sine = cosine * t;
    for (int i = lane; i < r; i += PAIR_LANES) {
        const double u = x[i], v = y[i];
        x[i] = cosine * u - sine * v;
        y[i] = sine * u + cosine * v;
    }
    return true;
}

// The columns [r][apart] of M become those of L. Eight lanes take a row, every warp finds the largest one by itself; so
// a step needs one barrier, if what is left of the rows' squared norms is read in one half of norms [2][r] and written
// in the other. Rows that are done have a norm of -1.
__device__ __forceinline__ void reduce_to_lower(double* columns, int r, int apart, double* norms) {
    const int me = static_cast<int>(threadIdx.x), groups = static_cast<int>(blockDim.x) / PAIR_LANES;
    const int group = me / PAIR_LANES, lane = me % PAIR_LANES, whole = static_cast<int>(round_up(r, groups));
    for (int i = group; i < whole; i += groups) {  // all lanes of a warp come along
        double squared = 0;
        for (int q = lane; i < r && q < r; q += PAIR_LANES) squared += columns[q * apart + i] * columns[q * apart + i];
        squared = sum_of_lanes<PAIR_LANES>(squared);
        if (i < r && lane == 0) norms[i] = squared;
    }
    __syncthreads();
    for (int k = 0; k < r; ++k) {
        const double* const before = norms + k % 2 * r;
        double* const after = norms + (k + 1) % 2 * r;
        double largest = -1;
        int best = r;
        for (int i = me % 32; i < r; i += 32) {
            if (before[i] > largest) {
                largest = before[i];
                best = i;
            }
        }
        largest_of_warp(largest, best);

        // The reflection takes the row x to `last`, 0, …, 0.
        double squared = 0;
        for (int q = k + lane; q < r; q += PAIR_LANES) squared += columns[q * apart + best] * columns[q * apart + best];
        squared = sum_of_lanes<PAIR_LANES>(squared);
        const double first = columns[k * apart + best], norm = sqrt(squared), last = first > 0 ? -norm : norm;
        const double weight = squared > 0 ? 1 / (squared + fabs(first) * norm) : 0;
        for (int i = group; i < whole; i += groups) {
            const bool left = i < r && i != best && before[i] >= 0;
            double sum = 0;
            for (int q = k + lane; left && q < r; q += PAIR_LANES) {
                sum += (columns[q * apart + best] - (q == k ? last : 0)) * columns[q * apart + i];
            }
            sum = weight * sum_of_lanes<PAIR_LANES>(sum);
            for (int q = k + lane; left && q < r; q += PAIR_LANES) {
                double& x = columns[q * apart + i];
                x -= (columns[q * apart + best] - (q == k ? last : 0)) * sum;
                if (q == k) after[i] = before[i] > x * x ? before[i] - x * x : 0;
            }
            if (i < r && !left && lane == 0) after[i] = -1;
        }
        __syncthreads();
        // Nobody reads this row again before the columns are rotated.
        for (int q = k + me; q < r; q += static_cast<int>(blockDim.x)) columns[q * apart + best] = q == k ? last : 0;
    }
    __syncthreads();
}

// Dynamic shared memory: columns [r][r | 1], norms [2][r]. An odd distance from column to column, because the lanes
// that load M's rows go from one to the next.
__global__ void __launch_bounds__(MOST_SVD_THREADS, 1) svd(Batch batch, const int64_t* modules) {
    PARA_DYNAMIC_SHARED(memory);
    PARA_SHARED(double, warps, 32);
    const Job job = listed_job(batch, modules);
    const Problem p = job.problem();
    const int r = static_cast<int>(p.rank()), apart = r | 1, even = (r + 1) & ~1;
    const int me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    double* const spectrum = batch.results + job.work[SPECTRUM];
    if (read(spectrum + STATUS) != 0) return;
    auto* const columns = reinterpret_cast<double*>(memory);
    double* const norms = columns + r * apart;

    double largest = 0;
    for (int e = me; e < r * r; e += threads) {
        const double m = read(p.core.m + e);
        columns[e % r * apart + e / r] = m;
        largest = fabs(m) > largest ? fabs(m) : largest;
    }
#pragma unroll
    for (int with = 16; with > 0; with /= 2) {
        const double other = __shfl_xor_sync(~0u, largest, with);
        largest = other > largest ? other : largest;
    }
    if (me % 32 == 0) warps[me / 32] = largest;
    __syncthreads();
    for (int i = 0; i < threads / 32; ++i) largest = warps[i] > largest ? warps[i] : largest;
    // The test for orthogonality multiplies four squares; entries near 1 keep that in range. Columns that are 2^-200 of
    // the largest can't change a bit of anything above rounding noise and would leave it. A power of two may be out of
    // range, so in two steps.
    int exponent;
    frexp(largest, &exponent);
    const double down = ldexp(1.0, -(exponent / 2)), rest = ldexp(1.0, exponent / 2 - exponent);
    const int group = me / PAIR_LANES, lane = me % PAIR_LANES;
    for (int q = group; q < round_up(r, threads / PAIR_LANES); q += threads / PAIR_LANES) {
        double peak = 0;
        if (q < r) {
            for (int i = lane; i < r; i += PAIR_LANES) {
                const double x = fabs(columns[q * apart + i]);
                peak = x > peak ? x : peak;
            }
        }
#pragma unroll
        for (int with = PAIR_LANES / 2; with > 0; with /= 2) {
            const double other = __shfl_xor_sync(~0u, peak, with);
            peak = other > peak ? other : peak;
        }
        if (q < r) {
            for (int i = lane; i < r; i += PAIR_LANES) {
                double& x = columns[q * apart + i];
                x = peak > largest * 0x1p-200 ? x * down * rest : 0;
            }
        }
    }
    __syncthreads();

    reduce_to_lower(columns, r, apart, norms);
    const double tolerance = 2 * sqrt(static_cast<double>(r)) * 0x1p-53;
    int sweeps = -1;
    for (int sweep = 1; sweep <= MAX_SWEEPS; ++sweep) {
        bool rotated = false;
        for (int step = 0; step < even - 1; ++step) {
            int a = even, b = even;
            if (group < even / 2) pair_of(even, step, group, a, b);
            // Lanes without a pair come along: a warp shuffles as a whole.
            double* const x = columns + (b < r ? a : 0) * apart;
            double* const y = columns + (b < r ? b : 0) * apart;
            if (rotate(x, y, b < r ? r : 0, lane, tolerance * tolerance)) rotated = true;
#ifndef PARA_BUG_JACOBI_SYNC
            __syncthreads();
#endif
        }
        if (!__syncthreads_or(rotated)) {
            sweeps = sweep;
            break;
        }
    }

    for (int q = group; q < round_up(r, threads / PAIR_LANES); q += threads / PAIR_LANES) {
        double squared = 0;
        for (int i = lane; q < r && i < r; i += PAIR_LANES) {
            squared += columns[q * apart + i] * columns[q * apart + i];
        }
        squared = sum_of_lanes<PAIR_LANES>(squared);
        if (q < r && lane == 0) norms[q] = sqrt(squared);
    }
    __syncthreads();
    // Column q comes after those that are larger, and after equal ones to its left.
    for (int q = group; q < r; q += threads / PAIR_LANES) {
        int place = 0;
        const double norm = norms[q];
        for (int i = 0; i < r; ++i) place += norms[i] > norm || (norms[i] == norm && i < q);
        for (int i = lane; i < r; i += PAIR_LANES) {
            write(p.core.u + i * r + place, norm > 0 ? columns[q * apart + i] / norm : 0);
        }
        if (lane == 0) {
            const double sigma = ldexp(norm, exponent);
            write(p.core.sigma + place, sigma);
            write(spectrum + SPECTRUM_HEAD + place, sigma);
        }
    }
    if (me == 0) write(spectrum + SWEEPS, static_cast<double>(sweeps));
}

const char* launch_svd(const Batch& batch, const int64_t* modules, int64_t count, int64_t largest_rank, void* stream) {
    const int64_t threads = round_up(PAIR_LANES / 2 * round_up(largest_rank, 2), 32);
    return launch(svd, dim3(static_cast<unsigned>(count)), dim3(static_cast<unsigned>(threads)),
                  svd_shared(largest_rank), static_cast<Stream>(stream), batch, modules);
}

}  // namespace para::cuda
