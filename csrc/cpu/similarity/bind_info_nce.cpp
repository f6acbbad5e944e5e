// kdfast::info_nce and kdfast::info_nce_grad on the CPU: the streaming softmax of the negatives, by its own ops, and the rows of the loss.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "similarity/bind_similarity.h"

namespace {

using kdfast::InfoNceGradients;
using kdfast::InfoNceParams;

// ---- tensors --------------------------------------------------------------------------------------------------------

// Arguments all have a leading batch dimension or none has; from here on all have one. With one they are to be contiguous, but for a
// stride 0 of what belongs to the bank.
struct Batch {
  bool given;

  Tensor in(const Tensor& x) const { return given ? x : batch_of_one(x.is_contiguous() ? x : torch::stable::contiguous(x)); }
  OptionalTensor in(const OptionalTensor& x) const { return x.has_value() ? OptionalTensor(in(*x)) : x; }
};

// ---- rows -----------------------------------------------------------------------------------------------------------

// The sizes, the queries and their scale.
InfoNceParams rows_of(const Tensor& query, const Tensor& scale) {
  STD_TORCH_CHECK(query.dim() == 3, "query must have 2 or 3 dimensions, got ", query.dim());
  InfoNceParams p{};
  p.batch = query.size(0), p.rows = query.size(1), p.width = query.size(2);
  p.query = row_matrix("query", query, {p.batch, p.rows, p.width});
  p.scale = row_data<float>("scale", scale, {p.batch, p.rows});
  return p;
}

// Which rows of the bank the positives are.
void take_columns(InfoNceParams& p, const Tensor& columns, const Tensor& keys) {
  STD_TORCH_CHECK(columns.dim() == 3, "columns must have ", 3, " dimensions, got ", columns.dim());
  p.positives = columns.size(2), p.count = keys.size(1);
  p.columns = packed<int64_t>("columns", columns, {p.batch, p.rows, p.positives});
  const bool inside = std::all_of(p.columns, p.columns + columns.numel(), [&](int64_t c) { return c >= -1 && c < p.count; });
  STD_TORCH_CHECK(inside, "columns must be in [-1, ", p.count, ")");
}

// f(begin, end) over the rows; how they are cut changes no bit of the result.
template <class F>
void for_rows(const InfoNceParams& p, const F& f) {
  const int64_t rows = p.batch * p.rows;
  const double work = double(rows) * double(p.positives + 1) * double(p.width) * 2;
  const int64_t workers = std::clamp<int64_t>(int64_t(work / kMinWork), 1, torch::stable::get_num_threads());
  for_each_task(workers, workers, [&](int64_t, int64_t t) { f(t * rows / workers, (t + 1) * rows / workers); });
}

// ---- the ops --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> info_nce(const Tensor& query, const Tensor& keys, const Tensor& scale, const OptionalTensor& bias,
                                                    const OptionalTensor& query_labels, const OptionalTensor& key_labels,
                                                    const OptionalTensor& key_index, const OptionalTensor& limit, const OptionalTensor& valid,
                                                    const OptionalTensor& positive, const OptionalTensor& columns,
                                                    const OptionalTensor& weights, bool include_positive, bool mean, bool want_pull,
                                                    int64_t precision, const OptionalTensor& panels) {
  STD_TORCH_CHECK(positive.has_value() != columns.has_value(), "positive or columns must be given, and not both");
  const Batch batch{query.dim() == 3};
  const Tensor q = batch.in(query), k = batch.in(keys), s = batch.in(scale);
  const OptionalTensor b = batch.in(bias), given = batch.in(positive), chosen = batch.in(columns), w = batch.in(weights), none;
  InfoNceParams p = rows_of(q, s);
  if (chosen.has_value()) {
    take_columns(p, *chosen, k);
    p.candidates = column_matrix("keys", k, {p.batch, p.count, p.width}, &p.candidates_batch_stride);
    p.bias = column_data<float>("bias", b, {p.batch, p.count}, &p.bias_batch_stride);
  } else {
    STD_TORCH_CHECK(given->dim() == 3 || given->dim() == 4, "positive must have ", query.dim(), " or ", query.dim() + 1, " dimensions");
    p.positives = given->dim() == 3 ? 1 : given->size(2);
    p.count = p.rows * p.positives;
    p.candidates_batch_stride = p.count * p.width;
    p.candidates = given->dim() == 3 ? row_matrix("positive", *given, {p.batch, p.rows, p.width})
                                     : row_matrix("positive", *given, {p.batch, p.rows, p.positives, p.width});
  }
  p.weights = row_data<float>("weights", w, {p.batch, p.rows, p.positives});

  const auto [lse, pull, lse_low] =
      kdfast::similarity_softmax(q, k, s, b, none, none, none, batch.in(query_labels), batch.in(key_labels), batch.in(key_index),
                                 batch.in(limit), batch.in(valid), want_pull, precision, panels);
  Tensor losses = batch.given ? output(query, {p.batch, p.rows}) : output(query, {p.rows});
  const Tensor slopes = output(query, {p.batch, p.rows, p.positives});
  float *const out = floats_of(losses), *const slope = floats_of(slopes), *const pulls = want_pull ? floats_of(pull) : nullptr;
  for_rows(p, [&](int64_t begin, int64_t end) {
    kdfast::cpu_kernels().info_nce_rows(p, {begin, end, include_positive, data<float>(lse), out, slope, pulls});
  });
  if (mean) {
    const float value = mean_of(out, p.batch * p.rows);
    losses = output(query, {});
    *floats_of(losses) = value;
  }
  return {losses, lse, lse_low, slopes, pull};
}

// The gradients that are wanted, in the order of query, keys, scale, bias, positive, each with a leading batch dimension.
std::vector<Tensor> info_nce_grad(const Tensor& g, const Tensor& lse, const Tensor& lse_low, const Tensor& slopes, const Tensor& pull, const Tensor& query,
                                  const Tensor& keys, const Tensor& scale, const OptionalTensor& bias, const OptionalTensor& query_labels,
                                  const OptionalTensor& key_labels, const OptionalTensor& key_index, const OptionalTensor& limit,
                                  const OptionalTensor& valid, const OptionalTensor& columns, bool want_query, bool want_keys,
                                  bool want_scale, bool want_bias, bool want_positive, int64_t precision) {
  const Batch batch{query.dim() == 3};
  const Tensor q = batch.in(query), s = batch.in(scale);
  InfoNceParams p = rows_of(q, s);
  STD_TORCH_CHECK(slopes.dim() == 3, "slopes must have 3 dimensions, got ", slopes.dim());
  p.positives = slopes.size(2);
  const bool mean = g.dim() == 0;
  const Tensor upstream = mean ? g : batch.in(g);

  InfoNceGradients d{};
  d.g = mean ? packed<float>("g", g, {}) : packed<float>("g", upstream, {p.batch, p.rows});
  d.g_stride = mean ? 0 : 1;
  d.factor = mean ? 1 / float(p.batch * p.rows) : 1;
  packed<float>("lse", lse, {p.batch, p.rows});
  d.slopes = packed<float>("slopes", slopes, {p.batch, p.rows, p.positives});
  if (want_query || want_scale) d.pull = packed<float>("pull", pull, {p.batch, p.rows, p.width});

  OptionalTensor dquery, dkeys, dscale, dbias, dpositive, dlse;
  const auto wanted = [&](OptionalTensor& x, bool want, const std::vector<int64_t>& shape) -> float* {
    if (!want) return nullptr;
    x = output(query, shape);
    return floats_of(*x);
  };
  d.dquery = wanted(dquery, want_query, {p.batch, p.rows, p.width});
  d.dscale = wanted(dscale, want_scale, {p.batch, p.rows});
  d.dpositive = wanted(dpositive, want_positive, {p.batch, p.rows, p.positives, p.width});
  d.dlse = wanted(dlse, want_keys || want_bias, {p.batch, p.rows});
  for_rows(p, [&](int64_t begin, int64_t end) { kdfast::cpu_kernels().info_nce_grad_rows(p, d, begin, end); });

  if (dlse.has_value()) {
    const Tensor k = batch.in(keys);
    const OptionalTensor none;
    const auto [all_keys, all_bias, no_values] =
        kdfast::similarity_grad_keys(*dlse, none, lse, OptionalTensor(lse_low), q, k, s, batch.in(bias), none, batch.in(query_labels),
                                     batch.in(key_labels), batch.in(key_index), batch.in(limit), batch.in(valid), want_keys, want_bias, false,
                                     precision);
    if (want_keys) dkeys = all_keys;
    if (want_bias) dbias = all_bias;
    if (columns.has_value()) {
      const Tensor chosen = batch.in(*columns);
      take_columns(p, chosen, k);
      d.dcandidates = want_keys ? floats_of(all_keys) : nullptr;
      d.dbias = want_bias ? floats_of(all_bias) : nullptr;
      kdfast::cpu_kernels().info_nce_grad_candidates(p, d);
    }
  }
  std::vector<Tensor> found;
  for (const OptionalTensor* x : {&dquery, &dkeys, &dscale, &dbias, &dpositive})
    if (x->has_value()) found.push_back(**x);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&info_nce));
  m.impl("info_nce_grad", TORCH_BOX(&info_nce_grad));
}
