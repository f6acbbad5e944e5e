// What the similarity kernels are given: plain pointers of the device, sizes, no torch.
#pragma once

#include <stdint.h>

#include "element_type.h"

namespace kdfast {

// z_ij = scale_i q_i.k_j + bias_j over the columns j that row i admits, and start_i. All is contiguous; what belongs to the bank has the
// batch stride 0 where the batch shares it.
struct SimilarityProblem {
  int64_t batch, rows, columns, width;
  Element element;           // 16 bits
  const void *query, *keys;  // [B, N, D], [B, M, D], D a multiple of 8, from a multiple of 16 bytes
  int64_t keys_stride;
  const void* values;  // [B, M, Dv], as the keys; null: they are the keys
  int64_t value_width, values_stride;
  const float* scale;        // [B, N]
  const float* bias;         // [B, M], or null
  int64_t bias_stride;
  const float* start_logit;  // [B, N], or null
  const int64_t *query_labels, *key_labels;  // [B, N], [B, M]: columns of the row's label are excluded; null: none
  int64_t labels_stride;
  const int64_t* key_index;  // [B, N, indices], excluded columns, -1 none; null
  int64_t indices;
  const float* limit;        // [B, N]: columns with scale_i q_i.k_j > limit_i are excluded; null
  const int64_t* valid;      // [B]: columns that count; null: all
  int64_t valid_stride;

  bool masked() const { return bias != nullptr || key_labels != nullptr || key_index != nullptr || limit != nullptr; }  // beyond `valid`
};

// lse_i = log sum_j exp(z_ij) in nats, lse_low what it rounded off, pooled_i = sum_j p_ij v_j.
struct SimilaritySums {
  float *lse, *lse_low;  // [B, N]
  float* pooled;         // [B, N, Dv], or null: not wanted
};

// Parts of a split bank: of the columns in each, a base-2 level, sum 2^(z - level) and sum 2^(z - level) v.
struct SimilarityParts {
  int64_t parts, columns;  // columns of a part
  float *top, *total;      // [parts, B, N]; null with one part
  float* pooled;           // [parts, B, N, Dv]
};

struct SimilarityForward {
  SimilarityProblem problem;
  SimilaritySums out;
  SimilarityParts split;
  int units, blocks;  // tiles of rows by parts of the bank; a block has one after another
};

// dL/dk_j = sum_i p_ij slope_i s_i q_i, p_ij = exp(z_ij - lse_i - lse_low_i), in float32; without limit,
// and without bias, labels and indices for rows of more than 128 numbers.
struct SimilarityKeyGradient {
  SimilarityProblem problem;
  const float *slope, *lse, *lse_low;  // [B, N]; lse_low may be null
  int64_t term_columns;
  float* terms;  // [B, term_columns, 2]: a query's part in its weights
  float* keys;   // [B, M, D]
};

// Whether rows of this width fit a tile, or one with values of this width beside them.
bool similarity_serves(int64_t width);
bool similarity_serves(int64_t width, int64_t value_width);
// Into how many parts the bank is cut and what each has, and the blocks to launch; false: too many rows.
bool similarity_plan(SimilarityForward& p);
// Null, or what went wrong.
const char* similarity_forward(const SimilarityForward& p, void* stream);
const char* similarity_merge(const SimilarityForward& p, void* stream);
// Sets term_columns.
void similarity_keys_plan(SimilarityKeyGradient& p);
const char* similarity_keys_gradient(const SimilarityKeyGradient& p, void* stream);

}  // namespace kdfast
