// What the second derivative of a softmax's pooled output is given: plain pointers, 64-bit sizes, no torch.
#pragma once

#include "similarity/pairs.h"
#include "similarity/similarity.h"

namespace kdfast {

// With upstreams g of lse and h of the pooled output, along a direction e of the queries, kappa of the keys and nu of the values (of keys
// that are the values: kappa) the logits move at rate_ij = e_i.k_j + s_i q_i.kappa_j; slope_ij = h_i.v_j, eta_ij = h_i.nu_j. Whole arrays.
struct PooledTangent {
  const float* g;                   // [batch, rows]
  Matrix h;                         // floats [batch, rows, pooled_width]
  const float *lse, *lse_low;       // [batch, rows]
  Matrix direction;                 // e, floats [batch, rows, width]
  Matrix keys_direction;            // kappa [batch, columns, width]; not given: 0
  int64_t keys_direction_batch_stride;
  Matrix values_direction;          // nu [batch, columns, pooled_width], where values are given; not given: 0
  int64_t values_direction_batch_stride;
};

// Of a row's candidates, or some of them: what they weigh, and under these weights the means of rate, slope and eta and the covariance of
// rate and slope.
struct RowMoments {
  double mass, rate, slope, eta, covariance;
};

// What a rectangle's moments are merged into, and its sums, with all moments known, added to. With p_ij brought to a sum of 1, means taken
// off,
//   A_ij = p_ij ((g_i + slope_ij) rate_ij + eta_ij - covariance_i),   B_ij = p_ij (g_i + slope_ij).
// Whole arrays; null: not wanted.
struct PooledSecondSums {
  RowMoments* moments;  // [batch, rows]
  float* rows;          // [batch, rows, width]: sum_j A_ij k_j + B_ij kappa_j
  float* slopes;        // [batch, rows, width]: sum_j B_ij k_j
  float* pooled;        // [batch, rows, pooled_width]: sum_j p_ij rate_ij v_j + p_ij nu_j
  float* keys;          // [batch, columns, width]: sum_i A_ij s_i q_i + B_ij e_i, and, where the keys are the values, what values have
  float* values;        // [batch, columns, pooled_width]: sum_i p_ij rate_ij h_i
};

// Both from one tile, where a rectangle has all columns of its rows and these are few.
enum class PooledSecondPart { kMoments, kSums, kBoth };
constexpr int64_t kColumnsInOneTile = 512;

struct PooledSecondTask {
  PairTask rectangle;
  PooledSecondPart part;
};

// What is made of rows, once their sums are there. Null: not wanted, or 0 of what is given.
struct PooledSecondRows {
  Matrix query_direction;         // u [batch, rows, width]; not given: 0
  const float* scale_direction;   // sigma [batch, rows]
  float* direction;               // e = s u + sigma q, before the sums
  float *dg, *dquery, *dscale;    // [batch, rows], [batch, rows, width], [batch, rows]
};

// One instruction set's.
struct PooledSecondKernels {
  int64_t (*pooled_second_workspace)(const SimilarityParams&, const PooledTangent&, const PooledSecondSums&, int64_t rows, int64_t columns,
                                     PooledSecondPart);
  void (*pooled_second)(const SimilarityParams&, const PooledSecondTask&, const PooledTangent&, const PooledSecondSums&, float* workspace);
  void (*pooled_second_directions)(const SimilarityParams&, const PooledSecondRows&, int64_t begin, int64_t end);  // of [batch rows]
  void (*pooled_second_finish)(const SimilarityParams&, const PooledSecondSums&, const PooledSecondRows&, int64_t begin, int64_t end);
};

}  // namespace kdfast
