// One call of the losses of matching rows: CLIP, NT-Xent, InfoNCE within a batch and SigLIP. From the pass over all pairs to the losses, and back.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "info_nce/bind_class_sums.h"
#include "info_nce/bind_reduction.h"
#include "similarity/bind_pairs.h"

namespace {

using kdfast::Matching;
using kdfast::MatchingGradients;

// Of x: [rows, width], or [batch, rows, width], problems by themselves.
struct MatchingSizes {
  bool batched;
  int64_t batch, rows, width;

  explicit MatchingSizes(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "x must have 2 or 3 dimensions, got ", x.dim());
    batched = x.dim() == 3;
    batch = batched ? x.size(0) : 1, rows = x.size(batched), width = x.size(1 + batched);
    STD_TORCH_CHECK(batch > 0, "x must have an entry");
  }
  // A shape of every entry's, of all of them.
  std::vector<int64_t> all(std::initializer_list<int64_t> shape) const {
    std::vector<int64_t> sizes(shape);
    if (batched) sizes.insert(sizes.begin(), batch);
    return sizes;
  }
  kdfast::Matrix entry(const char* name, const Tensor& x, int64_t at) const {
    return (batched ? row_matrix(name, x, {batch, rows, width}) : row_matrix(name, x, {rows, width})).from(at * rows * width);
  }
  // The elements of a contiguous tensor that has so many for a row, or so many lines of them for an entry.
  template <class T>
  const T* packed_rows(const char* name, const Tensor& x) const {
    return batched ? packed<T>(name, x, {batch, rows}) : packed<T>(name, x, {rows});
  }
  template <class T>
  const T* packed_lines(const char* name, const Tensor& x, int64_t lines, int64_t line) const {
    return batched ? packed<T>(name, x, {batch, lines, line}) : packed<T>(name, x, {lines, line});
  }
};

// One call, or an entry of it. With a shift it is the sigmoid loss of all pairs. Otherwise softmaxes over the other samples, of rows and of columns or of rows
// alone: without y the columns are the rows themselves, two views of N / 2 samples.
struct MatchingCall {
  Matching m;
  PairParams p;
  bool rows_alone;
  std::vector<float> of_rows;   // memory: scale and, for the sigmoid, shift of every row
  std::vector<int64_t> labels;  // memory: where they are not given, every row's label, or its positive
  std::vector<float> x_mean, y_mean;  // memory, with smoothing

  bool sigmoid() const { return p.shift != nullptr; }
  int64_t sides() const { return sigmoid() ? 0 : m.views || rows_alone ? 1 : 2; }
  double rows_share() const { return sides() == 2 ? 0.5 : 1; }
  double columns_share() const { return 1 - rows_share(); }
};

// The mean of the rows, each times its weight (null: 1), times `share`.
inline std::vector<float> mean_row(kdfast::Matrix x, int64_t rows, int64_t width, const float* weights, double share) {
  const std::vector<double> sum = sums_by_bag(1, std::vector<int64_t>(size_t(rows), 0), x, width, weights);
  std::vector<float> mean(sum.size());
  std::transform(sum.begin(), sum.end(), mean.begin(), [&](double s) { return share == 0 ? 0.0f : float(s * share / double(rows)); });
  return mean;
}

inline MatchingCall matching_call(const MatchingSizes& sizes, int64_t entry, const Tensor& x, const OptionalTensor& y, const OptionalTensor& scale,
                                  const OptionalTensor& shift, const OptionalTensor& labels, int64_t precision, bool rows_alone, double smoothing,
                                  double factor) {
  const int64_t rows = sizes.rows, width = sizes.width, samples = y.has_value() ? rows : rows / 2;
  STD_TORCH_CHECK(y.has_value() || (rows % 2 == 0 && !sizes.batched), "x must hold as many rows of one view as of the other, got ", rows);
  STD_TORCH_CHECK(!shift.has_value() || (y.has_value() && !labels.has_value()), "shift needs y, and no labels");
  STD_TORCH_CHECK(!rows_alone || (y.has_value() && !shift.has_value()), "rows_alone needs y, and no shift");
  STD_TORCH_CHECK(smoothing == 0 || (y.has_value() && !shift.has_value() && !labels.has_value()), "smoothing needs y, and no shift or labels");
  const Tensor& other = y.has_value() ? *y : x;
  STD_TORCH_CHECK(other.scalar_type() == x.scalar_type(), "y must have the dtype of x");
  MatchingCall call{{}, {}, rows_alone, {}, {}, {}, {}};
  Matching& m = call.m;
  m.rows = rows, m.width = width, m.views = !y.has_value();
  m.x = sizes.entry("x", x, entry), m.y = sizes.entry("y", other, entry);
  m.scale = scale.has_value() ? *packed<float>("scale", *scale, {}) : float(factor);
  call.of_rows.assign(size_t(rows), m.scale);
  if (shift.has_value()) call.of_rows.resize(size_t(2 * rows), *packed<float>("shift", *shift, {}));
  if (!labels.has_value()) {
    call.labels.resize(size_t(rows));
    for (int64_t i = 0; i < rows; ++i) call.labels[size_t(i)] = i % samples;
  }

  PairParams& p = call.p;
  p.precision = precision_for_rows(rows <= kKeysInPlace ? kdfast::Precision::kFloat32 : precision_of(precision), rows, kPairRowsOnVectors);
  p.batch = 1, p.rows = p.columns = rows, p.width = width;
  p.x = m.x, p.y = m.y;
  p.scale = call.of_rows.data();
  const int64_t* const classes = labels.has_value() ? sizes.packed_rows<int64_t>("labels", *labels) + entry * rows : call.labels.data();
  if (shift.has_value()) {
    p.shift = p.scale + rows, p.positive = classes;
  } else {
    p.x_labels = p.y_labels = classes;
  }
  if (smoothing > 0) {
    call.x_mean = mean_row(m.x, rows, width, nullptr, call.columns_share()), call.y_mean = mean_row(m.y, rows, width, nullptr, call.rows_share());
    m.smoothing = float(smoothing), m.x_mean = call.x_mean.data(), m.y_mean = call.y_mean.data();
  }
  return call;
}

// Log-sum-exps, their low digits and slopes of a side, [rows] each.
constexpr int64_t kStatistics = 3;

inline float level_of(const MatchingCall& call, const float* statistics) {
  return call.sigmoid() ? 0 : level_of(statistics, call.p.scale, call.m.rows, call.m.rows);
}

// A backward pass: the rows' upstream gradients and sums over the pairs.
struct Backward {
  const MatchingCall& call;
  const float *row, *column;  // statistics
  std::vector<float> of_rows;
  float *row_g, *column_g, *pull, *spread;

  Backward(const MatchingCall& call, const float* statistics)
      : call(call), row(statistics), column(call.sides() < 2 ? row : row + kStatistics * call.m.rows), of_rows(size_t(4 * call.m.rows)) {
    row_g = of_rows.data(), pull = row_g + call.m.rows, column_g = call.rows_alone ? nullptr : pull + call.m.rows, spread = pull + 2 * call.m.rows;
  }

  // g[i stride] times `share`, and times factors[i] where there are any, is the upstream gradient of row i's loss.
  void set(const float* g, int64_t stride, float share, const float* factors) const {
    const int64_t rows = call.m.rows;
    const auto of_row = [&](int64_t i) { return share * g[i * stride] * (factors != nullptr ? factors[i] : 1); };
    const auto weigh = [&](float* side, const float* statistics) {
      for (int64_t i = 0; i < rows; ++i) side[i] = of_row(i) * (call.sigmoid() ? 1 : statistics[2 * rows + i]);
    };
    weigh(row_g, row);
    if (column_g != nullptr) weigh(column_g, column);
    for (int64_t i = 0; i < rows; ++i)
      pull[i] = call.sigmoid() ? 0 : column_g == nullptr ? row_g[i] : row_g[i] + column_g[call.m.partner(i)];
    for (int64_t i = 0; i < rows && call.m.smoothing != 0; ++i) spread[i] = call.m.smoothing * of_row(i), pull[i] -= spread[i];
  }
  SymmetricUpstream upstream() const {
    const int64_t rows = call.m.rows;
    return {row_g, row, row + rows, column_g, column, column + rows};
  }
};

inline double total(const float* terms, int64_t count) { return std::accumulate(terms, terms + count, 0.0); }

// The gradients from the sums over the other pairs.
inline void finish(const MatchingCall& call, const Backward& back, MatchingGradients d) {
  const int64_t rows = call.m.rows, width = call.m.width, workers = workers_for(double(rows) * double(width) * 4);
  std::vector<float> x_common, y_common;
  if (call.m.smoothing != 0) {
    x_common = mean_row(call.m.x, rows, width, back.spread, call.rows_share()), y_common = mean_row(call.m.y, rows, width, back.spread, call.columns_share());
    d.spread = back.spread, d.x_common = x_common.data(), d.y_common = y_common.data();
  }
  for_each_task(workers, workers, [&](int64_t, int64_t t) {
    kdfast::cpu_kernels().matching_gradients(call.m, d, t * rows / workers, (t + 1) * rows / workers);
  });
}

// What the scale's gradient is, of the rows' terms: with two views the sums held every pair twice.
inline float of_scale(const MatchingCall& call, const float* terms) { return float((call.m.views ? 0.5 : 1) * total(terms, call.m.rows)); }

// The losses of rows, reduced.
struct Losses {
  const Reduction& reduction;
  bool include;  // whether a match is in its denominator
  std::vector<float> factors;

  const float* data() const { return factors.empty() ? nullptr : factors.data(); }

  // From both sides' statistics; of rows alone there is one.
  void find(const MatchingCall& call, float* row, float* column, float* losses) {
    const int64_t rows = call.m.rows;
    kdfast::cpu_kernels().matching_losses(
        call.m, {include, call.sides(), {row, column}, {row + rows, column + rows}, losses, {row + 2 * rows, column + 2 * rows}});
    const auto empty = [&](int64_t i) { return !include && row[i] == -std::numeric_limits<float>::infinity(); };
    factors = reduction.factors(rows, [&](int64_t i) { return !empty(i); });
    for (int64_t i = 0; i < rows; ++i)
      if (empty(i)) losses[i] = 0;
  }
};

// What is kept of few_pairs: gradients of x and y, or in place of y's the table of weights that it is made of, where there is memory for them;
// and of each row what it adds to those of scale (where wanted) and shift, and of Backward its pull and its spread.
struct Kept {
  float *dx, *dy, *table;
  bool want_scalars;
  std::vector<float> dscale, dshift, pull, spread;
};

// The losses of few_pairs, and `kept` from the same scores, for an upstream of `share` of every loss, each times its factor. work: of
// kept_words.
inline void kept_matching(const MatchingCall& call, Losses& of_rows, float* losses, float share, Kept& kept, float* work) {
  const int64_t rows = call.m.rows, sides = call.sides();
  std::vector<float> statistics(std::max<int64_t>(1, sides) * kStatistics * rows, 0.0f), scores(rows, 0.0f);
  float* const row = statistics.data();
  kept.dscale.resize(rows), kept.dshift.resize(rows);
  PairSums sums{kept.dx, kept.dy, call.sigmoid() ? kept.dshift.data() : nullptr, kept.want_scalars ? scores.data() : nullptr, 0};
  const Backward back(call, row);
  const float one = 1;
  if (call.sigmoid()) {
    back.set(&one, 0, share, of_rows.data());
    kept_sigmoid_sums(call.p, losses, back.row_g, sums, work, kept.table);
  } else {
    float* const column = row + (sides - 1) * kStatistics * rows;
    kept_symmetric_sums(call.p, row, row + rows, sides == 2 ? column : nullptr, column + rows, [&] {
      of_rows.find(call, row, column, losses);
      back.set(&one, 0, share, of_rows.data());
      if (kept.want_scalars) sums.level = level_of(call, row);
    }, back.upstream(), sums, work, kept.table);
  }
  finish(call, back, {back.pull, sums.scores, sums.level, kept.dx, kept.dy, kept.dx, kept.dy, kept.want_scalars ? kept.dscale.data() : nullptr, true});
  kept.pull.assign(back.pull, back.pull + rows), kept.spread.assign(back.spread, back.spread + rows);
}

}  // namespace
