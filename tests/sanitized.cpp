// The CPU core under sanitizers: ragged batches of random modules, of every type and layout, through the three stages.
// Each factor, core and output lies in memory of exactly its size. Every level of this machine, by one thread and by
// two, must give the same bits; "right" is printed where all did. Started by test_native.py.
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "../csrc/arena.h"
#include "../csrc/cpu/stages.h"

namespace {

using Bytes = std::unique_ptr<unsigned char[]>;

std::mt19937_64 random_bits(1);

int64_t pick(std::initializer_list<int64_t> choices) {
    return choices.begin()[random_bits() % choices.size()];
}

int64_t size_of(para::DType dtype) {
    return dtype == para::DType::f32 ? 4 : 2;
}

// [rows, cols] of random numbers around 1, of either layout.
para::Matrix matrix(int64_t rows, int64_t cols, para::DType dtype, std::vector<Bytes>& memory) {
    memory.emplace_back(new unsigned char[static_cast<size_t>(rows * cols * size_of(dtype))]);
    for (int64_t i = 0; i < rows * cols; ++i) {
        const auto bits = static_cast<uint32_t>(random_bits());
        // A sign, an exponent of a few below that of 1, and any fraction.
        const uint32_t f32 = (bits & 0x80ffffff) | 0x3e000000;
        const auto half = static_cast<uint16_t>(dtype == para::DType::f16 ? ((bits & 0x87ff) | 0x3000) : f32 >> 16);
        unsigned char* at = memory.back().get() + i * size_of(dtype);
        if (dtype == para::DType::f32) {
            std::memcpy(at, &f32, 4);
        } else {
            std::memcpy(at, &half, 2);
        }
    }
    const bool across = random_bits() % 2 == 0;
    return {memory.back().get(), rows, cols, across ? cols : 1, across ? 1 : rows, dtype};
}

struct Batch {
    std::vector<Bytes> memory;
    std::vector<std::unique_ptr<double[]>> cores;
    std::vector<para::Problem> problems;
};

void add_module(Batch& batch) {
    const auto any_type = [] { return static_cast<para::DType>(pick({0, 1, 2})); };
    const int64_t r = pick({1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 33});
    const int64_t m = pick({1, 3, 8, 17, 64, 95, 97, 127, 129, 300}), n = pick({1, 2, 9, 16, 63, 96, 128, 130, 257});
    const para::Matrix b = matrix(m, r, any_type(), batch.memory), a = matrix(r, n, any_type(), batch.memory);
    const int64_t k = pick({0, 1, r / 2, r});
    const para::DType dtype = any_type();
    batch.cores.emplace_back(new double[static_cast<size_t>(para::Core::words(r))]);
    unsigned char* outputs[2];
    for (int side = 0; side < 2; ++side) {
        batch.memory.emplace_back(new unsigned char[static_cast<size_t>((side ? n : m) * k * size_of(dtype))]);
        outputs[side] = batch.memory.back().get();
    }
    batch.problems.push_back({b, a, 0.7, para::Core(batch.cores.back().get(), r), k, outputs[0], outputs[1], dtype});
}

// Everything that the three stages leave: sigma, the new factors, what is certified.
std::vector<unsigned char> results(const Batch& batch, const para::Kernels& kernels, int threads) {
    std::vector<unsigned char> bytes;
    const auto keep = [&](const void* from, int64_t count) {
        const auto* first = static_cast<const unsigned char*>(from);
        bytes.insert(bytes.end(), first, first + count);
    };
    para::cpu::cores(batch.problems, kernels, threads);
    para::cpu::svd(batch.problems, kernels, threads);
    const auto certificates = para::cpu::truncate(batch.problems, kernels, threads);
    for (size_t i = 0; i < batch.problems.size(); ++i) {
        const para::Problem& p = batch.problems[i];
        keep(p.core.sigma, 8 * p.rank());
        keep(p.new_b, p.b.rows * p.k * size_of(p.new_dtype));
        keep(p.new_a, p.a.cols * p.k * size_of(p.new_dtype));
        if (p.k > 0) keep(&certificates[i], sizeof certificates[i]);
    }
    return bytes;
}

}  // namespace

int main() {
    para::Arena arena(size_t{9} << 20, 2);
    std::memset(arena.data(), 1, arena.bytes());
    int count;
    const para::Kernels* const* levels = para::available_kernels(count);
    for (int round = 0; round < 2; ++round) {
        Batch batch;
        for (int i = 0; i < 150; ++i) add_module(batch);  // enough for a second thread
        const auto expected = results(batch, *levels[0], 1);
        for (int level = 0; level < count; ++level) {
            for (int threads = 1; threads <= 2; ++threads) {
                if (results(batch, *levels[level], threads) != expected) {
                    return std::printf("wrong: level %s, %d threads\n", levels[level]->isa, threads), 1;
                }
            }
        }
    }
    std::puts("right");
}
