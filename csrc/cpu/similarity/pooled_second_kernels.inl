// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "similarity/pooled_second.inl"

namespace kdfast {
extern const PooledSecondKernels KDFAST_UNIT(pooled_second);
const PooledSecondKernels KDFAST_UNIT(pooled_second) = {
    .pooled_second_workspace = pooled_second_workspace,
    .pooled_second = pooled_second,
    .pooled_second_directions = pooled_second_directions,
    .pooled_second_finish = pooled_second_finish,
};
}  // namespace kdfast
