// kdfast::matching_loss and kdfast::matching_loss_grad on the CPU: CLIP, NT-Xent and SigLIP, from the pass over all pairs to the mean of the
// losses, and back.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "info_nce/bind_class_sums.h"
#include "info_nce/bind_reduction.h"
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
  std::vector<float> of_rows;   // memory: scale and, for the sigmoid, shift of every row
  std::vector<int64_t> labels;  // memory: where they are not given, every row's label, or its positive
  std::vector<float> x_mean, y_mean;  // memory, with smoothing

  bool sigmoid() const { return p.shift != nullptr; }
  int64_t sides() const { return sigmoid() ? 0 : m.views || rows_alone ? 1 : 2; }
  double rows_share() const { return sides() == 2 ? 0.5 : 1; }
  double columns_share() const { return 1 - rows_share(); }
};

// The mean of the rows, each times its weight (null: 1), times `share`.
std::vector<float> mean_row(kdfast::Matrix x, int64_t rows, int64_t width, const float* weights, double share) {
  const std::vector<double> sum = sums_by_bag(1, std::vector<int64_t>(size_t(rows), 0), x, width, weights);
  std::vector<float> mean(sum.size());
  std::transform(sum.begin(), sum.end(), mean.begin(), [&](double s) { return share == 0 ? 0.0f : float(s * share / double(rows)); });
  return mean;
}

MatchingCall matching_call(const Tensor& x, const OptionalTensor& y, const OptionalTensor& scale, const OptionalTensor& shift,
                           const OptionalTensor& labels, int64_t precision, bool rows_alone, double smoothing, double factor) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(y.has_value() || x.size(0) % 2 == 0, "x must hold as many rows of one view as of the other, got ", x.size(0));
  STD_TORCH_CHECK(!shift.has_value() || (y.has_value() && !labels.has_value()), "shift needs y, and no labels");
  STD_TORCH_CHECK(!rows_alone || (y.has_value() && !shift.has_value()), "rows_alone needs y, and no shift");
  STD_TORCH_CHECK(smoothing == 0 || (y.has_value() && !shift.has_value() && !labels.has_value()), "smoothing needs y, and no shift or labels");
  const int64_t rows = x.size(0), width = x.size(1), samples = y.has_value() ? rows : rows / 2;
  const Tensor& other = y.has_value() ? *y : x;
  STD_TORCH_CHECK(other.scalar_type() == x.scalar_type(), "y must have the dtype of x");
  MatchingCall call{{}, {}, rows_alone, {}, {}, {}, {}};
  Matching& m = call.m;
  m.rows = rows, m.width = width, m.views = !y.has_value();
  m.x = row_matrix("x", x, {rows, width}), m.y = row_matrix("y", other, {rows, width});
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
  const int64_t* const classes = labels.has_value() ? packed<int64_t>("labels", *labels, {rows}) : call.labels.data();
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

float level_of(const MatchingCall& call, const float* statistics) {
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

double total(const float* terms, int64_t count) { return std::accumulate(terms, terms + count, 0.0); }

// The gradients from the sums over the other pairs.
void finish(const MatchingCall& call, const Backward& back, MatchingGradients d) {
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
float of_scale(const MatchingCall& call, const float* terms) { return float((call.m.views ? 0.5 : 1) * total(terms, call.m.rows)); }

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

// The losses of few_pairs, and `kept` from the same scores, for an upstream of `share` of every loss, each times its factor.
void kept_matching(const MatchingCall& call, Losses& of_rows, float* losses, float share, Kept& kept) {
  const int64_t rows = call.m.rows, sides = call.sides();
  std::vector<float> statistics(std::max<int64_t>(1, sides) * kStatistics * rows, 0.0f), scores(rows, 0.0f);
  float* const row = statistics.data();
  kept.dscale.resize(rows), kept.dshift.resize(rows);
  PairSums sums{kept.dx, kept.dy, call.sigmoid() ? kept.dshift.data() : nullptr, kept.want_scalars ? scores.data() : nullptr, 0};
  const Backward back(call, row);
  const float one = 1;
  if (call.sigmoid()) {
    back.set(&one, 0, share, of_rows.data());
    kept_sigmoid_sums(call.p, losses, back.row_g, sums, kept.table);
  } else {
    float* const column = row + (sides - 1) * kStatistics * rows;
    kept_symmetric_sums(call.p, row, row + rows, sides == 2 ? column : nullptr, column + rows, [&] {
      of_rows.find(call, row, column, losses);
      back.set(&one, 0, share, of_rows.data());
      if (kept.want_scalars) sums.level = level_of(call, row);
    }, back.upstream(), sums, kept.table);
  }
  finish(call, back, {back.pull, sums.scores, sums.level, kept.dx, kept.dy, kept.dx, kept.dy, kept.want_scalars ? kept.dscale.data() : nullptr, true});
  kept.pull.assign(back.pull, back.pull + rows), kept.spread.assign(back.spread, back.spread + rows);
}

constexpr int64_t kOfRow = 4;  // numbers that are kept of a row: what Kept has

// Losses or their mean or sum, and what matching_loss_grad needs: statistics, and the rows' factors where they have any. For the mean or sum of
// few_pairs, where gradients are asked for, these for an upstream of 1 instead: [2] those of scale and shift, then x's and y's where they are
// asked for; else [0]. For losses of few_pairs that are not reduced, where a row's upstream is one for all that it weighs: [kOfRow, rows] in
// place of the statistics, x's gradient for an upstream of 1 of every loss, and the table of weights that y's is made of.
std::tuple<Tensor, Tensor, Tensor, Tensor> matching_loss(const Tensor& x, const OptionalTensor& y, const OptionalTensor& scale,
                                                         const OptionalTensor& shift, const OptionalTensor& labels, bool mean, bool keep_x, bool keep_y,
                                                         int64_t precision, bool rows_alone, double smoothing, double factor, bool include,
                                                         const OptionalTensor& row_weights, bool sum) {
  STD_TORCH_CHECK(include || (rows_alone && smoothing == 0), "without the match in its denominator there are rows_alone and no smoothing");
  const MatchingCall call = matching_call(x, y, scale, shift, labels, precision, rows_alone, smoothing, factor);
  const int64_t rows = call.m.rows, sides = call.sides();
  const Reduction reduction{mean, mean && sum, row_weights.has_value() ? packed<float>("row_weights", *row_weights, {rows}) : nullptr};
  const bool weighted = row_weights.has_value() || reduction.sum || !include;
  Losses of_rows{reduction, include, call.sigmoid() ? reduction.factors(rows, [](int64_t) { return true; }) : std::vector<float>()};
  const bool by_row = (call.sigmoid() || rows_alone) && precision_of(precision) != kdfast::Precision::kBFloat16;  // whose scores cost less than a table
  const bool kept = (mean || by_row) && (keep_x || keep_y) && kdfast::few_pairs(rows, rows, call.m.width);
  std::vector<float> row_losses(mean ? rows : 0, 0.0f);
  const Tensor loss = mean ? output(x, {}) : output(x, {rows});
  const Tensor statistics = !kept ? output(x, {sides * kStatistics + weighted, rows}) : mean ? output(x, {2}) : output(x, {kOfRow, rows});
  float* const losses = mean ? row_losses.data() : floats_of(loss);
  const auto kept_rows = [&](bool keep, int64_t width) { return kept && keep ? output(x, {rows, width}) : output(x, {0}); };
  const Tensor dx = kept_rows(keep_x, call.m.width), dy = kept_rows(keep_y, mean ? call.m.width : rows);
  if (kept) {
    Kept to{data_of(keep_x, dx), data_of(keep_y && mean, dy), data_of(keep_y && !mean, dy), scale.has_value() || shift.has_value(), {}, {}, {}, {}};
    kept_matching(call, of_rows, losses, mean ? 1 / float(rows) : 1, to);
    float* const found = floats_of(statistics);
    if (mean) {
      found[0] = of_scale(call, to.dscale.data()), found[1] = float(total(to.dshift.data(), rows));
    } else {
      float* at = found;
      for (const std::vector<float>* numbers : {&to.dscale, &to.dshift, &to.pull, &to.spread}) at = std::copy(numbers->begin(), numbers->end(), at);
    }
  } else if (call.sigmoid()) {
    sigmoid_losses(call.p, losses);
  } else {
    float *const row = floats_of(statistics), *const column = row + (sides - 1) * kStatistics * rows;
    if (call.m.views) {
      const std::vector<BatchStatistic> found = row_statistics(call.p, nullptr);
      for (int64_t i = 0; i < rows; ++i) log_sum(found[i], row + i, row + rows + i);
    } else {
      std::vector<float> unused(sides == 2 ? 0 : 2 * rows, 0.0f);
      float* const of_columns = sides == 2 ? column : unused.data();
      symmetric_log_sums(call.p, row, row + rows, of_columns, of_columns + rows);
    }
    of_rows.find(call, row, column, losses);
  }
  const float* const factors = of_rows.data();
  for (int64_t i = 0; i < rows && factors != nullptr; ++i) losses[i] *= factors[i];
  for (int64_t i = 0; i < rows && weighted && !kept; ++i) floats_of(statistics)[sides * kStatistics * rows + i] = factors != nullptr ? factors[i] : 1;
  if (mean) *floats_of(loss) = mean_of(losses, rows);
  return {loss, statistics, dx, dy};
}

// The gradients from what was kept of each row, x's in floats.
std::tuple<Tensor, Tensor, Tensor, Tensor> kept_rows_grad(const MatchingCall& call, const Tensor& like, const float* g, const Tensor& of_rows,
                                                          const Tensor& kept_x, const Tensor& table, bool want_x, bool want_y, bool want_scale,
                                                          bool want_shift) {
  const int64_t rows = call.m.rows, width = call.m.width;
  const float *const dscale = packed<float>("statistics", of_rows, {kOfRow, rows}), *const dshift = dscale + rows;
  const float *const pull = dshift + rows, *const spread = pull + rows;
  const Tensor dx = want_x ? output(like, {rows, width}) : output(like, {0});
  const Tensor dy = want_y ? output(like, {rows, width}, like.scalar_type()) : output(like, {0});
  if (want_x) {
    const float* const unit = packed<float>("kept_x", kept_x, {rows, width});
    float* const out = floats_of(dx);
    for (int64_t i = 0; i < rows; ++i) std::transform(unit + i * width, unit + (i + 1) * width, out + i * width, [&](float d) { return g[i] * d; });
  }
  if (want_y) {
    const Tensor sums = output(like, {rows, width});
    tabled_sums(call.p, packed<float>("table", table, {rows, rows}), g, floats_of(sums));
    const Backward back(call, dscale);
    for (int64_t i = 0; i < rows; ++i) back.pull[i] = g[i] * pull[i], back.spread[i] = g[i] * spread[i];
    finish(call, back, {back.pull, nullptr, 0, nullptr, floats_of(sums), nullptr, dy.mutable_data_ptr(), nullptr, false});
  }
  const auto product = [&](bool want, const float* of_row) {
    return want ? filled(like, {}, std::inner_product(g, g + rows, of_row, 0.0)) : output(like, {0});
  };
  return {dx, dy, product(want_scale, dscale), product(want_shift, dshift)};
}

// The gradients of x, y, scale and shift, [0] where not wanted, where the forward pass has not left them. kept_x and table: what it has left of
// rows, with these as statistics.
std::tuple<Tensor, Tensor, Tensor, Tensor> matching_loss_grad(const Tensor& g, const Tensor& statistics, const Tensor& x, const OptionalTensor& y,
                                                              const OptionalTensor& scale, const OptionalTensor& shift,
                                                              const OptionalTensor& labels, bool want_x, bool want_y, bool want_scale,
                                                              bool want_shift, int64_t precision, bool rows_alone, double smoothing, double factor,
                                                              const OptionalTensor& kept_x, const OptionalTensor& table) {
  STD_TORCH_CHECK(kept_x.has_value() == table.has_value(), "kept_x and table come together");
  const MatchingCall call = matching_call(x, y, scale, shift, labels, precision, rows_alone, smoothing, factor);
  const Matching& m = call.m;
  const int64_t rows = m.rows;
  const bool mean = g.dim() == 0;
  const float* const upstream = mean && !table.has_value() ? packed<float>("g", g, {}) : packed<float>("g", g, {rows});
  if (table.has_value()) return kept_rows_grad(call, x, upstream, statistics, *kept_x, *table, want_x, want_y, want_scale, want_shift);
  const int64_t of_sides = call.sides() * kStatistics;
  const bool weighted = statistics.dim() == 2 && statistics.size(0) > of_sides;
  const float* const of_rows = packed<float>("statistics", statistics, {of_sides + weighted, rows});
  const Backward back(call, of_rows);
  back.set(upstream, mean ? 0 : 1, mean ? 1 / float(rows) : 1, weighted ? of_rows + of_sides * rows : nullptr);

  const Tensor x_sums = zeros(x, want_x, {rows, m.width}), y_sums = zeros(x, want_y, {rows, m.width});
  std::vector<float> weights(call.sigmoid() ? rows : 0, 0.0f), scores(want_scale ? rows : 0, 0.0f), dscale(scores);
  float* const to_scores = want_scale ? scores.data() : nullptr;
  const float level = want_scale ? level_of(call, of_rows) : 0;
  const PairSums sums{data_of(want_x, x_sums), data_of(want_y, y_sums), call.sigmoid() ? weights.data() : nullptr, to_scores, level};
  call.sigmoid() ? sigmoid_sums(call.p, back.row_g, sums) : symmetric_sums(call.p, back.upstream(), sums);

  const auto made = [&](bool want, const Tensor& of) {
    return !want || x.scalar_type() == ScalarType::Float ? of : output(x, {rows, m.width}, x.scalar_type());
  };
  const auto memory = [](bool want, const Tensor& of) { return want ? of.mutable_data_ptr() : nullptr; };
  const Tensor dx = made(want_x, x_sums), dy = made(want_y, y_sums);
  finish(call, back, {back.pull, to_scores, sums.level, sums.x_sums, sums.y_sums, memory(want_x, dx), memory(want_y, dy),
                      want_scale ? dscale.data() : nullptr, false});
  const Tensor of_all = want_scale ? filled(x, {}, of_scale(call, dscale.data())) : output(x, {0});
  return {dx, dy, of_all, want_shift ? filled(x, {}, total(weights.data(), int64_t(weights.size()))) : output(x, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("matching_loss", TORCH_BOX(&matching_loss));
  m.impl("matching_loss_grad", TORCH_BOX(&matching_loss_grad));
}
