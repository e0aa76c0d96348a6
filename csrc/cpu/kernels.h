// The kernels of one ISA level behind one table, and who picks it. kernels.cpp is compiled once per level.
#pragma once

#include "../problem.h"

namespace para {

struct Kernels {
    const char* isa;
    int64_t (*cores_scratch)(const Problem&);
    int (*cores)(const Problem&, double* scratch);
    int64_t lanes;  // cores per call of svd
    int64_t (*svd_width)(int64_t r);
    int64_t (*svd_scratch)(int64_t width);
    void (*svd)(const Core* cores, const int64_t* r, int64_t count, int64_t width, double* scratch, int32_t* sweeps);
    int64_t (*truncate_scratch)(const Problem&);
    Certificate (*truncate)(const Problem&, double* scratch);
};

// The levels built in that this machine can run, best first; never empty. `count` receives how many.
const Kernels* const* available_kernels(int& count);

}  // namespace para
