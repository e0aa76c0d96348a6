// What the host must know of the device.
#pragma once

#include <cstdint>
#include <string>

namespace para::cuda {

// Bytes of shared memory that a block may have on the device of this number.
int64_t shared_limit_of(int device);

// Why no device can be used; empty where one can.
std::string unavailable();

}  // namespace para::cuda
