// kdfast::similarity_pooled_second on the CPU: the second derivative of a softmax's log-sum-exp and pooled output along a direction.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "similarity/bind_pairs.h"

namespace {

using kdfast::kColumnsInOneTile;
using kdfast::PooledSecondPart;
using kdfast::PooledSecondRows;
using kdfast::PooledSecondSums;
using kdfast::PooledTangent;
using kdfast::RowMoments;

// Moments and sums, all of them 0 so far. Where all columns of a rectangle's rows are few, their tiles are formed once; else once for the
// moments and once more for the sums.
void take_pooled_second(const SimilarityParams& p, const PooledTangent& t, const PooledSecondSums& out) {
  PairParams size{};
  size.batch = p.batch, size.rows = p.rows, size.columns = p.columns, size.width = std::max(p.width, p.pooled_width);
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t products = out.keys != nullptr ? 12 : 6;
  const bool once = p.columns <= kColumnsInOneTile && rectangle_parts(size, workers_for(work_of(size, products))) == 1;
  const auto take = [&](PooledSecondPart part) {
    for_each_rectangle(
        size, products, [&](int64_t rows, int64_t columns) { return kernels.pooled_second_workspace(p, t, out, rows, columns, part); },
        [&](PairTask task, float* work) {
          task.column_end = std::min(task.column_end, valid_columns(p, task.batch));
          if (task.column_begin < task.column_end) kernels.pooled_second(p, {task, part}, t, out, work);
        });
  };
  if (once) return take(PooledSecondPart::kBoth);
  take(PooledSecondPart::kMoments);
  take(PooledSecondPart::kSums);
}

// Gradients of <directions, first-order gradients> in g, h, query, keys, scale and values; [0] where not wanted. Of keys that are values,
// theirs has that of values.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> similarity_pooled_second(
    const Tensor& g, const Tensor& h, const OptionalTensor& query_direction, const OptionalTensor& keys_direction,
    const OptionalTensor& scale_direction, const OptionalTensor& values_direction, const Tensor& lse, const Tensor& lse_low,
    const Tensor& query, const Tensor& keys, const Tensor& scale, const OptionalTensor& bias, const OptionalTensor& values,
    const OptionalTensor& query_labels, const OptionalTensor& key_labels, const OptionalTensor& key_index, const OptionalTensor& limit,
    const OptionalTensor& valid, bool want_h, bool want_keys, bool want_scale, bool want_values, int64_t precision) {
  STD_TORCH_CHECK(values.has_value() || !(want_values || values_direction.has_value()),
                  "keys that are the values have no other direction or gradient");
  SimilarityParams p = parameters(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, true, precision);
  add_values(p, values);
  if (p.precision == kdfast::Precision::kFloat32Rows) p.precision = kdfast::Precision::kFloat32Vectors;
  PooledTangent t{};
  t.g = packed<float>("g", g, {p.batch, p.rows});
  t.h = {packed<float>("h", h, {p.batch, p.rows, p.pooled_width}), kdfast::ElementType::kFloat32};
  t.lse = packed<float>("lse", lse, {p.batch, p.rows}), t.lse_low = packed<float>("lse_low", lse_low, {p.batch, p.rows});
  const auto column_direction = [&](const char* name, const OptionalTensor& x, int64_t width, int64_t* stride) {
    return x.has_value() ? column_matrix(name, *x, {p.batch, p.columns, width}, stride) : kdfast::Matrix{};
  };
  t.keys_direction = column_direction("keys_direction", keys_direction, p.width, &t.keys_direction_batch_stride);
  t.values_direction = column_direction("values_direction", values_direction, p.pooled_width, &t.values_direction_batch_stride);
  PooledSecondRows made{};
  if (query_direction.has_value()) made.query_direction = row_matrix("query_direction", *query_direction, {p.batch, p.rows, p.width});
  made.scale_direction = row_data<float>("scale_direction", scale_direction, {p.batch, p.rows});

  const int64_t count = p.batch * p.rows;
  const Tensor dg = output(query, {p.batch, p.rows}), dquery = output(query, {p.batch, p.rows, p.width});
  const Tensor dscale = want_scale ? output(query, {p.batch, p.rows}) : output(query, {0});
  const Tensor dh = zeros(query, want_h, {p.batch, p.rows, p.pooled_width});
  const Tensor dkeys = zeros(query, want_keys, {p.batch, p.columns, p.width});
  const Tensor dvalues = zeros(query, want_values, {p.batch, p.columns, p.pooled_width});
  made.dg = floats_of(dg), made.dquery = floats_of(dquery), made.dscale = data_of(want_scale, dscale);
  const bool with_slopes = want_scale || made.scale_direction != nullptr;
  const Tensor scratch_rows = scratch(count * p.width * (with_slopes ? 3 : 2));
  float* const rows = floats_of(scratch_rows);
  std::fill_n(rows, scratch_rows.numel() - count * p.width, 0.0f);
  made.direction = rows + scratch_rows.numel() - count * p.width;
  t.direction = {made.direction, kdfast::ElementType::kFloat32};
  std::vector<RowMoments> moments(static_cast<size_t>(count), RowMoments{});
  const PooledSecondSums out{moments.data(), rows, with_slopes ? rows + count * p.width : nullptr, data_of(want_h, dh),
                             data_of(want_keys, dkeys), data_of(want_values, dvalues)};
  if (!want_keys && !want_values && t.keys_direction_batch_stride == 0 && t.values_direction_batch_stride == 0) fold_batch(p);

  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t workers = workers_for(double(count) * double(p.width));
  for_each_rows(workers, count, [&](int64_t, int64_t begin, int64_t end) { kernels.pooled_second_directions(p, made, begin, end); });
  if (count * p.columns > 0) take_pooled_second(p, t, out);
  for_each_rows(workers, count, [&](int64_t, int64_t begin, int64_t end) { kernels.pooled_second_finish(p, out, made, begin, end); });
  return {dg, dh, dquery, dkeys, dscale, dvalues};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("similarity_pooled_second", TORCH_BOX(&similarity_pooled_second)); }
