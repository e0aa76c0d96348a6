// The three stages over a ragged batch on one device: which blocks do what, how much memory they need, and the
// launches.
//
// A plan is made on the host and its `tables` copied to the device by the caller, who owns all memory. What a module's
// work is split into depends on its own shape, type and layout only, and so do its bits. Launches wait for nothing.
#pragma once

#include <vector>

#include "work.h"

namespace para::cuda {

// Addresses in the device's memory, all multiples of 16, and CUDA's stream.
struct Place {
    const int64_t* tables;
    double* scratch;
    double* results;
    void* stream;
};

// Stages 1 and 2: fills every core; results are the spectra: per module [SPECTRUM_HEAD + r], with SWEEPS = -1 and no
// sigma where the svd is left to the caller (cores too large, or Jacobi did not converge).
//
// Launches gram, cores and svd, once each where ranks are alike; another gram for ranks above SMALL_STRIPS_RANK,
// another cores where triangles are too large for shared memory, another svd for each further bucket of ranks.
class CoresPlan {
  public:
    // rows [modules, COLUMNS], scales [modules], as in `problems`. Throws std::runtime_error if there is no such
    // device.
    CoresPlan(const std::vector<Problem>& problems, const int64_t* rows, const double* scales, int device);

    // Throws std::runtime_error naming the stage.
    void launch(const Place& place) const;

    std::vector<int64_t> tables;
    std::vector<int64_t> spectra;      // where each module's spectrum starts in the results
    int64_t scratch = 0, results = 0;  // doubles

  private:
    // Modules or spans for one launch, in `tables`.
    struct Share {
        int64_t begin = 0, count = 0, largest_rank = 0;
    };

    int64_t shared_limit_, modules_;
    Share gram_[2], cores_[2];
    std::vector<Share> svd_;
};

// Stage 3: writes the new factors; launches transforms and truncate. Results: NUMBERS_OF_MODULE per module, then
// NUMBERS_OF_SPAN per span.
class TruncatePlan {
  public:
    TruncatePlan(const std::vector<Problem>& problems, const int64_t* rows, const double* scales);

    void launch(const Place& place) const;

    std::vector<int64_t> tables;
    std::vector<int64_t> sides;  // per span 2 · module + side, ascending
    int64_t scratch = 0, results = 0;

  private:
    int64_t modules_, spans_ = 0, largest_rank_ = 0, largest_new_rank_ = 0, most_of_t_ = 0;
};

}  // namespace para::cuda
