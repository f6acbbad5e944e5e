// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "relations/pair_sums.inl"

namespace kdfast {
extern const PairSumsKernels KDFAST_UNIT(pair_sums);
const PairSumsKernels KDFAST_UNIT(pair_sums) = {
    .row_squares = row_squares,
    .pair_sums_workspace = pair_sums_workspace,
    .pair_gaussians = pair_gaussians,
    .pair_distances = pair_distances,
    .pair_distance_losses = pair_distance_losses,
};
}  // namespace kdfast
