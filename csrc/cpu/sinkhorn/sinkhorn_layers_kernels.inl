// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "sinkhorn/sinkhorn_layers.inl"

namespace kdfast {
extern const SinkhornLayersKernels KDFAST_UNIT(sinkhorn_layers);
const SinkhornLayersKernels KDFAST_UNIT(sinkhorn_layers) = {
    .sinkhorn_assign_workspace = sinkhorn_assign_workspace<float>,
    .sinkhorn_assign_workspace_double = sinkhorn_assign_workspace<double>,
    .sinkhorn_assign = sinkhorn_assign<float>,
    .sinkhorn_assign_double = sinkhorn_assign<double>,
    .sinkhorn_normalize_workspace = sinkhorn_normalize_workspace<float>,
    .sinkhorn_normalize_workspace_double = sinkhorn_normalize_workspace<double>,
    .sinkhorn_normalize = sinkhorn_normalize<float>,
    .sinkhorn_normalize_double = sinkhorn_normalize<double>,
};
}  // namespace kdfast
