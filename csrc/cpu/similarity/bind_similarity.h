// What the bindings of the similarity kernels share: the parameters of one batched problem, checked; its division among threads.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <tuple>

#include "bind.h"
#include "dispatch.h"
#include "workspace.h"

namespace kdfast {

// Two ops themselves and the pass of one, for others that are made of them: the dispatcher takes as long as a small call's arithmetic.
std::tuple<Tensor, Tensor, Tensor> similarity_softmax(const Tensor& query, const Tensor& keys, const Tensor& scale, const OptionalTensor& bias,
                                                      const OptionalTensor& start_logit, const OptionalTensor& values,
                                                      const OptionalTensor& start_value, const OptionalTensor& query_labels,
                                                      const OptionalTensor& key_labels, const OptionalTensor& key_index,
                                                      const OptionalTensor& limit, const OptionalTensor& valid, bool pooled, int64_t precision,
                                                      const OptionalTensor& panels);
std::tuple<Tensor, Tensor, Tensor> similarity_grad_keys(const Tensor& slope, const OptionalTensor& h, const Tensor& lse,
                                                        const OptionalTensor& lse_low, const Tensor& query, const Tensor& keys,
                                                        const Tensor& scale, const OptionalTensor& bias, const OptionalTensor& values,
                                                        const OptionalTensor& query_labels, const OptionalTensor& key_labels,
                                                        const OptionalTensor& key_index, const OptionalTensor& limit,
                                                        const OptionalTensor& valid, bool want_keys, bool want_bias, bool want_values,
                                                        int64_t precision);

// [batch, rows] lse and its low digits and, where p asks for it, [batch, rows, width] pooled.
void streaming_softmax(SimilarityParams p, const OptionalTensor& panels, float* lse, float* lse_low, float* pooled);

// Of a gradient in the rows, sum_j dz_ij k_j [batch, rows, width], sum_j p_ij and sum_j dz_ij [batch, rows].
void similarity_row_sums(SimilarityParams p, const SimilarityUpstream& upstream, float* rows, float* mass, float* total);

}  // namespace kdfast

namespace {

using kdfast::SimilarityParams;

// By the sizes alone, so that a forward pass and its gradients see scores of the same bits. With few rows the cost is the packing of what
// passes by them: up to kRowsOnVectors that of parts of floats, up to kRowsInPlace (in bf16 kBFloat16RowsInPlace) any at all. With few keys it
// is the columns that only fill a panel.
constexpr int64_t kRowsOnVectors = 64, kRowsInPlace = 8, kBFloat16RowsInPlace = 2, kKeysInPlace = 16;

inline kdfast::Precision precision_for_rows(kdfast::Precision precision, int64_t rows, int64_t on_vectors = kRowsOnVectors) {
  const bool few = precision == kdfast::Precision::kFloat32 && rows <= on_vectors;
  return few ? kdfast::Precision::kFloat32Vectors : precision;
}

// The same where a bank passes by.
inline kdfast::Precision precision_for_queries(kdfast::Precision precision, int64_t queries, int64_t keys) {
  const int64_t in_place = precision == kdfast::Precision::kBFloat16 ? kBFloat16RowsInPlace : kRowsInPlace;
  return queries <= in_place || keys <= kKeysInPlace ? kdfast::Precision::kFloat32Rows : precision_for_rows(precision, queries);
}

// What every op over one bank takes, checked; without start and values.
inline SimilarityParams parameters(const Tensor& query, const Tensor& keys, const Tensor& scale, const OptionalTensor& bias,
                            const OptionalTensor& query_labels, const OptionalTensor& key_labels, const OptionalTensor& key_index,
                            const OptionalTensor& limit, const OptionalTensor& valid, bool pooled, int64_t precision) {
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3, "query and keys must have 3 dimensions, got ", query.dim(), " and ", keys.dim());
  STD_TORCH_CHECK(query_labels.has_value() == key_labels.has_value(), "query_labels and key_labels come together");
  const int64_t batch = query.size(0), rows = query.size(1), width = query.size(2), columns = keys.size(1);

  SimilarityParams p{};
  p.batch = batch, p.rows = rows, p.columns = columns, p.width = p.pooled_width = width;
  p.pooled = pooled;
  p.query = row_matrix("query", query, {batch, rows, width});
  p.keys = column_matrix("keys", keys, {batch, columns, width}, &p.keys_batch_stride);
  p.precision = precision_for_queries(precision_of(precision), p.keys_batch_stride == 0 ? batch * rows : rows, columns);
  p.scale = row_data<float>("scale", scale, {batch, rows});
  p.bias = column_data<float>("bias", bias, {batch, columns}, &p.bias_batch_stride);
  p.query_labels = row_data<int64_t>("query_labels", query_labels, {batch, rows});
  p.key_labels = column_data<int64_t>("key_labels", key_labels, {batch, columns}, &p.key_labels_batch_stride);
  p.key_indices = key_index.has_value() && key_index->dim() == 3 ? key_index->size(2) : 0;
  p.key_index = row_data<int64_t>("key_index", key_index, {batch, rows, p.key_indices});
  p.limit = row_data<float>("limit", limit, {batch, rows});
  p.valid = column_data<int64_t>("valid", valid, {batch}, &p.valid_stride);
  return p;
}

// Values other than the keys, if any.
inline void add_values(SimilarityParams& p, const OptionalTensor& values) {
  if (!values.has_value()) return;
  STD_TORCH_CHECK(values->dim() == 3, "values must have 3 dimensions, got ", values->dim());
  p.pooled_width = values->size(2);
  p.values = column_matrix("values", *values, {p.batch, p.columns, p.pooled_width}, &p.values_batch_stride);
}

// One bank for the whole batch: its rows are just more rows.
inline void fold_batch(SimilarityParams& p) {
  if (p.keys_batch_stride == 0 && p.values_batch_stride == 0 && p.bias_batch_stride == 0 && p.key_labels_batch_stride == 0 && p.valid_stride == 0)
    p.rows *= p.batch, p.batch = 1;
}

inline int64_t valid_columns(const SimilarityParams& p, int64_t batch) {
  if (p.valid == nullptr) return p.columns;
  return std::clamp<int64_t>(p.valid[batch * p.valid_stride], 0, p.columns);
}

// How each batch entry is cut: row_parts x column_parts tasks.
struct Division {
  int64_t workers, row_parts, column_parts;
};

constexpr int64_t kMinRows = 192;                     // rows a task should have, so that packing the bank stays small beside its products
constexpr int64_t kMinKeys = 96;                      // keys a task of the gradient should have: packing the queries is then a tenth of it
constexpr int64_t kMinColumns = 512;                  // columns a task should have
constexpr int64_t kPartialFloats = int64_t(1) << 21;  // 8 MB of partial results

// Rows are cut first, for they need no merge; then columns, as far as the partial results, `partial` floats a row, stay small. Depends on the
// sizes and the number of threads alone, so results do too.
inline Division divide(double work, int64_t batch, int64_t rows, int64_t columns, int64_t partial) {
  const int64_t workers = workers_for(work);
  const int64_t parts = workers / std::gcd(workers, batch);  // per batch entry, so that tasks divide evenly
  const int64_t row_parts = std::clamp<int64_t>(rows / kMinRows, 1, parts);
  const int64_t room = std::max<int64_t>(1, kPartialFloats / std::max<int64_t>(1, batch * rows * partial));
  const int64_t column_parts = std::clamp<int64_t>(parts / row_parts, 1, std::max<int64_t>(1, std::min(columns / kMinColumns, room)));
  return {workers, row_parts, column_parts};
}

// Parts that the keys of a batch entry are cut into where each thread owns its keys' sums.
inline int64_t parts_of_keys(int64_t workers, int64_t batch, int64_t keys) {
  return std::clamp<int64_t>(keys / kMinKeys, 1, workers / std::gcd(workers, batch));
}

// ---- losses ------------------------------------------------------------------------------------------------------------

inline float mean_of(const float* losses, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += losses[i];
  return float(sum / double(std::max<int64_t>(count, 1)));  // of nothing 0
}

}  // namespace
