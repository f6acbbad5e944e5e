// kdfast::matching_loss and kdfast::matching_loss_grad on the CPU: CLIP, NT-Xent and SigLIP, from the pass over all pairs to the mean of the
// losses, and back.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "similarity/bind_pairs.h"

namespace {

using kdfast::Matching;
using kdfast::MatchingGradients;

// One call. With a shift it is the sigmoid loss of all pairs. Otherwise softmaxes over the other samples: without y the columns are the rows
// themselves, two views of N / 2 samples.
struct MatchingCall {
  Matching m;
  PairParams p;
  Tensor of_rows, labels;  // memory: scale and, for the sigmoid, shift of every row; its label, or its positive

  bool sigmoid() const { return p.shift != nullptr; }
  int64_t sides() const { return sigmoid() ? 0 : m.views ? 1 : 2; }
};

MatchingCall matching_call(const Tensor& x, const OptionalTensor& y, const Tensor& scale, const OptionalTensor& shift, const OptionalTensor& labels,
                           int64_t precision) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(y.has_value() || x.size(0) % 2 == 0, "x must hold as many rows of one view as of the other, got ", x.size(0));
  STD_TORCH_CHECK(!shift.has_value() || (y.has_value() && !labels.has_value()), "shift needs y, and no labels");
  const int64_t rows = x.size(0), width = x.size(1), samples = y.has_value() ? rows : rows / 2;
  const Tensor& other = y.has_value() ? *y : x;
  STD_TORCH_CHECK(other.scalar_type() == x.scalar_type(), "y must have the dtype of x");
  MatchingCall call{{}, {}, scratch((shift.has_value() ? 2 : 1) * rows), labels.has_value() ? *labels : scratch(rows, ScalarType::Long)};
  Matching& m = call.m;
  m.rows = rows, m.width = width, m.views = !y.has_value();
  m.x = row_matrix("x", x, {rows, width}), m.y = row_matrix("y", other, {rows, width});
  m.scale = *packed<float>("scale", scale, {});
  float* const scales = floats_of(call.of_rows);
  std::fill_n(scales, rows, m.scale);
  if (!labels.has_value())
    for (int64_t i = 0; i < rows; ++i) static_cast<int64_t*>(call.labels.mutable_data_ptr())[i] = i % samples;

  PairParams& p = call.p;
  p.precision = precision_for_rows(precision_of(precision), rows, m.views ? kRowsOnVectors : kPairRowsOnVectors);  // as view_log_sums
  p.batch = 1, p.rows = p.columns = rows, p.width = width;
  p.x = m.x, p.y = m.y;
  p.scale = scales;
  const int64_t* const classes = packed<int64_t>("labels", call.labels, {rows});
  if (shift.has_value()) {
    std::fill_n(scales + rows, rows, *packed<float>("shift", *shift, {}));
    p.shift = scales + rows, p.positive = classes;
  } else {
    p.x_labels = p.y_labels = classes;
  }
  return call;
}

// The log-sum-exps of two views' rows over the rows of other samples, and what they have no room for.
void view_log_sums(const MatchingCall& call, const Tensor& x, int64_t precision, float* lse, float* low) {
  const Tensor one = batch_of_one(x);
  const OptionalTensor none, labels = batch_of_one(call.labels);
  const auto [sums, pooled, rest] = kdfast::similarity_softmax(one, one, batch_of_one(call.of_rows), none, none, none, none, labels, labels, none,
                                                               none, none, false, precision, none);
  std::copy_n(data<float>(sums), call.m.rows, lse);
  std::copy_n(data<float>(rest), call.m.rows, low);
}

constexpr int64_t kStatistics = 3;  // log-sum-exps, their low digits and slopes of a side, [rows] each

std::tuple<Tensor, Tensor> matching_loss(const Tensor& x, const OptionalTensor& y, const Tensor& scale, const OptionalTensor& shift,
                                         const OptionalTensor& labels, bool mean, int64_t precision) {
  const MatchingCall call = matching_call(x, y, scale, shift, labels, precision);
  const int64_t rows = call.m.rows, sides = call.sides();
  const Tensor statistics = output(x, {sides * kStatistics, rows}), losses = output(x, {rows});
  float *const row = floats_of(statistics), *const column = row + kStatistics * rows;
  if (call.sigmoid()) {
    sigmoid_losses(call.p, floats_of(losses));
  } else {
    if (call.m.views) {
      view_log_sums(call, x, precision, row, row + rows);
    } else {
      symmetric_log_sums(call.p, row, row + rows, column, column + rows);
    }
    kdfast::cpu_kernels().matching_losses(call.m, {sides, {row, column}, floats_of(losses), {row + 2 * rows, column + 2 * rows}});
  }
  if (!mean) return {losses, statistics};
  const Tensor value = output(x, {});
  *floats_of(value) = mean_of(floats_of(losses), rows);
  return {value, statistics};
}

double total(const Tensor& x, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += data<float>(x)[i];
  return sum;
}

// The gradients that are wanted, in the order of x, y, scale, shift.
std::vector<Tensor> matching_loss_grad(const Tensor& g, const Tensor& statistics, const Tensor& x, const OptionalTensor& y, const Tensor& scale,
                                       const OptionalTensor& shift, const OptionalTensor& labels, bool want_x, bool want_y, bool want_scale,
                                       bool want_shift, int64_t precision) {
  const MatchingCall call = matching_call(x, y, scale, shift, labels, precision);
  const Matching& m = call.m;
  const int64_t rows = m.rows, sides = call.sides();
  const bool mean = g.dim() == 0;
  const float* const upstream = mean ? packed<float>("g", g, {}) : packed<float>("g", g, {rows});
  const float* const row = packed<float>("statistics", statistics, {sides * kStatistics, rows});
  const float* const column = m.views ? row : row + kStatistics * rows;

  const Tensor of_rows = scratch(3 * rows);
  float *const row_g = floats_of(of_rows), *const column_g = row_g + rows, *const pull = column_g + rows;
  for (int64_t i = 0; i < rows; ++i) row_g[i] = column_g[i] = mean ? *upstream / float(rows) : upstream[i];
  for (int64_t i = 0; i < rows && sides > 0; ++i) row_g[i] *= row[2 * rows + i], column_g[i] *= column[2 * rows + i];
  for (int64_t i = 0; i < rows; ++i) pull[i] = call.sigmoid() ? 0 : row_g[i] + column_g[m.partner(i)];

  const bool sum_x = want_x || want_scale;
  const Tensor x_sums = zeros(x, sum_x, {rows, m.width}), y_sums = zeros(x, want_y, {rows, m.width});
  const Tensor weights = zeros(x, call.sigmoid(), {rows}), dscale = zeros(x, want_scale, {rows});
  const auto wanted = [](bool want, const Tensor& sums) { return want ? floats_of(sums) : nullptr; };
  const PairSums sums{wanted(sum_x, x_sums), wanted(want_y, y_sums), wanted(call.sigmoid(), weights)};
  if (call.sigmoid()) {
    sigmoid_sums(call.p, row_g, sums);
  } else {
    symmetric_sums(call.p, {row_g, row, row + rows, column_g, column, column + rows}, sums);
  }

  std::vector<Tensor> found;
  const auto made = [&](bool want, const Tensor& of) -> void* {
    if (!want) return nullptr;
    found.push_back(x.scalar_type() == ScalarType::Float ? of : output(x, {rows, m.width}, x.scalar_type()));  // floats in place
    return found.back().mutable_data_ptr();
  };
  void *const dx = made(want_x, x_sums), *const dy = made(want_y, y_sums);
  const MatchingGradients d{pull, sums.x_sums, sums.y_sums, dx, dy, wanted(want_scale, dscale)};
  const int64_t workers = workers_for(double(rows) * double(m.width) * 4);
  for_each_task(workers, workers, [&](int64_t, int64_t t) {
    kdfast::cpu_kernels().matching_gradients(m, d, t * rows / workers, (t + 1) * rows / workers);
  });
  const auto add_scalar = [&](bool want, const Tensor& terms, double factor) {
    if (!want) return;
    found.push_back(output(x, {}));
    *floats_of(found.back()) = float(factor * total(terms, rows));
  };
  add_scalar(want_scale, dscale, m.views ? 0.5 : 1);  // with two views the sums held every pair twice
  add_scalar(want_shift, weights, 1);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("matching_loss", TORCH_BOX(&matching_loss));
  m.impl("matching_loss_grad", TORCH_BOX(&matching_loss_grad));
}
