// What the similarity kernel is given: plain pointers, 64-bit sizes, no torch.
#pragma once

#include "engine/element.h"

namespace kdfast {

// One call. z_ij = scale_i q_i.k_j + bias_j over the admitted columns j, plus the row's own start, if any.
// Row-major and contiguous, except that a batch stride may be 0 (one bank for the whole batch). Null: not given.
struct SimilarityParams {
  Precision precision;
  int64_t batch, rows, columns, width;
  int64_t pooled_width;  // of values and start_value; width where keys are pooled

  Matrix query;               // [batch, rows, width]
  Matrix keys;                // [batch, columns, width]
  int64_t keys_batch_stride;  // in elements
  Matrix values;              // [batch, columns, pooled_width]; not given: the keys
  int64_t values_batch_stride;
  const float* scale;         // [batch, rows]
  const float* bias;          // [batch, columns]; -inf drops a column
  int64_t bias_batch_stride;

  const float* start_logit;  // [batch, rows]: a first candidate of the row, already a logit
  Matrix start_value;        // [batch, rows, pooled_width]; not given: zero

  const int64_t* query_labels;  // [batch, rows]: columns whose label equals the row's are dropped
  const int64_t* key_labels;    // [batch, columns]
  int64_t key_labels_batch_stride;
  const int64_t* key_index;  // [batch, rows, key_indices]: these columns of the row are dropped; -1 for none
  int64_t key_indices;
  const float* limit;        // [batch, rows]: columns with scale_i q_i.k_j > limit_i are dropped
  const int64_t* valid;      // [batch]: only the first so many columns exist
  int64_t valid_stride;

  const int32_t* panels;  // a packed copy (packed_bank.h), read in place of these keys where it is theirs and of the product's form

  // [rows, scores_stride], of a call of one batch entry in one task: the forward pass leaves the scores q.k here, with the sign of the scale, and the
  // gradients take them from here. Rows and columns have room for what only fills a tile.
  float* scores;
  int64_t scores_stride;

  bool pooled;  // also accumulate sum_j p_ij v_j
};

// A rectangle of one batch entry, computed by one thread.
//
// finish: the rectangle spans every column; write lse + lse_low = log(sum_j e^z) and pooled = sum_j p k.
// Otherwise write the three parts of a flash pass, maximum, sum and unnormalised pooled row, to be merged with
// those of the other column ranges by similarity_merge.
struct SimilarityTask {
  int64_t batch;
  int64_t row_begin, row_end;
  int64_t column_begin, column_end;
  bool start;   // this column range also takes the start candidate
  bool finish;
  float* lse;      // [row_end - row_begin]; when !finish the maximum
  float* lse_low;  // [row_end - row_begin]: the digits that these have no room for
  float* sum;      // [row_end - row_begin]; unused when finish
  float* pooled;   // [row_end - row_begin, pooled_width]; unused when !params.pooled
};

// What the gradient passes are given beside a call. With p_ij = exp(z_ij - lse_i - lse_low_i) and v the values, or the keys where none are
// given, a logit's gradient is dz_ij = p_ij (slope_i + h_i.v_j). A row with lse -inf has p = 0.
struct SimilarityUpstream {
  const float* slope;           // [batch, rows]
  Matrix h;                     // [batch, rows, pooled_width]; not given: 0
  const float *lse, *lse_low;   // [batch, rows]; lse_low null: 0
};

// The gradient in keys [key_begin, key_end) of one batch entry, computed by one thread. Outputs are the call's, whole; null: not wanted.
struct SimilarityGradTask {
  SimilarityUpstream upstream;
  int64_t batch;
  int64_t key_begin, key_end;
  float* dkeys;    // [batch, columns, width]: sum_i dz_ij s_i q_i, and, where the keys are the values, sum_i p_ij h_i
  float* dbias;    // [batch, columns]: sum_i dz_ij
  float* dvalues;  // [batch, columns, pooled_width]: sum_i p_ij h_i
};

// The gradient in the rows of a rectangle of one batch entry, computed by one thread.
struct SimilarityGradRowsTask {
  SimilarityUpstream upstream;
  int64_t batch;
  int64_t row_begin, row_end;
  int64_t column_begin, column_end;
  float* rows;   // [row_end - row_begin, width]: sum_j dz_ij k_j
  float* mass;   // [row_end - row_begin]: sum_j p_ij
  float* total;  // [row_end - row_begin]: sum_j dz_ij
};

// parts of one row range, in order: maximum and sum are [parts][stride rows], pooled is [parts][stride rows, width].
struct SimilarityMerge {
  int64_t parts, rows, part_stride, width;  // part_stride in rows
  const float *maximum, *low;  // low: of the maxima; null: 0
  const float* sum;
  const float* partial;  // null when nothing is pooled
  float *lse, *lse_low;
  float* pooled;
};

// One instruction set's.
struct SimilarityKernels {
  int64_t (*similarity_workspace)(const SimilarityParams&, int64_t rows, int64_t columns);  // floats, for tasks up to this size
  void (*similarity)(const SimilarityParams&, const SimilarityTask&, float* workspace);
  void (*similarity_merge)(const SimilarityMerge&);
  int64_t (*similarity_grad_workspace)(const SimilarityParams&, const SimilarityGradTask& like, int64_t keys);
  void (*similarity_grad)(const SimilarityParams&, const SimilarityGradTask&, float* workspace);
  int64_t (*similarity_grad_rows_workspace)(const SimilarityParams&, const SimilarityGradRowsTask& like, int64_t rows, int64_t columns);
  void (*similarity_grad_rows)(const SimilarityParams&, const SimilarityGradRowsTask&, float* workspace);
};

}  // namespace kdfast
