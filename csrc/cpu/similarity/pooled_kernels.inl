// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "similarity/pooled_grad.inl"

namespace kdfast {
extern const PooledKernels KDFAST_UNIT(pooled);
const PooledKernels KDFAST_UNIT(pooled) = {
    .pooled_grad_workspace = pooled_grad_workspace,
    .pooled_grad = pooled_grad,
    .pooled_finish_rows = pooled_finish_rows,
    .pooled_finish_keys = pooled_finish_keys,
};
}  // namespace kdfast
