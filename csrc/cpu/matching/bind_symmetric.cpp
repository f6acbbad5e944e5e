// kdfast::symmetric_lse and kdfast::symmetric_gradients on the CPU.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "similarity/bind_pairs.h"

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> symmetric_lse(const Tensor& x, const Tensor& y, const Tensor& scale,
                                                         const OptionalTensor& x_labels, const OptionalTensor& y_labels, int64_t precision) {
  const PairParams p = pair_parameters(x, y, scale, x_labels, y_labels, precision);
  Tensor row_lse = output(x, {p.batch, p.rows}), row_low = output(x, {p.batch, p.rows});
  Tensor column_lse = output(x, {p.batch, p.columns}), column_low = output(x, {p.batch, p.columns});
  symmetric_log_sums(p, floats_of(row_lse), floats_of(row_low), floats_of(column_lse), floats_of(column_low));
  return {row_lse, column_lse, row_low, column_low};
}

std::tuple<Tensor, Tensor> symmetric_gradients(const Tensor& row_g, const Tensor& column_g, const Tensor& row_lse, const Tensor& column_lse,
                                               const Tensor& row_low, const Tensor& column_low, const Tensor& x, const Tensor& y,
                                               const Tensor& scale, const OptionalTensor& x_labels, const OptionalTensor& y_labels,
                                               bool want_x, bool want_y, int64_t precision) {
  const PairParams p = pair_parameters(x, y, scale, x_labels, y_labels, precision);
  const auto per_row = [&](const char* name, const Tensor& t) { return row_data<float>(name, t, {p.batch, p.rows}); };
  const auto per_column = [&](const char* name, const Tensor& t) { return row_data<float>(name, t, {p.batch, p.columns}); };
  const SymmetricUpstream upstream{per_row("row_g", row_g),          per_row("row_lse", row_lse),          per_row("row_low", row_low),
                                   per_column("column_g", column_g), per_column("column_lse", column_lse), per_column("column_low", column_low)};
  Tensor x_sums = zeros(x, want_x, {p.batch, p.rows, p.width}), y_sums = zeros(x, want_y, {p.batch, p.columns, p.width});
  symmetric_sums(p, upstream, {want_x ? floats_of(x_sums) : nullptr, want_y ? floats_of(y_sums) : nullptr, nullptr});
  return {x_sums, y_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("symmetric_lse", TORCH_BOX(&symmetric_lse));
  m.impl("symmetric_gradients", TORCH_BOX(&symmetric_gradients));
}
