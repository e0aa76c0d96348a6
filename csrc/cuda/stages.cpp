#include "stages.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#include "launches.h"

namespace para::cuda {
namespace {

constexpr int64_t SIDES = 2;

int64_t rows_of(const Problem& p, int64_t side) {
    return side == 1 ? p.a.cols : p.b.rows;
}

int64_t bytes_of_side(const Problem& p, int64_t side) {
    return (side == 1 ? p.a.dtype : p.b.dtype) == DType::f32 ? 4 : 2;
}

// So many rows of each span that there are about `wanted`; a multiple of 8, which keeps 16-byte loads aligned.
int64_t span_rows(int64_t rows, int64_t wanted) {
    const int64_t spans = (rows + wanted - 1) / wanted;
    return round_up((rows + spans - 1) / spans, 8);
}

// About 64 KB of fp32, and enough that the partial Gram matrix is about 1/16 of what is read.
int64_t gram_rows(const Problem& p, int64_t side) {
    const int64_t r = p.rank();
    return span_rows(rows_of(p, side), std::max(16384 / r, 64 * r / bytes_of_side(p, side)));
}

// Likewise, T being at most 1/32 of what is read.
int64_t truncate_rows(const Problem& p, int64_t side) {
    return span_rows(rows_of(p, side), std::max(16384 / p.rank(), 256 * p.k / bytes_of_side(p, side)));
}

// The tables' beginning: rows and scales as they are, and the work table, to be filled.
std::vector<int64_t> new_tables(const std::vector<Problem>& problems, const int64_t* rows, const double* scales) {
    const auto modules = static_cast<int64_t>(problems.size());
    std::vector<int64_t> tables(rows, rows + modules * COLUMNS);
    for (int64_t i = 0; i < modules; ++i) {
        int64_t bits;
        std::memcpy(&bits, scales + i, sizeof bits);
        tables.push_back(bits);
    }
    tables.resize(static_cast<size_t>(modules * (COLUMNS + 1 + WORK_COLUMNS)));
    return tables;
}

int64_t* work_of(std::vector<int64_t>& tables, int64_t modules, int64_t module) {
    return tables.data() + modules * (COLUMNS + 1) + module * WORK_COLUMNS;
}

Batch batch_of(const Place& place, int64_t modules) {
    const int64_t* const scales = place.tables + modules * COLUMNS;
    return {place.tables, reinterpret_cast<const double*>(scales), scales + modules, place.scratch, place.results};
}

void check(const char* error, const char* stage) {
    if (error) throw std::runtime_error(std::string(stage) + ": " + error);
}

}  // namespace

CoresPlan::CoresPlan(const std::vector<Problem>& problems, const int64_t* rows, const double* scales, int device)
    : tables(new_tables(problems, rows, scales)),
      shared_limit_(shared_limit_of(device)),
      modules_(static_cast<int64_t>(problems.size())) {
    if (shared_limit_ == 0) throw std::runtime_error("there is no CUDA device " + std::to_string(device));
    std::vector<int64_t> spans[2], modules[2];
    // An svd launch per bucket of ranks: its shared memory is that of its largest.
    constexpr int64_t buckets[] = {16, 32, 64, 128, LARGEST_SVD_RANK};
    std::vector<int64_t> in_bucket[std::size(buckets)];
    for (int64_t i = 0; i < modules_; ++i) {
        const Problem& p = problems[static_cast<size_t>(i)];
        const int64_t r = p.rank();
        int64_t* const work = work_of(tables, modules_, i);
        work[PARTIALS] = scratch;
        const bool large_strips = r > SMALL_STRIPS_RANK;
        const GramShape shape = gram_shape(large_strips, shared_limit_);
        const int64_t block = r <= shape.whole ? r : COLUMN_BLOCK;
        for (int64_t side = 0; side < SIDES; ++side) {
            const int64_t all = rows_of(p, side), height = gram_rows(p, side);
            for (int64_t first = 0; first < all; first += height) {
                for (int64_t left = 0; left < r; left += block) {
                    for (int64_t right = left; right < r; right += block) {
                        spans[large_strips].insert(spans[large_strips].end(), {i, side, left, right, first,
                                                                               std::min(height, all - first), scratch});
                    }
                }
                ++work[PARTS_B + side];
                scratch += triangle(r);
            }
        }
        const bool large = !fits_cores(r, shared_limit_);
        work[TRIANGLES] = scratch;
        if (large) scratch += 2 * triangle(r);
        modules[large].push_back(i);
        work[SPECTRUM] = results;
        spectra.push_back(results);
        results += SPECTRUM_HEAD + r;
        cores_[large].largest_rank = std::max(cores_[large].largest_rank, r);
        if (!fits_svd(r, shared_limit_)) continue;
        size_t bucket = 0;
        while (r > buckets[bucket]) ++bucket;
        in_bucket[bucket].push_back(i);
    }
    const auto append = [&](const std::vector<int64_t>& words, Share& share, int64_t columns) {
        share.begin = static_cast<int64_t>(tables.size());
        share.count = static_cast<int64_t>(words.size()) / columns;
        tables.insert(tables.end(), words.begin(), words.end());
    };
    for (int large = 0; large < 2; ++large) {
        append(spans[large], gram_[large], SPAN_COLUMNS);
        append(modules[large], cores_[large], 1);
    }
    for (const std::vector<int64_t>& members : in_bucket) {
        if (members.empty()) continue;
        Share share;
        for (const int64_t i : members) {
            share.largest_rank = std::max(share.largest_rank, problems[static_cast<size_t>(i)].rank());
        }
        append(members, share, 1);
        svd_.push_back(share);
    }
}

void CoresPlan::launch(const Place& place) const {
    const Batch batch = batch_of(place, modules_);
    for (int large = 0; large < 2; ++large) {
        const Share& share = gram_[large];
        if (share.count == 0) continue;
        check(launch_gram(batch, large, place.tables + share.begin, share.count, shared_limit_, place.stream), "gram");
    }
    for (const Share& share : cores_) {
        if (share.count == 0) continue;
        check(launch_cores(batch, place.tables + share.begin, share.count, share.largest_rank, shared_limit_,
                           place.stream),
              "cores");
    }
    for (const Share& share : svd_) {
        check(launch_svd(batch, place.tables + share.begin, share.count, share.largest_rank, place.stream), "svd");
    }
}

TruncatePlan::TruncatePlan(const std::vector<Problem>& problems, const int64_t* rows, const double* scales)
    : tables(new_tables(problems, rows, scales)), modules_(static_cast<int64_t>(problems.size())) {
    std::vector<int64_t> spans;
    for (int64_t i = 0; i < modules_; ++i) {
        const Problem& p = problems[static_cast<size_t>(i)];
        if (p.k == 0) continue;
        const int64_t r = p.rank();
        work_of(tables, modules_, i)[TRANSFORMS] = scratch;
        scratch += 5 * r * round_up(p.k, TRUNCATE_TILE);
        largest_rank_ = std::max(largest_rank_, r);
        largest_new_rank_ = std::max(largest_new_rank_, p.k);
        for (int64_t side = 0; side < SIDES; ++side) {
            const int64_t all = rows_of(p, side), height = truncate_rows(p, side);
            for (int64_t first = 0; first < all; first += height) {
                for (int64_t left = 0; left < p.k; left += MOST_COMPONENTS) {
                    const int64_t right = std::min(left + MOST_COMPONENTS, p.k);
                    spans.insert(spans.end(), {i, side, left, right, first, std::min(height, all - first), 0});
                    sides.push_back(SIDES * i + side);
                    most_of_t_ = std::max(most_of_t_, t_in_shared(r, right - left));
                }
            }
        }
    }
    tables.insert(tables.end(), spans.begin(), spans.end());
    spans_ = static_cast<int64_t>(sides.size());
    results = modules_ * NUMBERS_OF_MODULE + spans_ * NUMBERS_OF_SPAN;
}

void TruncatePlan::launch(const Place& place) const {
    if (spans_ == 0) return;
    const Batch batch = batch_of(place, modules_);
    check(launch_transforms(batch, modules_, largest_rank_, largest_new_rank_, place.stream), "transforms");
    check(launch_truncate(batch, place.tables + modules_ * (COLUMNS + 1 + WORK_COLUMNS), spans_, most_of_t_,
                          place.results + modules_ * NUMBERS_OF_MODULE, place.stream),
          "truncate");
}

}  // namespace para::cuda
