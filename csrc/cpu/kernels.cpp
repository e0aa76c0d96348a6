// All kernels of one ISA level (PARA_ISA: v2, v3, v4 of x86-64, or plain). The only file built with ISA flags: it
// includes the C headers and ours alone, so that no inline function of a library ends up in the program at a level
// that the machine may not have.
#include "kernels.h"

#include "cores-inl.h"
#include "svd-inl.h"
#include "truncate-inl.h"

#define PARA_STRING(x) #x
#define PARA_NAME(x) PARA_STRING(x)

namespace para {
namespace PARA_ISA {

extern const Kernels kernels;
const Kernels kernels = {PARA_NAME(PARA_ISA), cores_scratch, cores, LANES, svd_width, svd_scratch, svd,
                         truncate_scratch,    truncate};

}  // namespace PARA_ISA
}  // namespace para
