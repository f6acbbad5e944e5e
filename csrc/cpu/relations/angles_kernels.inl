// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "relations/angles.inl"

namespace kdfast {
extern const AnglesKernels KDFAST_UNIT(angles);
const AnglesKernels KDFAST_UNIT(angles) = {
    .angle_unit = angle_unit,
    .angle_distances_workspace = angle_distances_workspace,
    .angle_distances = angle_distances,
    .angle_workspace = angle_workspace,
    .angle_losses = angle_losses,
    .angle_gradient_lanes = angle_gradient_lanes,
    .angle_gradient_workspace = angle_gradient_workspace,
    .angle_gradient = angle_gradient,
};
}  // namespace kdfast
