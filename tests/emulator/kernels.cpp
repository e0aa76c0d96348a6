// All stages of csrc/cuda on factors of all types and layouts, as a program that sanitizers can watch over.
//
// kernels SEED RANK…  makes modules of these ranks and truncates them to their full rank and to half of it, the threads
// in the order of SEED. Prints "right", or what is wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>

#include "cuda/stages.h"
#include "emulator.h"

namespace {

using para::DType;
using Numbers = std::vector<double>;

// A factor [rows, cols] somewhere in its memory, and its values.
struct Factor {
    std::vector<unsigned char> memory;
    size_t first = 0;  // byte
    int64_t rows, cols, row_stride, col_stride;
    DType dtype;
    Numbers values;  // [rows, cols]

    void* data() { return memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 + first; }
};

int bytes(DType dtype) {
    return dtype == DType::f32 ? 4 : 2;
}

// The bits of small whole numbers over 16, which all types have; and back.
uint32_t bits_of(DType dtype, double x) {
    const auto single = static_cast<float>(x);
    if (dtype == DType::f16) return para::cuda::double_to_half(x);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    return dtype == DType::f32 ? bits : bits >> 16;
}

double value_of(DType dtype, const void* from) {
    uint32_t bits = 0;
    std::memcpy(&bits, from, static_cast<size_t>(bytes(dtype)));
    if (dtype == DType::f16) return para::cuda::half_to_float(static_cast<uint16_t>(bits));
    if (dtype == DType::bf16) bits <<= 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// `layout`: rows one after the other, columns so, rows at an odd address, neither, or rows with gaps.
Factor factor(std::mt19937& random, int64_t rows, int64_t cols, DType dtype, int layout) {
    Factor f;
    f.rows = rows;
    f.cols = cols;
    f.dtype = dtype;
    const int64_t size = bytes(dtype);
    f.row_stride = layout == 1 ? 1 : layout == 3 ? 2 * cols + 3 : layout == 4 ? (cols + 15) / 8 * 8 : cols;
    f.col_stride = layout == 1 ? rows : layout == 3 ? 2 : 1;
    f.first = layout == 2 ? static_cast<size_t>(size) : 0;
    f.memory.resize(static_cast<size_t>((rows * f.row_stride + cols * f.col_stride + 1) * size) + 16);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
            f.values.push_back((static_cast<int>(random() % 65) - 32) / 16.0);
            const uint32_t bits = bits_of(dtype, f.values.back());
            std::memcpy(static_cast<char*>(f.data()) + (i * f.row_stride + j * f.col_stride) * size, &bits,
                        static_cast<size_t>(size));
        }
    }
    return f;
}

// ‖scale·BA − B'A'‖_F and ‖scale·BA‖_F.
void distance(const Factor& b, const Factor& a, double scale, const Factor& new_b, const Factor& new_a, double& error,
              double& norm) {
    error = norm = 0;
    for (int64_t i = 0; i < b.rows; ++i) {
        for (int64_t j = 0; j < a.cols; ++j) {
            double old_sum = 0, new_sum = 0;
            for (int64_t l = 0; l < b.cols; ++l) {
                old_sum +=
                    b.values[static_cast<size_t>(i * b.cols + l)] * a.values[static_cast<size_t>(l * a.cols + j)];
            }
            for (int64_t l = 0; l < new_b.cols; ++l) {
                new_sum += new_b.values[static_cast<size_t>(i * new_b.cols + l)] *
                           new_a.values[static_cast<size_t>(l * new_a.cols + j)];
            }
            error += (scale * old_sum - new_sum) * (scale * old_sum - new_sum);
            norm += scale * old_sum * scale * old_sum;
        }
    }
    error = std::sqrt(error);
    norm = std::sqrt(norm);
}

// An output of [rows, cols], not yet written.
Factor output(int64_t rows, int64_t cols) {
    Factor f;
    f.rows = rows;
    f.cols = cols;
    f.dtype = DType::f32;
    f.memory.assign(static_cast<size_t>(rows * cols * 4) + 16, 0xff);
    return f;
}

void look(Factor& f) {
    for (int64_t e = 0; e < f.rows * f.cols; ++e) {
        f.values.push_back(value_of(f.dtype, static_cast<char*>(f.data()) + e * 4));
    }
}

struct Module {
    Factor b, a, new_b, new_a;
    Numbers core;
    int64_t k;
};

template <class Plan>
Numbers run(const Plan& plan, const std::vector<int64_t>& tables, Numbers& scratch) {
    Numbers results(static_cast<size_t>(plan.results));
    scratch.assign(static_cast<size_t>(plan.scratch), NAN);
    plan.launch({tables.data(), scratch.data(), results.data(), nullptr});
    return results;
}

int check(const std::vector<int64_t>& ranks, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<Module> modules;
    int turn = 0;
    for (const int64_t r : ranks) {
        for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
            const int64_t m = 2 * r + 7 + 3 * turn + 2000 / r, n = r + 48 + 8 * (turn % 3),
                          k = turn % 2 ? r : (r + 1) / 2;
            const int layout = turn++ % 5;
            modules.push_back({factor(random, m, r, dtype, layout), factor(random, r, n, dtype, layout), output(m, k),
                               output(k, n), Numbers(static_cast<size_t>(para::Core::words(r) + 1)), k});
        }
    }
    const double scale = 0.75;
    std::vector<int64_t> rows;
    std::vector<para::Problem> problems;
    const Numbers scales(modules.size(), scale);
    const auto address = [](const void* x) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(x)); };
    for (Module& x : modules) {
        const int64_t row[para::COLUMNS] = {address(x.b.data()),
                                            x.b.rows,
                                            x.b.row_stride,
                                            x.b.col_stride,
                                            static_cast<int64_t>(x.b.dtype),
                                            address(x.a.data()),
                                            x.a.cols,
                                            x.a.row_stride,
                                            x.a.col_stride,
                                            static_cast<int64_t>(x.a.dtype),
                                            x.b.cols,
                                            address(x.core.data()),
                                            x.k,
                                            address(x.new_b.data()),
                                            address(x.new_a.data()),
                                            static_cast<int64_t>(DType::f32)};
        rows.insert(rows.end(), row, row + para::COLUMNS);
        problems.push_back(para::problem_of(row, scale));
    }
    Numbers scratch;
    const para::cuda::CoresPlan cores(problems, rows.data(), scales.data(), 0);
    const Numbers spectra = run(cores, cores.tables, scratch);
    const para::cuda::TruncatePlan truncate(problems, rows.data(), scales.data());
    run(truncate, truncate.tables, scratch);

    int wrong = 0;
    for (size_t i = 0; i < modules.size(); ++i) {
        Module& x = modules[i];
        look(x.new_b);
        look(x.new_a);
        double error, norm, tail = 0;
        distance(x.b, x.a, scale, x.new_b, x.new_a, error, norm);
        const double* spectrum = spectra.data() + cores.spectra[i];
        const double* sigma = spectrum + para::cuda::SPECTRUM_HEAD;
        for (int64_t j = x.k; j < x.b.cols; ++j) tail += sigma[j] * sigma[j];
        const double more = std::sqrt(std::fabs(error * error - tail));
        if (!(spectrum[para::cuda::STATUS] == 0 && spectrum[para::cuda::SWEEPS] > 0 && more < 1e-5 * norm)) {
            std::printf("wrong: rank %d, module %d: off by %g of %g after %g sweeps\n", static_cast<int>(x.b.cols),
                        static_cast<int>(i), more, norm, spectrum[para::cuda::SWEEPS]);
            ++wrong;
        }
    }
    return wrong;
}

}  // namespace

int main(int count, char** words) {
    const auto seed = static_cast<unsigned>(std::atoi(count > 1 ? words[1] : "0"));
    std::vector<int64_t> ranks;
    for (int i = 2; i < count; ++i) ranks.push_back(std::atoi(words[i]));
    para::emulator::set_seed(seed);
    try {
        if (check(ranks, seed)) return 1;
    } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
        return 1;
    }
    std::puts("right");
    return 0;
}
