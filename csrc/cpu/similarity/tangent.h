// What the pass of a second derivative is given: plain pointers, 64-bit sizes, no torch.
#pragma once

#include "similarity/large_shares.h"
#include "similarity/pairs.h"
#include "similarity/similarity.h"

namespace kdfast {

// Along a direction e of the queries and kappa of the keys the logits move at rate_ij = e_i.k_j + s_i q_i.kappa_j, with p as in a gradient.
// Whole arrays.
struct TangentUpstream {
  Matrix direction;            // e [batch, rows, width]
  Matrix keys_direction;       // kappa [batch, columns, width]; not given: 0
  int64_t keys_direction_batch_stride;
  const float* slope;          // [batch, rows], minus the mean rate
  const float *lse, *lse_low;  // [batch, rows]
  const float *of_rate, *of_weight;  // [batch, rows], f and g below; for the keys' sums alone
};

// Sums, which a rectangle's are added to. Whole arrays.
struct TangentSums {
  float* rows;           // [batch, rows, width]: sum_j p_ij (rate_ij + slope_i) k_j
  float *mass, *total;   // [batch, rows]: sum_j p_ij, sum_j p_ij (rate_ij + slope_i)
  float* keys;           // [batch, columns, width]: sum_i p_ij ((f_i (rate_ij + slope_i) + g_i) s_i q_i + f_i e_i); null: not wanted
  LargeShares large;     // where keys are wanted: those of all rows
};

// One instruction set's.
struct TangentKernels {
  int64_t (*tangent_workspace)(const SimilarityParams&, const TangentUpstream&, const TangentSums&, int64_t rows, int64_t columns);  // floats
  void (*tangent)(const SimilarityParams&, const PairTask&, const TangentUpstream&, const TangentSums&, float* workspace);
  // Once all rows are through: takes off keys `begin` .. `end` of a batch entry what f_i (rate_ij + slope_i) has too much of, off [batch, rows].
  void (*tangent_finish_keys)(const SimilarityParams&, const TangentSums&, const float* off, int64_t batch, int64_t begin, int64_t end);
};

}  // namespace kdfast
