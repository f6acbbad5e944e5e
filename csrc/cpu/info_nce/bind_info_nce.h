// What the bindings of InfoNCE share: arguments with or without a batch, the statistics of rows, the positives.
#pragma once

#include <algorithm>

#include "info_nce/bind_class_sums.h"

namespace {

// ---- tensors --------------------------------------------------------------------------------------------------------

// Arguments all have a leading batch dimension or none has; from here on all have one. With one they are to be contiguous, but for a
// stride 0 of what belongs to the bank.
struct Batch {
  bool given;

  Tensor in(const Tensor& x) const { return given ? x : batch_of_one(x.is_contiguous() ? x : torch::stable::contiguous(x)); }
  OptionalTensor in(const OptionalTensor& x) const { return x.has_value() ? OptionalTensor(in(*x)) : x; }
  // Rows of the bank that each row names: without a batch [rows] is [rows, 1].
  OptionalTensor named(const OptionalTensor& x) const {
    if (given || !x.has_value() || x->dim() != 1) return in(x);
    return batch_of_one(x->is_contiguous() ? *x : torch::stable::contiguous(*x), true);
  }
  // The scale of every row: `factor` where there is no tensor of them.
  Tensor scale(const OptionalTensor& x, double factor, const Tensor& query) const {
    return x.has_value() ? in(*x) : filled(query, {query.size(0), query.size(1)}, factor);
  }
};

// What a row's gradients are made of, [kStatistics + positives, batch, rows], and kSpread more where an e_i is taken off the slopes of its keys
// (KeySums), with label smoothing or attraction: lse, the digits it has no room for, and slopes in the order [batch, rows, positives];
// dloss / dlse, which is else the sum of the slopes, and e.
constexpr int64_t kStatistics = 2, kSpread = 2;

struct Statistics {
  float *lse, *lse_low, *slopes, *of_lse, *e;

  Statistics(const Tensor& x, int64_t rows, int64_t positives)
      : lse(floats_of(x)), lse_low(lse + rows), slopes(lse_low + rows), of_lse(slopes + rows * positives), e(of_lse + rows) {}
};

// ---- rows -----------------------------------------------------------------------------------------------------------

// The sizes, the queries and their scale.
inline InfoNceParams rows_of(const Tensor& query, const Tensor& scale) {
  STD_TORCH_CHECK(query.dim() == 3, "query must have 2 or 3 dimensions, got ", query.dim());
  InfoNceParams p{};
  p.batch = query.size(0), p.rows = query.size(1), p.width = query.size(2);
  p.query = row_matrix("query", query, {p.batch, p.rows, p.width});
  p.scale = row_data<float>("scale", scale, {p.batch, p.rows});
  return p;
}

// Which rows of the bank the positives are.
inline void take_columns(InfoNceParams& p, const Tensor& columns, const Tensor& keys) {
  STD_TORCH_CHECK(columns.dim() == 3, "columns must have ", 3, " dimensions, got ", columns.dim());
  p.positives = columns.size(2), p.count = keys.size(1);
  p.columns = packed<int64_t>("columns", columns, {p.batch, p.rows, p.positives});
  const bool inside = std::all_of(p.columns, p.columns + columns.numel(), [&](int64_t c) { return c >= -1 && c < p.count; });
  STD_TORCH_CHECK(inside, "columns must be in [-1, ", p.count, ")");
}

// The positives: rows given, [batch, rows, width] or [batch, rows, J, width], or rows of the bank.
inline void take_positives(InfoNceParams& p, const Batch& batch, const OptionalTensor& given, const OptionalTensor& chosen, const Tensor& keys,
                           const OptionalTensor& bias) {
  STD_TORCH_CHECK(given.has_value() != chosen.has_value(), "positive or columns must be given, and not both");
  if (chosen.has_value()) {
    take_columns(p, *chosen, keys);
    p.candidates = column_matrix("keys", keys, {p.batch, p.count, p.width}, &p.candidates_batch_stride);
    p.bias = column_data<float>("bias", bias, {p.batch, p.count}, &p.bias_batch_stride);
    return;
  }
  const int64_t dim = batch.given ? 3 : 2;
  STD_TORCH_CHECK(given->dim() == 3 || given->dim() == 4, "positive must have ", dim, " or ", dim + 1, " dimensions");
  p.positives = given->dim() == 3 ? 1 : given->size(2);
  p.count = p.rows * p.positives;
  p.candidates_batch_stride = p.count * p.width;
  p.candidates = given->dim() == 3 ? row_matrix("positive", *given, {p.batch, p.rows, p.width})
                                   : row_matrix("positive", *given, {p.batch, p.rows, p.positives, p.width});
}

}  // namespace
