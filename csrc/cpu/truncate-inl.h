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

// y [rows, width] ← X [rows, inner] · T [inner, width].
inline void small_product(Left x, int64_t rows, const double* t, int64_t inner, int64_t width, double* y) {
    const Right right = {t, STRIP, width};
    product<Terms::rounded>(x, rows, right, width / STRIP, inner, [&](int64_t i, int64_t j, const auto& tile) {
        for (int row = 0; row < tile.HIGH; ++row) {
            for (int q = 0; q < tile.WIDE; ++q) store(y + (i + row) * width + j + q * PART, tile.sum[row][q]);
        }
    });
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

// T_B [r, width] and T_Aᵀ [r, width] in fp64, not yet rounded; columns from `kept` on are zero. Scratch: u
// [r, width], root [width].
inline void transforms(const Problem& p, int64_t kept, int64_t width, double* u, double* root, double* t_b,
                       double* t_a) {
    const Core& core = p.core;
    const int64_t r = p.rank(), rank_b = core.ranks[0];
    for (int64_t i = 0; i < r * width; ++i) t_b[i] = 0;
    for (int64_t i = 0; i < rank_b; ++i) {
        for (int64_t c = 0; c < width; ++c) u[i * width + c] = c < kept ? core.u[i * r + c] : 0;
    }
    for (int64_t c = 0; c < width; ++c) root[c] = c < kept ? std::sqrt(core.sigma[c]) : 0;

    for (int64_t i = rank_b - 1; i >= 0; --i) {
        const double* row = core.r_b + i * r;
        const Vec diagonal = splat(row[core.pivot_b[i]]);
        for (int64_t c = 0; c < width; c += LANES) {
            Vec x = load(u + i * width + c) * load(root + c);
            for (int64_t l = i + 1; l < rank_b; ++l) {
                x = x - splat(row[core.pivot_b[l]]) * load(t_b + core.pivot_b[l] * width + c);
            }
            store(t_b + core.pivot_b[i] * width + c, x / diagonal);
        }
    }
    small_product({core.r_b, 1, r}, r, u, rank_b, width, t_a);
    for (int64_t c = 0; c < kept; ++c) {
        const double weight = p.scale / root[c];
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

// ‖M − (R_B T_B)(T_A R_Aᵀ)‖_F = ‖R_B (scale·I − T_B T_A) R_Aᵀ‖_F, for T as rounded: y = R_B T_B [r, width], z = R_A
// T_Aᵀ [r, width]. Scratch: zt [width, columns], squared [columns] with columns = round_up(r, LANES).
inline double lost_norm(const Core& core, const double* y, const double* z, int64_t r, int64_t width, double* zt,
                        double* squared) {
    const int64_t columns = round_up(r, LANES);
    for (int64_t c = 0; c < width; ++c) {
        for (int64_t q = 0; q < columns; ++q) zt[c * columns + q] = q < core.ranks[1] ? z[q * width + c] : 0;
    }
    for (int64_t q = 0; q < columns; ++q) squared[q] = 0;
    const Right right = {zt, STRIP, columns};
    product<Terms::rounded>({y, width, 1}, core.ranks[0], right, columns / STRIP, width,
                            [&](int64_t i, int64_t j, const auto& tile) {
                                constexpr int HIGH = std::decay_t<decltype(tile)>::HIGH;
                                constexpr int WIDE = std::decay_t<decltype(tile)>::WIDE;
                                double sums[HIGH * WIDE * PART];
                                PARA_UNROLL
                                for (int t = 0; t < HIGH * WIDE; ++t) {
                                    store(sums + t * PART, tile.sum[t / WIDE][t % WIDE]);
                                }
                                for (int64_t row = 0; row < HIGH; ++row) {
                                    const double* m = core.m + (i + row) * r + j;
                                    for (int64_t q = 0; q < WIDE * PART && j + q < r; ++q) {
                                        const double residual = m[q] - sums[row * WIDE * PART + q];
                                        squared[j + q] += residual * residual;
                                    }
                                }
                            });
    double total = 0;
    for (int64_t q = 0; q < r; ++q) total += squared[q];
    return std::sqrt(total);
}

// Rows of B, columns of A at a time: a multiple of every tile, and the panel fits the cache.
constexpr int64_t SLAB = 96;

// A tile's sums → out, the first `given` columns of each row, rows `apart` elements from one to the next, and
// add(row, q, error²) for every register q of them. `room` elements from the first on may be overwritten.
template <class T, class Tile, class Add>
PARA_INLINE void write_tile(const Tile& tile, int64_t given, int64_t room, typename T::Storage* out, int64_t apart,
                            Add add) {
    constexpr int HIGH = Tile::HIGH, WIDE = Tile::WIDE;
    if ((HIGH - 1) * apart + WIDE * PART <= room) {
        PARA_UNROLL
        for (int row = 0; row < HIGH; ++row) {
            PARA_UNROLL
            for (int q = 0; q < WIDE; ++q) {
                const Part error = T::store(out + row * apart + q * PART, tile.sum[row][q]) - tile.sum[row][q];
                add(row, q, error * error);
            }
        }
        return;
    }
    double sums[HIGH * WIDE * PART];  // the rare edge must not cost the others their registers
    PARA_UNROLL
    for (int i = 0; i < HIGH * WIDE; ++i) store(sums + i * PART, tile.sum[i / WIDE][i % WIDE]);
    for (int row = 0; row < HIGH; ++row) {
        for (int q = 0; q < WIDE && q * PART < given; ++q) {
            const Part sum = load_part(sums + (row * WIDE + q) * PART);
            const int64_t count = given - q * PART < PART ? given - q * PART : PART;
            const Part error = store_some<T>(out + row * apart + q * PART, sum, count) - sum;
            add(row, q, error * error);
        }
    }
}

// B' [m, k] ← B · T_B, T_B [r, width]. squared [width] receives, per component, the squared norm of what rounding to
// storage changed. Scratch: panel [SLAB, r].
template <class To, class From>
inline void write_b(const View<From>& b, const double* t_b, int64_t width, int64_t k, typename To::Storage* out,
                    double* panel, double* squared) {
    const int64_t m = b.rows, r = b.cols, strips = (r + STRIP - 1) / STRIP, new_strips = (k + STRIP - 1) / STRIP;
    const Left left = {panel, strips * STRIP, 1};
    const Right right = {t_b, STRIP, width};
    for (int64_t c = 0; c < width; ++c) squared[c] = 0;
    for (int64_t first = 0; first < m; first += SLAB) {
        const int64_t count = m - first < SLAB ? m - first : SLAB;
        pack_strips(b, first, count, 0, strips, panel, STRIP, strips * STRIP);
        const int64_t next = first + SLAB;
        Ahead ahead(b, next, m - next < SLAB ? m - next : SLAB, 0, r);
        const int64_t lines = ahead.lines() / (count * new_strips) + 1;  // for every row
        product<Terms::exact>(left, count, right, new_strips, r, [&](int64_t i, int64_t j, const auto& tile) {
            constexpr int WIDE = std::decay_t<decltype(tile)>::WIDE;
            ahead.fetch(lines * tile.HIGH);
            Part errors[WIDE];
            PARA_UNROLL
            for (int q = 0; q < WIDE; ++q) errors[q] = load_part(squared + j + q * PART);
            // Where a row is one tile, what is written beyond it is overwritten by the next.
            const int64_t at = (first + i) * k + j;
            const int64_t room = new_strips <= MOST_STRIPS ? m * k - at : (tile.HIGH - 1) * k + k - j;
            write_tile<To>(tile, k - j, room, out + at, k, [&](int, int q, Part error) { errors[q] += error; });
            PARA_UNROLL
            for (int q = 0; q < WIDE; ++q) store(squared + j + q * PART, errors[q]);
        });
    }
}

// A' [k, n] ← T_A · A, T_Aᵀ [r, width]; squared as for write_b. Scratch: panel [SLAB / STRIP, r · STRIP + 8],
// lanes [k, LANES].
template <class To, class From>
inline void write_a(const View<From>& a, const double* t_a, int64_t width, int64_t k, typename To::Storage* out,
                    double* panel, double* lanes, double* squared) {
    const int64_t r = a.rows, n = a.cols, apart = r * STRIP + 8;
    const Left left = {t_a, 1, width};
    const Right right = {panel, apart, STRIP};
    for (int64_t i = 0; i < k * LANES; ++i) lanes[i] = 0;
    for (int64_t first = 0; first < n; first += SLAB) {
        const int64_t count = n - first < SLAB ? n - first : SLAB, strips = (count + STRIP - 1) / STRIP;
        pack_strips(a, 0, r, first, strips, panel, apart, STRIP);
        const int64_t next = first + SLAB;
        Ahead ahead(a, 0, r, next, n - next < SLAB ? n - next : SLAB);
        const int64_t lines = ahead.lines() / (k * strips) + 1;  // for every strip
        product<Terms::exact>(left, k, right, strips, r, [&](int64_t i, int64_t j, const auto& tile) {
            ahead.fetch(lines * tile.HIGH * tile.WIDE / PARTS);
            const int64_t given = count - j, room = (tile.HIGH - 1) * n + given;
            write_tile<To>(tile, given, room, out + i * n + first + j, n, [&](int row, int q, Part error) {
                double* into = lanes + (i + row) * LANES + (j + q * PART) % LANES;
                store(into, load_part(into) + error);
            });
        });
    }
    for (int64_t c = 0; c < width; ++c) squared[c] = c < k ? sum(load(lanes + c * LANES)) : 0;
}

inline int64_t truncate_scratch(const Problem& p) {
    const int64_t r = p.rank(), width = round_up(p.k, LANES);
    const int64_t columns = round_up(r, LANES);
    return SLAB * columns + 8 * SLAB + width * LANES + 5 * r * width + 2 * width + (width + 1) * columns;
}

// Calls work(To) with the format of the new factors.
template <class Work>
inline void with_format(DType dtype, Work work) {
    switch (dtype) {
        case DType::f32:
            return work(F32());
        case DType::f16:
            return work(F16());
        case DType::bf16:
            return work(BF16());
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
    double* u = z + r * width;
    double* line = u + r * width;
    double* squared = line + width;
    double* lanes = squared + width;
    double* zt = lanes + width * LANES;
    double* residuals = zt + width * round_up(r, LANES);
    double* panel = residuals + round_up(r, LANES);

    transforms(p, kept, width, u, line, t_b, t_a);
    const int bits_b = 53 - significand_bits(p.b.dtype), bits_a = 53 - significand_bits(p.a.dtype);
    for (int64_t i = 0; i < r * width; i += PART) {
        store(t_b + i, rounded_to_bits(load_part(t_b + i), bits_b));
        store(t_a + i, rounded_to_bits(load_part(t_a + i), bits_a));
    }
    small_product({core.r_b, r, 1}, core.ranks[0], t_b, r, width, y);
    small_product({core.r_a, r, 1}, core.ranks[1], t_a, r, width, z);
    Rounding in_b{}, in_a{};
    with_format(p.new_dtype, [&](auto to) {
        using To = decltype(to);
        with_view(p.b, false, [&](const auto& b) {
            write_b<To>(b, t_b, width, p.k, static_cast<typename To::Storage*>(p.new_b), panel, squared);
        });
        in_b = rounding(squared, core.sigma, kept);
        with_view(p.a, false, [&](const auto& a) {
            write_a<To>(a, t_a, width, p.k, static_cast<typename To::Storage*>(p.new_a), panel, lanes, squared);
        });
        in_a = rounding(squared, core.sigma, kept);
    });
    return {lost_norm(core, y, z, r, width, zt, residuals),
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
