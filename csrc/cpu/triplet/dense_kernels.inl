// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "triplet/dense_pull.inl"
#include "triplet/dense_soft.inl"
#include "triplet/multi_similarity.inl"

namespace kdfast {
extern const DenseKernels KDFAST_UNIT(dense);
const DenseKernels KDFAST_UNIT(dense) = {
    .dense_squares = dense_squares,
    .dense_positives = dense_positives,
    .dense_mirror = dense_mirror,
    .dense_pull_workspace = dense_pull_workspace,
    .dense_pull = dense_pull,
    .dense_finish_rows = dense_finish_rows,
    .dense_finish_columns = dense_finish_columns,
    .triplet_hinges_workspace = triplet_hinges_workspace,
    .triplet_hinges = triplet_hinges,
    .triplet_hinges_grad_workspace = triplet_hinges_grad_workspace,
    .triplet_hinges_grad = triplet_hinges_grad,
    .hinge_filter_workspace = hinge_filter_workspace,
    .hinge_filter = hinge_filter,
    .sorted_hinges_workspace = sorted_hinges_workspace,
    .sorted_hinges = sorted_hinges,
    .soft_hinges_workspace = soft_hinges_workspace,
    .soft_hinges = soft_hinges,
    .triplet_hinges_pull = triplet_hinges_pull,
    .pull_hinges = pull_hinges,
    .pull_hinges_pull = pull_hinges_pull,
    .multi_similarity_workspace = multi_similarity_workspace,
    .multi_similarity = multi_similarity,
    .multi_similarity_grad_workspace = multi_similarity_grad_workspace,
    .multi_similarity_grad = multi_similarity_grad,
    .multi_similarity_pull = multi_similarity_pull,
};
}  // namespace kdfast
