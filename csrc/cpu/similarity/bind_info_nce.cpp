// kdfast::info_nce and kdfast::info_nce_grad on the CPU: the streaming softmax of the negatives, by its own ops, and the rows of the loss.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "similarity/bind_pairs.h"

namespace {

using kdfast::InfoNceGradients;
using kdfast::InfoNceParams;
using kdfast::InfoNceRows;

// ---- tensors --------------------------------------------------------------------------------------------------------

// Arguments all have a leading batch dimension or none has; from here on all have one. With one they are to be contiguous, but for a
// stride 0 of what belongs to the bank.
struct Batch {
  bool given;

  Tensor in(const Tensor& x) const { return given ? x : batch_of_one(x.is_contiguous() ? x : torch::stable::contiguous(x)); }
  OptionalTensor in(const OptionalTensor& x) const { return x.has_value() ? OptionalTensor(in(*x)) : x; }
  // The scale of every row: `factor` where there is no tensor of them.
  Tensor scale(const OptionalTensor& x, double factor, const Tensor& query) const {
    return x.has_value() ? in(*x) : filled(query, {query.size(0), query.size(1)}, factor);
  }
};

// What a row's gradients are made of, [2 + positives, batch, rows]: lse, the digits it has no room for, and slopes in the order [batch, rows,
// positives].
struct Statistics {
  float *lse, *lse_low, *slopes;

  Statistics(const Tensor& x, int64_t rows) : lse(floats_of(x)), lse_low(lse + rows), slopes(lse_low + rows) {}
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

// ---- few pairs ------------------------------------------------------------------------------------------------------

// The losses of few_pairs with lse, lse_low and slopes, and from the same scores both gradients: pull, and the keys' for an upstream of 1 of
// every loss.
void kept_info_nce(const InfoNceParams& p, const Tensor& keys, int64_t precision, const InfoNceRows& r, float* lse, float* lse_low,
                   float* keys_sums) {
  PairParams pairs{};
  pairs.precision = precision_for_rows(precision_of(precision), std::min(p.rows, keys.size(1)), kPairRowsOnVectors);
  pairs.batch = 1, pairs.rows = p.rows, pairs.columns = keys.size(1), pairs.width = p.width;
  pairs.x = p.query, pairs.y = row_matrix("keys", keys, {1, pairs.columns, p.width});
  pairs.scale = p.scale;
  const Tensor slopes = scratch(p.rows);
  float* const slope = floats_of(slopes);
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  kept_symmetric_sums(pairs, lse, lse_low, nullptr, nullptr, [&] {
    InfoNceRows rows = r;
    rows.pull = nullptr;
    kernels.info_nce_rows(p, rows);
    for (int64_t i = 0; i < p.rows; ++i) slope[i] = std::accumulate(r.slopes + i * p.positives, r.slopes + (i + 1) * p.positives, 0.0f);
  }, {slope, lse, lse_low}, {r.pull, keys_sums, nullptr});
  kernels.info_nce_pull(p, r);
}

// ---- the ops --------------------------------------------------------------------------------------------------------

// Losses or their mean, statistics, pull, and the keys' gradient for an upstream of 1 of every loss: where it is asked for, with pull,
// and the pairs are few and none left out; else [0], and info_nce_grad forms it.
std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce(const Tensor& query, const Tensor& keys, const OptionalTensor& scale, const OptionalTensor& bias,
                                                    const OptionalTensor& query_labels, const OptionalTensor& key_labels,
                                                    const OptionalTensor& key_index, const OptionalTensor& limit, const OptionalTensor& valid,
                                                    const OptionalTensor& positive, const OptionalTensor& columns,
                                                    const OptionalTensor& weights, bool include_positive, bool mean, bool want_pull,
                                                    int64_t precision, const OptionalTensor& panels, bool keep_keys, double factor) {
  STD_TORCH_CHECK(positive.has_value() != columns.has_value(), "positive or columns must be given, and not both");
  const Batch batch{query.dim() == 3};
  const Tensor q = batch.in(query), k = batch.in(keys), s = batch.scale(scale, factor, q);
  const OptionalTensor b = batch.in(bias), given = batch.in(positive), chosen = batch.in(columns), w = batch.in(weights);
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

  Tensor losses = batch.given ? output(query, {p.batch, p.rows}) : output(query, {p.rows});
  const Tensor statistics = output(query, {2 + p.positives, p.batch, p.rows});
  const Tensor pull = want_pull ? output(query, {p.batch, p.rows, p.width}) : output(query, {0});
  const Statistics of(statistics, p.batch * p.rows);
  float* const out = floats_of(losses);
  const bool rules = bias.has_value() || query_labels.has_value() || key_index.has_value() || limit.has_value() || valid.has_value();
  const bool keep = keep_keys && mean && want_pull && !batch.given && given.has_value() && !rules && kdfast::few_pairs(p.rows, k.size(1), p.width);
  const Tensor kept = keep ? output(query, {1, k.size(1), p.width}) : output(query, {0});
  const InfoNceRows rows{0, p.batch * p.rows, include_positive, of.lse, of.lse_low, out, of.slopes, want_pull ? floats_of(pull) : nullptr};
  if (keep) {
    kept_info_nce(p, k, precision, rows, of.lse, of.lse_low, floats_of(kept));
  } else {
    const OptionalTensor labels = batch.in(query_labels), of_keys = batch.in(key_labels), index = batch.in(key_index);
    const OptionalTensor limits = batch.in(limit), prefix = batch.in(valid);
    kdfast::streaming_softmax(parameters(q, k, s, b, labels, of_keys, index, limits, prefix, want_pull, precision), panels, of.lse, of.lse_low,
                              floats_of(pull));
    for_rows(p, [&](int64_t begin, int64_t end) {
      InfoNceRows part = rows;
      part.begin = begin, part.end = end;
      kdfast::cpu_kernels().info_nce_rows(p, part);
    });
  }
  if (mean) {
    const float value = mean_of(out, p.batch * p.rows);
    losses = output(query, {});
    *floats_of(losses) = value;
  }
  return {losses, statistics, pull, kept};
}

// The backward pass of the rows, but for its run: what belongs to them and is wanted of query, scale and positive.
struct Backward {
  const Batch batch;
  const Tensor query, scale, pull, g;
  InfoNceParams p;
  InfoNceGradients d{};
  OptionalTensor dquery, dscale, dpositive;

  Backward(const Tensor& upstream, const OptionalTensor& statistics, const Tensor& pulls, const Tensor& queries, const OptionalTensor& scales,
           bool want_query, bool want_scale, bool want_positive, double factor)
      : batch{queries.dim() == 3}, query(batch.in(queries)), scale(batch.scale(scales, factor, query)),
        pull(pulls.dim() == 2 ? batch_of_one(pulls) : pulls), g(upstream.dim() == 0 ? upstream : batch.in(upstream)), p(rows_of(query, scale)) {
    if (statistics.has_value()) {
      STD_TORCH_CHECK(statistics->dim() == 3 && statistics->size(0) >= 2, "statistics must have 3 dimensions, 2 rows or more");
      p.positives = statistics->size(0) - 2;
      packed<float>("statistics", *statistics, {2 + p.positives, p.batch, p.rows});
      d.slopes = Statistics(*statistics, p.batch * p.rows).slopes;
    }
    const bool mean = g.dim() == 0;
    d.g = mean ? packed<float>("g", g, {}) : packed<float>("g", g, {p.batch, p.rows});
    d.g_stride = mean ? 0 : 1;
    d.factor = mean ? 1 / float(p.batch * p.rows) : 1;
    if (want_query || want_scale) d.pull = packed<float>("pull", pull, {p.batch, p.rows, p.width});
    d.dquery = wanted(dquery, want_query, {p.batch, p.rows, p.width});
    d.dscale = wanted(dscale, want_scale, {p.batch, p.rows});
    d.dpositive = wanted(dpositive, want_positive, {p.batch, p.rows, p.positives, p.width});
  }

  float* wanted(OptionalTensor& x, bool want, std::vector<int64_t> shape) const {
    if (!want) return nullptr;
    if (!batch.given) shape.erase(shape.begin());
    x = output(query, shape);
    return floats_of(*x);
  }

  void run() const {
    for_rows(p, [&](int64_t begin, int64_t end) { kdfast::cpu_kernels().info_nce_grad_rows(p, d, begin, end); });
  }
};

std::vector<Tensor> those_wanted(std::initializer_list<const OptionalTensor*> gradients) {
  std::vector<Tensor> found;
  for (const OptionalTensor* x : gradients)
    if (x->has_value()) found.push_back(**x);
  return found;
}

// The gradients of query, scale and positive that are wanted. Without statistics there are no positives, and `pull` is all that pulls a query.
std::vector<Tensor> info_nce_grad_rows(const Tensor& g, const OptionalTensor& statistics, const Tensor& pull, const Tensor& query,
                                       const OptionalTensor& scale, bool want_query, bool want_scale, bool want_positive, double factor) {
  const Backward back(g, statistics, pull, query, scale, want_query, want_scale, want_positive, factor);
  back.run();
  return those_wanted({&back.dquery, &back.dscale, &back.dpositive});
}

// The gradients that are wanted, in the order of query, keys, scale, bias, positive, with a leading batch dimension where the arguments have one.
std::vector<Tensor> info_nce_grad(const Tensor& g, const Tensor& statistics, const Tensor& pull, const Tensor& query, const Tensor& keys,
                                  const OptionalTensor& scale, const OptionalTensor& bias, const OptionalTensor& query_labels,
                                  const OptionalTensor& key_labels, const OptionalTensor& key_index, const OptionalTensor& limit,
                                  const OptionalTensor& valid, const OptionalTensor& columns, bool want_query, bool want_keys,
                                  bool want_scale, bool want_bias, bool want_positive, int64_t precision,
                                  const OptionalTensor& kept_keys, double factor) {
  Backward back(g, statistics, pull, query, scale, want_query, want_scale, want_positive, factor);
  const Batch& batch = back.batch;
  InfoNceParams& p = back.p;
  InfoNceGradients& d = back.d;
  OptionalTensor dkeys, dbias, dlse;
  const bool kept = kept_keys.has_value() && kept_keys->numel() > 0;
  if ((want_keys && !kept) || want_bias) {
    dlse = output(query, {p.batch, p.rows});
    d.dlse = floats_of(*dlse);
  }
  back.run();

  if (kept && want_keys) {
    STD_TORCH_CHECK(g.dim() == 0 && !want_bias && !columns.has_value(), "the gradient of keys is kept for the mean of losses without exclusions");
    const float upstream = d.factor * *d.g;
    const float* const sums = packed<float>("kept_keys", *kept_keys, {1, keys.size(-2), p.width});
    float* const out = back.wanted(dkeys, true, {1, keys.size(-2), p.width});
    std::transform(sums, sums + kept_keys->numel(), out, [&](float x) { return upstream * x; });
  } else if (dlse.has_value()) {
    const Tensor k = batch.in(keys), lse = torch::stable::select(statistics, 0, 0);
    const OptionalTensor none, lse_low = torch::stable::select(statistics, 0, 1);
    const auto [all_keys, all_bias, no_values] =
        kdfast::similarity_grad_keys(*dlse, none, lse, lse_low, back.query, k, back.scale, batch.in(bias), none, batch.in(query_labels),
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
  if (!batch.given && dkeys.has_value() && dkeys->dim() == 3) dkeys = torch::stable::squeeze(*dkeys, 0);
  if (!batch.given && dbias.has_value()) dbias = torch::stable::squeeze(*dbias, 0);
  return those_wanted({&back.dquery, &dkeys, &back.dscale, &dbias, &back.dpositive});
}

// Of a plain call: matrices, one scale, nothing left out, the mean. What an op is given takes as long as some of its arithmetic.
std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_mean(const Tensor& query, const Tensor& keys, const Tensor& positive, double factor, bool pull,
                                                         bool keep_keys, int64_t precision) {
  const OptionalTensor none;
  return info_nce(query, keys, none, none, none, none, none, none, none, positive, none, none, true, true, pull, precision, none, keep_keys, factor);
}

std::vector<Tensor> info_nce_mean_grad(const Tensor& g, const Tensor& statistics, const Tensor& pull, const Tensor& kept_keys,
                                       const Tensor& query, const Tensor& keys, double factor, bool want_query, bool want_keys, bool want_scale,
                                       bool want_positive, int64_t precision) {
  const OptionalTensor none;
  if (!want_keys) return info_nce_grad_rows(g, statistics, pull, query, none, want_query, want_scale, want_positive, factor);
  return info_nce_grad(g, statistics, pull, query, keys, none, none, none, none, none, none, none, none, want_query, want_keys, want_scale, false,
                       want_positive, precision, kept_keys, factor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&info_nce));
  m.impl("info_nce_grad", TORCH_BOX(&info_nce_grad));
  m.impl("info_nce_grad_rows", TORCH_BOX(&info_nce_grad_rows));
  m.impl("info_nce_mean", TORCH_BOX(&info_nce_mean));
  m.impl("info_nce_mean_grad", TORCH_BOX(&info_nce_mean_grad));
}
