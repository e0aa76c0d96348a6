// What is to be done in a launch, beside the table of problem.h: rows of int64, made on the host (stages.cpp), read by
// kernels.
#pragma once

#include "../problem.h"

namespace para::cuda {

// Both factors of a module are tall here: side 0 is B [m, r], side 1 is Aᵀ [n, r].
//
// One row per thread block of `gram` and `truncate`: some rows of one side.
enum SpanColumn : int64_t {
    MODULE,
    SIDE,
    LEFT,   // gram: first column of one block of columns, and of the other (the same on the diagonal);
    RIGHT,  // truncate: the components from LEFT up to RIGHT
    FIRST,  // of the rows, a multiple of 8
    COUNT,
    OUT,  // gram: where in scratch the partial Gram matrix lies, a packed upper triangle [r (r + 1) / 2]
    SPAN_COLUMNS
};

// One row per module. Places are in doubles, from the start of scratch or results on.
enum WorkColumn : int64_t {
    PARTIALS,    // scratch: partial Gram matrices, B's before A's
    PARTS_B,     // how many of them
    PARTS_A,     //
    TRIANGLES,   // scratch: two packed triangles, where shared memory is too small for them
    SPECTRUM,    // results: what the host reads, [SPECTRUM_HEAD + r]
    TRANSFORMS,  // scratch: T_B, T_Aᵀ, and three more for `transforms`, [r, width] each, width = round_up(k, 4)
    WORK_COLUMNS
};

// At the head of a spectrum; sigma [r] follows.
enum SpectrumWord : int64_t { SQUARED_NORM_B, SQUARED_NORM_A, STATUS, SWEEPS, SPECTRUM_HEAD };

// Results of stage 3: per module lost, stretch_b, stretch_a; then per span the squared rounding error, plain and
// weighted by sigma.
constexpr int NUMBERS_OF_MODULE = 3, NUMBERS_OF_SPAN = 2;

// What every kernel gets, all of it in the device's memory.
struct Batch {
    const int64_t* rows;   // [modules, COLUMNS]
    const double* scales;  // [modules]
    const int64_t* work;   // [modules, WORK_COLUMNS]
    double* scratch;
    double* results;
};

constexpr int GRAM_THREADS = 160;
constexpr int TRUNCATE_THREADS = 128;
constexpr int CORES_THREADS = 256;
constexpr int MOST_SVD_THREADS = 704, LARGEST_SVD_RANK = MOST_SVD_THREADS / 4;
constexpr int TRANSFORMS_THREADS = 256;

// A panel is what a thread block of `gram` and `truncate` holds of a factor, in fp64. While it works on one, every
// thread waits for PREFETCH loads of the next.
constexpr int PANEL = 2880;  // doubles, each row's padding included
constexpr int PREFETCH = 4;

// Rows added up one by one: rounding of equal terms all goes one way.
constexpr int CHAIN = 64;

// Columns in a strip of `gram`: a thread adds up strip × strip. Small strips up to SMALL_STRIPS_RANK, so that there are
// enough threads; the other kernel takes what is above.
constexpr int SMALL_STRIP = 4, LARGE_STRIP = 8;
constexpr int SMALL_STRIPS_RANK = 64;
// Columns in a block where there are too many for one.
constexpr int COLUMN_BLOCK = 64;

// `truncate`: rows and components per thread; components per block; rows and columns of a panel; doubles of T in shared
// memory.
constexpr int TRUNCATE_TILE = 4;
constexpr int MOST_COMPONENTS = 128;
constexpr int MOST_ROWS = 128;
constexpr int MOST_INNER = 32;
constexpr int MOST_OF_T = 4096;

constexpr int LARGEST_RANK = 1024;      // of `transforms`, whose right-hand sides are in shared memory
constexpr int RIGHT_HAND_SIDES = 4096;  // doubles of them

PARA_HOST_DEVICE constexpr int64_t round_up(int64_t x, int64_t to) {
    return (x + to - 1) / to * to;
}

PARA_HOST_DEVICE constexpr int64_t triangle(int64_t r) {
    return r * (r + 1) / 2;
}

}  // namespace para::cuda
