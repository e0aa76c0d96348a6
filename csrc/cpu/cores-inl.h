// Stage 1: B [m, r], A [r, n] → R_B, R_A, M = scale · R_B · R_Aᵀ.
//
// R comes from a Gram matrix accumulated in fp64 (exact products of ≤ 32-bit data; chains of CHAIN rows, panels of
// CHUNK, partial sums of panels added in a fixed pairwise tree) by a pivoted Cholesky of the Gram matrix, its diagonal
// scaled to [1, 4) by powers of two: only the column-scaled condition number counts (Demmel & Veselić 1992; van der
// Sluis 1969), and scaling columns by powers of two changes no bit.
#pragma once

#include <cmath>

#include "panel-inl.h"

namespace para {
namespace PARA_ISA {
namespace {

constexpr int64_t CHUNK = 128;  // rows of a panel
constexpr int64_t CHAIN = 32;   // rows added up one by one: rounding of equal terms all goes one way
constexpr double UNIT_ROUNDOFF = 0x1p-53;
constexpr int64_t TILE = 4;

// G [width, width] = PᵀP of a panel P [count, width]; entries left of the diagonal's tile are not written.
inline void gram_of_panel(const double* panel, int64_t count, int64_t width, double* gram) {
    for (int64_t i = 0; i < width; i += TILE) {
        for (int64_t j = i / LANES * LANES; j < width; j += LANES) {
            for (int64_t first = 0; first < count; first += CHAIN) {
                const int64_t last = first + CHAIN < count ? first + CHAIN : count;
                Vec acc[TILE];
                for (Vec& a : acc) a = splat(0);
                for (int64_t k = first; k < last; ++k) {
                    const Vec right = load(panel + k * width + j);
                    for (int64_t t = 0; t < TILE; ++t) {
                        acc[t] = fma_exact(splat(panel[k * width + i + t]), right, acc[t]);
                    }
                }
                for (int64_t t = 0; t < TILE; ++t) {
                    double* to = gram + (i + t) * width + j;
                    store(to, first == 0 ? acc[t] : load(to) + acc[t]);
                }
            }
        }
    }
}

// G [width, width] of the rows of x (of its columns if transposed). Scratch: panel [CHUNK, width], levels ≥
// log2(rows/CHUNK) + 2 buffers of [width, width]; the result is left in the first.
inline void gram(const Matrix& x, bool transposed, int64_t width, double* panel, double* levels) {
    const int64_t rows = transposed ? x.cols : x.rows;
    const int64_t size = width * width;
    int64_t depth = 0;  // partial sums on the stack; they cover chunks like the binary digits of their count
    int64_t chunks = 0;
    for (int64_t first = 0; first < rows; first += CHUNK) {
        const int64_t count = rows - first < CHUNK ? rows - first : CHUNK;
        pack(x, transposed, first, count, width, panel);
        gram_of_panel(panel, count, width, levels + depth * size);
        ++depth;
        ++chunks;
        const bool last = first + CHUNK >= rows;
        for (int64_t digit = chunks; depth > 1 && (last || digit % 2 == 0); digit /= 2) {
            double* into = levels + (depth - 2) * size;
            const double* from = levels + (depth - 1) * size;
            for (int64_t i = 0; i < size; i += LANES) store(into + i, load(into + i) + load(from + i));
            --depth;
        }
    }
}

inline int64_t gram_levels(int64_t rows) {
    int64_t levels = 2;
    for (int64_t chunks = (rows + CHUNK - 1) / CHUNK; chunks > 1; chunks /= 2) ++levels;
    return levels;
}

// The power of two D with 1 ≤ G_ii / D² < 4.
inline double diagonal_scale(double g) {
    int exponent;
    std::frexp(g, &exponent);
    return std::ldexp(1.0, exponent % 2 == 0 ? exponent / 2 - 1 : (exponent - 1) / 2);
}

// R [rank, r] (row-major, columns in their own order) with RᵀR = G, pivot[j] the column eliminated at step j.
// G [width, width], upper part given, is destroyed. Stops where a pivot is rounding noise. Scratch: scale [width].
inline int64_t pivoted_cholesky(double* g, int64_t width, int64_t r, int64_t max_rank, double* scale, double* out,
                                int64_t* pivot) {
    for (int64_t i = 0; i < width; ++i) scale[i] = i < r && g[i * width + i] > 0 ? diagonal_scale(g[i * width + i]) : 1;
    double largest = 0;
    for (int64_t i = 0; i < r; ++i) {
        for (int64_t j = i; j < width; ++j) {
            const double scaled = g[i * width + j] / scale[i] / scale[j];
            g[i * width + j] = scaled;
            if (j < r) g[j * width + i] = scaled;
        }
        if (g[i * width + i] > largest) largest = g[i * width + i];
    }
    const double noise = static_cast<double>(r) * UNIT_ROUNDOFF * largest;

    // Columns still to be eliminated are left in pivot[rank …]; the eliminated ones move to the front.
    for (int64_t i = 0; i < r; ++i) pivot[i] = i;
    int64_t rank = 0;
    for (; rank < max_rank; ++rank) {
        int64_t best = rank;
        for (int64_t i = rank + 1; i < r; ++i) {
            const double challenger = g[pivot[i] * width + pivot[i]], champion = g[pivot[best] * width + pivot[best]];
            if (challenger > champion || (challenger == champion && pivot[i] < pivot[best])) best = i;
        }
        const int64_t p = pivot[best];
        const double d = g[p * width + p];
        if (!(d > noise)) break;
        pivot[best] = pivot[rank];
        pivot[rank] = p;

        double* row = g + p * width;  // becomes the row of R, still scaled
        const double root = std::sqrt(d);
        for (int64_t i = 0; i < rank; ++i) row[pivot[i]] = 0;
        for (int64_t j = 0; j < width; j += LANES) store(row + j, load(row + j) / splat(root));
        row[p] = root;
        for (int64_t i = rank + 1; i < r; ++i) {
            double* other = g + pivot[i] * width;
            const Vec factor = splat(row[pivot[i]]);
            for (int64_t j = 0; j < width; j += LANES) store(other + j, load(other + j) - factor * load(row + j));
        }
        for (int64_t j = 0; j < r; ++j) out[rank * r + j] = row[j] * scale[j];
    }
    for (int64_t i = rank * r; i < r * r; ++i) out[i] = 0;
    return rank;
}

// out [r, r] ← factor · X · Yᵀ, X [rows, r], Y [cols, r], zero elsewhere. Scratch: yt [r, width], line [width].
inline void product_transposed(const double* x, int64_t rows, const double* y, int64_t cols, int64_t r, int64_t width,
                               double factor, double* yt, double* line, double* out) {
    for (int64_t l = 0; l < r; ++l) {
        for (int64_t j = 0; j < width; ++j) yt[l * width + j] = j < cols ? y[j * r + l] : 0;
    }
    for (int64_t i = 0; i < r; ++i) {
        for (int64_t j = 0; j < width; j += LANES) {
            Vec acc = splat(0);
            if (i < rows) {
                for (int64_t l = 0; l < r; ++l) acc += splat(x[i * r + l]) * load(yt + l * width + j);
            }
            store(line + j, acc * splat(factor));
        }
        for (int64_t j = 0; j < r; ++j) out[i * r + j] = line[j];
    }
}

// Doubles of scratch that cores() needs for a module.
inline int64_t cores_scratch(const Problem& p) {
    const int64_t width = round_up(p.rank(), LANES);
    const int64_t rows = p.b.rows > p.a.cols ? p.b.rows : p.a.cols;
    return CHUNK * width + gram_levels(rows) * width * width + 2 * width;
}

// Returns 0, or 1 if B, 2 if A holds a NaN or an infinity, 3 if M overflows: in fp64 the squares of ≤ 32-bit data can't
// overflow, so the diagonal of the Gram matrix is finite exactly when every entry is.
inline int cores(const Problem& p, double* scratch) {
    const int64_t r = p.rank(), width = round_up(r, LANES);
    double* panel = scratch;
    double* levels = panel + CHUNK * width;
    const int64_t rows = p.b.rows > p.a.cols ? p.b.rows : p.a.cols;
    double* lines = levels + gram_levels(rows) * width * width;
    const Core& core = p.core;

    for (int side = 0; side < 2; ++side) {
        const bool is_a = side == 1;
        gram(is_a ? p.a : p.b, is_a, width, panel, levels);
        double squared_norm = 0;
        for (int64_t i = 0; i < r; ++i) squared_norm += levels[i * width + i];
        if (!std::isfinite(squared_norm)) return side + 1;
        core.squared_norms[side] = squared_norm;
        const int64_t other = is_a ? p.a.cols : p.b.rows;
        core.ranks[side] = pivoted_cholesky(levels, width, r, r < other ? r : other, lines, is_a ? core.r_a : core.r_b,
                                            is_a ? core.pivot_a : core.pivot_b);
    }
    product_transposed(core.r_b, core.ranks[0], core.r_a, core.ranks[1], r, width, p.scale, levels, lines, core.m);
    for (int64_t i = 0; i < r * r; ++i) {
        if (!std::isfinite(core.m[i])) return 3;
    }
    return 0;
}

}  // namespace
}  // namespace PARA_ISA
}  // namespace para
