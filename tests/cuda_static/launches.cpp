// CUDA's runtime without a device, linked to the compiled kernels in place of the real one: it notes launches instead
// of performing them. And how many blocks of a launch fit on a multiprocessor, by cuda_occupancy.h.
#include <cuda_occupancy.h>
#include <cuda_runtime_api.h>

#include <climits>
#include <map>
#include <string>
#include <vector>

#include "cuda/stages.h"

namespace {

// Of every kernel, by the address of its host function; a static, since kernels register before main().
std::map<const void*, std::string>& names() {
    static std::map<const void*, std::string> all;
    return all;
}

using Note = void (*)(const char* kernel, int64_t blocks, int threads, int64_t dynamic_shared);
Note note;
int64_t limit;  // of shared memory per block
int allowed;    // of dynamic shared memory, for the next launch

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    names()[host] = name;
}

// Of <<<>>>, which the kernels' host functions are made for and nobody calls.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
    return cudaErrorNotSupported;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) {
    return cudaErrorNotSupported;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
    return cudaErrorNotSupported;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = static_cast<int>(limit);
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int dynamic_shared) {
    allowed = dynamic_shared;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
    return "an error";
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
    if (static_cast<int64_t>(shared) > allowed) return cudaErrorInvalidValue;
    note(names().at(host).c_str(), grid.x, static_cast<int>(block.x), static_cast<int64_t>(shared));
    return cudaSuccess;
}

// What a whole call launches for table [modules, COLUMNS] on a device of so much shared memory per block.
void note_launches(const int64_t* table, int64_t modules, int64_t shared_limit, Note each) {
    note = each;
    limit = shared_limit;
    std::vector<para::Problem> problems;
    for (int64_t i = 0; i < modules; ++i) problems.push_back(para::problem_of(table + i * para::COLUMNS, 1));
    const std::vector<double> scales(static_cast<size_t>(modules), 1);
    const para::cuda::Place nowhere{};
    para::cuda::CoresPlan(problems, table, scales.data(), 0).launch(nowhere);
    para::cuda::TruncatePlan(problems, table, scales.data()).launch(nowhere);
}

// `reserved`: the driver's own shared memory, per block.
int blocks_per_multiprocessor(int architecture, int most_threads, int64_t shared, int64_t shared_limit,
                              int64_t reserved, int registers, int64_t static_shared, int threads,
                              int64_t dynamic_shared) {
    cudaOccDeviceProp device;
    device.computeMajor = architecture / 10;
    device.computeMinor = architecture % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = most_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.numSms = 1;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = static_cast<size_t>(shared);
    device.sharedMemPerBlockOptin = static_cast<size_t>(shared_limit);
    device.reservedSharedMemPerBlock = static_cast<size_t>(reserved);
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = INT_MAX;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = static_cast<size_t>(static_shared);
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = static_cast<size_t>(dynamic_shared);
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads,
                                                                       static_cast<size_t>(dynamic_shared));
    return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}

}  // extern "C"
