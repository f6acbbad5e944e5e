// What the bindings of the similarity kernels share: matrices and vectors of one batched problem, checked; its division among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <vector>

#include "bind.h"
#include "dispatch.h"

namespace {

using kdfast::SimilarityParams;
using OptionalTensor = std::optional<Tensor>;

// Contiguous, or a contiguous [...] expanded over the batch dimension; returns the batch stride in elements.
inline int64_t batch_stride(const char* name, const Tensor& x, bool may_be_shared) {
  int64_t expected = 1;
  bool inner = true;
  for (int64_t d = x.dim() - 1; d > 0; --d) {
    inner = inner && (x.size(d) == 1 || x.stride(d) == expected);
    expected *= x.size(d);
  }
  const bool shared = x.stride(0) == 0 && may_be_shared;
  STD_TORCH_CHECK(x.numel() == 0 || (inner && (x.size(0) == 1 || x.stride(0) == expected || shared)), name,
                  " must be contiguous", may_be_shared ? " (its batch stride may be 0)" : "");
  return shared || x.size(0) == 1 ? 0 : expected;
}

template <class T>
const T* row_data(const char* name, const OptionalTensor& x, ScalarType type, std::initializer_list<int64_t> shape) {
  if (!x.has_value()) return nullptr;
  check(name, *x, type, shape);
  batch_stride(name, *x, false);
  return data<T>(*x);
}

template <class T>
const T* column_data(const char* name, const OptionalTensor& x, ScalarType type, std::initializer_list<int64_t> shape, int64_t* stride) {
  if (!x.has_value()) return nullptr;
  check(name, *x, type, shape);
  *stride = batch_stride(name, *x, true);
  return data<T>(*x);
}

// Query-side and bank-side matrices, of any element type.
inline kdfast::Matrix row_matrix(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  check(name, x, x.scalar_type(), shape);
  batch_stride(name, x, false);
  return matrix(name, x);
}

inline kdfast::Matrix column_matrix(const char* name, const Tensor& x, std::initializer_list<int64_t> shape, int64_t* stride) {
  check(name, x, x.scalar_type(), shape);
  *stride = batch_stride(name, x, true);
  return matrix(name, x);
}

inline kdfast::Precision precision_of(int64_t precision) {
  STD_TORCH_CHECK(precision >= 0 && precision <= 2, "precision must be 0 (float), 1 (bf16x3) or 2 (bf16), got ", precision);
  return kdfast::Precision(precision);
}

inline Tensor floats(int64_t count) {
  return torch::stable::empty({count}, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
}

// What every op over one bank takes, checked; without start and values.
inline SimilarityParams parameters(const Tensor& query, const Tensor& keys, const Tensor& scale, const OptionalTensor& bias,
                            const OptionalTensor& query_labels, const OptionalTensor& key_labels, const OptionalTensor& key_index,
                            const OptionalTensor& limit, const OptionalTensor& valid, bool pooled, int64_t precision) {
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3, "query and keys must have 3 dimensions, got ", query.dim(), " and ", keys.dim());
  STD_TORCH_CHECK(query_labels.has_value() == key_labels.has_value(), "query_labels and key_labels come together");
  const int64_t batch = query.size(0), rows = query.size(1), width = query.size(2), columns = keys.size(1);

  SimilarityParams p{};
  p.precision = precision_of(precision);
  p.batch = batch, p.rows = rows, p.columns = columns, p.width = p.pooled_width = width;
  p.pooled = pooled;
  p.query = row_matrix("query", query, {batch, rows, width});
  p.keys = column_matrix("keys", keys, {batch, columns, width}, &p.keys_batch_stride);
  p.scale = row_data<float>("scale", scale, ScalarType::Float, {batch, rows});
  p.bias = column_data<float>("bias", bias, ScalarType::Float, {batch, columns}, &p.bias_batch_stride);
  p.query_labels = row_data<int64_t>("query_labels", query_labels, ScalarType::Long, {batch, rows});
  p.key_labels = column_data<int64_t>("key_labels", key_labels, ScalarType::Long, {batch, columns}, &p.key_labels_batch_stride);
  p.key_indices = key_index.has_value() && key_index->dim() == 3 ? key_index->size(2) : 0;
  p.key_index = row_data<int64_t>("key_index", key_index, ScalarType::Long, {batch, rows, p.key_indices});
  p.limit = row_data<float>("limit", limit, ScalarType::Float, {batch, rows});
  p.valid = column_data<int64_t>("valid", valid, ScalarType::Long, {batch}, &p.valid_stride);
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

inline Tensor output(const Tensor& like, std::initializer_list<int64_t> shape) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Float);
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

// Threads that so many multiply-adds are worth.
inline int64_t workers_for(double work) { return std::clamp<int64_t>(int64_t(work / kMinWork), 1, torch::stable::get_num_threads()); }

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

}  // namespace
