// The three stages on modules of one shape, by one thread at one ISA level, for instructions.py to count what they
// execute: instructions LEVEL MODULES M N R K.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "../csrc/cpu/stages.h"

int main(int argc, char** argv) {
    if (argc != 7) return 2;
    int count;
    const para::Kernels* const* found = para::available_kernels(count);
    const para::Kernels* kernels = nullptr;
    for (int i = 0; i < count; ++i) {
        if (std::strcmp(found[i]->isa, argv[1]) == 0) kernels = found[i];
    }
    if (!kernels) return std::fprintf(stderr, "this machine has no level %s\n", argv[1]), 1;
    const int64_t modules = std::atoll(argv[2]), m = std::atoll(argv[3]), n = std::atoll(argv[4]),
                  r = std::atoll(argv[5]), k = std::atoll(argv[6]);

    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    std::vector<float> factors(static_cast<size_t>(modules * (m + n) * r)), outputs(factors.size());
    std::vector<double> cores(static_cast<size_t>(modules * para::Core::words(r)));
    for (float& x : factors) x = normal(random);
    std::vector<para::Problem> problems;
    for (int64_t i = 0; i < modules; ++i) {
        const float *b = factors.data() + i * (m + n) * r, *a = b + m * r;
        float *new_b = outputs.data() + i * (m + n) * k, *new_a = new_b + m * k;
        problems.push_back({{b, m, r, r, 1, para::DType::f32},
                            {a, r, n, n, 1, para::DType::f32},
                            1.0,
                            para::Core(cores.data() + i * para::Core::words(r), r),
                            k,
                            new_b,
                            new_a,
                            para::DType::f32});
    }
    para::cpu::cores(problems, *kernels, 1);
    para::cpu::svd(problems, *kernels, 1);
    para::cpu::truncate(problems, *kernels, 1);
}
