// The CPU kernels of one instruction set, as function pointers. No C++ library: isa_*.cpp include this.
#pragma once

#include "similarity/distillation.h"
#include "gather/gather.h"
#include "similarity/info_nce.h"
#include "similarity/matching.h"
#include "knn/knn.h"
#include "similarity/pairs.h"
#include "relations/angles.h"
#include "relations/pair_sums.h"
#include "similarity/similarity.h"
#include "sinkhorn/sinkhorn.h"
#include "triplet/chosen.h"
#include "triplet/dense.h"
#include "triplet/mining.h"

// Compilers that know AMX, and the system that lends its registers.
#if defined(__x86_64__) && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define KDFAST_HAS_AMX 1
#else
#define KDFAST_HAS_AMX 0
#endif

namespace kdfast {

struct CpuKernels {
  const char* isa;
  int64_t (*similarity_workspace)(const SimilarityParams&, int64_t rows, int64_t columns);  // floats, for tasks up to this size
  void (*similarity)(const SimilarityParams&, const SimilarityTask&, float* workspace);
  void (*similarity_merge)(const SimilarityMerge&);
  int64_t (*similarity_grad_workspace)(const SimilarityParams&, const SimilarityGradTask& like, int64_t keys);
  void (*similarity_grad)(const SimilarityParams&, const SimilarityGradTask&, float* workspace);
  int64_t (*similarity_grad_rows_workspace)(const SimilarityParams&, const SimilarityGradRowsTask& like, int64_t rows, int64_t columns);
  void (*similarity_grad_rows)(const SimilarityParams&, const SimilarityGradRowsTask&, float* workspace);
  void (*info_nce_rows)(const InfoNceParams&, const InfoNceRows&);
  void (*info_nce_grad_rows)(const InfoNceParams&, const InfoNceGradients&, int64_t begin, int64_t end);
  void (*info_nce_grad_candidates)(const InfoNceParams&, const InfoNceGradients&);
  int64_t (*distillation_workspace)(const DistillationParams&, int64_t rows, int64_t columns);  // floats, for tasks up to this size
  void (*distillation)(const DistillationParams&, const DistillationTask&, float* workspace);
  void (*distillation_merge)(const DistillationParams&, const DistillationMerge&);
  int64_t (*distillation_grad_workspace)(const DistillationParams&, int64_t keys);  // floats, for tasks up to this size
  void (*distillation_grad)(const DistillationParams&, const DistillationGradTask&, float* workspace);
  int64_t (*symmetric_workspace)(const PairParams&, int64_t rows, int64_t columns);  // floats, for tasks up to this size
  void (*symmetric)(const PairParams&, const PairTask&, const SymmetricStatistics&, float* workspace);
  int64_t (*symmetric_grad_workspace)(const PairParams&, const PairSums&, int64_t rows, int64_t columns);
  void (*symmetric_grad)(const PairParams&, const PairTask&, const SymmetricUpstream&, const PairSums&, float* workspace);
  int64_t (*sigmoid_workspace)(const PairParams&, int64_t rows, int64_t columns);
  void (*sigmoid)(const PairParams&, const PairTask&, float* loss, float* workspace);  // loss [task rows]
  int64_t (*sigmoid_grad_workspace)(const PairParams&, const PairSums&, int64_t rows, int64_t columns);
  void (*sigmoid_grad)(const PairParams&, const PairTask&, const float* g, const PairSums&, float* workspace);  // g [batch, rows]
  void (*matching_losses)(const Matching&, const MatchingLosses&);
  void (*matching_gradients)(const Matching&, const MatchingGradients&, int64_t begin, int64_t end);
  // Items begin .. end: of the N K scores, of the N rows. False: an index was outside the bank.
  bool (*gather_similarity)(const GatherParams&, int64_t begin, int64_t end);
  bool (*gather_weighted_sum)(const GatherParams&, int64_t begin, int64_t end);
  // The statistic of one row of scores, which become weights; and of rows begin .. end with their weighted sums.
  void (*gather_row_statistic)(const GatherParams&, const RowStatistic&, int64_t row, float* scores, int64_t positive);
  bool (*gather_statistic)(const GatherParams&, const RowStatistic&, int64_t begin, int64_t end, float* scores);
  int64_t (*gather_block)(const GatherParams&);  // bank rows in a block, 0 where single rows are faster
  int64_t (*gather_blocks_workspace)(const GatherParams&, const GatherBlocks&);  // floats
  // Blocks first .. last: scores added to the samples' values; the sums of their samples into sums [rows, width].
  void (*gather_blocks_scores)(const GatherParams&, const GatherBlocks&, int64_t first, int64_t last, float* workspace);
  void (*gather_blocks_sums)(const GatherParams&, const GatherBlocks&, int64_t first, int64_t last, float* workspace, float* sums);
  int64_t (*gather_scatter_workspace)(const ScatterParams&);  // floats
  void (*gather_scatter)(const ScatterParams&, int64_t first, int64_t last, float* workspace);  // blocks first .. last
  // Elements of workspace for problems up to this size; the solution of one.
  int64_t (*sinkhorn_workspace)(const SinkhornProblem<float>&, const SinkhornSchedule&, int64_t workers);
  int64_t (*sinkhorn_workspace_double)(const SinkhornProblem<double>&, const SinkhornSchedule&, int64_t workers);
  void (*sinkhorn_solve)(const SinkhornProblem<float>&, const SinkhornSchedule&, const SinkhornTeam&, const SinkhornSolution<float>&, float* workspace);
  void (*sinkhorn_solve_double)(const SinkhornProblem<double>&, const SinkhornSchedule&, const SinkhornTeam&, const SinkhornSolution<double>&, double* workspace);
  int64_t (*sinkhorn_plan_workspace)(const SinkhornProblem<float>&);
  int64_t (*sinkhorn_plan_workspace_double)(const SinkhornProblem<double>&);
  void (*sinkhorn_plan)(const SinkhornProblem<float>&, const SinkhornPlan<float>&, float* workspace);
  void (*sinkhorn_plan_double)(const SinkhornProblem<double>&, const SinkhornPlan<double>&, double* workspace);
  int64_t (*sinkhorn_replay_workspace)(const SinkhornProblem<float>&, int64_t workers);
  int64_t (*sinkhorn_replay_workspace_double)(const SinkhornProblem<double>&, int64_t workers);
  void (*sinkhorn_replay)(const SinkhornProblem<float>&, const SinkhornReplay<float>&, const SinkhornTeam&, float* workspace);
  void (*sinkhorn_replay_double)(const SinkhornProblem<double>&, const SinkhornReplay<double>&, const SinkhornTeam&, double* workspace);
  int64_t (*sinkhorn_assign_workspace)(const SinkhornAssign<float>&);
  int64_t (*sinkhorn_assign_workspace_double)(const SinkhornAssign<double>&);
  void (*sinkhorn_assign)(const SinkhornAssign<float>&, float* workspace);
  void (*sinkhorn_assign_double)(const SinkhornAssign<double>&, double* workspace);
  int64_t (*sinkhorn_normalize_workspace)(const SinkhornNormalize<float>&);
  int64_t (*sinkhorn_normalize_workspace_double)(const SinkhornNormalize<double>&);
  void (*sinkhorn_normalize)(const SinkhornNormalize<float>&, int64_t begin, int64_t end, float* workspace);  // matrices
  void (*sinkhorn_normalize_double)(const SinkhornNormalize<double>&, int64_t begin, int64_t end, double* workspace);
  double (*angle_unit)(const Matrix& x, int64_t rows, int64_t width);
  int64_t (*angle_distances_workspace)(int64_t width);  // floats
  // Rows `first` and on, kAngleBlock of them, of one side's squared distances, in units of `unit`.
  void (*angle_distances)(const AngleParams&, const Matrix& x, int64_t width, int64_t first, double unit, const AngleDistances&, float* workspace);
  int64_t (*angle_workspace)();  // floats
  double (*angle_losses)(const AngleParams&, int64_t j0, int64_t k0, float* workspace);  // between two blocks
  int64_t (*angle_gradient_lanes)();                                                      // rows of a call
  int64_t (*angle_gradient_workspace)(const AngleParams&);                                // floats
  void (*angle_gradient)(const AngleParams&, const Matrix& x, int64_t width, int64_t first, float factor, float* out, float* workspace);
  void (*row_squares)(const float* x, int64_t rows, int64_t width, float* to);
  int64_t (*pair_sums_workspace)(const PairSumParams&, bool gradient, int64_t rows);  // floats, for calls of at most so many rows
  void (*pair_gaussians)(const PairSumParams&, int64_t count, const float* rate, const float* weight, const PairResults&, int64_t begin,
                         int64_t end, float* workspace);
  void (*pair_distances)(const PairSumParams&, const PairResults&, int64_t begin, int64_t end, float* workspace);
  void (*pair_distance_losses)(const PairSumParams&, float inverse_mean, float teacher_inverse_mean, const PairResults&, int64_t begin,
                               int64_t end, float* workspace);
  int64_t (*knn_workspace)(const KnnScanParams&, int64_t rows);  // floats, for tasks up to this size
  void (*knn_scan)(const KnnScanParams&, int64_t begin, int64_t end, float* workspace);
  void (*knn_refine)(const KnnRefineParams&, int64_t begin, int64_t end);
  void (*row_scales)(const MetricRows&, int64_t begin, int64_t end, float* scale);
  int64_t (*triplet_extrema_workspace)(const ExtremaParams&, int64_t rows);  // floats, for tasks up to this size
  void (*triplet_extrema)(const ExtremaParams&, int64_t begin, int64_t end, float* workspace);  // of the sequence
  int64_t (*triplet_facenet_workspace)(const PairsParams&, int64_t rows);
  void (*triplet_facenet)(const PairsParams&, int64_t begin, int64_t end, float* workspace);
  int64_t (*triplet_weighted_workspace)(const WeightedParams&, int64_t rows);
  void (*triplet_weighted)(const WeightedParams&, int64_t begin, int64_t end, float* workspace);
  void (*triplet_chosen)(const ChosenParams&, const ChosenLosses&, int64_t begin, int64_t end);  // anchors
  void (*triplet_chosen_grad_x)(const ChosenParams&, const ChosenGradients&, int64_t begin, int64_t end);
  void (*triplet_chosen_grad_y)(const ChosenParams&, const ChosenGradients&, int64_t begin, int64_t end, bool* touched);
  // Losses over all negatives; rows, or columns, begin .. end.
  void (*dense_squares)(const float* x, int64_t width, int64_t begin, int64_t end, float* square);
  void (*dense_positives)(const DenseParams&, int64_t begin, int64_t end);
  void (*dense_finish_rows)(const DenseParams&, const float* pull, const double* weight, float* sums, int64_t begin, int64_t end);
  void (*dense_finish_columns)(const DenseParams&, const float* pull, double* weight, float* sums, int64_t begin, int64_t end);
  int64_t (*triplet_hinges_workspace)(const DenseParams&, int64_t rows, int64_t slots);  // floats, for tasks up to this size
  void (*triplet_hinges)(const DenseParams&, const HingeRule&, const HingeResult&, int64_t begin, int64_t end, float* workspace);
  int64_t (*triplet_hinges_grad_workspace)(const DenseParams&, const PairSums&, int64_t rows, int64_t columns, int64_t most);
  void (*triplet_hinges_grad)(const DenseParams&, const HingeRule&, const HingeUpstream&, const PairTask&, const PairSums&, int64_t most,
                              float* workspace);
  int64_t (*sorted_hinges_workspace)(const DenseParams&, int64_t rows, int64_t most);
  void (*sorted_hinges)(const DenseParams&, const HingeRule&, const HingeResult&, int64_t begin, int64_t end, int64_t most, float* workspace);
  int64_t (*sorted_hinges_grad_workspace)(const DenseParams&, const PairSums&, int64_t rows, int64_t most);
  void (*sorted_hinges_grad)(const DenseParams&, const HingeRule&, const HingeUpstream&, const PairSums&, int64_t begin, int64_t end,
                             int64_t most, float* workspace);
  void (*triplet_hinges_pull)(const DenseParams&, const HingeRule&, const HingeUpstream&, float* pull, int64_t begin, int64_t end);
  void (*pull_hinges)(const DenseParams&, const PullHinges&, int64_t begin, int64_t end);
  void (*pull_hinges_pull)(const DenseParams&, const float* level, const float* g, float* pull, int64_t begin, int64_t end);
  int64_t (*multi_similarity_workspace)(const DenseParams&, int64_t rows);
  void (*multi_similarity)(const DenseParams&, const MultiSimilarityRule&, const MultiSimilarityResult&, int64_t begin, int64_t end,
                           float* workspace);
  int64_t (*multi_similarity_grad_workspace)(const DenseParams&, const PairSums&, int64_t rows, int64_t columns);
  void (*multi_similarity_grad)(const DenseParams&, const MultiSimilarityRule&, const MultiSimilarityUpstream&, const PairTask&,
                                const PairSums&, float* workspace);
  void (*multi_similarity_pull)(const DenseParams&, const MultiSimilarityRule&, const MultiSimilarityUpstream&, float* pull, int64_t begin,
                                int64_t end);
  double (*fma_probe)(bool bfloat16, int64_t steps);  // returns the operations done
};

}  // namespace kdfast
