// Tile: a block of a product that stays in registers while the sum runs, the inner loop of all matrix products here.
//
// Y is read in strips (panel-inl.h) or in rows; either way a row of PARTS registers a strip. Elements are sums over k
// from front to back, so neither the size of a tile nor the level changes a bit.
#pragma once

#include "panel-inl.h"

namespace para {
namespace PARA_ISA {
namespace {

// Registers for sums: with 32 of them 24, with 16 of them 12 (8 if a row takes two).
constexpr int SUMS = PART == 8 ? 24 : PART == 4 ? 12 : 8;
constexpr int MOST_STRIPS = PART >= 4 ? 3 : 1;  // of a tile

// Products with exact terms may be fused; others may not, or levels without fused instructions would differ.
enum class Terms { exact, rounded };

struct Left {
    const double* data;  // element (i, k) at data[i·row + k·step]
    int64_t row, step;
};
struct Right {
    const double* data;  // element (k, j) at data[j / STRIP·strip + k·step + j % STRIP]
    int64_t strip, step;
};

template <int ROWS, int STRIPS>
struct Tile {
    static constexpr int HIGH = ROWS, WIDE = STRIPS * static_cast<int>(PARTS);
    Part sum[ROWS][WIDE];

    PARA_INLINE void clear() {
        PARA_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            PARA_UNROLL
            for (int q = 0; q < WIDE; ++q) sum[i][q] = part(0);
        }
    }

    template <Terms terms>
    PARA_INLINE void add(Left left, Right right, int64_t count) {
        const double* x = left.data;
        const double* y = right.data;
        PARA_UNROLL_SOME
        for (int64_t k = 0; k < count; ++k, x += left.step, y += right.step) {
            Part row[WIDE];
            PARA_UNROLL
            for (int q = 0; q < WIDE; ++q) {
                row[q] = load_part(y + q / static_cast<int>(PARTS) * right.strip + q % static_cast<int>(PARTS) * PART);
            }
            PARA_UNROLL
            for (int i = 0; i < ROWS; ++i) {
                const Part factor = part(x[i * left.row]);
                PARA_UNROLL
                for (int q = 0; q < WIDE; ++q) {
                    sum[i][q] =
                        terms == Terms::exact ? fma_exact(factor, row[q], sum[i][q]) : sum[i][q] + factor * row[q];
                }
            }
        }
    }
};

// finish(i, j, tile): the sums of rows from i and columns from j on, for one tile of X·Y.
template <Terms terms, int ROWS, int STRIPS, class Finish>
inline void one_tile(Left x, int64_t first, Right y, int64_t strip, int64_t inner, Finish& finish) {
    Tile<ROWS, STRIPS> tile;
    tile.clear();
    tile.template add<terms>({x.data + first * x.row, x.row, x.step}, {y.data + strip * y.strip, y.strip, y.step},
                             inner);
    finish(first, strip * STRIP, tile);
}

// ROWS rows, all strips: from left to right, in equal shares of at most STRIPS.
template <Terms terms, int ROWS, int STRIPS, class Finish>
inline void row_of_tiles(Left x, int64_t first, Right y, int64_t strips, int64_t inner, Finish& finish) {
    int64_t from = 0;
    for (int64_t shares = (strips + STRIPS - 1) / STRIPS; shares > 0; --shares) {
        const int64_t share = (strips - from) / shares;
        if (share == STRIPS) {
            one_tile<terms, ROWS, STRIPS>(x, first, y, from, inner, finish);
        } else {
            one_tile<terms, ROWS, (STRIPS > 1 ? STRIPS - 1 : 1)>(x, first, y, from, inner, finish);
        }
        from += share;
    }
}

template <Terms terms, int STRIPS, class Finish>
inline void tiles_of_product(Left x, int64_t rows, Right y, int64_t strips, int64_t inner, Finish& finish) {
    constexpr int ROWS = SUMS / (STRIPS * static_cast<int>(PARTS));
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS) row_of_tiles<terms, ROWS, STRIPS>(x, i, y, strips, inner, finish);
    for (; i + ROWS / 2 <= rows; i += ROWS / 2) row_of_tiles<terms, ROWS / 2, STRIPS>(x, i, y, strips, inner, finish);
    for (; i < rows; ++i) row_of_tiles<terms, 1, STRIPS>(x, i, y, strips, inner, finish);
}

// X [rows, inner] · Y [inner, strips·STRIP], given to finish tile by tile: a row's columns in order, and a column's
// rows. Up to MOST_STRIPS make one tile.
template <Terms terms, class Finish>
inline void product(Left x, int64_t rows, Right y, int64_t strips, int64_t inner, Finish finish) {
    if (strips == 1 || MOST_STRIPS == 1) {
        tiles_of_product<terms, 1>(x, rows, y, strips, inner, finish);
    } else if (strips == 2 || strips == 4) {
        tiles_of_product<terms, 2>(x, rows, y, strips, inner, finish);
    } else {
        tiles_of_product<terms, MOST_STRIPS>(x, rows, y, strips, inner, finish);
    }
}

}  // namespace
}  // namespace PARA_ISA
}  // namespace para
