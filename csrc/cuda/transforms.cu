// Stage 3, first half: T_B, T_A, and how much of the module they lose; a block per module. What it computes and why:
// csrc/cpu/truncate-inl.h.
#include "block.cuh"
#include "formats.cuh"
#include "launches.h"

namespace para::cuda {

constexpr int TILE = 4;                          // rows and columns of a product that a thread adds up
constexpr int HIGH = 128, WIDE = 32, DEEP = 16;  // what the block holds of left [HIGH, DEEP] and right [DEEP, WIDE]
constexpr int HIGH_APART = HIGH + 2;             // not a multiple of the banks
constexpr int STAGE = DEEP * (HIGH_APART + WIDE);
static_assert(HIGH / TILE * (WIDE / TILE) == TRANSFORMS_THREADS, "a tile per thread");

// finish(i, j, Σ_l left(i, l) · right(l, j)) for i < rows, j < columns, l < inner. It begins with a barrier: what
// others wrote before may be read. stage [STAGE] is shared memory.
template <class Left, class Right, class Finish>
__device__ __forceinline__ void staged_product(int rows, int columns, int inner, double* stage, Left left, Right right,
                                               Finish finish) {
    const int me = static_cast<int>(threadIdx.x), line = me / (WIDE / TILE) * TILE, column = me % (WIDE / TILE) * TILE;
    double* const staged_left = stage;  // [DEEP][HIGH_APART]
    double* const staged_right = stage + DEEP * HIGH_APART;
    for (int top = 0; top < rows; top += HIGH) {
        const int high = min(HIGH, rows - top);
        for (int side = 0; side < columns; side += WIDE) {
            const int wide = min(WIDE, columns - side);
            double sum[TILE][TILE] = {};
            for (int from = 0; from < inner; from += DEEP) {
                const int deep = min(DEEP, inner - from);
                __syncthreads();  // what was staged before is used
                for (int e = me; e < high * DEEP; e += TRANSFORMS_THREADS) {
                    const int i = e / DEEP, l = e % DEEP;
                    if (l < deep) staged_left[l * HIGH_APART + i] = left(top + i, from + l);
                }
                for (int e = me; e < deep * WIDE; e += TRANSFORMS_THREADS) {
                    const int l = e / WIDE, j = e % WIDE;
                    if (j < wide) staged_right[l * WIDE + j] = right(from + l, side + j);
                }
                __syncthreads();
                if (line >= high || column >= wide) continue;
                // What a tile has beyond the edge is never finished.
                for (int l = 0; l < deep; ++l) {
                    double u[TILE], v[TILE];
#pragma unroll
                    for (int t = 0; t < TILE; t += 2) {
                        const auto s = *reinterpret_cast<double2*>(staged_left + l * HIGH_APART + line + t);
                        const auto w = *reinterpret_cast<double2*>(staged_right + l * WIDE + column + t);
                        u[t] = s.x, u[t + 1] = s.y, v[t] = w.x, v[t + 1] = w.y;
                    }
#pragma unroll
                    for (int i = 0; i < TILE; ++i) {
#pragma unroll
                        for (int j = 0; j < TILE; ++j) sum[i][j] += u[i] * v[j];
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < TILE; ++i) {
#pragma unroll
                for (int j = 0; j < TILE; ++j) {
                    if (line + i < high && column + j < wide) finish(top + line + i, side + column + j, sum[i][j]);
                }
            }
        }
    }
}

// How many components are worth solving for: below rounding noise, U is noise, and S^-½ would blow it up. sigma [r]
// falls.
__device__ __forceinline__ int components(const Problem& p, const double* sigma) {
    const int64_t limits[] = {p.rank(), p.b.rows, p.a.cols};
    int64_t most = p.k;
    for (const int64_t limit : limits) most = limit < most ? limit : most;
    const double noise = static_cast<double>(p.rank()) * 0x1p-53 * sigma[0];
    int low = 0, high = static_cast<int>(most);
    while (low < high) {
        const int middle = (low + high) / 2;
        if (sigma[middle] > noise) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// An upper bound of ‖Y·D⁻¹‖₂ for Y [rows, width], D = diag(root): the square root of the ∞-norm of its Gram matrix,
// which goes to gram [kept, kept]. In every thread.
__device__ __forceinline__ double stretch(const double* y, int rows, const double* root, int kept, int width,
                                          double* gram, double* stage, double* warps) {
    staged_product(
        kept, kept, rows, stage, [&](int c, int i) { return read(y + i * width + c); },
        [&](int i, int d) { return read(y + i * width + d); },
        [&](int c, int d, double sum) { write(gram + c * kept + d, fabs(sum) / (root[c] * root[d])); });
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    constexpr int WARPS = TRANSFORMS_THREADS / 32;
    double largest = 0;
    for (int c = warp; c < kept; c += WARPS) {
        double row_sum = 0;
        for (int d = lane; d < kept; d += 32) row_sum += read(gram + c * kept + d);
        row_sum = sum_of_lanes<32>(row_sum);
        largest = row_sum > largest ? row_sum : largest;
    }
    if (lane == 0) warps[warp] = largest;
    __syncthreads();
    for (int i = 0; i < WARPS; ++i) largest = warps[i] > largest ? warps[i] : largest;
    return sqrt(largest);
}

// Dynamic shared memory: root [r], pivot [r], then the right-hand sides [r][wide] and columns [2][r] of the triangular
// solve, and after it the stage of products; see transforms_shared().
__global__ void __launch_bounds__(TRANSFORMS_THREADS, 2) transforms(Batch batch, int wide) {
    PARA_DYNAMIC_SHARED(memory);
    PARA_SHARED(double, warps, 32);
    PARA_SHARED(int64_t, ranks, 2);
    const Job job = shared_job(batch, blockIdx.x);
    const Problem p = job.problem();
    if (p.k == 0) return;
    const Core& core = p.core;
    const int r = static_cast<int>(p.rank()), width = static_cast<int>(round_up(p.k, TRUNCATE_TILE));
    const int me = static_cast<int>(threadIdx.x);
    double* const t_b = batch.scratch + job.work[TRANSFORMS];  // [r, width], as the others
    double* const t_a = t_b + int64_t{r} * width;
    double* const y = t_a + int64_t{r} * width;
    double* const z = y + int64_t{r} * width;
    double* const gram = z + int64_t{r} * width;
    const int bits_b = 53 - significand_bits(p.b.dtype), bits_a = 53 - significand_bits(p.a.dtype);

    auto* const root = reinterpret_cast<double*>(memory);
    auto* const pivot = reinterpret_cast<int*>(root + round_up(r, 2));
    double* const stage = root + round_up(r, 2) + round_up(r, 4) / 2;
    share(core.ranks, 2, ranks);
    for (int i = me; i < r; i += TRANSFORMS_THREADS) {
        root[i] = read(core.sigma + i);
        pivot[i] = static_cast<int>(read(core.pivot_b + i));
    }
    __syncthreads();
    const int rank_b = static_cast<int>(ranks[0]), rank_a = static_cast<int>(ranks[1]), kept = components(p, root);
    __syncthreads();
    for (int i = me; i < r; i += TRANSFORMS_THREADS) root[i] = sqrt(root[i]);
    __syncthreads();

    // T_B: a step solves for one row and takes it out of all rows above. A thread keeps to one column. Each step's
    // column of R_B comes to shared memory during the step before.
    double* const sides = stage;
    double* const columns = sides + r * wide;
    const int column = me % wide, line = me / wide, lines = TRANSFORMS_THREADS / wide;
    const auto fetch = [&](int i) {
        for (int l = me; l <= i; l += TRANSFORMS_THREADS) columns[i % 2 * r + l] = read(core.r_b + l * r + pivot[i]);
    };
    for (int first = 0; first < width; first += wide) {
        const int c = first + column;
        for (int i = line; i < rank_b; i += lines) {
            sides[i * wide + column] = c < kept ? read(core.u + i * r + c) * root[c] : 0;
        }
        if (rank_b > 0) fetch(rank_b - 1);
        __syncthreads();
        for (int i = rank_b - 1; i >= 0; --i) {
            if (i > 0) fetch(i - 1);
            const double* const of_r = columns + i % 2 * r;
            const double x = sides[i * wide + column] / of_r[i];
            for (int l = line; l < i; l += lines) sides[l * wide + column] -= of_r[l] * x;
            if (line == 0 && c < width) write(t_b + pivot[i] * width + c, rounded_to_bits(x, bits_b));
            __syncthreads();
        }
    }
    for (int e = me; e < (r - rank_b) * width; e += TRANSFORMS_THREADS) {
        write(t_b + pivot[rank_b + e / width] * width + e % width, 0.0);
    }

    staged_product(
        r, width, rank_b, stage, [&](int j, int i) { return read(core.r_b + i * r + j); },
        [&](int i, int c) { return c < kept ? read(core.u + i * r + c) : 0; },
        [&](int j, int c, double sum) {
            write(t_a + j * width + c, c < kept ? rounded_to_bits(p.scale / root[c] * sum, bits_a) : 0);
        });
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
        const double* const of_r = side == 1 ? core.r_a : core.r_b;
        const double* const t = side == 1 ? t_a : t_b;
        staged_product(
            side == 1 ? rank_a : rank_b, width, r, stage, [&](int i, int l) { return read(of_r + i * r + l); },
            [&](int l, int c) { return read(t + l * width + c); },
            [&](int i, int c, double sum) { write((side == 1 ? z : y) + i * width + c, sum); });
    }
    // ‖M − (R_B T_B)(T_A R_Aᵀ)‖_F = ‖R_B (scale·I − T_B T_A) R_Aᵀ‖_F, for T as rounded.
    double squared = 0;
    staged_product(
        rank_b, rank_a, width, stage, [&](int i, int c) { return read(y + i * width + c); },
        [&](int c, int j) { return read(z + j * width + c); },
        [&](int i, int j, double sum) {
            const double residual = read(core.m + i * r + j) - sum;
            squared += residual * residual;
        });
    squared = sum_of_block(squared, warps);
    double* const numbers = batch.results + int64_t{blockIdx.x} * NUMBERS_OF_MODULE;
    if (me == 0) write(numbers, sqrt(squared));
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
        const double bound =
            stretch(side == 1 ? z : y, side == 1 ? rank_a : rank_b, root, kept, width, gram, stage, warps);
        if (me == 0) write(numbers + 1 + side, bound);
    }
}

const char* launch_transforms(const Batch& batch, int64_t modules, int64_t largest_rank, int64_t largest_new_rank,
                              void* stream) {
    int wide = 1;
    while (wide < largest_new_rank && wide < TRANSFORMS_THREADS && 2 * wide * largest_rank <= RIGHT_HAND_SIDES) {
        wide *= 2;
    }
    const int64_t solve = largest_rank * (wide + 2);
    const int64_t doubles = round_up(largest_rank, 2) + round_up(largest_rank, 4) / 2 + (solve < STAGE ? STAGE : solve);
    return launch(transforms, dim3(static_cast<unsigned>(modules)), TRANSFORMS_THREADS,
                  static_cast<size_t>(doubles) * sizeof(double), static_cast<Stream>(stream), batch, wide);
}

}  // namespace para::cuda
