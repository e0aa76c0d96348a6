// The three stages over a ragged batch: threads over modules, every module on its own. Read this first.
#pragma once

#include <vector>

#include "kernels.h"

namespace para {
namespace cpu {

// Fills R_B, R_A, M, norms of every core. Per module: 0, or 1 if B, 2 if A, 3 if M is not finite (that core is then
// unusable).
std::vector<int32_t> cores(const std::vector<Problem>& problems, const Kernels& kernels, int threads);

// Fills U and sigma of every core. Per module: sweeps taken, or -1 if Jacobi did not converge.
std::vector<int32_t> svd(const std::vector<Problem>& problems, const Kernels& kernels, int threads);

// Writes new_b and new_a of every module with k > 0.
std::vector<Certificate> truncate(const std::vector<Problem>& problems, const Kernels& kernels, int threads);

}  // namespace cpu
}  // namespace para
