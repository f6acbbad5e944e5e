// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "sinkhorn/sinkhorn.inl"

namespace kdfast {
extern const SinkhornKernels KDFAST_UNIT(sinkhorn);
const SinkhornKernels KDFAST_UNIT(sinkhorn) = {
    .sinkhorn_workspace = sinkhorn_workspace<float>,
    .sinkhorn_workspace_double = sinkhorn_workspace<double>,
    .sinkhorn_solve = sinkhorn_solve<float>,
    .sinkhorn_solve_double = sinkhorn_solve<double>,
};
}  // namespace kdfast
