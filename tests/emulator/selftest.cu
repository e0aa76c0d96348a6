// The emulator's own test: kernels that are right, and the same kernels with a bug planted. `selftest none SEED` runs
// all kernels and must find nothing; `selftest BUG SEED` must end with an error, in the modes that test_emulator.py
// lists. A bug's line bears its name, so that the test knows which line a report must name.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cuda/platform.h"

namespace selftest {

using namespace para::cuda;

enum class Bug {
    none,
    lost_update,
    half_a_warp,
    sync_in_a_branch,
    own_lane,
    ended_lane,
    out_of_array,
    out_of_bounds,
    uninitialised,
    no_first_sync,
    no_second_sync,
    no_syncthreads,
    no_syncwarp,
    half_a_syncwarp,
    no_second_syncwarp,
    misaligned,
    too_much_shared,
};

constexpr unsigned LANES = 32, TILE = 16;

// out += Σ in, by every block in turn; 128 threads.
template <Bug BUG>
__global__ void __launch_bounds__(128) total(const double* __restrict__ in, int size, double* out) {
    PARA_SHARED(double, parts, 4);
    const unsigned lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    double sum = 0;
    for (unsigned i = blockIdx.x * 128 + threadIdx.x; i < static_cast<unsigned>(size); i += gridDim.x * 128) {
        sum += read(in + i);
    }
    if (BUG == Bug::ended_lane && lane > 24) return;
    for (unsigned by = 16; by > 0; by /= 2) {
        if (BUG == Bug::half_a_warp && lane >= 16) break;
        const unsigned mask = BUG == Bug::own_lane ? ~1u : ~0u;
        sum += __shfl_down_sync(mask, sum, by);  // own_lane, ended_lane, half_a_warp
    }
    if (lane == 0) parts[BUG == Bug::out_of_array ? warp + 1 : warp] = sum;  // out_of_array
    if (BUG == Bug::sync_in_a_branch && warp == 1) __syncthreads();          // sync_in_a_branch
    __syncthreads();                                                         // sync_in_a_branch, half_a_warp
    if (threadIdx.x > 0) return;
    sum = parts[0] + parts[1] + parts[2] + parts[3];
    if (BUG == Bug::lost_update) {
        write(out, read(out) + sum);  // lost_update
    } else {
        atomicAdd(out, sum);
    }
}

// c [rows, cols] = a [rows, inner] · b [inner, cols], a tile for each block of 16 × 16 threads.
template <Bug BUG>
__global__ void product(const float* a, const float* b, float* c, int rows, int inner, int cols) {
    PARA_DYNAMIC_SHARED(memory);
    float* const tile_a = reinterpret_cast<float*>(memory);
    float* const tile_b = tile_a + TILE * TILE;
    const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y), tile = TILE;
    const int row = static_cast<int>(blockIdx.y) * tile + y, col = static_cast<int>(blockIdx.x) * tile + x;
    float sum = 0;
    for (int first = 0; first < inner; first += tile) {
        const bool a_there = row < rows && first + x < inner, b_there = first + y < inner && col < cols;
        if (a_there) {
            tile_a[y * tile + x] = read(a + row * inner + first + x);  // no_second_sync
        } else if (BUG != Bug::uninitialised) {
            tile_a[y * tile + x] = 0;
        }
        const int at = y * tile + x + (BUG == Bug::out_of_bounds ? 1 : 0);
        tile_b[at] = b_there ? read(b + (first + y) * cols + col) : 0;  // out_of_bounds
        if (BUG != Bug::no_first_sync) __syncthreads();
        for (int k = 0; k < tile; ++k) sum += tile_a[y * tile + k] * tile_b[k * tile + x];  // no_first_sync
        if (BUG != Bug::no_second_sync) __syncthreads();
    }
    if (row < rows && col < cols) write(c + row * cols + col, sum);
}

// Makes the columns of a [size, size] orthogonal, an even size: one-sided Jacobi, 8 lanes for each pair of columns, all
// pairs of a round at once. Matrix blockIdx.x; sweeps[blockIdx.x] is how many it took.
template <Bug BUG>
__global__ void orthogonalise(double* matrices, int size, int* sweeps) {
    PARA_DYNAMIC_SHARED(memory);
    double* const a = reinterpret_cast<double*>(memory);  // column by column
    double* const global = matrices + static_cast<int64_t>(blockIdx.x) * size * size;
    const int thread = static_cast<int>(threadIdx.x), pair = thread / 8, part = thread % 8;
    for (int i = thread; i < size * size; i += static_cast<int>(blockDim.x)) {
        a[i % size * size + i / size] = read(global + i);
    }
    __syncthreads();
    int sweep = 0;
    for (bool rotated = true; rotated && sweep < 30; ++sweep) {
        rotated = false;
        for (int round = 0; round < size - 1; ++round) {
            const int ring = size - 1;
            const int p = pair == 0 ? ring : (round + pair) % ring, q = (round + ring - pair) % ring;
            double* const x = a + p * size;
            double* const y = a + q * size;
            double xx = 0, yy = 0, xy = 0;
            for (int i = part; i < size; i += 8) {
                xx += x[i] * x[i];
                yy += y[i] * y[i];
                xy += x[i] * y[i];
            }
            for (int by = 4; by > 0; by /= 2) {
                xx += __shfl_xor_sync(~0u, xx, by, 8);
                yy += __shfl_xor_sync(~0u, yy, by, 8);
                xy += __shfl_xor_sync(~0u, xy, by, 8);
            }
            if (fabs(xy) > 1e-15 * sqrt(xx * yy)) {
                rotated = true;
                const double zeta = (yy - xx) / (2 * xy);
                const double t = (zeta < 0 ? -1 : 1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
                const double c = 1 / sqrt(1 + t * t), s = c * t;
                for (int i = part; i < size; i += 8) {
                    const double old = x[i];
                    x[i] = c * old - s * y[i];  // no_syncthreads
                    y[i] = s * old + c * y[i];  // no_syncthreads
                }
            }
            if (BUG != Bug::no_syncthreads) __syncthreads();
        }
        rotated = __syncthreads_or(rotated);
    }
    for (int i = thread; i < size * size; i += static_cast<int>(blockDim.x)) {
        write(global + i, a[i % size * size + i / size]);
    }
    if (thread == 0) write(sweeps + blockIdx.x, sweep);
}

// Each lane's number moves two lanes on, through shared memory; each warp by itself, of two.
template <Bug BUG>
__global__ void pass_on(int* out) {
    PARA_SHARED(int, box, 64);
    const unsigned lane = threadIdx.x % LANES, before = threadIdx.x - lane + (lane + 31) % LANES;
    const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
    int x = static_cast<int>(threadIdx.x);
    for (int i = 0; i < 2; ++i) {
        box[threadIdx.x] = x;  // no_syncwarp, half_a_syncwarp, no_second_syncwarp
        if (BUG != Bug::no_syncwarp) __syncwarp(BUG == Bug::half_a_syncwarp ? half : ~0u);
        x = box[before];
        if (BUG != Bug::no_second_syncwarp) __syncwarp();
    }
    write(out + threadIdx.x, x);
}

template <Bug BUG>
__global__ void copy(const float* in, float* out) {
    const float* const from = in + 4 * threadIdx.x + (BUG == Bug::misaligned ? 1 : 0);
    const float4 x = read(reinterpret_cast<const float4*>(from));  // misaligned
    write(reinterpret_cast<float4*>(out + 4 * threadIdx.x), make_float4(x.x, x.y, x.z, x.w));
}

// What each word returns, 16 numbers for each of 40 threads: a warp, and a quarter of one.
__global__ void words(int* out) {
    const int i = static_cast<int>(threadIdx.x);
    int* const mine = out + 16 * i;
    write(mine + 0, __shfl_sync(~0u, i, 5));
    write(mine + 1, __shfl_sync(~0u, i, 11, 8));
    write(mine + 2, __shfl_xor_sync(~0u, i, 3));
    write(mine + 3, __shfl_xor_sync(~0u, i, 4, 4));
    write(mine + 4, __shfl_down_sync(~0u, i, 3, 8));
    write(mine + 5, static_cast<int>(__shfl_sync(~0u, 0.5 * i, 2)));
    write(mine + 6, static_cast<int>(__ballot_sync(~0u, i % 3 == 0)));
    write(mine + 7, __any_sync(~0u, i == 33));
    write(mine + 8, __all_sync(~0u, i < 32));
    write(mine + 9, __syncthreads_or(i == 39));
    write(mine + 10, __syncthreads_or(i == 40));
    if (i % 2 == 0) {
        write(mine + 11, __shfl_xor_sync(0x55555555u, i, 2));
    } else {
        __syncwarp(0xaaaaaaaau);
        write(mine + 11, -1);
    }
    if (i < 8) return;
    __syncthreads();  // those that have ended do not hold it
    write(mine + 12, static_cast<int>(__ballot_sync(~0u, 1)));
}

#ifdef PARA_EMULATED

std::string problem;

void expect(bool right, const std::string& what) {
    if (!right && problem.empty()) problem = "wrong: " + what;
}

void expect_launched(const char* error) {
    if (error && problem.empty()) problem = error;
}

std::vector<double> numbers(size_t count) {  // in [-1, 1), the same on every machine
    std::vector<double> all(count);
    uint32_t state = 1;
    for (double& x : all) {
        state = state * 1664525 + 1013904223;
        x = state * 0x1p-31 - 1;
    }
    return all;
}

template <Bug BUG>
void run_total() {
    const std::vector<double> in = numbers(2000);
    double want = 0, sum = 0;
    for (const double x : in) want += x;
    expect_launched(launch(total<BUG>, 5, 128, 0, nullptr, in.data(), 2000, &sum));
    expect(fabs(sum - want) < 1e-12, "total");
}

template <Bug BUG>
void run_product(int inner) {
    constexpr int ROWS = 20, COLS = 35;
    const std::vector<double> random = numbers(ROWS * inner + inner * COLS);
    const std::vector<float> a(random.begin(), random.begin() + ROWS * inner),
        b(random.begin() + ROWS * inner, random.end());
    std::vector<float> c(ROWS * COLS);
    const size_t shared = BUG == Bug::too_much_shared ? size_t{1} << 20 : 2 * TILE * TILE * sizeof(float);
    expect_launched(launch(product<BUG>, dim3(3, 2), dim3(TILE, TILE), shared, nullptr, a.data(), b.data(), c.data(),
                           ROWS, inner, COLS));
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLS; ++j) {
            double want = 0;
            for (int k = 0; k < inner; ++k) want += double{a[i * inner + k]} * b[k * COLS + j];
            expect(fabs(c[i * COLS + j] - want) < 1e-5, "product");
        }
    }
}

template <Bug BUG>
void run_orthogonalise(int count, int size) {
    std::vector<double> matrices = numbers(static_cast<size_t>(count * size * size));
    std::vector<int> sweeps(static_cast<size_t>(count));
    const unsigned threads = static_cast<unsigned>(size * 4);
    const size_t shared = static_cast<size_t>(size * size) * sizeof(double);
    expect_launched(launch(orthogonalise<BUG>, static_cast<unsigned>(count), threads, shared, nullptr, matrices.data(),
                           size, sweeps.data()));
    for (int m = 0; m < count; ++m) {
        const double* const a = matrices.data() + m * size * size;
        expect(sweeps[static_cast<size_t>(m)] < 30, "sweeps of orthogonalise");
        for (int p = 0; p < size; ++p) {
            for (int q = 0; q < p; ++q) {
                double xx = 0, yy = 0, xy = 0;
                for (int i = 0; i < size; ++i) {
                    xx += a[i * size + p] * a[i * size + p];
                    yy += a[i * size + q] * a[i * size + q];
                    xy += a[i * size + p] * a[i * size + q];
                }
                expect(fabs(xy) <= 1e-13 * sqrt(xx * yy), "orthogonalise");
            }
        }
    }
}

template <Bug BUG>
void run_pass_on() {
    int out[64];
    expect_launched(launch(pass_on<BUG>, 1, 64, 0, nullptr, out));
    for (int i = 0; i < 64; ++i) expect(out[i] == i / 32 * 32 + (i + 30) % 32, "pass_on");
}

template <Bug BUG>
void run_copy() {
    alignas(16) float in[132], out[128];
    for (int i = 0; i < 132; ++i) in[i] = static_cast<float>(i);
    expect_launched(launch(copy<BUG>, 1, 32, 0, nullptr, in, out));
    for (int i = 0; i < 128; ++i) expect(out[i] == in[i], "copy");
}

void run_words() {
    int out[40][16] = {};
    expect_launched(launch(words, 1, 40, 0, nullptr, &out[0][0]));
    for (int i = 0; i < 40; ++i) {
        const int warp = i / 32 * 32;
        const unsigned alive = i < 32 ? ~0u : 0xffu, third = i < 32 ? 0x49249249u : 0x92u;
        const int want[16] = {warp + 5,
                              i / 8 * 8 + 3,
                              i ^ 3,
                              i % 8 < 4 ? i : i - 4,
                              i % 8 < 5 ? i + 3 : i,
                              warp / 2 + 1,
                              static_cast<int>(third),
                              i >= 32,
                              i < 32,
                              1,
                              0,
                              i % 2 ? -1 : i ^ 2,
                              i < 8 ? 0 : static_cast<int>(i < 32 ? alive & ~0xffu : alive)};
        for (int word = 0; word < 16; ++word) {
            expect(out[i][word] == want[word], "word " + std::to_string(word) + " of thread " + std::to_string(i));
        }
    }
}

void run_conversions() {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const uint16_t half = static_cast<uint16_t>(bits);
        const float x = half_to_float(half);
        const int exponent = half >> 10 & 31, rest = half & 1023;
        const double want =
            (half & 0x8000 ? -1 : 1) * (exponent ? ldexp(1024 + rest, exponent - 25) : ldexp(rest, -24));
        if (exponent < 31) {
            expect(x == want && float_to_half(x) == half, "half_to_float");
            const double next = half_to_float(static_cast<uint16_t>(half + 1)),
                         tie = exponent == 30 && rest == 1023 ? 65520 : fabs(want + next) / 2;
            const uint16_t even = static_cast<uint16_t>(half + (half & 1));
            const double sign = half & 0x8000 ? -1 : 1;
            expect(double_to_half(sign * tie) == even, "a tie of double_to_half");
            expect(double_to_half(sign * tie * (1 - 0x1p-52)) == half, "double_to_half below a tie");
            expect(double_to_half(sign * tie * (1 + 0x1p-52)) == half + 1, "double_to_half above a tie");
        } else {
            expect(rest ? x != x && half_to_float(float_to_half(x)) != x : x == want * INFINITY,
                   "half_to_float of what is not finite");
        }
    }
}

void run_counters() {
    using para::emulator::launches;
    para::emulator::reset();
    expect(launches().empty(), "reset");
    run_product<Bug::none>(40);
    run_pass_on<Bug::none>();
    expect(launches().size() == 2, "launches");
    const para::emulator::Launch &first = launches()[0], &second = launches()[1];
    expect(first.kernel == "product<(selftest::Bug)0>" && second.kernel == "pass_on<(selftest::Bug)0>",
           "names: " + first.kernel + ", " + second.kernel);
    expect(first.read == 4 * (3 * 20 * 40 + 2 * 40 * 35) && first.written == 4 * 20 * 35, "bytes");
    expect(first.block_barriers == 6 * 3 * 2 && first.warp_barriers == 0, "barriers of the block");
    expect(second.block_barriers == 0 && second.warp_barriers == 8, "barriers of a warp");
    expect(first.shared == 2048 && second.shared == 256, "shared memory");
    expect(first.grid.x == 3 && first.grid.y == 2 && first.block.x == 16, "shapes");
}

void run_all() {
    run_total<Bug::none>();
    for (const int inner : {10, 40}) run_product<Bug::none>(inner);
    run_orthogonalise<Bug::none>(3, 16);
    run_pass_on<Bug::none>();
    run_copy<Bug::none>();
    run_words();
    run_conversions();
    run_counters();
}

const struct {
    const char* name;
    void (*run)();
} cases[] = {
    {"none", run_all},
    {"lost_update", run_total<Bug::lost_update>},
    {"half_a_warp", run_total<Bug::half_a_warp>},
    {"sync_in_a_branch", run_total<Bug::sync_in_a_branch>},
    {"own_lane", run_total<Bug::own_lane>},
    {"ended_lane", run_total<Bug::ended_lane>},
    {"out_of_array", run_total<Bug::out_of_array>},
    {"out_of_bounds", [] { run_product<Bug::out_of_bounds>(40); }},
    {"uninitialised", [] { run_product<Bug::uninitialised>(10); }},
    {"no_first_sync", [] { run_product<Bug::no_first_sync>(40); }},
    {"no_second_sync", [] { run_product<Bug::no_second_sync>(40); }},
    {"no_syncthreads", [] { run_orthogonalise<Bug::no_syncthreads>(1, 16); }},
    {"no_syncwarp", run_pass_on<Bug::no_syncwarp>},
    {"half_a_syncwarp", run_pass_on<Bug::half_a_syncwarp>},
    {"no_second_syncwarp", run_pass_on<Bug::no_second_syncwarp>},
    {"misaligned", run_copy<Bug::misaligned>},
    {"too_much_shared", [] { run_product<Bug::too_much_shared>(40); }},
    {"speed", [] { run_orthogonalise<Bug::none>(50, 16); }},
};

#else

template __global__ void total<Bug::none>(const double*, int, double*);
template __global__ void product<Bug::none>(const float*, const float*, float*, int, int, int);
template __global__ void orthogonalise<Bug::none>(double*, int, int*);
template __global__ void pass_on<Bug::none>(int*);
template __global__ void copy<Bug::none>(const float*, float*);

#endif

}  // namespace selftest

#ifdef PARA_EMULATED
int main(int argc, char** argv) {
    const std::string wanted = argc > 1 ? argv[1] : "none";
    para::emulator::set_seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
    for (const auto& one : selftest::cases) {
        if (wanted != one.name) continue;
        one.run();
        const std::string found = std::exchange(selftest::problem, "");
        std::puts(found.empty() ? "right" : found.c_str());
        selftest::run_all();  // whatever was found, the next launch begins anew
        if (!selftest::problem.empty()) std::printf("and then %s\n", selftest::problem.c_str());
        return found.empty() && selftest::problem.empty() ? 0 : 1;
    }
    std::fprintf(stderr, "no case %s\n", wanted.c_str());
    return 2;
}
#endif
