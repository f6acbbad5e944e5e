// kdfast::matching_loss and kdfast::matching_loss_grad on the CPU: CLIP, NT-Xent and SigLIP, from the pass over all pairs to the mean of the
// losses, and back.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "similarity/bind_pairs.h"

namespace {

using kdfast::Matching;
using kdfast::MatchingGradients;

// One call. With a shift it is the sigmoid loss of all pairs. Otherwise softmaxes over the other samples, of rows and of columns or of rows
// alone: without y the columns are the rows themselves, two views of N / 2 samples.
struct MatchingCall {
  Matching m;
  PairParams p;
  bool rows_alone;
  Tensor of_rows, labels;  // memory: scale and, for the sigmoid, shift of every row; its label, or its positive

  bool sigmoid() const { return p.shift != nullptr; }
  int64_t sides() const { return sigmoid() ? 0 : m.views || rows_alone ? 1 : 2; }
};

MatchingCall matching_call(const Tensor& x, const OptionalTensor& y, const Tensor& scale, const OptionalTensor& shift, const OptionalTensor& labels,
                           int64_t precision, bool rows_alone) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(y.has_value() || x.size(0) % 2 == 0, "x must hold as many rows of one view as of the other, got ", x.size(0));
  STD_TORCH_CHECK(!shift.has_value() || (y.has_value() && !labels.has_value()), "shift needs y, and no labels");
  STD_TORCH_CHECK(!rows_alone || (y.has_value() && !shift.has_value()), "rows_alone needs y, and no shift");
  const int64_t rows = x.size(0), width = x.size(1), samples = y.has_value() ? rows : rows / 2;
  const Tensor& other = y.has_value() ? *y : x;
  STD_TORCH_CHECK(other.scalar_type() == x.scalar_type(), "y must have the dtype of x");
  MatchingCall call{{}, {}, rows_alone, scratch((shift.has_value() ? 2 : 1) * rows), labels.has_value() ? *labels : scratch(rows, ScalarType::Long)};
  Matching& m = call.m;
  m.rows = rows, m.width = width, m.views = !y.has_value();
  m.x = row_matrix("x", x, {rows, width}), m.y = row_matrix("y", other, {rows, width});
  m.scale = *packed<float>("scale", scale, {});
  float* const scales = floats_of(call.of_rows);
  std::fill_n(scales, rows, m.scale);
  if (!labels.has_value())
    for (int64_t i = 0; i < rows; ++i) static_cast<int64_t*>(call.labels.mutable_data_ptr())[i] = i % samples;

  PairParams& p = call.p;
  p.precision = precision_for_rows(rows <= kKeysInPlace ? kdfast::Precision::kFloat32 : precision_of(precision), rows, kPairRowsOnVectors);
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

// Log-sum-exps, their low digits and slopes of a side, [rows] each. Of the sigmoid loss the sums of the weights, where the sums are kept.
constexpr int64_t kStatistics = 3;

// A backward pass: the rows' upstream gradients and sums over the pairs.
struct Backward {
  const MatchingCall& call;
  const float *row, *column;  // statistics
  Tensor of_rows;
  float *row_g, *column_g, *pull;

  Backward(const MatchingCall& call, const float* statistics)
      : call(call), row(statistics), column(call.sides() < 2 ? row : row + kStatistics * call.m.rows), of_rows(scratch(3 * call.m.rows)) {
    row_g = floats_of(of_rows), pull = row_g + call.m.rows, column_g = call.rows_alone ? nullptr : pull + call.m.rows;
  }

  // g[i stride] times `share` is the upstream gradient of row i's loss.
  void set(const float* g, int64_t stride, float share) const {
    const int64_t rows = call.m.rows;
    const auto weigh = [&](float* side, const float* statistics) {
      for (int64_t i = 0; i < rows; ++i) side[i] = share * g[i * stride] * (call.sigmoid() ? 1 : statistics[2 * rows + i]);
    };
    weigh(row_g, row);
    if (column_g != nullptr) weigh(column_g, column);
    for (int64_t i = 0; i < rows; ++i)
      pull[i] = call.sigmoid() ? 0 : column_g == nullptr ? row_g[i] : row_g[i] + column_g[call.m.partner(i)];
  }
  SymmetricUpstream upstream() const {
    const int64_t rows = call.m.rows;
    return {row_g, row, row + rows, column_g, column, column + rows};
  }
};

inline float* data_of(bool want, const Tensor& x) { return want ? floats_of(x) : nullptr; }

// (losses or their mean, statistics, sums of the rows of x and of y): the sums for an upstream of 1 of the mean, where they are asked for and
// few_pairs; else [0], and matching_loss_grad forms them.
std::tuple<Tensor, Tensor, Tensor, Tensor> matching_loss(const Tensor& x, const OptionalTensor& y, const Tensor& scale, const OptionalTensor& shift,
                                                         const OptionalTensor& labels, bool mean, bool keep_x, bool keep_y, int64_t precision,
                                                         bool rows_alone) {
  const MatchingCall call = matching_call(x, y, scale, shift, labels, precision, rows_alone);
  const int64_t rows = call.m.rows, sides = call.sides();
  const bool kept = mean && (keep_x || keep_y) && kdfast::few_pairs(rows, rows, call.m.width);
  const Tensor losses = output(x, {rows}), statistics = output(x, {call.sigmoid() ? int64_t(kept) : sides * kStatistics, rows});
  const auto sums = [&](bool keep) { return kept && keep ? output(x, {rows, call.m.width}) : output(x, {0}); };
  const Tensor x_sums = sums(keep_x), y_sums = sums(keep_y);
  float *const row = floats_of(statistics), *const column = row + kStatistics * rows;
  const auto find_losses = [&] {
    kdfast::cpu_kernels().matching_losses(call.m, {sides, {row, column}, {row + rows, column + rows}, floats_of(losses), {row + 2 * rows, column + 2 * rows}});
  };
  if (kept) {
    const Backward back(call, row);
    const float one = 1;
    if (call.sigmoid()) {
      std::fill_n(row, rows, 0.0f);
      back.set(&one, 0, 1 / float(rows));
      kept_sigmoid_sums(call.p, floats_of(losses), back.row_g, {data_of(keep_x, x_sums), data_of(keep_y, y_sums), row});
    } else {
      const bool both = sides == 2;
      kept_symmetric_sums(call.p, row, row + rows, both ? column : nullptr, column + rows, [&] {
        find_losses();
        back.set(&one, 0, 1 / float(rows));
      }, back.upstream(), {data_of(keep_x, x_sums), data_of(keep_y, y_sums), nullptr});
    }
  } else if (call.sigmoid()) {
    sigmoid_losses(call.p, floats_of(losses));
  } else {
    if (call.m.views) {
      const std::vector<BatchStatistic> found = row_statistics(call.p, nullptr);
      for (int64_t i = 0; i < rows; ++i) log_sum(found[i], row + i, row + rows + i);
    } else {
      const Tensor unused = scratch(sides == 2 ? 0 : 2 * rows);
      float* const of_columns = sides == 2 ? column : floats_of(unused);
      symmetric_log_sums(call.p, row, row + rows, of_columns, of_columns + rows);
    }
    find_losses();
  }
  if (!mean) return {losses, statistics, x_sums, y_sums};
  const Tensor value = output(x, {});
  *floats_of(value) = mean_of(floats_of(losses), rows);
  return {value, statistics, x_sums, y_sums};
}

double total(const Tensor& x, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += data<float>(x)[i];
  return sum;
}

// The gradients that are wanted, in the order of x, y, scale, shift.
std::vector<Tensor> matching_loss_grad(const Tensor& g, const Tensor& statistics, const Tensor& kept_x, const Tensor& kept_y, const Tensor& x,
                                       const OptionalTensor& y, const Tensor& scale, const OptionalTensor& shift, const OptionalTensor& labels,
                                       bool want_x, bool want_y, bool want_scale, bool want_shift, int64_t precision, bool rows_alone) {
  const MatchingCall call = matching_call(x, y, scale, shift, labels, precision, rows_alone);
  const Matching& m = call.m;
  const int64_t rows = m.rows, sides = call.sides();
  const bool mean = g.dim() == 0, kept = kept_x.numel() + kept_y.numel() > 0, sum_x = want_x || want_scale;
  const float* const upstream = mean ? packed<float>("g", g, {}) : packed<float>("g", g, {rows});
  const Backward back(call, packed<float>("statistics", statistics, {call.sigmoid() ? int64_t(kept) : sides * kStatistics, rows}));
  const float one = 1;
  back.set(kept ? &one : upstream, mean ? 0 : 1, mean ? 1 / float(rows) : 1);

  const Tensor x_sums = kept ? kept_x : zeros(x, sum_x, {rows, m.width}), y_sums = kept ? kept_y : zeros(x, want_y, {rows, m.width});
  const Tensor weights = kept ? statistics : zeros(x, call.sigmoid(), {rows}), dscale = zeros(x, want_scale, {rows});
  if (kept) {
    STD_TORCH_CHECK(mean, "sums are kept for the mean of the losses");
    if (sum_x) packed<float>("kept_x", kept_x, {rows, m.width});
    if (want_y) packed<float>("kept_y", kept_y, {rows, m.width});
  } else if (call.sigmoid()) {
    sigmoid_sums(call.p, back.row_g, {data_of(sum_x, x_sums), data_of(want_y, y_sums), floats_of(weights)});
  } else {
    symmetric_sums(call.p, back.upstream(), {data_of(sum_x, x_sums), data_of(want_y, y_sums), nullptr});
  }

  std::vector<Tensor> found;
  const auto made = [&](bool want, const Tensor& of) -> void* {
    if (!want) return nullptr;
    const bool in_place = x.scalar_type() == ScalarType::Float && !kept;
    found.push_back(in_place ? of : output(x, {rows, m.width}, x.scalar_type()));
    return found.back().mutable_data_ptr();
  };
  const float factor = kept ? *upstream : 1;
  void *const dx = made(want_x, x_sums), *const dy = made(want_y, y_sums);
  const MatchingGradients d{factor, back.pull, data_of(sum_x, x_sums), data_of(want_y, y_sums), dx, dy, data_of(want_scale, dscale)};
  const int64_t workers = workers_for(double(rows) * double(m.width) * 4);
  for_each_task(workers, workers, [&](int64_t, int64_t t) {
    kdfast::cpu_kernels().matching_gradients(m, d, t * rows / workers, (t + 1) * rows / workers);
  });
  const auto add_scalar = [&](bool want, const Tensor& terms, double times) {
    if (!want) return;
    found.push_back(output(x, {}));
    *floats_of(found.back()) = float(times * total(terms, rows));
  };
  add_scalar(want_scale, dscale, m.views ? 0.5 : 1);  // with two views the sums held every pair twice
  add_scalar(want_shift, weights, factor);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("matching_loss", TORCH_BOX(&matching_loss));
  m.impl("matching_loss_grad", TORCH_BOX(&matching_loss_grad));
}
