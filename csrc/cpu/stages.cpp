#include "stages.h"

#include <map>

#include "../parallel.h"

namespace para {
namespace cpu {
namespace {

constexpr double OVERHEAD = 1000;  // nanoseconds per module, beside its arithmetic

// One per thread; grows to the largest module that the thread meets.
class Scratch {
  public:
    double* reserve(int64_t count) {
        if (static_cast<int64_t>(memory_.size()) < count + 8) memory_.assign(static_cast<size_t>(count + 8), 0.0);
        const auto address = reinterpret_cast<uintptr_t>(memory_.data());
        return memory_.data() + (64 - address % 64) % 64 / sizeof(double);
    }

  private:
    std::vector<double> memory_;
};

}  // namespace

std::vector<int32_t> cores(const std::vector<Problem>& problems, const Kernels& kernels, int threads) {
    std::vector<int32_t> status(problems.size());
    std::vector<double> costs;
    for (const Problem& p : problems) {
        const double r = static_cast<double>(p.rank());
        costs.push_back(static_cast<double>(p.b.rows + p.a.cols) * r * (r + 8) / 64 + r * r * r + OVERHEAD);
    }
    parallel_for(costs, threads, [&] {
        return [&, scratch = Scratch()](size_t i) mutable {
            status[i] = kernels.cores(problems[i], scratch.reserve(kernels.cores_scratch(problems[i])));
        };
    });
    return status;
}

std::vector<int32_t> svd(const std::vector<Problem>& problems, const Kernels& kernels, int threads) {
    std::map<int64_t, std::vector<size_t>> by_width;
    for (size_t i = 0; i < problems.size(); ++i) by_width[kernels.svd_width(problems[i].rank())].push_back(i);
    struct Task {
        int64_t width;
        std::vector<size_t> modules;
    };
    std::vector<Task> tasks;
    std::vector<double> costs;
    const auto lanes = static_cast<size_t>(kernels.lanes);
    for (const auto& [width, modules] : by_width) {
        for (size_t first = 0; first < modules.size(); first += lanes) {
            const size_t last = std::min(first + lanes, modules.size());
            tasks.push_back({width,
                             {modules.begin() + static_cast<std::ptrdiff_t>(first),
                              modules.begin() + static_cast<std::ptrdiff_t>(last)}});
            costs.push_back(8 * static_cast<double>(width) * static_cast<double>(width) * static_cast<double>(width));
        }
    }

    std::vector<int32_t> sweeps(problems.size());
    parallel_for(costs, threads, [&] {
        return [&, scratch = Scratch()](size_t t) mutable {
            const Task& task = tasks[t];
            std::vector<Core> cores;
            std::vector<int64_t> ranks;
            for (const size_t i : task.modules) {
                cores.push_back(problems[i].core);
                ranks.push_back(problems[i].rank());
            }
            std::vector<int32_t> done(task.modules.size());
            kernels.svd(cores.data(), ranks.data(), static_cast<int64_t>(cores.size()), task.width,
                        scratch.reserve(kernels.svd_scratch(task.width)), done.data());
            for (size_t lane = 0; lane < done.size(); ++lane) sweeps[task.modules[lane]] = done[lane];
        };
    });
    return sweeps;
}

std::vector<Certificate> truncate(const std::vector<Problem>& problems, const Kernels& kernels, int threads) {
    std::vector<Certificate> certificates(problems.size());
    std::vector<double> costs;
    for (const Problem& p : problems) {
        costs.push_back(static_cast<double>(p.b.rows + p.a.cols) * static_cast<double>(p.rank() * (p.k + 8)) / 64 +
                        OVERHEAD);
    }
    parallel_for(costs, threads, [&] {
        return [&, scratch = Scratch()](size_t i) mutable {
            if (problems[i].k == 0) return;
            certificates[i] = kernels.truncate(problems[i], scratch.reserve(kernels.truncate_scratch(problems[i])));
        };
    });
    return certificates;
}

}  // namespace cpu
}  // namespace para
