// Stage 2: M = U S Vᵀ by one-sided Jacobi (Hestenes 1958; de Rijk 1989), eight matrices at a time, one in each lane.
//
// Columns of M are rotated until every pair is orthogonal; their norms are S, the normalised columns U. V is never
// needed. A lane in which a pair is already orthogonal is masked, so a matrix's bits don't depend on its neighbours.
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
    return (width * width + width) * LANES;
}

inline Vec dot(const double* x, const double* y, int64_t width) {
    Vec acc[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (int64_t i = 0; i < width; i += 4) {
        for (int64_t t = 0; t < 4; ++t) acc[t] += load(x + (i + t) * LANES) * load(y + (i + t) * LANES);
    }
    return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

// One sweep over all pairs of columns; columns [width][width][LANES]. Returns the lanes that were rotated.
inline Mask sweep(double* columns, double* norms, int64_t width) {
    const double tolerance = 2 * std::sqrt(static_cast<double>(width)) * 0x1p-53;
    const Vec squared_tolerance = splat(tolerance * tolerance), one = splat(1), zero = splat(0);
    Mask rotated = zero > zero;
    for (int64_t p = 0; p < width; ++p) {
        store(norms + p * LANES, dot(columns + p * width * LANES, columns + p * width * LANES, width));
    }
    for (int64_t p = 0; p + 1 < width; ++p) {
        double* x = columns + p * width * LANES;
        for (int64_t q = p + 1; q < width; ++q) {
            double* y = columns + q * width * LANES;
            const Vec alpha = load(norms + p * LANES), beta = load(norms + q * LANES);
            const Vec gamma = dot(x, y, width);
            const Mask rotate = gamma * gamma > squared_tolerance * alpha * beta;
            const Mask exchange = beta > alpha;  // larger columns first: fewer sweeps, and S comes out sorted
            if (!any(rotate) && !any(exchange)) continue;
            rotated = rotated | rotate;

            const Vec zeta = (beta - alpha) / (splat(2) * select(rotate, gamma, one));
            const Vec magnitude = one / (absolute(zeta) + square_root(one + zeta * zeta));
            const Vec t = select(rotate, select(zero > zeta, -magnitude, magnitude), zero);
            const Vec cosine = one / square_root(one + t * t), sine = cosine * t;
            const Vec shift = t * select(rotate, gamma, zero);
            const Vec new_alpha = alpha - shift, new_beta = beta + shift;
            store(norms + p * LANES, select(exchange, new_beta, new_alpha));
            store(norms + q * LANES, select(exchange, new_alpha, new_beta));
            const Vec c = select(exchange, sine, cosine), s = select(exchange, -cosine, sine);
            for (int64_t i = 0; i < width * LANES; i += LANES) {
                const Vec left = load(x + i), right = load(y + i);
                store(x + i, c * left - s * right);
                store(y + i, s * left + c * right);
            }
        }
    }
    return rotated;
}

// Fills sigma and U of up to eight cores; r[lane] ≤ width. sweeps[lane]: how many, or -1 if they did not suffice.
inline void svd(const Core* cores, const int64_t* r, int64_t count, int64_t width, double* scratch, int32_t* sweeps) {
    double* columns = scratch;
    double* norms = columns + width * width * LANES;
    int exponent[LANES] = {};
    for (int64_t i = 0; i < width * width * LANES; ++i) columns[i] = 0;
    for (int64_t lane = 0; lane < count; ++lane) {
        const double* m = cores[lane].m;
        const int64_t n = r[lane];
        double largest = 0;
        for (int64_t i = 0; i < n * n; ++i) largest = std::fabs(m[i]) > largest ? std::fabs(m[i]) : largest;
        // The test for orthogonality multiplies four squares; entries near 1 keep that in range. Columns that are
        // 2^-200 of the largest can't change a bit of anything above rounding noise and would leave it.
        std::frexp(largest, &exponent[lane]);
        for (int64_t q = 0; q < n; ++q) {
            double peak = 0;
            for (int64_t i = 0; i < n; ++i) peak = std::fabs(m[i * n + q]) > peak ? std::fabs(m[i * n + q]) : peak;
            if (peak <= largest * 0x1p-200) continue;
            for (int64_t i = 0; i < n; ++i) {
                columns[(q * width + i) * LANES + lane] = std::ldexp(m[i * n + q], -exponent[lane]);
            }
        }
    }

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
            for (int64_t i = 0; i < n; ++i) {
                const double x = columns[(q * width + i) * LANES + lane];
                cores[lane].u[i * n + q] = norm > 0 ? x / norm : 0;
            }
        }
    }
}

}  // namespace
}  // namespace PARA_ISA
}  // namespace para
