// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "distillation/distillation.inl"
#include "distillation/distillation_grad.inl"
#include "distillation/distillation_kept.inl"

namespace kdfast {
extern const DistillationKernels KDFAST_UNIT(distillation);
const DistillationKernels KDFAST_UNIT(distillation) = {
    .distillation_workspace = distillation_workspace,
    .distillation = distillation,
    .distillation_merge = distillation_merge,
    .distillation_grad_workspace = distillation_grad_workspace,
    .distillation_grad = distillation_grad,
    .kept_distillation_workspace = kept_distillation_workspace,
    .kept_distillation = kept_distillation,
};
}  // namespace kdfast
