// Stage 1: B [m, r], A [r, n] → R_B, R_A, M = scale · R_B · R_Aᵀ. What it computes and why: csrc/cpu/cores-inl.h.
//
// `gram`: a block per span of rows, whose partial Gram matrix it adds up; no block waits for another. `cores`: a block
// per module adds the partial ones up and decomposes, both factors side by side.
#include "block.cuh"
#include "launches.h"
#include "panel.cuh"

namespace para::cuda {

// Offset of row i of a packed upper triangle, such that element (i, j) is at row + j.
__device__ __forceinline__ int packed_row(int r, int i) {
    return i * (2 * r - i - 1) / 2;
}

// Tile number t of the upper triangle of [strips, strips] tiles, row by row.
__device__ __forceinline__ void tile_of_triangle(int strips, int t, int& row, int& column) {
    row = 0;
    for (int length = strips; t >= length; --length) {
        t -= length;
        ++row;
    }
    column = row + t;
}

// Each thread adds up STRIP × STRIP elements of XᵀX over every `groups`-th row of a panel. Its sums of at most CHAIN
// rows go to totals in shared memory, [STRIP²][threads that add up]; in the end those of the groups are added up.
template <int STRIP>
__global__ void __launch_bounds__(GRAM_THREADS, STRIP == SMALL_STRIP ? 4 : 1)
    gram(Batch batch, const int64_t* spans, int whole, int most_threads) {
    PARA_DYNAMIC_SHARED(memory);
    PARA_SHARED(int64_t, span, SPAN_COLUMNS);
    share(spans + int64_t{blockIdx.x} * SPAN_COLUMNS, SPAN_COLUMNS, span);
    __syncthreads();
    const Tall x = tall(shared_job(batch, span[MODULE]).problem(), span[SIDE] == 1);
    const int left = static_cast<int>(span[LEFT]), right = static_cast<int>(span[RIGHT]);
    const int count = static_cast<int>(span[COUNT]);
    const int64_t first = span[FIRST];
    const bool diagonal = left == right;
    // Columns of the blocks, and of their strips. What a panel holds of strips beyond the columns is never written out.
    const int most_columns = x.columns <= whole ? whole : COLUMN_BLOCK, rest = x.columns - right;
    const int wide = rest < most_columns ? rest : most_columns;
    const int split = diagonal ? 0 : COLUMN_BLOCK;
    const int strips = (wide + STRIP - 1) / STRIP, rows_of_tiles = diagonal ? strips : COLUMN_BLOCK / STRIP;
    const int tiles = diagonal ? strips * (strips + 1) / 2 : rows_of_tiles * strips;
    const int groups = most_threads / tiles, threads = groups * tiles;
    const int me = static_cast<int>(threadIdx.x), group = me / tiles;
    int tile_row, tile_column;
    if (diagonal) {
        tile_of_triangle(strips, me % tiles, tile_row, tile_column);
    } else {
        tile_row = me % tiles / strips;
        tile_column = me % strips;
    }

    auto* const panel = reinterpret_cast<double*>(memory);
    double* const totals = panel + PANEL;
    const int width = split + wide;
    const Layout layout = layout_of(x, width == x.columns);
    const int apart = apart_of(layout, width);
    const int height = most_rows(layout, width, apart, PANEL - STRIP);  // a row's last strip may reach beyond it
    const PanelReader reader(x, layout, height, width, split, right - left - split);
    double sum[STRIP][STRIP] = {};
    int chain = 0;
#ifdef PARA_BUG_UNINITIALISED
    bool fresh = false;
#else
    bool fresh = true;
#endif
    const auto total = [&] {
        if (me < threads) {
#pragma unroll
            for (int e = 0; e < STRIP * STRIP; ++e) {
                double* const to = totals + e * threads + me;
                *to = fresh ? sum[e / STRIP][e % STRIP] : *to + sum[e / STRIP][e % STRIP];
                sum[e / STRIP][e % STRIP] = 0;
            }
        }
        fresh = false;
        chain = 0;
    };

    const auto rows_from = [&](int begin) { return min(count - begin, height); };
    uint4 raw[PREFETCH];
    reader.fetch(first, rows_from(0), left, width, raw);
    for (int begin = 0; begin < count; begin += height) {
        const int rows = rows_from(begin);
        reader.put(rows, width, raw, panel, apart);
        __syncthreads();
        if (begin + height < count) reader.fetch(first + begin + height, rows_from(begin + height), left, width, raw);
        const int longest = (rows + groups - 1) / groups;
        if (chain + longest > CHAIN) total();
        chain += longest;
        if (me < threads) {
            const double* a = panel + group * apart + tile_row * 2;
            const double* b = panel + group * apart + split + tile_column * 2;
#pragma unroll 1
            for (int k = group; k < rows; k += groups, a += groups * apart, b += groups * apart) {
                double u[STRIP], v[STRIP];
#pragma unroll
                for (int i = 0; i < STRIP; i += 2) {
                    const auto s = *reinterpret_cast<const double2*>(a + i * rows_of_tiles);
                    const auto t = *reinterpret_cast<const double2*>(b + i * strips);
                    u[i] = s.x, u[i + 1] = s.y, v[i] = t.x, v[i + 1] = t.y;
                }
#pragma unroll
                for (int i = 0; i < STRIP; ++i) {
#pragma unroll
                    for (int j = 0; j < STRIP; ++j) sum[i][j] += u[i] * v[j];
                }
            }
        }
#ifndef PARA_BUG_GRAM_SECOND_SYNC
        __syncthreads();  // the panel is read; the next may come
#endif
    }
    total();
    __syncthreads();

    for (int n = groups; n > 1;) {  // pairwise
        const int half = (n + 1) / 2;
        if (group < n - half) {
            for (int e = 0; e < STRIP * STRIP; ++e) {
                totals[e * threads + me] += totals[e * threads + me + half * tiles];
            }
        }
        n = half;
        __syncthreads();
    }
    // From tiles to rows of the packed triangle.
    double* const out = batch.scratch + span[OUT];
    const int warps = GRAM_THREADS / 32, lane = me % 32;
    for (int i = me / 32; i < (diagonal ? wide : COLUMN_BLOCK); i += warps) {
        const int strip_i = i / 2 % rows_of_tiles, at_i = i / 2 / rows_of_tiles * 2 + i % 2;
        for (int j = (diagonal ? i : 0) + lane; j < wide; j += 32) {
            const int strip_j = j / 2 % strips, at_j = j / 2 / strips * 2 + j % 2;
            int tile, e;
            if (!diagonal) {
                tile = strip_i * strips + strip_j;
                e = at_i * STRIP + at_j;
            } else if (strip_i <= strip_j) {
                tile = packed_row(strips, strip_i) + strip_j;
                e = at_i * STRIP + at_j;
            } else {
                tile = packed_row(strips, strip_j) + strip_i;
                e = at_j * STRIP + at_i;
            }
            write(out + packed_row(x.columns, left + i) + right + j, totals[e * threads + tile]);
        }
    }
}

// The power of two D with 1 ≤ G_ii / D² < 4.
__device__ __forceinline__ double diagonal_scale(double g) {
    int exponent;
    frexp(g, &exponent);
    return ldexp(1.0, exponent % 2 == 0 ? exponent / 2 - 1 : (exponent - 1) / 2);
}

// finish(i, j, Σ_l left(i, l) · right(l, j)) for i < rows, j < columns, i ≤ l < inner: left is an upper triangle. A
// thread takes 4 × 4 of them at a time.
template <class Left, class Right, class Finish>
__device__ __forceinline__ void triangle_product(int rows, int columns, int inner, Left left, Right right,
                                                 Finish finish) {
    constexpr int TILE = 4;
    const int high = (rows + TILE - 1) / TILE, wide = (columns + TILE - 1) / TILE;
    for (int tile = static_cast<int>(threadIdx.x); tile < high * wide; tile += static_cast<int>(blockDim.x)) {
        const int i = tile / wide * TILE, j = tile % wide * TILE;
        double sum[TILE][TILE] = {};
        for (int l = i; l < inner; ++l) {
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

// What the halves of a block share, one for each factor.
struct Pivoting {
    double noise[2], pivot[2], squared_norm[2];
    int at[2], rank[2];
    bool done[2];
};

// A block per module, half of it for each factor; between barriers both do the same. `large`: the triangles are too
// large for shared memory and lie where the table says.
template <bool LARGE>
__global__ void __launch_bounds__(CORES_THREADS) cores(Batch batch, const int64_t* modules) {
    PARA_DYNAMIC_SHARED(memory);
    PARA_SHARED(Pivoting, shared, 1);
    const Job job = listed_job(batch, modules);
    const Problem p = job.problem();
    const Core& core = p.core;
    const int r = static_cast<int>(p.rank()), packed = static_cast<int>(triangle(r));
    constexpr int HALF = CORES_THREADS / 2;
    const int side = static_cast<int>(threadIdx.x) / HALF, me = static_cast<int>(threadIdx.x) % HALF;
    const int warp = me / 32, lane = me % 32;
    Pivoting& mine = shared[0];

    // scale [2][r], pivot [2][r], place [r], and the triangles; see cores_shared().
    auto* const small = reinterpret_cast<double*>(memory);
    double* const scale = small + side * r;
    int* const pivot = reinterpret_cast<int*>(small + 2 * r) + side * r;
    auto* const place = reinterpret_cast<int16_t*>(small + 3 * r);
    double* const triangles = LARGE ? batch.scratch + job.work[TRIANGLES] : small + 3 * r + (r + 3) / 4;
    double* const g = triangles + int64_t{side} * packed;

    // Partial sums in eights, and the eights.
    const int64_t parts = job.work[PARTS_B + side];
    const double* const partial = batch.scratch + job.work[PARTIALS] + side * job.work[PARTS_B] * packed;
    for (int e = me; e < packed; e += HALF) {
        double total = 0;
        for (int64_t begin = 0; begin < parts; begin += 8) {
            const int64_t end = begin + 8 < parts ? begin + 8 : parts;
            double sum = 0;
            for (int64_t part = begin; part < end; ++part) sum += read(partial + part * packed + e);
            total += sum;
        }
        g[e] = total;
    }
    __syncthreads();
    if (warp == 0) {
        double sum = 0;
        for (int i = lane; i < r; i += 32) {
            const double d = g[packed_row(r, i) + i];
            sum += d;
            scale[i] = d > 0 ? 1 / diagonal_scale(d) : 1;
            pivot[i] = i;
        }
        sum = sum_of_lanes<32>(sum);
        if (lane == 0) {
            mine.squared_norm[side] = sum;
            const int64_t rows = side == 1 ? p.a.cols : p.b.rows;
            mine.rank[side] = static_cast<int>(r < rows ? r : rows);
            mine.done[side] = !isfinite(sum);
        }
    }
    __syncthreads();
    for (int i = warp; i < r; i += HALF / 32) {
        for (int j = i + lane; j < r; j += 32) g[packed_row(r, i) + j] *= scale[i] * scale[j];
    }
    __syncthreads();

    bool done = mine.done[side];
    for (int step = 0; step < r; ++step) {
        if (warp == 0 && !done) {
            double value = -1;
            int key = INT32_MAX;  // equal pivots: the smallest column, whose place goes along
            for (int i = step + lane; i < r; i += 32) {
                const double challenger = g[packed_row(r, i) + i];
                const int challenging = pivot[i] * LARGEST_RANK + i;
                if (challenger > value || (challenger == value && challenging < key)) {
                    value = challenger;
                    key = challenging;
                }
            }
            largest_of_warp(value, key);
            if (lane == 0) {
                if (step == 0) mine.noise[side] = r * 0x1p-53 * value;
                mine.pivot[side] = value;
                mine.at[side] = key % LARGEST_RANK;
                if (step >= mine.rank[side] || !(value > mine.noise[side])) {
                    mine.rank[side] = step < mine.rank[side] ? step : mine.rank[side];
                    mine.done[side] = true;
                }
            }
        }
        __syncthreads();
        if (mine.done[0] && mine.done[1]) break;
        done = mine.done[side];
        const int best = mine.at[side];
        double* const line = g + packed_row(r, step);  // becomes the row of R, still scaled
        if (!done) {
            const double root = sqrt(mine.pivot[side]);
            // Rows and columns `step` and `best` are exchanged, and the row is divided by the root.
            for (int i = me; i < r; i += HALF) {
                if (i < step) {
                    double* const other = g + packed_row(r, i);
                    const double x = other[step];
                    other[step] = other[best];
                    other[best] = x;
                } else if (i == step) {
                    if (best != step) {
                        g[packed_row(r, best) + best] = line[step];
                        const int column = pivot[step];
                        pivot[step] = pivot[best];
                        pivot[best] = column;
                    }
                    line[step] = root;
                } else if (i == best) {
                    line[i] /= root;
                } else {
                    double* const other = g + (i < best ? packed_row(r, i) + best : packed_row(r, best) + i);
                    const double x = best == step ? line[i] : *other;
                    if (best != step) *other = line[i];
                    line[i] = x / root;
                }
            }
        }
        __syncthreads();
        if (!done) {
            for (int i = step + 1 + warp; i < r; i += HALF / 32) {
                double* const other = g + packed_row(r, i);
                const double factor = line[i];
                for (int j = i + lane; j < r; j += 32) other[j] -= factor * line[j];
            }
        }
        __syncthreads();
    }

    const int rank = mine.rank[side];
    double* const out = side == 1 ? core.r_a : core.r_b;
    for (int i = warp; i < r; i += HALF / 32) {
        for (int j = lane; j < r; j += 32) {
            double x = 0;
            if (i < rank && j >= i) x = g[packed_row(r, i) + j] /= scale[pivot[j]];
            write(out + i * r + pivot[j], x);
        }
    }
    int64_t* const order = side == 1 ? core.pivot_a : core.pivot_b;
    for (int j = me; j < r; j += HALF) {
        write(order + j, int64_t{pivot[j]});
        if (side == 1) place[pivot[j]] = static_cast<int16_t>(j);
    }
    if (me == 0) {
        write(core.ranks + side, int64_t{rank});
        write(core.squared_norms + side, mine.squared_norm[side]);
    }
    __syncthreads();

    // M's sums take the columns in the order in which B's were eliminated.
    const int* const column = reinterpret_cast<int*>(small + 2 * r);
    const int rank_b = mine.rank[0], rank_a = mine.rank[1];
    bool finite = true;
    triangle_product(
        rank_b, rank_a, r, [&](int i, int l) { return l < i ? 0 : triangles[packed_row(r, i) + l]; },
        [&](int l, int j) {
            const int at = place[column[l]];
            return at < j ? 0 : triangles[packed + packed_row(r, j) + at];
        },
        [&](int i, int j, double sum) {
            const double m = p.scale * sum;
            finite = finite && isfinite(m);
            write(core.m + i * r + j, m);
        });
    for (int e = static_cast<int>(threadIdx.x); e < r * r; e += CORES_THREADS) {
        if (e / r >= rank_b || e % r >= rank_a) write(core.m + e, 0.0);
    }
    const bool overflow = __syncthreads_or(!finite);
    if (threadIdx.x == 0) {
        double* const spectrum = batch.results + job.work[SPECTRUM];
        const bool bad_b = !isfinite(mine.squared_norm[0]), bad_a = !isfinite(mine.squared_norm[1]);
        write(spectrum + SQUARED_NORM_B, mine.squared_norm[0]);
        write(spectrum + SQUARED_NORM_A, mine.squared_norm[1]);
        write(spectrum + STATUS, bad_b ? 1.0 : bad_a ? 2.0 : overflow ? 3.0 : 0.0);
        write(spectrum + SWEEPS, -1.0);
    }
}

const char* unusable_device(int device) {
    return unusable(device);
}

int64_t shared_limit_of(int device) {
    return static_cast<int64_t>(shared_limit(device));
}

const char* launch_gram(const Batch& batch, bool large, const int64_t* spans, int64_t count, int64_t shared_limit,
                        void* stream) {
    const GramShape shape = gram_shape(large, shared_limit);
    return launch(large ? gram<LARGE_STRIP> : gram<SMALL_STRIP>, dim3(static_cast<unsigned>(count)), GRAM_THREADS,
                  shape.shared, static_cast<Stream>(stream), batch, spans, shape.whole, shape.threads);
}

const char* launch_cores(const Batch& batch, const int64_t* modules, int64_t count, int64_t largest_rank,
                         int64_t shared_limit, void* stream) {
    const bool large = !fits_cores(largest_rank, shared_limit);
    return launch(large ? cores<true> : cores<false>, dim3(static_cast<unsigned>(count)), CORES_THREADS,
                  static_cast<size_t>(cores_shared(largest_rank, large)), static_cast<Stream>(stream), batch, modules);
}

}  // namespace para::cuda
