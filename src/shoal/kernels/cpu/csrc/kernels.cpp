// One instruction set's kernels: compiled once for each, with its flags and SHOAL_TABLE as name.
#include "layers.h"
#include "noise.h"

#define SHOAL_STRING(x) #x
#define SHOAL_NAME(x) SHOAL_STRING(x)
#define SHOAL_JOIN(a, b) a##b
#define SHOAL_SYMBOL(x) SHOAL_JOIN(kTable_, x)

namespace shoal {
extern const KernelTable SHOAL_SYMBOL(SHOAL_TABLE);
const KernelTable SHOAL_SYMBOL(SHOAL_TABLE) = {SHOAL_NAME(SHOAL_TABLE), forward, experts, linear,
                                               add_gumbel, input_bytes, plan};
} // namespace shoal
