// What the InfoNCE kernels are given: plain pointers, 64-bit sizes, no torch.
#pragma once

#include "engine/element.h"

namespace kdfast {

// One call: N rows with J positives each, beside the log-sum-exp of the row's negatives. Row-major and contiguous, except that
// batch strides may be 0. Null: not given.
struct InfoNceParams {
  int64_t batch, rows, positives, count, width;

  Matrix query;                     // [batch, rows, width]
  Matrix candidates;                // [batch, count, width], which the positives are among
  int64_t candidates_batch_stride;  // in elements
  const int64_t* columns;           // [batch, rows, positives]: which they are, -1 for none; null: i positives + j
  const float* bias;                // [batch, count], of their logits
  int64_t bias_batch_stride;
  const float* scale;    // [batch, rows]
  const float* weights;  // [batch, rows, positives]; null: 1 / positives each
};

// What the forward pass reads and writes of rows begin .. end of batch x rows.
struct InfoNceRows {
  int64_t begin, end;
  bool include_positive;
  const float *lse, *lse_low;  // [batch, rows]
  float* losses;     // [batch, rows]
  float* slopes;     // [batch, rows, positives]: -dloss / dlogit of a positive; their sum is dloss / dlse
  float* pull;       // [batch, rows, width]: sum_j p_ij k_j in, dloss / d(scale query) out; null: not wanted
  // [batch, rows], for info_nce_pull: sum_j p_ij (q_i.k_j - level) times dloss / dlse, what query.pull is made to be with them; null: not known
  const float* scores;
  float level;
};

// The backward pass: upstream times the rows' derivatives. Null outputs are not wanted.
struct InfoNceGradients {
  const float* g;       // upstream of row i: factor g[i g_stride]
  int64_t g_stride;     // 1, or 0 where all rows have the same
  float factor;
  const float* slopes;  // as the forward pass left them
  const float* pull;    // needed for dquery and dscale
  float* dquery;        // [batch, rows, width]
  float* dscale;        // [batch, rows]
  float* dlse;          // [batch, rows]
  float* dpositive;     // [batch, rows, positives, width]
  float* dcandidates;   // [batch, count, width]: added to, at the columns
  float* dbias;         // [batch, count]: added to
};

// The second derivative along a direction, one of the cotangents of the first one's gradients (info_nce_second.inl).
struct InfoNceTangent {
  const float* g;  // upstream, as above
  int64_t g_stride;
  float factor;
  bool include_positive;
  const float *lse, *lse_low;  // [batch, rows]
  const float *slopes, *pull;  // as the forward pass left them; slopes null: of lse itself, whose pull is the mean of the keys

  Matrix query;            // u [batch, rows, width]; not given: 0
  const float* scale;      // sigma [batch, rows]; null: 0
  Matrix candidates;       // kappa+, where the candidates are; not given: 0
  const float* keys_mean;  // [batch, rows, width] sum_j p_ij kappa_j; null: 0

  float* direction;  // [batch, rows, width] e
  float* pooled;     // [batch, rows, width] O
  float* slope;      // [batch, rows] minus the mean rate of the logits
  float* curvature;  // [batch, rows, positives] c

  const float *rows, *mass, *total;  // what the pass over the bank has found, with the above as its upstream

  float* dg;           // [batch, rows], for an upstream of 1; null: not wanted
  float* dquery;       // [batch, rows, width]
  float* dscale;       // [batch, rows]; null: not wanted
  float* dcandidates;  // [batch, count, width]: added to; null: not wanted
};

// One instruction set's.
struct InfoNceKernels {
  void (*info_nce_rows)(const InfoNceParams&, const InfoNceRows&);
  void (*info_nce_pull)(const InfoNceParams&, const InfoNceRows&);  // sum_j p_ij k_j times dloss / dlse in, instead
  void (*info_nce_grad_rows)(const InfoNceParams&, const InfoNceGradients&, int64_t begin, int64_t end);
  void (*info_nce_grad_candidates)(const InfoNceParams&, const InfoNceGradients&);
  void (*info_nce_direction)(const InfoNceParams&, const InfoNceTangent&, int64_t begin, int64_t end);  // makes direction ... curvature, dg
  void (*info_nce_second_rows)(const InfoNceParams&, const InfoNceTangent&, int64_t begin, int64_t end);
  void (*info_nce_second_candidates)(const InfoNceParams&, const InfoNceTangent&);
};

}  // namespace kdfast
