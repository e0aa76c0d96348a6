// parallel_for: tasks over std::threads, largest first, the first exception rethrown after all have stopped. Starting a
// thread takes as long as a small adapter's stage, so there are no more than the work is worth.
//
// Tasks must not share anything they write; which thread runs a task never changes its result. Every thread works in
// the default floating-point environment, so that a caller's flush-to-zero mode can't change a result either.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdint>
#include <exception>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

namespace para {

class DefaultFloatingPoint {
  public:
    DefaultFloatingPoint() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatingPoint() { std::fesetenv(&saved_); }
    DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
    DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

  private:
    std::fenv_t saved_;
};

constexpr double WORTH_A_THREAD = 1e5;  // nanoseconds

// Calls make_worker() once per thread and the worker it returns once per task; `costs` are rough nanoseconds.
template <class MakeWorker>
void parallel_for(const std::vector<double>& costs, int threads, MakeWorker make_worker) {
    const size_t count = costs.size();
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return costs[x] > costs[y]; });

    std::atomic<size_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;
    auto run = [&] {
        try {
            DefaultFloatingPoint environment;
            auto worker = make_worker();
            for (size_t i = next++; i < count; i = next++) worker(order[i]);
        } catch (...) {
            next = count;
            std::lock_guard<std::mutex> lock(error_mutex);
            if (!error) error = std::current_exception();
        }
    };

    std::vector<std::thread> others;
    const double worth = 1 + std::accumulate(costs.begin(), costs.end(), 0.0) / WORTH_A_THREAD;
    const double allowed = std::max(threads, 1), tasks = static_cast<double>(count);
    const auto wanted = static_cast<size_t>(std::min({worth, allowed, tasks}));
    try {
        for (size_t i = 1; i < wanted; ++i) others.emplace_back(run);
    } catch (const std::system_error&) {
        // Fewer threads than asked for is slower, not wrong.
    }
    run();
    for (auto& thread : others) thread.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace para
