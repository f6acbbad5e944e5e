// kdfast::info_nce and kdfast::info_nce_grad on the CPU: the streaming softmax of the negatives, by its own ops, and the rows of the loss.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "info_nce/bind_attraction.h"
#include "info_nce/bind_info_nce.h"
#include "info_nce/bind_reduction.h"
#include "info_nce/bind_smoothing.h"
#include "similarity/bind_pairs.h"

namespace {

// ---- rows -----------------------------------------------------------------------------------------------------------

// The weights of the positives, times each row's factor.
std::vector<float> reweighted(const InfoNceParams& p, const std::vector<float>& factors) {
  std::vector<float> weights(factors.size() * p.positives);
  for (int64_t at = 0; at < int64_t(weights.size()); ++at)
    weights[at] = float(double(factors[at / p.positives]) * (p.weights != nullptr ? double(p.weights[at]) : 1 / double(p.positives)));
  return weights;
}

bool has_positive(const InfoNceParams& p, int64_t row) {
  if (p.columns == nullptr) return true;
  const int64_t* const columns = p.columns + row * p.positives;
  return std::any_of(columns, columns + p.positives, [](int64_t c) { return c >= 0; });
}

// A row's class is part of its denominator where it attracts.
SimilarityParams without_labels(SimilarityParams p) {
  p.query_labels = p.key_labels = nullptr;
  return p;
}

// ---- few pairs ------------------------------------------------------------------------------------------------------

// Whether the keys that rows leave out can be named by one label each: by their classes, or a row's one index.
bool few_pairs_of(const SimilarityParams& p) {
  const bool by_label = p.key_labels == nullptr ? p.key_indices <= 1 : p.key_indices == 0;
  return by_label && p.bias == nullptr && p.limit == nullptr && p.valid == nullptr && kdfast::few_pairs(p.rows, p.columns, p.width);
}

// lse and lse_low of few_pairs and, from the same scores, both gradients: pull, and the keys' for an upstream of 1 of every loss, but for the
// positives among them. `find()` makes losses and slopes, and what `upstream` is given. straight: pulls are straightened, for a gradient of the
// scale.
template <class Find>
void kept_info_nce(const InfoNceParams& p, const SimilarityParams& bank, int64_t precision, const InfoNceRows& r, float* lse, float* lse_low,
                   float* keys_sums, bool straight, const SymmetricUpstream& upstream, const Find& find) {
  PairParams pairs{};
  pairs.precision = precision_for_rows(precision_of(precision), std::min(p.rows, bank.columns), kPairRowsOnVectors);
  pairs.batch = 1, pairs.rows = p.rows, pairs.columns = bank.columns, pairs.width = p.width;
  pairs.x = p.query, pairs.y = bank.keys;
  pairs.scale = p.scale;
  pairs.x_labels = bank.query_labels, pairs.y_labels = bank.key_labels;
  std::vector<int64_t> places(bank.key_indices > 0 ? bank.columns : 0);
  if (bank.key_indices > 0) {
    std::iota(places.begin(), places.end(), int64_t(0));
    pairs.x_labels = bank.key_index, pairs.y_labels = places.data();
  }
  std::vector<float> scores(straight ? p.rows : 0, 0.0f);
  InfoNceRows pulled = r;
  PairSums sums{r.pull, keys_sums, nullptr};
  if (straight) pulled.scores = sums.scores = scores.data();
  const Workspace<float> workspace = product_workspace(kept_words(pairs, sums, false, false));
  kept_symmetric_sums(pairs, lse, lse_low, nullptr, nullptr, [&] {
    find();
    if (straight) pulled.level = sums.level = level_of(lse, p.scale, p.rows, bank.columns);
  }, upstream, sums, workspace.data());
  kdfast::cpu_kernels().info_nce_pull(p, pulled);
}

// ---- the ops --------------------------------------------------------------------------------------------------------

// Losses or their mean, statistics, pull, and the keys' gradient for an upstream of 1 of every loss: where it is asked for, with pull,
// and these are few_pairs_of a bank; else [0], and info_nce_grad forms it.
std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce(const Tensor& query, const Tensor& keys, const OptionalTensor& scale, const OptionalTensor& bias,
                                                    const OptionalTensor& query_labels, const OptionalTensor& key_labels,
                                                    const OptionalTensor& key_index, const OptionalTensor& limit, const OptionalTensor& valid,
                                                    const OptionalTensor& positive, const OptionalTensor& columns,
                                                    const OptionalTensor& weights, bool include_positive, bool mean, bool want_pull,
                                                    int64_t precision, const OptionalTensor& panels, bool keep_keys, double factor, double smoothing,
                                                    bool attract, const OptionalTensor& row_weights, bool sum, bool want_scale) {
  STD_TORCH_CHECK(!attract || (query_labels.has_value() && !columns.has_value() && !weights.has_value() && !limit.has_value() && smoothing == 0),
                  "attraction needs query_labels, and no columns, weights, limit or smoothing");
  const Batch batch{query.dim() == 3};
  const Tensor q = batch.in(query), k = batch.in(keys), s = batch.scale(scale, factor, q);
  const OptionalTensor b = batch.in(bias), given = batch.in(positive), chosen = batch.named(columns), w = batch.in(weights);
  InfoNceParams p = rows_of(q, s);
  if (!attract || given.has_value()) take_positives(p, batch, given, chosen, k, b);
  p.weights = row_data<float>("weights", w, {p.batch, p.rows, p.positives});
  const OptionalTensor of_rows = batch.in(row_weights);
  const Reduction reduction{mean, mean && sum, row_data<float>("row_weights", of_rows, {p.batch, p.rows})};

  std::vector<float> of_mean(mean ? p.batch * p.rows : 0);
  const Tensor losses = mean ? output(query, {}) : batch.given ? output(query, {p.batch, p.rows}) : output(query, {p.rows});
  const Tensor statistics = output(query, {kStatistics + p.positives + (smoothing > 0 || attract ? kSpread : 0), p.batch, p.rows});
  const Tensor pull = !want_pull ? output(query, {0}) : batch.given ? output(query, {p.batch, p.rows, p.width}) : output(query, {p.rows, p.width});
  const Statistics of(statistics, p.batch * p.rows, p.positives);
  float* const out = mean ? of_mean.data() : floats_of(losses);
  const OptionalTensor labels = batch.in(query_labels), of_keys = batch.in(key_labels), index = batch.named(key_index);
  const OptionalTensor limits = batch.in(limit), prefix = batch.in(valid);
  const SimilarityParams bank = parameters(q, k, s, b, labels, of_keys, index, limits, prefix, want_pull, precision);
  const SimilarityParams softmax = attract && include_positive ? without_labels(bank) : bank;
  const bool keep = keep_keys && mean && want_pull && !batch.given && (include_positive || !attract) && few_pairs_of(softmax);
  const Tensor kept = keep ? output(query, {k.size(1), p.width}) : output(query, {0});
  const InfoNceRows rows{0, p.batch * p.rows, include_positive, of.lse, of.lse_low, out, of.slopes, want_pull ? floats_of(pull) : nullptr};
  const std::optional<Attraction> attraction = attract ? std::optional<Attraction>(std::in_place, p, bank) : std::nullopt;
  const auto attract_rows = [&] {
    attraction->find(rows, of.of_lse, of.e);
    attraction->scale(rows, reduction.factors(rows.end, [&](int64_t i) { return of.e[i] > 0; }), of.of_lse, of.e);
  };
  std::vector<float> of_positives;
  const auto find_rows = [&](float* pulls) {
    const auto empty = [&](int64_t i) { return !include_positive && of.lse[i] == -std::numeric_limits<float>::infinity(); };
    const std::vector<float> factors = reduction.factors(rows.end, [&](int64_t i) { return !empty(i) && has_positive(p, i); });
    if (!factors.empty()) of_positives = reweighted(p, factors), p.weights = of_positives.data();
    for_rows(p, [&](int64_t begin, int64_t end) {
      kdfast::cpu_kernels().info_nce_rows(p, {begin, end, include_positive, of.lse, of.lse_low, out, of.slopes, pulls});
    });
    for (int64_t i = 0; i < rows.end && !factors.empty(); ++i)
      if (empty(i)) out[i] = 0;
  };
  if (keep) {
    const Tensor more = zeros(query, true, {attract ? bank.columns : p.rows});
    float* const others = floats_of(more);
    SymmetricUpstream upstream{attract ? of.of_lse : others, of.lse, of.lse_low};
    if (attract) upstream.row_class = bank.query_labels, upstream.column_class = bank.key_labels, upstream.row_pull = of.e, upstream.column_pull = others;
    kept_info_nce(p, softmax, precision, rows, of.lse, of.lse_low, floats_of(kept), want_scale, upstream, [&] {
      if (attract) return attract_rows();
      find_rows(nullptr);
      for (int64_t i = 0; i < p.rows; ++i) others[i] = std::accumulate(of.slopes + i * p.positives, of.slopes + (i + 1) * p.positives, 0.0f);
    });
  } else {
    kdfast::streaming_softmax(softmax, panels, of.lse, of.lse_low, floats_of(pull));
    attract ? attract_rows() : find_rows(rows.pull);
    if (attract && want_pull) attraction->pull_rows(rows, of.of_lse, of.e);
  }
  if (smoothing > 0) smooth_rows(p, bank, smoothing, rows, of.of_lse, of.e);
  if (keep) {
    const float one = 1;
    InfoNceGradients d{};
    d.g = &one, d.factor = 1, d.slopes = of.slopes, d.dcandidates = floats_of(kept);
    if (smoothing > 0) spread_to_bank(p, bank, Keys::kOfOthers, d, of.e, floats_of(kept), nullptr);
    if (chosen.has_value()) kdfast::cpu_kernels().info_nce_grad_candidates(p, d);
  }
  if (mean) *floats_of(losses) = mean_of(out, p.batch * p.rows);
  return {losses, statistics, pull, kept};
}

// The backward pass of the rows, but for its run: what belongs to them and is wanted of query, scale and positive.
struct Backward {
  const Batch batch;
  const Tensor query, scale, pull, g;
  InfoNceParams p;
  InfoNceGradients d{};
  Tensor dquery, dscale, dpositive;

  Backward(const Tensor& upstream, const OptionalTensor& statistics, const Tensor& pulls, const Tensor& queries, const OptionalTensor& scales,
           bool want_query, bool want_scale, bool want_positive, double factor, bool spread)
      : batch{queries.dim() == 3}, query(batch.in(queries)), scale(batch.scale(scales, factor, query)),
        pull(pulls.dim() == 2 ? batch_of_one(pulls) : pulls), g(upstream.dim() == 0 ? upstream : batch.in(upstream)), p(rows_of(query, scale)) {
    if (statistics.has_value()) {
      const int64_t beside = kStatistics + (spread ? kSpread : 0);
      STD_TORCH_CHECK(statistics->dim() == 3 && statistics->size(0) >= beside, "statistics must have 3 dimensions, ", beside, " rows or more");
      p.positives = statistics->size(0) - beside;
      packed<float>("statistics", *statistics, {beside + p.positives, p.batch, p.rows});
      d.slopes = Statistics(*statistics, p.batch * p.rows, p.positives).slopes;
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

  // Memory for a gradient, in a tensor that is [0] where it is not wanted.
  float* wanted(Tensor& x, bool want, std::vector<int64_t> shape) const {
    if (want && !batch.given) shape.erase(shape.begin());
    x = output(query, want ? shape : std::vector<int64_t>{0});
    return want ? floats_of(x) : nullptr;
  }

  void run() const {
    for_rows(p, [&](int64_t begin, int64_t end) { kdfast::cpu_kernels().info_nce_grad_rows(p, d, begin, end); });
  }
};

// The gradients of query, scale and positive, [0] where not wanted. Without statistics there are no positives, and `pull` is all that pulls a query.
std::tuple<Tensor, Tensor, Tensor> info_nce_grad_rows(const Tensor& g, const OptionalTensor& statistics, const Tensor& pull, const Tensor& query,
                                                      const OptionalTensor& scale, bool want_query, bool want_scale, bool want_positive,
                                                      double factor, bool spread) {
  const Backward back(g, statistics, pull, query, scale, want_query, want_scale, want_positive, factor, spread);
  back.run();
  return {back.dquery, back.dscale, back.dpositive};
}

// The gradients of query, keys, scale, bias and positive, with a leading batch dimension where the arguments have one; [0] where not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_grad(
    const Tensor& g, const Tensor& statistics, const Tensor& pull, const Tensor& query, const Tensor& keys, const OptionalTensor& scale,
    const OptionalTensor& bias, const OptionalTensor& query_labels, const OptionalTensor& key_labels, const OptionalTensor& key_index,
    const OptionalTensor& limit, const OptionalTensor& valid, const OptionalTensor& columns, bool want_query, bool want_keys, bool want_scale,
    bool want_bias, bool want_positive, int64_t precision, const OptionalTensor& kept_keys, double factor, bool spread, bool attract,
    bool include_positive) {
  Backward back(g, statistics, pull, query, scale, want_query, want_scale, want_positive, factor, spread);
  const Batch& batch = back.batch;
  InfoNceParams& p = back.p;
  InfoNceGradients& d = back.d;
  Tensor dkeys = output(query, {0}), dbias = output(query, {0});
  OptionalTensor dlse;
  const bool kept = kept_keys.has_value() && kept_keys->numel() > 0;
  if ((want_keys && !kept) || want_bias) {
    dlse = output(query, {p.batch, p.rows});
    d.dlse = floats_of(*dlse);
  }
  back.run();

  if (kept && want_keys) {
    STD_TORCH_CHECK(g.dim() == 0 && !want_bias, "the gradient of keys is kept for the mean of losses without a bias");
    const float upstream = d.factor * *d.g;
    const float* const sums = packed<float>("kept_keys", *kept_keys, {keys.size(-2), p.width});
    float* const out = back.wanted(dkeys, true, {1, keys.size(-2), p.width});
    std::transform(sums, sums + kept_keys->numel(), out, [&](float x) { return upstream * x; });
  } else if (dlse.has_value()) {
    const Statistics of(statistics, p.batch * p.rows, p.positives);
    for (int64_t i = 0; i < p.batch * p.rows && spread; ++i) d.dlse[i] = d.factor * d.g[i * d.g_stride] * of.of_lse[i];
    const Tensor k = batch.in(keys), lse = torch::stable::select(statistics, 0, 0);
    const OptionalTensor none, lse_low = torch::stable::select(statistics, 0, 1);
    const OptionalTensor b = batch.in(bias), labels = batch.in(query_labels), of_keys = batch.in(key_labels), index = batch.named(key_index);
    const OptionalTensor limits = batch.in(limit), prefix = batch.in(valid);
    const bool exclude = !(attract && include_positive);
    const auto [all_keys, all_bias, no_values] =
        kdfast::similarity_grad_keys(*dlse, none, lse, lse_low, back.query, k, back.scale, b, none, exclude ? labels : none, exclude ? of_keys : none,
                                     index, limits, prefix, want_keys, want_bias, false, precision);
    if (want_keys) dkeys = all_keys;
    if (want_bias) dbias = all_bias;
    float *const to_keys = want_keys ? floats_of(all_keys) : nullptr, *const to_bias = want_bias ? floats_of(all_bias) : nullptr;
    if (spread) {
      const SimilarityParams bank = parameters(back.query, k, back.scale, b, labels, of_keys, index, limits, prefix, false, precision);
      spread_to_bank(p, bank, attract ? Keys::kOfItsClass : Keys::kOfOthers, d, of.e, to_keys, to_bias);
    }
    if (columns.has_value()) {
      const Tensor chosen = *batch.named(columns);
      take_columns(p, chosen, k);
      d.dcandidates = to_keys, d.dbias = to_bias;
      kdfast::cpu_kernels().info_nce_grad_candidates(p, d);
    }
  }
  if (!batch.given && dkeys.dim() == 3) dkeys = torch::stable::squeeze(dkeys, 0);
  if (!batch.given && dbias.dim() == 2) dbias = torch::stable::squeeze(dbias, 0);
  return {back.dquery, dkeys, back.dscale, dbias, back.dpositive};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&info_nce));
  m.impl("info_nce_grad", TORCH_BOX(&info_nce_grad));
  m.impl("info_nce_grad_rows", TORCH_BOX(&info_nce_grad_rows));
}
