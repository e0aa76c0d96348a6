// The one struct that crosses every layer: where a module's factors lie, and where its core and its new factors go.
//
// A module's update is ΔW = scale · B · A with B [m, r] and A [r, n]. Memory belongs to the caller; all strides are in
// elements. One row of int64 per module (`Column`) carries a whole ragged batch from Python: no padding, no copies.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PARA_HOST_DEVICE __host__ __device__
#else
#define PARA_HOST_DEVICE
#endif

namespace para {

enum class DType : int64_t { f32 = 0, f16 = 1, bf16 = 2 };

struct Matrix {
    const void* data;
    int64_t rows, cols;
    int64_t row_stride, col_stride;
    DType dtype;
};

// What stages 1 and 2 leave for stage 3, in fp64, r × r row-major each:
//   R_B [rank_b, r] and R_A [rank_a, r] with R_BᵀR_B = BᵀB and R_AᵀR_A = AAᵀ; R_B's columns in the order `pivot_b` are
//   upper triangular; M = scale · R_B · R_Aᵀ = U S Vᵀ; U [rank_b, r], columns in descending order of sigma.
struct Core {
    double *r_b, *r_a, *m, *u;
    double* sigma;               // [r]
    double* squared_norms;       // [2]: ‖B‖_F², ‖A‖_F²
    int64_t *pivot_b, *pivot_a;  // [r] each: the column of R eliminated at each step
    int64_t* ranks;              // [2]: rank_b, rank_a

    static constexpr int64_t words(int64_t r) { return 4 * r * r + 3 * r + 4; }

    PARA_HOST_DEVICE Core(void* memory, int64_t r) {
        r_b = static_cast<double*>(memory);
        r_a = r_b + r * r;
        m = r_a + r * r;
        u = m + r * r;
        sigma = u + r * r;
        squared_norms = sigma + r;
        pivot_b = reinterpret_cast<int64_t*>(squared_norms + 2);
        pivot_a = pivot_b + r;
        ranks = pivot_a + r;
    }
};

// How close the stored factors are to what they should be; Python adds the rounding-error terms (see backends/cpu.py).
struct Certificate {
    double lost;        // ‖scale·BA − B(T_B T_A)A‖_F, T as used
    double stretch_b;   // an upper bound of ‖B·T_B·D⁻¹‖₂ with D = diag(√σ): 1 but for rounding
    double stretch_a;   // an upper bound of ‖D⁻¹·T_A·A‖₂
    double rounding_b;  // ‖dB‖_F, dB = stored B' − B·T_B
    double rounding_a;  // ‖dA‖_F, dA = stored A' − T_A·A
    double weighted_b;  // ‖dB·D‖_F
    double weighted_a;  // ‖D·dA‖_F
};

struct Problem {
    Matrix b, a;  // [m, r], [r, n]
    double scale;
    Core core;
    int64_t k;            // rank of the new factors
    void *new_b, *new_a;  // [m, k], [k, n], contiguous
    DType new_dtype;

    PARA_HOST_DEVICE int64_t rank() const { return b.cols; }
};

// Columns of the table, in order. The last four are read by stage 3 only.
enum Column : int64_t {
    B_DATA,
    B_ROWS,
    B_ROW_STRIDE,
    B_COL_STRIDE,
    B_DTYPE,
    A_DATA,
    A_COLS,
    A_ROW_STRIDE,
    A_COL_STRIDE,
    A_DTYPE,
    RANK,
    CORE,
    NEW_RANK,
    NEW_B,
    NEW_A,
    NEW_DTYPE,
    COLUMNS
};

template <class T>
PARA_HOST_DEVICE inline T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// What a row [COLUMNS] of the table says.
PARA_HOST_DEVICE inline Problem problem_of(const int64_t* row, double scale) {
    const int64_t r = row[RANK];
    return {{pointer<const void>(row[B_DATA]), row[B_ROWS], r, row[B_ROW_STRIDE], row[B_COL_STRIDE],
             static_cast<DType>(row[B_DTYPE])},
            {pointer<const void>(row[A_DATA]), r, row[A_COLS], row[A_ROW_STRIDE], row[A_COL_STRIDE],
             static_cast<DType>(row[A_DTYPE])},
            scale,
            Core(pointer<void>(row[CORE]), r),
            row[NEW_RANK],
            pointer<void>(row[NEW_B]),
            pointer<void>(row[NEW_A]),
            static_cast<DType>(row[NEW_DTYPE])};
}

}  // namespace para
