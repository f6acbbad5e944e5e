// What the distillation kernels are given: plain pointers, 64-bit sizes, no torch.
#pragma once

#include "similarity/pairs.h"
#include "similarity/similarity.h"

namespace kdfast {

// One call, a batch of one: N rows of a student and of a teacher, each over its own bank of M keys. Both sides admit the same columns and
// may have a start candidate, of which only the logit counts. `student` and `teacher` hold the same exclusions; teacher.keys may be
// student.keys.
struct DistillationParams {
  SimilarityParams student, teacher;
  bool kl;            // the loss is KL, not the cross-entropy of the student's softmax under the teacher's
  float* loss;        // [rows]
  float* difference;  // [rows, width]: sum_j (p^S_ij - p^T_ij) k^S_j
  float* log_sums;    // [5, rows]: lse of the student, the digits it has no room for, the same of the teacher; p^S - p^T of the start
  float* teacher_slopes;  // [rows]: t dloss/dt, of the teacher's scale and its start's logit together; null: not wanted
  float* dkeys;       // [columns, width]: for kept_distillation alone; null: not wanted
  float* table;       // [rows, columns], p^S - p^T times the factors: for kept_distillation alone; null: not wanted
  const float* factors;  // [rows], of the losses' gradients: for kept_distillation alone; null: 1
};

// Pairs whose scores are kept from the mean of the losses to the gradients: few_pairs on both sides. Fewer rows or keys yet are multiplied
// where they lie.
inline bool few_distilled_pairs(int64_t rows, int64_t columns, int64_t width, int64_t teacher_width) {
  return rows > 8 && columns > 16 && few_pairs(rows, columns, width) && few_pairs(rows, columns, teacher_width);
}

// The side with the wider rows, which say in what form blocks of both are packed.
inline const SimilarityParams& wider_side(const DistillationParams& p) { return p.teacher.width > p.student.width ? p.teacher : p.student; }

// A rectangle, computed by one thread. finish: it spans every column, and the call's outputs are written. Otherwise `statistics` and
// `pooled` are, for distillation_merge.
struct DistillationTask {
  int64_t row_begin, row_end;
  int64_t column_begin, column_end;
  bool start;         // this column range also takes the start candidates
  bool finish;
  float* statistics;  // [row_end - row_begin][kDistillationStatistics]
  float* pooled;      // [row_end - row_begin][2][pooled_stride]: unnormalised, student's and teacher's
  int64_t pooled_stride;
};

// Student's maximum in two floats and sum, the same of the teacher, excess, depth and covariance (distillation.inl).
constexpr int64_t kDistillationStatistics = 9;

// Rows `begin` to `end` of the call from their parts, [parts][part_stride rows] of what a task writes. Part 0 is overwritten.
struct DistillationMerge {
  int64_t parts, part_stride, begin, end;
  float* statistics;
  float* pooled;
  int64_t pooled_stride;
};

// The gradient in keys [key_begin, key_end), computed by one thread.
struct DistillationGradTask {
  int64_t key_begin, key_end;
  const float* g;         // [rows], upstream of loss
  const float* log_sums;  // [5, rows], as the forward pass left them
  float* dkeys;           // [columns, width]: sum_i g_i s_i (p^S_ij - p^T_ij) q_i
};

// One instruction set's.
struct DistillationKernels {
  int64_t (*distillation_workspace)(const DistillationParams&, int64_t rows, int64_t columns);  // floats, for tasks up to this size
  void (*distillation)(const DistillationParams&, const DistillationTask&, float* workspace);
  void (*distillation_merge)(const DistillationParams&, const DistillationMerge&);
  int64_t (*distillation_grad_workspace)(const DistillationParams&, int64_t keys);  // floats, for tasks up to this size
  void (*distillation_grad)(const DistillationParams&, const DistillationGradTask&, float* workspace);
  int64_t (*kept_distillation_workspace)(const DistillationParams&);
  // Of few_distilled_pairs, all of the call. `between` is called with the losses known, before their factors are read.
  void (*kept_distillation)(const DistillationParams&, const Step& between, float* workspace);
};

}  // namespace kdfast
