// kdfast::similarity_second and kdfast::info_nce_second on the CPU: the second derivative of log-sum-exps, and of InfoNCE's losses, along a direction,
// from what the forward pass left.

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "info_nce/bind_info_nce.h"
#include "similarity/bind_pairs.h"

namespace {

using kdfast::InfoNceTangent;
using kdfast::kMostLargeShares;
using kdfast::LargeShare;
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
  if (out.keys == nullptr) return;
  const int64_t count = p.batch * p.rows;
  std::vector<float> off(count);
  for (int64_t i = 0; i < count; ++i) off[i] = out.mass[i] == 0 ? 0 : u.of_rate[i] * out.total[i] / out.mass[i];
  for_each_rows(workers_for(double(count) * double(p.width)), p.columns, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = 0; b < p.batch; ++b) kernels.tangent_finish_keys(p, out, off.data(), b, begin, end);
  });
}

struct KeysDirection {
  kdfast::Matrix matrix;  // not given: 0
  int64_t batch_stride;
};

// Everything from the directions in `t` to the outputs it names and dkeys (null: not wanted), which is 0 so far. 6 N M D where the keys neither
// move nor want a gradient; else 12, and 4 for the mean of their direction.
void take_second_order(const InfoNceParams& p, InfoNceTangent t, SimilarityParams bank, const KeysDirection& of_keys, float* dkeys) {
  const int64_t count = p.batch * p.rows;
  const Tensor made = scratch(count * (4 * p.width + p.positives + 7 + (dkeys != nullptr ? 2 * kMostLargeShares + 1 : 0)));
  float* free = floats_of(made);
  const auto take = [&](int64_t numbers) { return std::exchange(free, free + count * numbers); };
  t.direction = take(p.width), t.pooled = take(p.width), t.slope = take(1), t.curvature = take(p.positives);
  float *const rows = take(p.width), *const mass = take(1), *const total = take(1);
  t.rows = rows, t.mass = mass, t.total = total;
  const kdfast::Matrix direction{t.direction, kdfast::ElementType::kFloat32};
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const auto direct = [&] { for_rows(p, [&](int64_t begin, int64_t end) { kernels.info_nce_direction(p, t, begin, end); }); };

  const bool moves = of_keys.matrix.data != nullptr;
  if (!moves && dkeys == nullptr) {
    direct();
    kdfast::similarity_row_sums(bank, {t.slope, direction, t.lse, t.lse_low}, rows, mass, total);
  } else {
    float *const of_rate = take(1), *const of_weight = take(1), *const lse = take(1), *const low = take(1);
    if (bank.precision == kdfast::Precision::kFloat32Rows) bank.precision = kdfast::Precision::kFloat32Vectors;
    if (moves) {  // and the log-sum-exps of scores that have the bits of the pass below
      SimilarityParams pooled = bank;
      pooled.values = of_keys.matrix, pooled.values_batch_stride = of_keys.batch_stride;
      float* const keys_mean = take(p.width);
      kdfast::streaming_softmax(pooled, std::nullopt, lse, low, keys_mean);
      t.keys_mean = keys_mean;
    } else {
      std::copy_n(t.lse, count, lse), std::copy_n(t.lse_low, count, low);
    }
    direct();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * p.positives, end = at + p.positives;
      const float g = t.factor * t.g[i * t.g_stride];
      of_rate[i] = g * (t.slopes != nullptr ? std::accumulate(t.slopes + at, t.slopes + end, 0.0f) : 1);
      of_weight[i] = g * std::accumulate(t.curvature + at, t.curvature + end, 0.0f);
    }
    std::fill_n(rows, count * p.width, 0.0f);
    std::fill_n(mass, count, 0.0f), std::fill_n(total, count, 0.0f);
    kdfast::LargeShares large{};
    if (dkeys != nullptr) {
      large = {reinterpret_cast<LargeShare*>(take(2 * kMostLargeShares)), reinterpret_cast<int32_t*>(take(1))};
      std::fill_n(large.count, count, 0);
    }
    tangent_sums(bank, {direction, of_keys.matrix, of_keys.batch_stride, t.slope, lse, low, of_rate, of_weight},
                 {rows, mass, total, dkeys, large});
  }
  for_rows(p, [&](int64_t begin, int64_t end) { kernels.info_nce_second_rows(p, t, begin, end); });
  if (t.dcandidates != nullptr) kernels.info_nce_second_candidates(p, t);
  leave_vectors();
}

// Gradients in g, query, keys ([0] unless wanted) and scale, of g times the log-sum-exps, whose mean of the keys is `pooled`.
std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_second(
    const Tensor& g, const OptionalTensor& query_direction, const OptionalTensor& keys_direction, const OptionalTensor& scale_direction,
    const Tensor& lse, const Tensor& lse_low, const Tensor& pooled, const Tensor& query, const Tensor& keys, const Tensor& scale,
    const OptionalTensor& bias, const OptionalTensor& query_labels, const OptionalTensor& key_labels, const OptionalTensor& key_index,
    const OptionalTensor& limit, const OptionalTensor& valid, bool want_keys, int64_t precision) {
  const SimilarityParams bank = parameters(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, true, precision);
  const InfoNceParams p = rows_of(query, scale);
  InfoNceTangent t{};
  t.g = packed<float>("g", g, {p.batch, p.rows}), t.g_stride = 1, t.factor = 1;
  t.lse = packed<float>("lse", lse, {p.batch, p.rows}), t.lse_low = packed<float>("lse_low", lse_low, {p.batch, p.rows});
  t.pull = packed<float>("pooled", pooled, {p.batch, p.rows, p.width});
  if (query_direction.has_value()) t.query = row_matrix("query_direction", *query_direction, {p.batch, p.rows, p.width});
  t.scale = row_data<float>("scale_direction", scale_direction, {p.batch, p.rows});
  KeysDirection of_keys{};
  if (keys_direction.has_value())
    of_keys.matrix = column_matrix("keys_direction", *keys_direction, {p.batch, bank.columns, p.width}, &of_keys.batch_stride);
  Tensor dg = output(query, {p.batch, p.rows}), dquery = output(query, {p.batch, p.rows, p.width}), dscale = output(query, {p.batch, p.rows});
  Tensor dkeys = want_keys ? filled(query, {p.batch, bank.columns, p.width}, 0) : output(query, {0});
  t.dg = floats_of(dg), t.dquery = floats_of(dquery), t.dscale = floats_of(dscale);
  take_second_order(p, t, bank, of_keys, want_keys ? floats_of(dkeys) : nullptr);
  return {dg, dquery, dkeys, dscale};
}

// Gradients in g, query, keys, scale and positive, the last as [count, width]; [0] where not wanted. Of matrices, no weights of positives, no
// smoothing.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_second(
    const Tensor& g, const OptionalTensor& query_direction, const OptionalTensor& keys_direction, const OptionalTensor& scale_direction,
    const OptionalTensor& positive_direction, const Tensor& statistics, const Tensor& pull, const Tensor& query, const Tensor& keys,
    const OptionalTensor& scale, const OptionalTensor& bias, const OptionalTensor& query_labels, const OptionalTensor& key_labels,
    const OptionalTensor& key_index, const OptionalTensor& limit, const OptionalTensor& valid, const OptionalTensor& positive,
    const OptionalTensor& columns, bool include_positive, bool want_g, bool want_keys, bool want_scale, bool want_positive, int64_t precision,
    double factor) {
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
  const bool mean = g.dim() == 0;
  InfoNceTangent t{};
  t.g = mean ? data<float>(upstream) : packed<float>("g", upstream, {1, p.rows});
  t.g_stride = mean ? 0 : 1;
  t.factor = mean ? 1 / float(p.rows) : 1;
  t.include_positive = include_positive;
  t.lse = of.lse, t.lse_low = of.lse_low, t.slopes = of.slopes;
  t.pull = packed<float>("pull", pull, {p.rows, p.width});
  t.query = direction_of("query_direction", of_query, p.rows * p.width);
  t.scale = row_data<float>("scale_direction", of_scale, {1, p.rows});
  const kdfast::Matrix of_bank = direction_of("keys_direction", of_keys, keys_count * p.width);
  t.candidates = given.has_value() ? direction_of("positive_direction", of_positive, p.count * p.width) : of_bank;
  Tensor dg = output(query, {want_g ? p.rows : 0}), dquery = output(query, {p.rows, p.width}), dscale = output(query, {want_scale ? p.rows : 0});
  Tensor dkeys = want_keys ? filled(query, {keys_count, p.width}, 0) : output(query, {0});
  Tensor dpositive = want_positive ? filled(query, {p.count, p.width}, 0) : output(query, {0});
  t.dg = want_g ? floats_of(dg) : nullptr;
  t.dquery = floats_of(dquery);
  t.dscale = want_scale ? floats_of(dscale) : nullptr;
  t.dcandidates = want_positive ? floats_of(dpositive) : want_keys && chosen.has_value() ? floats_of(dkeys) : nullptr;
  const SimilarityParams bank = parameters(q, k, s, b, labels, key_classes, index, limits, prefix, true, precision);
  take_second_order(p, t, bank, {of_bank, 0}, want_keys ? floats_of(dkeys) : nullptr);
  if (want_g && mean) {
    const float value = mean_of(floats_of(dg), p.rows);
    dg = output(query, {});
    *floats_of(dg) = value;
  }
  return {dg, dquery, dkeys, dscale, dpositive};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("similarity_second", TORCH_BOX(&similarity_second));
  m.impl("info_nce_second", TORCH_BOX(&info_nce_second));
}
