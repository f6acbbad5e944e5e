// kdfast::info_nce_second on the CPU: the second derivative of InfoNCE's losses along a direction, from what the forward pass left.

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>
#include <utility>

#include "similarity/bind_info_nce.h"
#include "similarity/bind_pairs.h"

namespace {

using kdfast::InfoNceTangent;
using kdfast::TangentSums;
using kdfast::TangentUpstream;

// Rows of `matrix`'s shape: a direction of them.
kdfast::Matrix direction_of(const char* name, const OptionalTensor& direction, int64_t numbers) {
  if (!direction.has_value()) return {};
  STD_TORCH_CHECK(direction->numel() == numbers, name, " must have ", numbers, " elements, got ", direction->numel());
  return matrix(name, *direction);
}

// Adds its sums to `out`.
void tangent_sums(const SimilarityParams& p, const TangentUpstream& u, const TangentSums& out) {
  PairParams size{};
  size.batch = p.batch, size.rows = p.rows, size.columns = p.columns, size.width = p.width;
  if (p.batch * p.rows * p.columns == 0) return;
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  for_each_rectangle(
      size, out.keys != nullptr ? 6 : 4, [&](int64_t rows, int64_t columns) { return kernels.tangent_workspace(p, u, out, rows, columns); },
      [&](PairTask task, float* work) {
        task.column_end = std::min(task.column_end, valid_columns(p, task.batch));
        if (task.column_begin < task.column_end) kernels.tangent(p, task, u, out, work);
      });
}

// Gradients in g, query, keys, scale and positive, the last as [count, width]; [0] where not wanted. Of matrices, no weights of positives, no
// smoothing. 6 N M D where the keys neither move nor want a gradient; else 12, and 4 for the mean of a direction of theirs.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_second(
    const Tensor& g, const OptionalTensor& query_direction, const OptionalTensor& keys_direction, const OptionalTensor& scale_direction,
    const OptionalTensor& positive_direction, const Tensor& statistics, const Tensor& pull, const Tensor& query, const Tensor& keys, const OptionalTensor& scale, const OptionalTensor& bias,
    const OptionalTensor& query_labels, const OptionalTensor& key_labels, const OptionalTensor& key_index, const OptionalTensor& limit,
    const OptionalTensor& valid, const OptionalTensor& positive, const OptionalTensor& columns, bool include_positive, bool want_g, bool want_keys,
    bool want_scale, bool want_positive, int64_t precision, double factor) {
  STD_TORCH_CHECK(query.dim() == 2, "query must have 2 dimensions, got ", query.dim());
  const Batch batch{false};
  const Tensor q = batch.in(query), k = batch.in(keys), s = batch.scale(scale, factor, q), upstream = batch.in(g);
  const OptionalTensor b = batch.in(bias), given = batch.in(positive), chosen = batch.in(columns);
  const OptionalTensor of_query = batch.in(query_direction), of_keys = batch.in(keys_direction), of_scale = batch.in(scale_direction);
  const OptionalTensor of_positive = batch.in(positive_direction), labels = batch.in(query_labels), key_classes = batch.in(key_labels);
  const OptionalTensor index = batch.in(key_index), limits = batch.in(limit), prefix = batch.in(valid);
  InfoNceParams p = rows_of(q, s);
  take_positives(p, batch, given, chosen, k, b);
  STD_TORCH_CHECK(given.has_value() || !(want_positive || of_positive.has_value()), "columns of the bank have no direction of their own");
  packed<float>("statistics", statistics, {kStatistics + p.positives, 1, p.rows});
  const Statistics of(statistics, p.rows, p.positives);

  const int64_t keys_count = k.size(1);
  const bool moves = of_keys.has_value(), mean = g.dim() == 0;
  const Tensor made = scratch(p.rows * (4 * p.width + p.positives + 8));
  float* free = floats_of(made);
  const auto take = [&](int64_t count) { return std::exchange(free, free + p.rows * count); };
  InfoNceTangent t{};
  t.g = mean ? data<float>(upstream) : packed<float>("g", upstream, {1, p.rows});
  t.g_stride = mean ? 0 : 1;
  t.factor = mean ? 1 / float(p.rows) : 1;
  t.include_positive = include_positive;
  t.lse = of.lse, t.lse_low = of.lse_low, t.slopes = of.slopes;
  t.pull = packed<float>("pull", pull, {1, p.rows, p.width});
  t.query = direction_of("query_direction", of_query, p.rows * p.width);
  t.scale = row_data<float>("scale_direction", of_scale, {1, p.rows});
  const kdfast::Matrix of_bank = direction_of("keys_direction", of_keys, keys_count * p.width);
  t.candidates = given.has_value() ? direction_of("positive_direction", of_positive, p.count * p.width) : of_bank;
  t.direction = take(p.width), t.pooled = take(p.width), t.slope = take(1), t.curvature = take(p.positives);
  float *const rows = take(p.width), *const mass = take(1), *const total = take(1), *const moved = take(1);
  t.rows = rows, t.mass = mass, t.total = total;
  t.dg = want_g ? moved : nullptr;
  Tensor dg = want_g ? mean ? output(query, {}) : output(query, {p.rows}) : output(query, {0}), dquery = output(query, {p.rows, p.width});
  Tensor dkeys = want_keys ? filled(query, {keys_count, p.width}, 0) : output(query, {0}), dscale = output(query, {want_scale ? p.rows : 0});
  Tensor dpositive = want_positive ? filled(query, {p.count, p.width}, 0) : output(query, {0});
  t.dquery = floats_of(dquery);
  t.dscale = want_scale ? floats_of(dscale) : nullptr;
  t.dcandidates = want_positive ? floats_of(dpositive) : want_keys && chosen.has_value() ? floats_of(dkeys) : nullptr;

  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  SimilarityParams bank = parameters(q, k, s, b, labels, key_classes, index, limits, prefix, true, precision);
  if (!moves && !want_keys) {
    for_rows(p, [&](int64_t begin, int64_t end) { kernels.info_nce_direction(p, t, begin, end); });
    kdfast::similarity_row_sums(bank, {t.slope, {t.direction, kdfast::ElementType::kFloat32}, t.lse, t.lse_low}, rows, mass, total);
  } else {
    float *const of_rate = take(1), *const of_weight = take(1), *lse = of.lse, *low = of.lse_low;
    if (bank.precision == kdfast::Precision::kFloat32Rows) bank.precision = kdfast::Precision::kFloat32Vectors;
    if (moves) {  // and the log-sum-exps of scores that have the bits of the pass below
      SimilarityParams pooled = bank;
      pooled.values = of_bank;
      float* const keys_mean = take(p.width);
      lse = take(1), low = take(1);
      kdfast::streaming_softmax(pooled, std::nullopt, lse, low, keys_mean);
      t.keys_mean = keys_mean;
    }
    for_rows(p, [&](int64_t begin, int64_t end) { kernels.info_nce_direction(p, t, begin, end); });
    for (int64_t i = 0; i < p.rows; ++i) {
      const int64_t at = i * p.positives, end = at + p.positives;
      const float row_g = t.factor * t.g[i * t.g_stride];
      of_rate[i] = row_g * std::accumulate(t.slopes + at, t.slopes + end, 0.0f);
      of_weight[i] = row_g * std::accumulate(t.curvature + at, t.curvature + end, 0.0f);
    }
    std::fill_n(rows, p.rows * p.width, 0.0f);
    std::fill_n(mass, p.rows, 0.0f), std::fill_n(total, p.rows, 0.0f);
    tangent_sums(bank, {{t.direction, kdfast::ElementType::kFloat32}, of_bank, t.slope, lse, low, of_rate, of_weight},
                 {rows, mass, total, want_keys ? floats_of(dkeys) : nullptr});
  }
  for_rows(p, [&](int64_t begin, int64_t end) { kernels.info_nce_second_rows(p, t, begin, end); });
  if (t.dcandidates != nullptr) kernels.info_nce_second_candidates(p, t);
  leave_vectors();
  if (want_g && mean) *floats_of(dg) = mean_of(moved, p.rows);
  if (want_g && !mean) std::copy_n(moved, p.rows, floats_of(dg));
  return {dg, dquery, dkeys, dscale, dpositive};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("info_nce_second", TORCH_BOX(&info_nce_second));
}
