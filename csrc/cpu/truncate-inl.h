// Stage 3: B' = B·T_B [m, k], A' = T_A·A [k, n] with
//
//     T_B = R_B⁻¹ U_k S_k^½  (triangular solve in pivot order),   T_A = scale · S_k^-½ U_kᵀ R_B,
//
// the square-root method of balanced truncation (Laub, Heath, Paige & Ward 1987) applied to a factored matrix: B'A' is
// the best rank-k approximation of scale·BA, with √σ on both sides, and no Q or V is formed. T is rounded to as many
// bits as keep its products with the factors exact in fp64, never fewer than fp32 has; sums are fp64, rounded once.
#pragma once

#include <cmath>

#include "cores-inl.h"

namespace para {
namespace PARA_ISA {
namespace {

inline int significand_bits(DType dtype) {
    return dtype == DType::f32 ? 24 : dtype == DType::f16 ? 11 : 8;
}

inline double round_to_bits(double x, int bits) {
    uint64_t word;
    std::memcpy(&word, &x, sizeof word);
    const int drop = 53 - bits;
    word += (uint64_t{1} << (drop - 1)) - 1 + ((word >> drop) & 1);
    word &= ~((uint64_t{1} << drop) - 1);
    std::memcpy(&x, &word, sizeof word);
    return x;
}

// out [count, width] ← X · Y, all packed; products exact in fp64. X's element (i, j) lies at x[i·x_row + j·x_col],
// Y [inner, width].
inline void thin_product(const double* x, int64_t x_row, int64_t x_col, int64_t count, const double* y, int64_t inner,
                         int64_t width, double* out) {
    for (int64_t i = 0; i < count; i += TILE) {
        const int64_t rows = count - i < TILE ? count - i : TILE;
        const double* line[TILE];
        for (int64_t s = 0; s < TILE; ++s) line[s] = x + (i + (s < rows ? s : 0)) * x_row;
        for (int64_t c = 0; c < width; c += LANES) {
            Vec acc[TILE];
            for (Vec& a : acc) a = splat(0);
            for (int64_t j = 0; j < inner; ++j) {
                const Vec right = load(y + j * width + c);
                for (int64_t s = 0; s < TILE; ++s) acc[s] = fma_exact(splat(line[s][j * x_col]), right, acc[s]);
            }
            for (int64_t s = 0; s < rows; ++s) store(out + (i + s) * width + c, acc[s]);
        }
    }
}

// How many components are worth solving for: below rounding noise, U is noise, and S^-½ would blow it up.
inline int64_t components(const Problem& p) {
    const int64_t limits[] = {p.rank(), p.b.rows, p.a.cols};
    int64_t most = p.k;
    for (const int64_t limit : limits) most = limit < most ? limit : most;
    const double noise = static_cast<double>(p.rank()) * UNIT_ROUNDOFF * p.core.sigma[0];
    int64_t count = 0;
    while (count < most && p.core.sigma[count] > noise) ++count;
    return count;
}

// T_B [r, width] and T_Aᵀ [r, width] in fp64, not yet rounded; columns from `kept` on are zero.
inline void transforms(const Problem& p, int64_t kept, int64_t width, double* t_b, double* t_a) {
    const Core& core = p.core;
    const int64_t r = p.rank(), rank_b = core.ranks[0];
    for (int64_t i = 0; i < r * width; ++i) t_b[i] = t_a[i] = 0;

    for (int64_t i = rank_b - 1; i >= 0; --i) {
        const double* row = core.r_b + i * r;
        double* x = t_b + core.pivot_b[i] * width;
        for (int64_t c = 0; c < kept; ++c) x[c] = core.u[i * r + c] * std::sqrt(core.sigma[c]);
        for (int64_t l = i + 1; l < rank_b; ++l) {
            const Vec factor = splat(row[core.pivot_b[l]]);
            const double* solved = t_b + core.pivot_b[l] * width;
            for (int64_t c = 0; c < width; c += LANES) store(x + c, load(x + c) - factor * load(solved + c));
        }
        const Vec diagonal = splat(row[core.pivot_b[i]]);
        for (int64_t c = 0; c < width; c += LANES) store(x + c, load(x + c) / diagonal);
    }
    for (int64_t i = 0; i < rank_b; ++i) {
        for (int64_t j = 0; j < r; ++j) {
            const double factor = core.r_b[i * r + j];
            for (int64_t c = 0; c < kept; ++c) t_a[j * width + c] += factor * core.u[i * r + c];
        }
    }
    for (int64_t c = 0; c < kept; ++c) {
        const double weight = p.scale / std::sqrt(core.sigma[c]);
        for (int64_t j = 0; j < r; ++j) t_a[j * width + c] *= weight;
    }
}

// An upper bound of ‖Y·D⁻¹‖₂ for Y [rows, width], D = diag(√sigma): the square root of the ∞-norm of its Gram matrix.
// Scratch: [width].
inline double stretch(const double* y, int64_t rows, const double* sigma, int64_t kept, int64_t width, double* line) {
    double largest = 0;
    for (int64_t c = 0; c < kept; ++c) {
        for (int64_t d = 0; d < width; d += LANES) {
            Vec acc = splat(0);
            for (int64_t i = 0; i < rows; ++i) acc += splat(y[i * width + c]) * load(y + i * width + d);
            store(line + d, absolute(acc));
        }
        double row_sum = 0;
        for (int64_t d = 0; d < kept; ++d) row_sum += line[d] / (std::sqrt(sigma[c]) * std::sqrt(sigma[d]));
        if (row_sum > largest) largest = row_sum;
    }
    return std::sqrt(largest);
}

// y [rows, width] ← x [rows, r] · t [r, width].
inline void small_product(const double* x, int64_t rows, const double* t, int64_t r, int64_t width, double* y) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < width; c += LANES) {
            Vec acc = splat(0);
            for (int64_t j = 0; j < r; ++j) acc += splat(x[i * r + j]) * load(t + j * width + c);
            store(y + i * width + c, acc);
        }
    }
}

// ‖M − (R_B T_B)(T_A R_Aᵀ)‖_F = ‖R_B (scale·I − T_B T_A) R_Aᵀ‖_F, for T as rounded.
inline double lost_norm(const Core& core, const double* y, const double* z, int64_t r, int64_t width) {
    double squared = 0;
    for (int64_t i = 0; i < core.ranks[0]; ++i) {
        for (int64_t q = 0; q < core.ranks[1]; ++q) {
            Vec acc = splat(0);
            for (int64_t c = 0; c < width; c += LANES) acc += load(y + i * width + c) * load(z + q * width + c);
            const double residual = core.m[i * r + q] - sum(acc);
            squared += residual * residual;
        }
    }
    return std::sqrt(squared);
}

constexpr int64_t BLOCK = 64;  // rows of B, columns of A at a time: with r = 64 their panel fills the L1 cache

inline int64_t truncate_scratch(const Problem& p) {
    const int64_t r = p.rank(), width = round_up(p.k, LANES);
    return BLOCK * round_up(r, LANES) + 2 * BLOCK * width + 4 * r * width + 2 * width;
}

// B' ← B · T_B, T_B [r, width]. squared [width] receives, per component, the squared norm of what rounding to storage
// changed. Scratch: panel [BLOCK, r], block and errors [BLOCK, width] each.
inline void write_b(const Problem& p, const double* t_b, int64_t width, double* scratch, double* squared) {
    const int64_t r = p.rank(), k = p.k, panel_width = round_up(r, LANES);
    double* panel = scratch;
    double* block = panel + BLOCK * panel_width;
    double* errors = block + BLOCK * width;
    for (int64_t first = 0; first < p.b.rows; first += BLOCK) {
        const int64_t count = p.b.rows - first < BLOCK ? p.b.rows - first : BLOCK;
        pack(p.b, false, first, count, panel_width, panel);
        thin_product(panel, panel_width, 1, count, t_b, r, width, block);
        for (int64_t i = 1; k < width && i < count; ++i)
            std::memmove(block + i * k, block + i * width, sizeof(double) * k);
        write_row(block, count * k, p.new_dtype, p.new_b, first * k, errors);
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t c = 0; c < k; ++c) squared[c] += errors[i * k + c];
        }
    }
}

// A' ← T_A · A, T_Aᵀ [r, width]; the rest as for write_b.
inline void write_a(const Problem& p, const double* t_a, int64_t width, double* scratch, double* squared) {
    const int64_t r = p.rank(), k = p.k, n = p.a.cols;
    double* panel = scratch;  // [r, BLOCK]
    double* block = panel + BLOCK * round_up(r, LANES);
    double* errors = block + BLOCK * width;
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t count = n - first < BLOCK ? n - first : BLOCK;
        pack_columns(p.a, first, count, BLOCK, panel);
        thin_product(t_a, 1, width, k, panel, r, BLOCK, block);
        for (int64_t c = 0; c < k; ++c) {
            write_row(block + c * BLOCK, count, p.new_dtype, p.new_a, c * n + first, errors);
            Vec acc = splat(0);
            for (int64_t i = count; i < round_up(count, LANES); ++i) errors[i] = 0;
            for (int64_t i = 0; i < count; i += LANES) acc += load(errors + i);
            squared[c] += sum(acc);
        }
    }
}

struct Rounding {
    double plain, weighted;
};

inline Rounding rounding(const double* squared, const double* sigma, int64_t kept) {
    Rounding sums = {0, 0};
    for (int64_t c = 0; c < kept; ++c) {
        sums.plain += squared[c];
        sums.weighted += squared[c] * sigma[c];
    }
    return {std::sqrt(sums.plain), std::sqrt(sums.weighted)};
}

inline Certificate truncate(const Problem& p, double* scratch) {
    const Core& core = p.core;
    const int64_t r = p.rank(), width = round_up(p.k, LANES), kept = components(p);
    double* t_b = scratch;
    double* t_a = t_b + r * width;
    double* y = t_a + r * width;
    double* z = y + r * width;
    double* line = z + r * width;
    double* squared = line + width;
    double* blocks = squared + width;

    transforms(p, kept, width, t_b, t_a);
    const int bits_b = 53 - significand_bits(p.b.dtype), bits_a = 53 - significand_bits(p.a.dtype);
    for (int64_t i = 0; i < r * width; ++i) {
        t_b[i] = round_to_bits(t_b[i], bits_b);
        t_a[i] = round_to_bits(t_a[i], bits_a);
    }
    small_product(core.r_b, core.ranks[0], t_b, r, width, y);
    small_product(core.r_a, core.ranks[1], t_a, r, width, z);
    for (int64_t c = 0; c < width; ++c) squared[c] = 0;
    write_b(p, t_b, width, blocks, squared);
    const Rounding in_b = rounding(squared, core.sigma, kept);
    for (int64_t c = 0; c < width; ++c) squared[c] = 0;
    write_a(p, t_a, width, blocks, squared);
    const Rounding in_a = rounding(squared, core.sigma, kept);
    return {lost_norm(core, y, z, r, width),
            stretch(y, core.ranks[0], core.sigma, kept, width, line),
            stretch(z, core.ranks[1], core.sigma, kept, width, line),
            in_b.plain,
            in_a.plain,
            in_b.weighted,
            in_a.weighted};
}

}  // namespace
}  // namespace PARA_ISA
}  // namespace para
