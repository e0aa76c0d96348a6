#include "launches.h"
#include "platform.h"

namespace para::cuda {

int64_t shared_limit_of(int device) {
    return static_cast<int64_t>(shared_limit(device));
}

}  // namespace para::cuda
