// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "gather/gather_blocks.inl"
#include "gather/gather_scatter.inl"
#include "gather/gather_statistic.inl"

namespace kdfast {
extern const GatherKernels KDFAST_UNIT(gather);
const GatherKernels KDFAST_UNIT(gather) = {
    .gather_similarity = gather_similarity,
    .gather_weighted_sum = gather_weighted_sum,
    .gather_row_statistic = gather_row_statistic,
    .gather_statistic = gather_statistic,
    .gather_block = gather_block,
    .gather_blocks_workspace = gather_blocks_workspace,
    .gather_blocks_scores = gather_blocks_scores,
    .gather_blocks_sums = gather_blocks_sums,
    .gather_scatter_workspace = gather_scatter_workspace,
    .gather_scatter = gather_scatter,
};
}  // namespace kdfast
