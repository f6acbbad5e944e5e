// What the gradient of a softmax's pooled output is given: plain pointers, 64-bit sizes, no torch.
#pragma once

#include "similarity/large_shares.h"
#include "similarity/similarity.h"

namespace kdfast {

// With p_ij = exp(z_ij - lse_i - lse_low_i), v the values, or the keys where none are given, and w_ij = h_i.v_j, a logit's gradient is
// dz_ij = p_ij (g_i + w_ij - mean_i), mean_i = sum_j p_ij w_ij. h_i.pooled_i, which stands for that mean meanwhile, is off by the w's
// rounding errors and its own.
struct PooledUpstream {
  const float* g;              // [batch, rows]; null: 0
  Matrix h;                    // floats [batch, rows, pooled_width]; null: 0
  const float* pooled;         // [batch, rows, pooled_width]
  const float *lse, *lse_low;  // [batch, rows]
};

// What a rectangle's sums are added to, or with `begins` are the first of. Whole arrays; null: not wanted.
struct PooledSums {
  float* rows;     // [batch, rows, width]: sum_j dz_ij k_j
  float* dkeys;    // [batch, columns, width]: sum_i dz_ij s_i q_i, and, where the keys are the values, sum_i p_ij h_i
  float* dbias;    // [batch, columns]: sum_i dz_ij
  float* dvalues;  // [batch, columns, pooled_width]: sum_i p_ij h_i

  // [batch, rows], where any but dvalues is wanted: the stand-in for the mean (written), sum_j p_ij, sum_j p_ij (w_ij - mean_i), and the large
  // shares
  float *mean, *mass, *total;
  LargeShares large;

  bool by_slopes() const { return rows != nullptr || dkeys != nullptr || dbias != nullptr; }
};

// A rectangle of one batch entry, computed by one thread.
struct PooledGradTask {
  PooledUpstream upstream;
  int64_t batch;
  int64_t row_begin, row_end;
  int64_t column_begin, column_end;
  PooledSums sums;
  bool begins;
};

// Once all of a row is in its sums, of which there are `parts` copies, each as long as the array: their total, the mean as it is, and what
// it was off by taken out of the sums.
struct PooledFinish {
  PooledSums sums;  // dkeys, dbias: null as there
  int64_t parts;
  const float *start_weight, *start_slope;  // [batch, rows]: the start's p and its w; null: no start, 0
  bool scaled;                              // rows become sum_j dz_ij s_i k_j
  const float* key_mean;                    // [batch, rows, width], sum_j p_ij k_j; null: not known
  float* rows;                              // [batch, rows, width], may be the first copy; null: not wanted
  float* mean;                              // [batch, rows], may be the first copy
};

// One instruction set's.
struct PooledKernels {
  int64_t (*pooled_grad_workspace)(const SimilarityParams&, const PooledGradTask& like, int64_t rows, int64_t columns);
  void (*pooled_grad)(const SimilarityParams&, const PooledGradTask&, float* workspace);
  void (*pooled_finish_rows)(const SimilarityParams&, const PooledFinish&, int64_t begin, int64_t end);  // of [batch rows]
  void (*pooled_finish_keys)(const SimilarityParams&, const PooledFinish&, int64_t batch, int64_t begin, int64_t end);
};

}  // namespace kdfast
