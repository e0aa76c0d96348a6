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

inline int significand_bits(DType dtype) { return dtype == DType::f32 ? 24 : dtype == DType::f16 ? 11 : 8; }

inline double round_to_bits(double x, int bits) {
    uint64_t word;
    std::memcpy(&word, &x, sizeof word);
    const int drop = 53 - bits;
    word += (uint64_t{1} << (drop - 1)) - 1 + ((word >> drop) & 1);
    word &= ~((uint64_t{1} << drop) - 1);
    std::memcpy(&x, &word, sizeof word);
    return x;
}

// out [count, width] ← x [count, r] (rows x_width apart) · t [r, width], r products exact in fp64.
inline void thin_product(const double* x, int64_t x_width, int64_t count, const double* t, int64_t r, int64_t width,
                         double* out) {
    for (int64_t i = 0; i < count; i += TILE) {
        const int64_t rows = count - i < TILE ? count - i : TILE;
        const double* line[TILE];
        for (int64_t s = 0; s < TILE; ++s) line[s] = x + (i + (s < rows ? s : 0)) * x_width;
        for (int64_t c = 0; c < width; c += LANES) {
            Vec acc[TILE];
            for (Vec& a : acc) a = splat(0);
            for (int64_t j = 0; j < r; ++j) {
                const Vec right = load(t + j * width + c);
                for (int64_t s = 0; s < TILE; ++s) acc[s] = fma_exact(splat(line[s][j]), right, acc[s]);
            }
            for (int64_t s = 0; s < rows; ++s) store(out + (i + s) * width + c, acc[s]);
        }
    }
}

// T_B [r, width] and T_Aᵀ [r, width] in fp64, not yet rounded; columns of σ = 0 stay zero.
inline void transforms(const Problem& p, int64_t width, double* t_b, double* t_a) {
    const Core& core = p.core;
    const int64_t r = p.rank(), rank_b = core.ranks[0];
    const int64_t kept = p.k < r ? p.k : r;
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
        const double weight = core.sigma[c] > 0 ? p.scale / std::sqrt(core.sigma[c]) : 0;
        for (int64_t j = 0; j < r; ++j) t_a[j * width + c] *= weight;
    }
}

// An upper bound of ‖Y‖₂ for Y [rows, width]: the square root of the ∞-norm of YᵀY. Scratch: [width].
inline double spectral_norm_bound(const double* y, int64_t rows, int64_t width, double* line) {
    double largest = 0;
    for (int64_t c = 0; c < width; ++c) {
        for (int64_t d = 0; d < width; d += LANES) {
            Vec acc = splat(0);
            for (int64_t i = 0; i < rows; ++i) acc += splat(y[i * width + c]) * load(y + i * width + d);
            store(line + d, absolute(acc));
        }
        double row_sum = 0;
        for (int64_t d = 0; d < width; ++d) row_sum += line[d];
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

inline int64_t truncate_scratch(const Problem& p) {
    const int64_t r = p.rank(), width = round_up(p.k, LANES);
    return CHUNK * round_up(r, LANES) + CHUNK * width + CHUNK + 4 * r * width + width;
}

// Writes the product of one factor (of its transpose, into a transposed matrix) with t [r, width]; returns the squared
// norm of what rounding to storage changed.
inline double write_product(const Problem& p, bool is_a, const double* t, int64_t width, double* scratch) {
    const Matrix& x = is_a ? p.a : p.b;
    void* out = is_a ? p.new_a : p.new_b;
    const int64_t rows = is_a ? x.cols : x.rows, r = p.rank(), panel_width = round_up(r, LANES);
    double* panel = scratch;
    double* block = panel + CHUNK * panel_width;
    double* line = block + CHUNK * width;
    double squared = 0;
    for (int64_t first = 0; first < rows; first += CHUNK) {
        const int64_t count = rows - first < CHUNK ? rows - first : CHUNK;
        pack(x, is_a, first, count, panel_width, panel);
        thin_product(panel, panel_width, count, t, r, width, block);
        if (is_a) {
            for (int64_t c = 0; c < p.k; ++c) {
                for (int64_t i = 0; i < count; ++i) line[i] = block[i * width + c];
                squared += write_row(line, count, p.new_dtype, out, c * rows + first);
            }
        } else {
            for (int64_t i = 0; i < count; ++i) {
                squared += write_row(block + i * width, p.k, p.new_dtype, out, (first + i) * p.k);
            }
        }
    }
    return squared;
}

inline Certificate truncate(const Problem& p, double* scratch) {
    const int64_t r = p.rank(), width = round_up(p.k, LANES);
    double* t_b = scratch;
    double* t_a = t_b + r * width;
    double* y = t_a + r * width;
    double* z = y + r * width;
    double* line = z + r * width;
    double* blocks = line + width;

    transforms(p, width, t_b, t_a);
    const int bits_b = 53 - significand_bits(p.b.dtype), bits_a = 53 - significand_bits(p.a.dtype);
    for (int64_t i = 0; i < r * width; ++i) {
        t_b[i] = round_to_bits(t_b[i], bits_b);
        t_a[i] = round_to_bits(t_a[i], bits_a);
    }
    small_product(p.core.r_b, p.core.ranks[0], t_b, r, width, y);
    small_product(p.core.r_a, p.core.ranks[1], t_a, r, width, z);
    Certificate certificate;
    certificate.lost = lost_norm(p.core, y, z, r, width);
    certificate.norm_b = spectral_norm_bound(y, p.core.ranks[0], width, line);
    certificate.norm_a = spectral_norm_bound(z, p.core.ranks[1], width, line);
    certificate.rounding_b = std::sqrt(write_product(p, false, t_b, width, blocks));
    certificate.rounding_a = std::sqrt(write_product(p, true, t_a, width, blocks));
    return certificate;
}

}  // namespace
}  // namespace PARA_ISA
}  // namespace para
