// kdfast::info_nce_second on the CPU: the second derivative of InfoNCE's losses along a direction, from what the forward pass left.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "similarity/bind_info_nce.h"

namespace {

using kdfast::InfoNceTangent;
using kdfast::SimilarityUpstream;

// Rows of `matrix`'s shape: a direction of them.
kdfast::Matrix direction_of(const char* name, const OptionalTensor& direction, int64_t numbers) {
  if (!direction.has_value()) return {};
  STD_TORCH_CHECK(direction->numel() == numbers, name, " must have ", numbers, " elements, got ", direction->numel());
  return matrix(name, *direction);
}

// Gradients in g, query, scale and positive, the last as [count, width]; [0] where not wanted. Of matrices, no weights of positives, no smoothing.
std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_second(
    const Tensor& g, const OptionalTensor& query_direction, const OptionalTensor& scale_direction, const OptionalTensor& positive_direction,
    const Tensor& statistics, const Tensor& pull, const Tensor& query, const Tensor& keys, const OptionalTensor& scale, const OptionalTensor& bias,
    const OptionalTensor& query_labels, const OptionalTensor& key_labels, const OptionalTensor& key_index, const OptionalTensor& limit,
    const OptionalTensor& valid, const OptionalTensor& positive, const OptionalTensor& columns, bool include_positive, bool want_g,
    bool want_scale, bool want_positive, int64_t precision, double factor) {
  STD_TORCH_CHECK(query.dim() == 2, "query must have 2 dimensions, got ", query.dim());
  const Batch batch{false};
  const Tensor q = batch.in(query), k = batch.in(keys), s = batch.scale(scale, factor, q), upstream = batch.in(g);
  const OptionalTensor b = batch.in(bias), given = batch.in(positive), chosen = batch.in(columns);
  const OptionalTensor of_query = batch.in(query_direction), of_scale = batch.in(scale_direction), of_positive = batch.in(positive_direction);
  InfoNceParams p = rows_of(q, s);
  take_positives(p, batch, given, chosen, k, b);
  STD_TORCH_CHECK(given.has_value() || !(want_positive || of_positive.has_value()), "columns of the bank have no direction of their own");
  packed<float>("statistics", statistics, {kStatistics + p.positives, 1, p.rows});
  const Statistics of(statistics, p.rows, p.positives);

  InfoNceTangent t{};
  const bool mean = g.dim() == 0;
  t.g = mean ? data<float>(upstream) : packed<float>("g", upstream, {1, p.rows});
  t.g_stride = mean ? 0 : 1;
  t.factor = mean ? 1 / float(p.rows) : 1;
  t.include_positive = include_positive;
  t.lse = of.lse, t.lse_low = of.lse_low, t.slopes = of.slopes;
  t.pull = packed<float>("pull", pull, {1, p.rows, p.width});
  t.query = direction_of("query_direction", of_query, p.rows * p.width);
  t.scale = row_data<float>("scale_direction", of_scale, {1, p.rows});
  t.candidates = direction_of("positive_direction", of_positive, p.count * p.width);

  const Tensor made = scratch(p.rows * (3 * p.width + p.positives + 4));
  t.direction = floats_of(made), t.pooled = t.direction + p.rows * p.width;
  float* const rows = t.pooled + p.rows * p.width;
  t.slope = rows + p.rows * p.width;
  float *const mass = t.slope + p.rows, *const total = mass + p.rows, *const moved = total + p.rows;
  t.curvature = moved + p.rows;
  t.dg = want_g ? moved : nullptr;
  t.rows = rows, t.mass = mass, t.total = total;

  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  for_rows(p, [&](int64_t begin, int64_t end) { kernels.info_nce_direction(p, t, begin, end); });
  const SimilarityParams bank = parameters(q, k, s, b, batch.in(query_labels), batch.in(key_labels), batch.in(key_index), batch.in(limit),
                                           batch.in(valid), true, precision);
  const SimilarityUpstream along{t.slope, {t.direction, kdfast::ElementType::kFloat32}, t.lse, t.lse_low};
  kdfast::similarity_row_sums(bank, along, rows, mass, total);

  Tensor dg = want_g ? mean ? output(query, {}) : output(query, {p.rows}) : output(query, {0}), dquery = output(query, {p.rows, p.width});
  Tensor dscale = output(query, {want_scale ? p.rows : 0});
  Tensor dpositive = want_positive ? filled(query, {p.count, p.width}, 0) : output(query, {0});
  t.dquery = floats_of(dquery);
  t.dscale = want_scale ? floats_of(dscale) : nullptr;
  t.dcandidates = want_positive ? floats_of(dpositive) : nullptr;
  for_rows(p, [&](int64_t begin, int64_t end) { kernels.info_nce_second_rows(p, t, begin, end); });
  if (want_positive) kernels.info_nce_second_candidates(p, t);
  leave_vectors();
  if (want_g && mean) *floats_of(dg) = mean_of(moved, p.rows);
  if (want_g && !mean) std::copy_n(moved, p.rows, floats_of(dg));
  return {dg, dquery, dscale, dpositive};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("info_nce_second", TORCH_BOX(&info_nce_second));
}
