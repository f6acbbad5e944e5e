// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "sinkhorn/sinkhorn_plan.inl"
#include "sinkhorn/sinkhorn_product.inl"
#include "sinkhorn/sinkhorn_pull.inl"
#include "sinkhorn/sinkhorn_replay_problem.inl"

namespace kdfast {
extern const SinkhornGradientKernels KDFAST_UNIT(sinkhorn_gradient);
const SinkhornGradientKernels KDFAST_UNIT(sinkhorn_gradient) = {
    .sinkhorn_plan_workspace = sinkhorn_plan_workspace<float>,
    .sinkhorn_plan_workspace_double = sinkhorn_plan_workspace<double>,
    .sinkhorn_plan = sinkhorn_plan<float>,
    .sinkhorn_plan_double = sinkhorn_plan<double>,
    .sinkhorn_pull_workspace = sinkhorn_pull_workspace<float>,
    .sinkhorn_pull_workspace_double = sinkhorn_pull_workspace<double>,
    .sinkhorn_pull = sinkhorn_pull<float>,
    .sinkhorn_pull_double = sinkhorn_pull<double>,
    .sinkhorn_product_workspace = sinkhorn_product_workspace<float>,
    .sinkhorn_product_workspace_double = sinkhorn_product_workspace<double>,
    .sinkhorn_product = sinkhorn_product<float>,
    .sinkhorn_product_double = sinkhorn_product<double>,
    .sinkhorn_replay_workspace = sinkhorn_replay_workspace<float>,
    .sinkhorn_replay_workspace_double = sinkhorn_replay_workspace<double>,
    .sinkhorn_replay = sinkhorn_replay<float>,
    .sinkhorn_replay_double = sinkhorn_replay<double>,
};
}  // namespace kdfast
