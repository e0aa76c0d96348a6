// Stage 3, second half: B' = B·T_B [m, k] and A' = T_A·A [k, n], both products of all modules in one launch; a block
// per span of rows of one factor.
#include "block.cuh"
#include "launches.h"
#include "panel.cuh"

namespace para::cuda {

// Rows of X · T, T [r, width], as new factors. A thread makes TILE rows, `strips` apart, by TILE components.
//
// Dynamic shared memory: a panel, in which the outputs are put in order too, and all of T or some rows of it.
__global__ void __launch_bounds__(TRUNCATE_THREADS, 4) truncate(Batch batch, const int64_t* spans, double* errors) {
    PARA_DYNAMIC_SHARED(memory);
    PARA_SHARED(int64_t, span, SPAN_COLUMNS);
    PARA_SHARED(double, sigma, MOST_COMPONENTS);
    PARA_SHARED(double, warps, 32);
    constexpr int TILE = TRUNCATE_TILE;
    share(spans + int64_t{blockIdx.x} * SPAN_COLUMNS, SPAN_COLUMNS, span);
    __syncthreads();
    const Job job = shared_job(batch, span[MODULE]);
    const Problem p = job.problem();
    const bool is_a = span[SIDE] == 1;
    const Tall x = tall(p, is_a);
    const int r = x.columns, width = static_cast<int>(round_up(p.k, TILE));
    const int left = static_cast<int>(span[LEFT]), made = static_cast<int>(span[RIGHT]) - left;
    const int count = static_cast<int>(span[COUNT]);
    const int64_t first = span[FIRST];

    // Threads: `across` of them for a row's components, `strips` strips of rows.
    const int me = static_cast<int>(threadIdx.x);
    const int across = (made + TILE - 1) / TILE, taken = across * TILE;
    const int height = min(TRUNCATE_THREADS / across * TILE & ~7, MOST_ROWS), strips = height / TILE;
    const int strip = me / across, component = me % across;
    for (int c = me; c < made; c += TRUNCATE_THREADS) sigma[c] = left + c < r ? read(p.core.sigma + left + c) : 0;

    // So many of X's columns at a time. Their number in a panel is even: the last may be zero.
    const int most = min(min(PANEL / height - 2, PREFETCH * 4 * TRUNCATE_THREADS / height), MOST_INNER) & ~3;
    const bool at_once = r <= most && layout_of(x, true).chunk > 1;
    const Layout layout = layout_of(x, at_once);
    const int inner = at_once            ? r
                      : layout.chunk > 1 ? most & ~7
                                         : min(min(most, PREFETCH * TRUNCATE_THREADS / height) & ~1, r);
    const PanelReader reader(x, layout, height, inner, inner, 0);
    const int apart = apart_of(layout, inner);
    auto* const panel = reinterpret_cast<double*>(memory);
    double* const shared_t = panel + PANEL;
    const bool whole_t = round_up(r, 2) * taken <= MOST_OF_T;  // as t_in_shared() has it
    const auto share_t = [&](int from, int rows) {             // and zeros up to an even number
        const double* const t = batch.scratch + job.work[TRANSFORMS] + (is_a ? int64_t{r} * width : 0) + span[LEFT];
        for (int c = me; c < static_cast<int>(round_up(rows, 2)) * taken / 2; c += TRUNCATE_THREADS) {
            const int l = c * 2 / taken, at = c * 2 % taken;
            double2 pair = make_double2(0, 0);
            if (l < rows) pair = read(reinterpret_cast<const double2*>(t + (from + l) * width + at));
            *reinterpret_cast<double2*>(shared_t + c * 2) = pair;
        }
    };
    if (whole_t) share_t(0, r);

    double squared = 0, weighted = 0;
    uint4 raw[PREFETCH];
    const auto rows_from = [&](int begin) { return min(count - begin, height); };
    reader.fetch(first, rows_from(0), 0, min(inner, r), raw);
    for (int begin = 0; begin < count; begin += height) {
        const int rows = rows_from(begin);
        double sum[TILE][TILE] = {};
        for (int from = 0; from < r; from += inner) {
            const int columns = min(inner, r - from);
            reader.put(rows, columns, raw, panel, apart);
            if (columns % 2) {
                for (int i = me; i < rows; i += TRUNCATE_THREADS) panel[i * apart + columns] = 0;
            }
            if (!whole_t) share_t(from, columns);
            __syncthreads();
            const bool same = from + inner < r;  // rows
            const int next = same ? from + inner : 0, next_begin = same ? begin : begin + height;
            if (next_begin < count) {
                reader.fetch(first + next_begin, rows_from(next_begin), next, min(inner, r - next), raw);
            }
            if (strip < strips) {
                const double* const u = panel + opaque(strip) * apart;
                const double* const v = shared_t + (whole_t ? from * taken : 0) + component * 2;
#pragma unroll 1
                for (int l = 0; l < columns; l += 2) {
                    double2 xs[TILE];
#pragma unroll
                    for (int i = 0; i < TILE; ++i) {
                        xs[i] = *reinterpret_cast<const double2*>(u + i * strips * apart + l);
                    }
#pragma unroll
                    for (int j = 0; j < TILE; j += 2) {
                        const auto even = *reinterpret_cast<const double2*>(v + l * taken + j * across);
                        const auto odd = *reinterpret_cast<const double2*>(v + (l + 1) * taken + j * across);
#pragma unroll
                        for (int i = 0; i < TILE; ++i) {
                            sum[i][j] += xs[i].x * even.x;
                            sum[i][j] += xs[i].y * odd.x;
                            sum[i][j + 1] += xs[i].x * even.y;
                            sum[i][j + 1] += xs[i].y * odd.y;
                        }
                    }
                }
            }
            __syncthreads();
        }
        with_format(job.problem().new_dtype, [&](auto format) {
            using Format = decltype(format);
            const Problem p = job.problem();
            using Storage = typename Format::Storage;
            auto* const staged = reinterpret_cast<Storage*>(memory);
            const bool one_run = !is_a && made == p.k;
            const int64_t offset = is_a ? span[LEFT] * p.a.cols + first + begin : (first + begin) * p.k + span[LEFT];
            char* const out = static_cast<char*>(is_a ? p.new_a : p.new_b) + offset * int64_t{sizeof(Storage)};
            const Runs runs = is_a      ? Runs{out, made, rows, height, p.a.cols}
                              : one_run ? Runs{out, 1, rows * made, 0, 0}
                                        : Runs{out, rows, made, static_cast<int>(round_up(made, 8)), p.k};
            const int down = opaque(is_a ? 1 : one_run ? made : runs.stage), right = opaque(is_a ? height : 1);
            if (strip < strips) {
#pragma unroll
                for (int i = 0; i < TILE; ++i) {
#pragma unroll
                    for (int j = 0; j < TILE; ++j) {
                        const int line = strip + i * strips, c = opaque(column_of(component, across, j));
                        if (line >= rows || c >= made) continue;
                        const Storage stored = Format::store(sum[i][j]);
                        const double error = Format::load(stored) - sum[i][j];
                        squared += error * error;
                        weighted += error * error * sigma[c];
                        staged[line * down + c * right] = stored;
                    }
                }
            }
            __syncthreads();
            write_runs(runs, staged);
        });
        __syncthreads();  // the panel's memory is free again
    }
    squared = sum_of_block(squared, warps);
    __syncthreads();
    weighted = sum_of_block(weighted, warps);
    if (me == 0) {
        double* const to = errors + int64_t{blockIdx.x} * NUMBERS_OF_SPAN;
        write(to, squared);
        write(to + 1, weighted);
    }
}

const char* launch_truncate(const Batch& batch, const int64_t* spans, int64_t count, int64_t most_of_t, double* errors,
                            void* stream) {
    return launch(truncate, dim3(static_cast<unsigned>(count)), TRUNCATE_THREADS,
                  static_cast<size_t>(PANEL + most_of_t) * sizeof(double), static_cast<Stream>(stream), batch, spans,
                  errors);
}

}  // namespace para::cuda
