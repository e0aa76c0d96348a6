// The seam: the only file that knows whether nvcc compiles the kernels or a C++ compiler, for tests/emulator.
//
// Kernels use CUDA's own words and what follows; <cuda_fp16.h>, cooperative groups and <<<>>> are not among them. They
// have external linkage (no unnamed namespace): the emulator reads their names from the symbol table.
//
//   PARA_DYNAMIC_SHARED(name)         unsigned char* name: the launch's dynamic shared memory, aligned to 16 bytes
//   PARA_SHARED(type, name, count)    type name[count] in shared memory; a bare __shared__ does not compile
//   read(global), write(global, x)    the only ways to touch global memory, whose bytes the emulator counts: one load
//                                     or store of up to 16 bytes, so the address is a multiple of their number
//   half_to_float, float_to_half, double_to_half    the bits of an fp16 number, rounded once, to nearest even
//   launch(kernel, grid, block, shared, stream, args...)    nullptr, or what went wrong
//   shared_limit(device)              bytes of shared memory a block may have on this device, 0 where there is none
//   unusable(device)                  nullptr, or why these kernels can't run there
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>

#ifdef PARA_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>

#define PARA_DYNAMIC_SHARED(name)                                               \
    extern __shared__ __align__(16) unsigned char para_dynamic_shared_memory[]; \
    unsigned char* const name = para_dynamic_shared_memory
#define PARA_SHARED(type, name, count) __shared__ type name[count]

namespace para::cuda {

using Stream = cudaStream_t;

template <class T>
__device__ __forceinline__ T read(const T* global) {
    static_assert(sizeof(T) <= 16, "wider than the widest load");
    __builtin_assume(__isGlobal(global));  // or the instruction would ask where it points
    return *global;
}

template <class T>
__device__ __forceinline__ void write(T* global, std::common_type_t<T> value) {
    static_assert(sizeof(T) <= 16, "wider than the widest store");
    __builtin_assume(__isGlobal(global));
    *global = value;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ uint16_t float_to_half(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ uint16_t double_to_half(double value) {
    uint16_t bits;
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(bits) : "d"(value));
    return bits;
}

inline size_t shared_limit(int device) {
    int bytes = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return error == cudaSuccess ? static_cast<size_t>(bytes) : 0;
}

inline const char* unusable(int device) {
    int major = 0, minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess) return 10 * major + minor < 75 ? "its compute capability is below 7.5" : nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}

// All of the device's shared memory for a kernel, whatever the launch needs: of two threads that launch at once, none
// may take from the other, and the limit without asking is 48 KB less what the kernel has statically.
inline cudaError_t allow_shared(const void* kernel) {
    int device = 0;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    const int most = static_cast<int>(shared_limit(device)) - static_cast<int>(attributes.sharedSizeBytes);
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

template <class... Parameters, class... Args>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream, Args&&... args) {
    const void* const function = reinterpret_cast<const void*>(kernel);
    cudaError_t error = allow_shared(function);
    if (error == cudaSuccess) {
        std::tuple<Parameters...> values(static_cast<Args&&>(args)...);
        error = std::apply(
            [&](auto&... value) {
                void* addresses[] = {&value..., nullptr};
                return cudaLaunchKernel(function, grid, block, addresses, shared, stream);
            },
            values);
    }
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // or the next call that asks, perhaps PyTorch's, is told of this error
    return cudaGetErrorString(error);
}

}  // namespace para::cuda
#endif
