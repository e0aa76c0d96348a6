#include "device.h"
#include "platform.h"

namespace para::cuda {

int64_t shared_limit_of(int device) {
    return static_cast<int64_t>(shared_limit(device));
}

std::string unavailable() {
#ifndef PARA_EMULATED
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (count == 0) return "no CUDA device was found";
#endif
    return "";
}

}  // namespace para::cuda
