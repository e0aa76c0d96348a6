// Stage 2: M = U S Vᵀ by one-sided Jacobi (Hestenes 1958; de Rijk 1989), eight matrices at a time, one in each lane.
//
// First M = Π·L·Qᵀ by Householder reflections of its rows, the largest that is left first: on the columns of L, graded
// and half empty, Jacobi needs two thirds of the rotations (Drmač & Veselić 2008). Then columns are rotated until every
// pair is orthogonal; their norms are S, the normalised columns Πᵀ·U, and neither Q nor V is needed. A lane in which a
// pair is already orthogonal is masked, so a matrix's bits don't depend on its neighbours.
#pragma once

#include <cmath>

#include "vec.h"

namespace para {
namespace PARA_ISA {
namespace {

constexpr int MAX_SWEEPS = 40;

// Matrices of one width share a call: a function of r alone, so that bits don't depend on the batch.
inline int64_t svd_width(int64_t r) {
    return r <= 16 ? round_up(r, 4) : round_up(r, 8);
}

inline int64_t svd_scratch(int64_t width) {
    return (width * (width + 1) + 4 * width) * LANES;
}

// Doubles from a column [width][LANES] to the next: never a power of two, at which loads wait for unrelated stores.
inline int64_t svd_apart(int64_t width) {
    return (width + 1) * LANES;
}

inline Vec dot(const double* x, const double* y, int64_t width) {
    Vec acc[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (int64_t i = 0; i < width; i += 4) {
        for (int64_t t = 0; t < 4; ++t) acc[t] += load(x + (i + t) * LANES) * load(y + (i + t) * LANES);
    }
    return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

// Brings row `from` of one lane to `to`, and what is known of it.
inline void exchange_rows(double* columns, double* norms, double* order, int64_t width, int64_t lane, int64_t from,
                          int64_t to) {
    for (int64_t q = 0; q < width; ++q) {
        double* column = columns + q * svd_apart(width) + lane;
        exchange(column[from * LANES], column[to * LANES]);
    }
    exchange(norms[from * LANES + lane], norms[to * LANES + lane]);
    exchange(order[from * LANES + lane], order[to * LANES + lane]);
}

// columns [width][width][LANES], those of M, become those of L; row i of L was row order[i] of M. Scratch: norms,
// reflector, sums [width][LANES] each.
inline void reduce_to_lower(double* columns, int64_t width, double* order, double* norms, double* reflector,
                            double* sums) {
    const Vec zero = splat(0), one = splat(1);
    const int64_t apart = svd_apart(width);
    const auto at = [&](int64_t q, int64_t i) { return columns + q * apart + i * LANES; };
    for (int64_t i = 0; i < width; ++i) {
        store(order + i * LANES, splat(static_cast<double>(i)));
        Vec squared = zero;
        for (int64_t q = 0; q < width; ++q) squared += load(at(q, i)) * load(at(q, i));
        store(norms + i * LANES, squared);
    }
    for (int64_t k = 0; k + 1 < width; ++k) {
        for (int64_t lane = 0; lane < LANES; ++lane) {
            int64_t largest = k;
            for (int64_t i = k + 1; i < width; ++i) {
                if (norms[i * LANES + lane] > norms[largest * LANES + lane]) largest = i;
            }
            if (largest != k) exchange_rows(columns, norms, order, width, lane, largest, k);
        }
        Vec squared = zero;
        for (int64_t q = k; q < width; ++q) {
            const Vec x = load(at(q, k));
            store(reflector + q * LANES, x);
            squared += x * x;
        }
        const Vec first = load(reflector + k * LANES), norm = square_root(squared);
        const Vec last = select(first > zero, -norm, norm);  // what remains of the row
        store(reflector + k * LANES, first - last);
        const Mask there = squared > zero;
        const Vec weight = select(there, one / select(there, squared + absolute(first) * norm, one), zero);

        for (int64_t i = k + 1; i < width; i += 2) {
            const int64_t j = i + 1 < width ? i + 1 : i;
            Vec total[2] = {zero, zero};
            for (int64_t q = k; q < width; ++q) {
                const Vec a = load(reflector + q * LANES);
                total[0] += a * load(at(q, i));
                total[1] += a * load(at(q, j));
            }
            store(sums + i * LANES, total[0]);
            store(sums + j * LANES, total[1]);
        }
        for (int64_t q = k; q < width; ++q) {
            const Vec a = load(reflector + q * LANES) * weight;
            for (int64_t i = k + 1; i < width; ++i) store(at(q, i), load(at(q, i)) - a * load(sums + i * LANES));
            store(at(q, k), q == k ? last : zero);
        }
        for (int64_t i = k + 1; i < width; ++i) {
            const Vec done = load(at(k, i));
            store(norms + i * LANES, load(norms + i * LANES) - done * done);
        }
    }
}

struct Pair {
    int64_t p, q;  // p < q
};

// Makes the columns of each pair orthogonal and keeps their squared norms up to date; the pairs share no column, so
// that the machine works on one while it waits for another's square roots. Returns the lanes that were rotated.
template <int COUNT>
PARA_INLINE Mask rotate(double* columns, double* norms, int64_t width, const Pair (&pairs)[COUNT],
                        Vec squared_tolerance) {
    const int64_t apart = svd_apart(width);
    const Vec one = splat(1), zero = splat(0);
    Mask rotated = zero > zero, changed = rotated;
    Vec gamma[COUNT], c[COUNT], s[COUNT];
    Mask rotate[COUNT], swap[COUNT];
    PARA_UNROLL
    for (int k = 0; k < COUNT; ++k) {
        const Vec alpha = load(norms + pairs[k].p * LANES), beta = load(norms + pairs[k].q * LANES);
        gamma[k] = dot(columns + pairs[k].p * apart, columns + pairs[k].q * apart, width);
        rotate[k] = gamma[k] * gamma[k] > squared_tolerance * alpha * beta;
        swap[k] = beta > alpha;  // larger columns first: fewer sweeps, and S comes out sorted
        rotated = rotated | rotate[k];
        changed = changed | rotate[k] | swap[k];
    }
    if (!any(changed)) return rotated;
    PARA_UNROLL
    for (int k = 0; k < COUNT; ++k) {
        double *alpha_at = norms + pairs[k].p * LANES, *beta_at = norms + pairs[k].q * LANES;
        const Vec alpha = load(alpha_at), beta = load(beta_at);
        const Vec difference = select(rotate[k], beta - alpha, one);
        const Vec twice = select(rotate[k], gamma[k] + gamma[k], zero);
        const Vec root = square_root(difference * difference + twice * twice);
        const Vec t = twice / (difference + select(zero > difference, -root, root));
        const Vec cosine = one / square_root(one + t * t), sine = cosine * t;
        const Vec shift = t * gamma[k];
        const Vec new_alpha = alpha - shift, new_beta = beta + shift;
        store(alpha_at, select(swap[k], new_beta, new_alpha));
        store(beta_at, select(swap[k], new_alpha, new_beta));
        c[k] = select(swap[k], sine, cosine);
        s[k] = select(swap[k], -cosine, sine);
    }
    PARA_UNROLL
    for (int k = 0; k < COUNT; ++k) {
        double *x = columns + pairs[k].p * apart, *y = columns + pairs[k].q * apart;
        for (int64_t i = 0; i < width * LANES; i += LANES) {
            const Vec left = load(x + i), right = load(y + i);
            store(x + i, c[k] * left - s[k] * right);
            store(y + i, s[k] * left + c[k] * right);
        }
    }
    return rotated;
}

// One sweep over all pairs of columns; columns [width][width][LANES]. Returns the lanes that were rotated.
inline Mask sweep(double* columns, double* norms, int64_t width) {
    const double tolerance = 2 * std::sqrt(static_cast<double>(width)) * 0x1p-53;
    const Vec squared_tolerance = splat(tolerance * tolerance);
    Mask rotated = splat(0) > splat(0);
    for (int64_t p = 0; p < width; ++p) {
        store(norms + p * LANES, dot(columns + p * svd_apart(width), columns + p * svd_apart(width), width));
    }
    const auto one = [&](Pair x) { rotated = rotated | rotate(columns, norms, width, {x}, squared_tolerance); };
    const auto two = [&](Pair x, Pair y) {
        rotated = rotated | rotate(columns, norms, width, {x, y}, squared_tolerance);
    };
    // Four columns of up to 64 rows stay in the first cache while all later ones pass by.
    const int64_t together = width <= 16 || width > 64 ? 2 : 4;
    for (int64_t first = 0; first < width; first += together) {
        const int64_t last = first + together;
        for (int64_t p = first; p < last; ++p) {
            for (int64_t q = p + 1; q < last; ++q) one({p, q});
        }
        for (int64_t q = last; q < width; q += 2) {
            for (int64_t p = first; p < last; p += 2) {
                two({p, q}, {p + 1, q + 1});
                two({p, q + 1}, {p + 1, q});
            }
        }
    }
    return rotated;
}

// Fills sigma and U of up to eight cores; r[lane] ≤ width. sweeps[lane]: how many, or -1 if they did not suffice.
inline void svd(const Core* cores, const int64_t* r, int64_t count, int64_t width, double* scratch, int32_t* sweeps) {
    double* columns = scratch;
    double* norms = columns + width * svd_apart(width);
    double* order = norms + width * LANES;
    int exponent[LANES] = {};
    for (int64_t i = 0; i < width * svd_apart(width); ++i) columns[i] = 0;
    for (int64_t lane = 0; lane < count; ++lane) {
        const double* m = cores[lane].m;
        const int64_t n = r[lane];
        double largest = 0;
        for (int64_t i = 0; i < n * n; ++i) largest = std::fabs(m[i]) > largest ? std::fabs(m[i]) : largest;
        // The test for orthogonality multiplies four squares; entries near 1 keep that in range. Columns that are
        // 2^-200 of the largest can't change a bit of anything above rounding noise and would leave it.
        std::frexp(largest, &exponent[lane]);
        // In two steps: one power of two may be out of range.
        const int half = exponent[lane] / 2;
        const double down = std::ldexp(1.0, -half), rest = std::ldexp(1.0, half - exponent[lane]);
        for (int64_t q = 0; q < n; ++q) {
            double peak = 0;
            for (int64_t i = 0; i < n; ++i) peak = std::fabs(m[i * n + q]) > peak ? std::fabs(m[i * n + q]) : peak;
            if (peak <= largest * 0x1p-200) continue;
            for (int64_t i = 0; i < n; ++i)
                columns[q * svd_apart(width) + i * LANES + lane] = m[i * n + q] * down * rest;
        }
    }

    reduce_to_lower(columns, width, order, norms, order + width * LANES, order + 2 * width * LANES);
    for (int64_t lane = 0; lane < count; ++lane) sweeps[lane] = -1;
    for (int done = 1; done <= MAX_SWEEPS; ++done) {
        const Mask rotated = sweep(columns, norms, width);
        const Flags active = flags(rotated);
        for (int64_t lane = 0; lane < count; ++lane) {
            if (!active.lane[lane] && sweeps[lane] < 0) sweeps[lane] = done;
        }
        if (!any(rotated)) break;
    }

    // The last sweep left the norms of sorted columns; a lane's zero columns come last, so its first r hold it all.
    for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t n = r[lane];
        for (int64_t q = 0; q < n; ++q) {
            const double norm = std::sqrt(norms[q * LANES + lane]);
            cores[lane].sigma[q] = std::ldexp(norm, exponent[lane]);
            for (int64_t i = 0; i < width; ++i) {
                const auto row = static_cast<int64_t>(order[i * LANES + lane]);
                const double x = columns[q * svd_apart(width) + i * LANES + lane];
                if (row < n) cores[lane].u[row * n + q] = norm > 0 ? x / norm : 0;
            }
        }
    }
}

}  // namespace
}  // namespace PARA_ISA
}  // namespace para
