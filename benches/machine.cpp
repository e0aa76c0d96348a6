// What this machine can do, for the floor that the benches compare with: the rate of fused multiply-adds, and how fast
// memory is read and copied, by a number of threads. Compiled by machine.py for the processor that it runs on.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int REGISTER = 64, CHAINS = 20;
#elif defined(__AVX__)
constexpr int REGISTER = 32, CHAINS = 12;
#else
constexpr int REGISTER = 16, CHAINS = 12;
#endif
typedef double Doubles __attribute__((vector_size(REGISTER)));
typedef uint64_t Words __attribute__((vector_size(REGISTER)));

template <class Work>
double seconds(int threads, Work work) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
    work(0);
    for (auto& thread : others) thread.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// A thread's equal share of count items.
std::pair<int64_t, int64_t> share(int64_t count, int threads, int i) {
    return {count * i / threads, count * (i + 1) / threads};
}

volatile double sink;

}  // namespace

extern "C" {

// fp64 operations a second, a multiply-add counted as two.
double fma_rate(int threads, double for_seconds) {
    int64_t repeats = 1 << 16;
    for (;; repeats *= 2) {
        const double elapsed = seconds(threads, [=](int i) {
            Doubles chain[CHAINS], factor = Doubles{} + 0.5, term = Doubles{} + i;
#pragma GCC unroll 32
            for (int c = 0; c < CHAINS; ++c) chain[c] = Doubles{} + 1 + c;
            for (int64_t n = 0; n < repeats; ++n) {
#pragma GCC unroll 32
                for (int c = 0; c < CHAINS; ++c) chain[c] = chain[c] * factor + term;
            }
            Doubles total{};
#pragma GCC unroll 32
            for (int c = 0; c < CHAINS; ++c) total += chain[c];
            sink = total[0];
        });
        if (elapsed > for_seconds) {
            return 2.0 * CHAINS * (REGISTER / 8) * static_cast<double>(repeats) * threads / elapsed;
        }
    }
}

// Bytes a second read from `bytes` of memory.
double read_rate(const uint64_t* memory, int64_t bytes, int threads) {
    const int64_t words = bytes / REGISTER;
    const double elapsed = seconds(threads, [=](int i) {
        const auto part = share(words / 4, threads, i);
        Words sum[4] = {};
        for (int64_t w = part.first; w < part.second; ++w) {
            for (int64_t t = 0; t < 4; ++t) {
                Words x;
                std::memcpy(&x, reinterpret_cast<const char*>(memory) + (w * 4 + t) * REGISTER, REGISTER);
                sum[t] ^= x;
            }
        }
        sink = static_cast<double>((sum[0] ^ sum[1] ^ sum[2] ^ sum[3])[0]);
    });
    return static_cast<double>(bytes) / elapsed;
}

// Bytes a second copied: each is read once and written once.
double copy_rate(const char* from, char* to, int64_t bytes, int threads) {
    const double elapsed = seconds(threads, [=](int i) {
        const auto part = share(bytes, threads, i);
        std::memcpy(to + part.first, from + part.first, static_cast<size_t>(part.second - part.first));
    });
    return static_cast<double>(bytes) / elapsed;
}
}
