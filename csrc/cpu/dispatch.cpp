// Which ISA levels were built in and which of them this machine runs.
#include "kernels.h"

namespace para {

#ifdef PARA_X86_LEVELS
namespace v2 {
extern const Kernels kernels;
}
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}
#endif
namespace plain {
extern const Kernels kernels;
}

const Kernels* const* available_kernels(int& count) {
    static const Kernels* found[4];
    static const int found_count = [] {
        int n = 0;
#ifdef PARA_X86_LEVELS
        __builtin_cpu_init();
        const bool has_v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
        const bool has_v3 =
            has_v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
        const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512cd");
        if (has_v4) found[n++] = &v4::kernels;
        if (has_v3) found[n++] = &v3::kernels;
        if (has_v2) found[n++] = &v2::kernels;
#endif
        found[n++] = &plain::kernels;
        return n;
    }();
    count = found_count;
    return found;
}

}  // namespace para
