// Stage 1: B [m, r], A [r, n] → R_B, R_A, M = scale · R_B · R_Aᵀ.
//
// R comes from a Gram matrix accumulated in fp64 (exact products of ≤ 32-bit data; chains of CHAIN rows, CHAINS of them
// added one by one to a block, blocks in a fixed pairwise tree) by a pivoted Cholesky of the Gram matrix, its diagonal
// scaled to [1, 4) by powers of two: only the column-scaled condition number counts (Demmel & Veselić 1992; van der
// Sluis 1969), and scaling columns by powers of two changes no bit.
#pragma once

#include <cmath>
#include <type_traits>

#include "tile-inl.h"

namespace para {
namespace PARA_ISA {
namespace {

constexpr int64_t CHAIN = 64;   // rows added up one by one: rounding of equal terms all goes one way
constexpr int64_t CHAINS = 16;  // of a block
constexpr int64_t BLOCK = CHAIN * CHAINS;
constexpr int64_t PANEL = 2 * CHAIN;          // rows packed at a time
constexpr int64_t APART = PANEL * STRIP + 8;  // of a panel's strips: not a power of two, which would share cache sets
constexpr double UNIT_ROUNDOFF = 0x1p-53;

// G's rows from row·STRIP, STRIPS strips from column strip·STRIP on, gain those of PᵀP; `fresh`: are set to them.
// TOGETHER chains run side by side, where one has too few sums to keep the machine busy.
template <int STRIPS, int TOGETHER>
inline void gram_tile(const double* panel, int64_t count, int64_t row, int64_t strip, int64_t width, bool fresh,
                      double* gram) {
    constexpr int ROWS = static_cast<int>(STRIP);
    using Sums = Tile<ROWS, STRIPS>;
    double* out = gram + row * STRIP * width + strip * STRIP;
    const Left left = {panel + row * APART, 1, STRIP};
    const Right right = {panel + strip * APART, APART, STRIP};
    auto total = [&](const Sums& sums) {
        PARA_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            PARA_UNROLL
            for (int q = 0; q < Sums::WIDE; ++q) {
                double* to = out + i * width + q * PART;
                store(to, fresh ? sums.sum[i][q] : load_part(to) + sums.sum[i][q]);
            }
        }
        fresh = false;
    };
    int64_t k = 0;
    if (TOGETHER > 1) {
        for (; k + TOGETHER * CHAIN <= count; k += TOGETHER * CHAIN) {
            Sums sums[TOGETHER];
            PARA_UNROLL
            for (int t = 0; t < TOGETHER; ++t) sums[t].clear();
            for (int64_t i = k; i < k + CHAIN; ++i) {
                PARA_UNROLL
                for (int t = 0; t < TOGETHER; ++t) {
                    const int64_t at = (i + t * CHAIN) * STRIP;
                    sums[t].template add<Terms::exact>({left.data + at, 1, STRIP}, {right.data + at, APART, STRIP}, 1);
                }
            }
            PARA_UNROLL
            for (int t = 0; t < TOGETHER; ++t) total(sums[t]);
        }
    }
    for (; k < count; k += CHAIN) {
        const int64_t at = k * STRIP;
        Sums sums;
        sums.clear();
        sums.template add<Terms::exact>({left.data + at, 1, STRIP}, {right.data + at, APART, STRIP},
                                        count - k < CHAIN ? count - k : CHAIN);
        total(sums);
    }
}

// G [width, width] gains PᵀP of a panel P [count, strips·STRIP]; what lies left of the diagonal's blocks is not
// written.
inline void gram_of_panel(const double* panel, int64_t count, int64_t strips, int64_t width, bool fresh, Ahead ahead,
                          double* gram) {
    const int64_t lines = ahead.lines() / (strips * (strips + 1) / 2) + 1;  // for every block
    int64_t from = 0;
    for (int64_t shares = (strips + MOST_STRIPS - 1) / MOST_STRIPS; shares > 0; --shares) {
        const int64_t until = from + (strips - from) / shares;
        for (int64_t row = 0; row < until; ++row) {
            const int64_t strip = row > from ? row : from;
            ahead.fetch(lines * (until - strip));
            switch (until - strip) {
                case 1:
                    gram_tile<1, MOST_STRIPS == 1 ? 1 : 2>(panel, count, row, strip, width, fresh, gram);
                    break;
                case 2:
                    gram_tile<MOST_STRIPS == 1 ? 1 : 2, 1>(panel, count, row, strip, width, fresh, gram);
                    break;
                default:
                    gram_tile<MOST_STRIPS, 1>(panel, count, row, strip, width, fresh, gram);
            }
        }
        from = until;
    }
}

// Narrow factors (r ≤ NARROW): eight rows a step, one in each lane, so that a pair of columns is one multiply-add and
// those left of the diagonal are none. Blocks of the matrix, as above, would take 24 instead of 17 a row at r = 16.
constexpr int64_t NARROW = 16;
constexpr int64_t NARROW_BLOCK = 64 * PANEL;
constexpr int64_t NARROW_APART = NARROW * STRIP;
constexpr int NARROW_ROWS = PART == 8 ? 4 : PART == 4 ? 3 : 2, NARROW_COLUMNS = 4;  // pairs of columns in registers
constexpr int64_t LANE_ROWS = NARROW + NARROW_ROWS - 1;  // the last rows of pairs may run over

// lanes [LANE_ROWS, NARROW][LANES] gain the products of columns from `row` on with those from `column` on, where those
// lie SHIFT or more further on; `fresh`: are set to them. panel: [steps · LANES / STRIP strips of rows][NARROW][STRIP].
template <int SHIFT>
PARA_NOINLINE void narrow_tile(const double* panel, int64_t steps, int64_t row, int64_t column, bool fresh,
                               double* lanes) {
    for (int64_t q = 0; q < LANES / PART; ++q) {
        Part sum[NARROW_ROWS][NARROW_COLUMNS];
        PARA_UNROLL
        for (int t = 0; t < NARROW_ROWS * NARROW_COLUMNS; ++t) {
            sum[t / NARROW_COLUMNS][t % NARROW_COLUMNS] = part(0);
        }
        const double* x = panel + q / PARTS * NARROW_APART + q % PARTS * PART;
        const double *left = x + row * STRIP, *right = x + column * STRIP;
        for (int64_t s = 0; s < steps; ++s) {
            Part factor[NARROW_ROWS];
            PARA_UNROLL
            for (int i = 0; i < NARROW_ROWS; ++i) factor[i] = load_part(left + i * STRIP);
            PARA_UNROLL
            for (int j = 0; j < NARROW_COLUMNS; ++j) {
                const Part with = load_part(right + j * STRIP);
                PARA_UNROLL
                for (int i = 0; i < NARROW_ROWS; ++i) {
                    if (j >= i + SHIFT) sum[i][j] = fma_exact(factor[i], with, sum[i][j]);
                }
            }
            left += LANES / STRIP * NARROW_APART;
            right += LANES / STRIP * NARROW_APART;
        }
        PARA_UNROLL
        for (int i = 0; i < NARROW_ROWS; ++i) {
            PARA_UNROLL
            for (int j = 0; j < NARROW_COLUMNS; ++j) {
                if (j < i + SHIFT) continue;
                double* to = lanes + ((row + i) * NARROW + column + j) * LANES + q * PART;
                store(to, fresh ? sum[i][j] : load_part(to) + sum[i][j]);
            }
        }
    }
}

inline void gram_of_narrow_panel(const double* panel, int64_t steps, int64_t r, bool fresh, Ahead ahead,
                                 double* lanes) {
    const int64_t tiles = (r + NARROW_ROWS - 1) / NARROW_ROWS * ((r + NARROW_COLUMNS - 1) / NARROW_COLUMNS);
    const int64_t lines = 2 * ahead.lines() / tiles + 1;  // for every tile
    for (int64_t row = 0; row < r; row += NARROW_ROWS) {
        for (int64_t column = row / NARROW_COLUMNS * NARROW_COLUMNS; column < r; column += NARROW_COLUMNS) {
            ahead.fetch(lines);
            const int64_t shift = row - column;
            if (shift < 0) {
                narrow_tile<1 - NARROW_ROWS>(panel, steps, row, column, fresh, lanes);
            } else if (shift == 0) {
                narrow_tile<0>(panel, steps, row, column, fresh, lanes);
            } else if (shift == 1) {
                narrow_tile<1>(panel, steps, row, column, fresh, lanes);
            } else if (shift == 2) {
                narrow_tile<2>(panel, steps, row, column, fresh, lanes);
            } else {
                narrow_tile<3>(panel, steps, row, column, fresh, lanes);
            }
        }
    }
}

// levels [size] each ← a fixed pairwise tree of the sums that add_block(begin, end, sum) sets, left in the first.
template <class AddBlock>
void sum_of_blocks(int64_t rows, int64_t block, int64_t size, double* levels, AddBlock add_block) {
    int64_t depth = 0;  // partial sums on the stack; they cover blocks like the binary digits of their count
    int64_t blocks = 0;
    for (int64_t begin = 0; begin < rows; begin += block) {
        const int64_t end = begin + block < rows ? begin + block : rows;
        add_block(begin, end, levels + depth * size);
        ++depth;
        ++blocks;
        for (int64_t digit = blocks; depth > 1 && (end == rows || digit % 2 == 0); digit /= 2) {
            double* into = levels + (depth - 2) * size;
            const double* from = levels + (depth - 1) * size;
            for (int64_t i = 0; i < size; i += LANES) store(into + i, load(into + i) + load(from + i));
            --depth;
        }
    }
}

// G [width, width] of the rows of x. Scratch: panel [panel_words(width)], gram_levels(rows) buffers of [width, width];
// the result is left in the first.
template <class T>
void gram(const View<T>& x, int64_t width, double* panel, double* levels) {
    const int64_t r = x.cols, strips = (r + STRIP - 1) / STRIP;
    // Calls panel_of(first, count, ahead): rows first … first + count of x, and those to be fetched meanwhile.
    const auto by_panels = [&](int64_t begin, int64_t end, auto panel_of) {
        for (int64_t first = begin; first < end; first += PANEL) {
            const int64_t next = first + PANEL, coming = x.rows - next < PANEL ? x.rows - next : PANEL;
            panel_of(first, end - first < PANEL ? end - first : PANEL, Ahead(x, next, coming, 0, r));
        }
    };
    if (r > NARROW) {
        sum_of_blocks(x.rows, BLOCK, width * width, levels, [&](int64_t begin, int64_t end, double* sum) {
            by_panels(begin, end, [&](int64_t first, int64_t count, Ahead ahead) {
                pack_strips(x, first, count, 0, strips, panel, APART, STRIP);
                gram_of_panel(panel, count, strips, width, first == begin, ahead, sum);
            });
        });
        return;
    }
    double* lanes = panel + PANEL * NARROW;  // a tile that runs over the panel reads them, for sums that nobody wants
    const int64_t used = round_up(x.rows < PANEL ? x.rows : PANEL, LANES) * NARROW;
    for (int64_t i = 0; i < used; ++i) panel[i] = 0;  // columns from r on stay so
    sum_of_blocks(x.rows, NARROW_BLOCK, width * width, levels, [&](int64_t begin, int64_t end, double* out) {
        by_panels(begin, end, [&](int64_t first, int64_t count, Ahead ahead) {
            const int64_t steps = (count + LANES - 1) / LANES;
            pack_strips(x.transposed(), 0, r, first, steps * LANES / STRIP, panel, NARROW_APART, STRIP);
            gram_of_narrow_panel(panel, steps, r, first == begin, ahead, lanes);
        });
        for (int64_t i = 0; i < r; ++i) {
            for (int64_t j = i; j < r; ++j) out[i * width + j] = sum(load(lanes + (i * NARROW + j) * LANES));
        }
    });
}

inline int64_t gram_levels(int64_t rows) {
    int64_t levels = 2;
    for (int64_t blocks = (rows + BLOCK - 1) / BLOCK; blocks > 1; blocks /= 2) ++levels;
    return levels;
}

// The power of two D with 1 ≤ G_ii / D² < 4.
inline double diagonal_scale(double g) {
    int exponent;
    std::frexp(g, &exponent);
    return std::ldexp(1.0, exponent % 2 == 0 ? exponent / 2 - 1 : (exponent - 1) / 2);
}

// R [rank, r] (row-major, columns in their own order) with RᵀR = G, pivot[j] the column eliminated at step j.
// G [width, width], upper part given, is destroyed: rows and columns are exchanged as they are eliminated, so that what
// is left shrinks. Stops where a pivot is rounding noise. Scratch: scale [width].
inline int64_t pivoted_cholesky(double* g, int64_t width, int64_t r, int64_t max_rank, double* scale, double* out,
                                int64_t* pivot) {
    double largest = 0;
    for (int64_t i = 0; i < r; ++i) scale[i] = g[i * width + i] > 0 ? 1 / diagonal_scale(g[i * width + i]) : 1;
    for (int64_t i = 0; i < r; ++i) {
        for (int64_t j = i; j < r; ++j) g[i * width + j] *= scale[i] * scale[j];
        if (g[i * width + i] > largest) largest = g[i * width + i];
        pivot[i] = i;
    }
    const double noise = static_cast<double>(r) * UNIT_ROUNDOFF * largest;

    int64_t rank = 0;
    for (; rank < max_rank; ++rank) {
        int64_t best = rank;
        for (int64_t i = rank + 1; i < r; ++i) {
            const double challenger = g[i * width + i], champion = g[best * width + best];
            if (challenger > champion || (challenger == champion && pivot[i] < pivot[best])) best = i;
        }
        const double d = g[best * width + best];
        if (!(d > noise)) break;
        double* row = g + rank * width;  // becomes the row of R, still scaled
        if (best != rank) {
            for (int64_t i = 0; i < rank; ++i) exchange(g[i * width + rank], g[i * width + best]);
            for (int64_t i = rank + 1; i < best; ++i) exchange(row[i], g[i * width + best]);
            for (int64_t j = best + 1; j < r; ++j) exchange(row[j], g[best * width + j]);
            exchange(row[rank], g[best * width + best]);
            exchange(pivot[rank], pivot[best]);
        }
        const double root = std::sqrt(d);
        row[rank] = root;
        for (int64_t j = rank + 1; j < r; ++j) row[j] /= root;
        for (int64_t i = rank + 1; i < r; ++i) {
            double* other = g + i * width;
            const Vec factor = splat(row[i]);
            for (int64_t j = i / LANES * LANES; j < width; j += LANES) {
                store(other + j, load(other + j) - factor * load(row + j));
            }
        }
    }
    for (int64_t i = 0; i < r * r; ++i) out[i] = 0;
    for (int64_t i = 0; i < rank; ++i) {
        for (int64_t j = i; j < r; ++j) out[i * r + pivot[j]] = g[i * width + j] / scale[pivot[j]];
    }
    return rank;
}

// out [r, r] ← factor · X · Yᵀ, X [rows, r], Y [cols, r], zero elsewhere. Scratch: yt [r, width].
inline void product_transposed(const double* x, int64_t rows, const double* y, int64_t cols, int64_t r, int64_t width,
                               double factor, double* yt, double* out) {
    for (int64_t l = 0; l < r; ++l) {
        for (int64_t j = 0; j < width; ++j) yt[l * width + j] = j < cols ? y[j * r + l] : 0;
    }
    for (int64_t i = rows * r; i < r * r; ++i) out[i] = 0;
    const Right right = {yt, STRIP, width};
    product<Terms::rounded>({x, r, 1}, rows, right, width / STRIP, r, [&](int64_t i, int64_t j, const auto& tile) {
        constexpr int HIGH = std::decay_t<decltype(tile)>::HIGH, WIDE = std::decay_t<decltype(tile)>::WIDE;
        for (int row = 0; row < HIGH; ++row) {
            double line[WIDE * PART];
            for (int q = 0; q < WIDE; ++q) store(line + q * PART, tile.sum[row][q] * part(factor));
            for (int64_t t = 0; t < WIDE * PART && j + t < r; ++t) out[(i + row) * r + j + t] = line[t];
        }
    });
}

// Doubles of a panel, and of the lanes of a narrow one.
inline int64_t panel_words(int64_t width) {
    const int64_t narrow = PANEL * NARROW + LANE_ROWS * NARROW * LANES, wide = width / STRIP * APART;
    return narrow > wide ? narrow : wide;
}

// Doubles of scratch that cores() needs for a module.
inline int64_t cores_scratch(const Problem& p) {
    const int64_t width = round_up(p.rank(), LANES);
    const int64_t rows = p.b.rows > p.a.cols ? p.b.rows : p.a.cols;
    return panel_words(width) + gram_levels(rows) * width * width + width;
}

// Returns 0, or 1 if B, 2 if A holds a NaN or an infinity, 3 if M overflows: in fp64 the squares of ≤ 32-bit data can't
// overflow, so the diagonal of the Gram matrix is finite exactly when every entry is.
inline int cores(const Problem& p, double* scratch) {
    const int64_t r = p.rank(), width = round_up(r, LANES);
    double* panel = scratch;
    double* levels = panel + panel_words(width);
    const int64_t rows = p.b.rows > p.a.cols ? p.b.rows : p.a.cols;
    double* scale = levels + gram_levels(rows) * width * width;
    const Core& core = p.core;

    for (int side = 0; side < 2; ++side) {
        const bool is_a = side == 1;
        with_view(is_a ? p.a : p.b, is_a, [&](const auto& x) { gram(x, width, panel, levels); });
        double squared_norm = 0;
        for (int64_t i = 0; i < r; ++i) squared_norm += levels[i * width + i];
        if (!std::isfinite(squared_norm)) return side + 1;
        core.squared_norms[side] = squared_norm;
        const int64_t other = is_a ? p.a.cols : p.b.rows;
        core.ranks[side] = pivoted_cholesky(levels, width, r, r < other ? r : other, scale, is_a ? core.r_a : core.r_b,
                                            is_a ? core.pivot_a : core.pivot_b);
    }
    product_transposed(core.r_b, core.ranks[0], core.r_a, core.ranks[1], r, width, p.scale, levels, core.m);
    for (int64_t i = 0; i < r * r; ++i) {
        if (!std::isfinite(core.m[i])) return 3;
    }
    return 0;
}

}  // namespace
}  // namespace PARA_ISA
}  // namespace para
