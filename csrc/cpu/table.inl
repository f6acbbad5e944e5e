// One instruction set's row of the dispatch table; KDFAST_ISA is its name.
#pragma once

#include "similarity/distillation.inl"
#include "similarity/distillation_grad.inl"
#include "gather/gather_blocks.inl"
#include "gather/gather_scatter.inl"
#include "gather/gather_statistic.inl"
#include "similarity/info_nce.inl"
#include "knn/knn.inl"
#include "engine/probe.inl"
#include "relations/angles.inl"
#include "relations/pair_sums.inl"
#include "similarity/sigmoid.inl"
#include "similarity/similarity.inl"
#include "similarity/similarity_grad.inl"
#include "similarity/similarity_grad_rows.inl"
#include "sinkhorn/sinkhorn.inl"
#include "sinkhorn/sinkhorn_layers.inl"
#include "sinkhorn/sinkhorn_plan.inl"
#include "sinkhorn/sinkhorn_replay.inl"
#include "similarity/matching.inl"
#include "similarity/symmetric.inl"
#include "triplet/chosen.inl"
#include "triplet/dense_sorted.inl"
#include "triplet/extrema.inl"
#include "triplet/facenet.inl"
#include "triplet/multi_similarity.inl"
#include "triplet/weighted.inl"

#define KDFAST_PASTE_(a, b) a##b
#define KDFAST_PASTE(a, b) KDFAST_PASTE_(a, b)
#define KDFAST_QUOTE_(a) #a
#define KDFAST_QUOTE(a) KDFAST_QUOTE_(a)

namespace kdfast {
extern const CpuKernels KDFAST_PASTE(kernels_, KDFAST_ISA);
const CpuKernels KDFAST_PASTE(kernels_, KDFAST_ISA) = {
    .isa = KDFAST_QUOTE(KDFAST_ISA),
    .similarity_workspace = similarity_workspace,
    .similarity = similarity,
    .similarity_merge = similarity_merge,
    .similarity_grad_workspace = similarity_grad_workspace,
    .similarity_grad = similarity_grad,
    .similarity_grad_rows_workspace = similarity_grad_rows_workspace,
    .similarity_grad_rows = similarity_grad_rows,
    .info_nce_rows = info_nce_rows,
    .info_nce_grad_rows = info_nce_grad_rows,
    .info_nce_grad_candidates = info_nce_grad_candidates,
    .distillation_workspace = distillation_workspace,
    .distillation = distillation,
    .distillation_merge = distillation_merge,
    .distillation_grad_workspace = distillation_grad_workspace,
    .distillation_grad = distillation_grad,
    .symmetric_workspace = symmetric_workspace,
    .symmetric = symmetric,
    .symmetric_grad_workspace = symmetric_grad_workspace,
    .symmetric_grad = symmetric_grad,
    .sigmoid_workspace = sigmoid_workspace,
    .sigmoid = sigmoid,
    .sigmoid_grad_workspace = sigmoid_grad_workspace,
    .sigmoid_grad = sigmoid_grad,
    .matching_losses = matching_losses,
    .matching_gradients = matching_gradients,
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
    .sinkhorn_workspace = sinkhorn_workspace<float>,
    .sinkhorn_workspace_double = sinkhorn_workspace<double>,
    .sinkhorn_solve = sinkhorn_solve<float>,
    .sinkhorn_solve_double = sinkhorn_solve<double>,
    .sinkhorn_plan_workspace = sinkhorn_plan_workspace<float>,
    .sinkhorn_plan_workspace_double = sinkhorn_plan_workspace<double>,
    .sinkhorn_plan = sinkhorn_plan<float>,
    .sinkhorn_plan_double = sinkhorn_plan<double>,
    .sinkhorn_replay_workspace = sinkhorn_replay_workspace<float>,
    .sinkhorn_replay_workspace_double = sinkhorn_replay_workspace<double>,
    .sinkhorn_replay = sinkhorn_replay<float>,
    .sinkhorn_replay_double = sinkhorn_replay<double>,
    .sinkhorn_assign_workspace = sinkhorn_assign_workspace<float>,
    .sinkhorn_assign_workspace_double = sinkhorn_assign_workspace<double>,
    .sinkhorn_assign = sinkhorn_assign<float>,
    .sinkhorn_assign_double = sinkhorn_assign<double>,
    .sinkhorn_normalize_workspace = sinkhorn_normalize_workspace<float>,
    .sinkhorn_normalize_workspace_double = sinkhorn_normalize_workspace<double>,
    .sinkhorn_normalize = sinkhorn_normalize<float>,
    .sinkhorn_normalize_double = sinkhorn_normalize<double>,
    .angle_unit = angle_unit,
    .angle_distances_workspace = angle_distances_workspace,
    .angle_distances = angle_distances,
    .angle_workspace = angle_workspace,
    .angle_losses = angle_losses,
    .angle_gradient_lanes = angle_gradient_lanes,
    .angle_gradient_workspace = angle_gradient_workspace,
    .angle_gradient = angle_gradient,
    .row_squares = row_squares,
    .pair_sums_workspace = pair_sums_workspace,
    .pair_gaussians = pair_gaussians,
    .pair_distances = pair_distances,
    .pair_distance_losses = pair_distance_losses,
    .knn_workspace = knn_workspace,
    .knn_scan = knn_scan,
    .knn_refine = knn_refine,
    .row_scales = row_scales,
    .triplet_extrema_workspace = triplet_extrema_workspace,
    .triplet_extrema = triplet_extrema,
    .triplet_facenet_workspace = triplet_facenet_workspace,
    .triplet_facenet = triplet_facenet,
    .triplet_weighted_workspace = triplet_weighted_workspace,
    .triplet_weighted = triplet_weighted,
    .triplet_chosen = triplet_chosen,
    .triplet_chosen_grad_x = triplet_chosen_grad_x,
    .triplet_chosen_grad_y = triplet_chosen_grad_y,
    .dense_squares = dense_squares,
    .dense_positives = dense_positives,
    .dense_finish_rows = dense_finish_rows,
    .dense_finish_columns = dense_finish_columns,
    .triplet_hinges_workspace = triplet_hinges_workspace,
    .triplet_hinges = triplet_hinges,
    .triplet_hinges_grad_workspace = triplet_hinges_grad_workspace,
    .triplet_hinges_grad = triplet_hinges_grad,
    .sorted_hinges_workspace = sorted_hinges_workspace,
    .sorted_hinges = sorted_hinges,
    .sorted_hinges_grad_workspace = sorted_hinges_grad_workspace,
    .sorted_hinges_grad = sorted_hinges_grad,
    .triplet_hinges_pull = triplet_hinges_pull,
    .pull_hinges = pull_hinges,
    .pull_hinges_pull = pull_hinges_pull,
    .multi_similarity_workspace = multi_similarity_workspace,
    .multi_similarity = multi_similarity,
    .multi_similarity_grad_workspace = multi_similarity_grad_workspace,
    .multi_similarity_grad = multi_similarity_grad,
    .multi_similarity_pull = multi_similarity_pull,
    .fma_probe = fma_probe,
};
}  // namespace kdfast
