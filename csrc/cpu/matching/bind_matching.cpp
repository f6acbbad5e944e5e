// kdfast::matching_loss and kdfast::matching_loss_grad on the CPU, of one problem or of several.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "matching/bind_matching.h"

namespace {

constexpr int64_t kOfRow = 4;  // numbers that are kept of a row: what Kept has

// Losses or their mean or sum, and what matching_loss_grad needs: statistics, and the rows' factors where they have any. For the mean or sum of
// few_pairs, where gradients are asked for, these for an upstream of 1 instead: [2] those of scale and shift, then x's and y's where they are
// asked for; else [0]. For losses of few_pairs that are not reduced, where a row's upstream is one for all that it weighs: [kOfRow, rows] in
// place of the statistics, x's gradient for an upstream of 1 of every loss, and the table of weights that y's is made of. Of x [batch, rows, width]
// all but a mean and what is kept for its scalars has that dimension first.
std::tuple<Tensor, Tensor, Tensor, Tensor> matching_loss(const Tensor& x, const OptionalTensor& y, const OptionalTensor& scale,
                                                         const OptionalTensor& shift, const OptionalTensor& labels, bool mean, bool keep_x, bool keep_y,
                                                         int64_t precision, bool rows_alone, double smoothing, double factor, bool include,
                                                         const OptionalTensor& row_weights, bool sum) {
  STD_TORCH_CHECK(include || (rows_alone && smoothing == 0), "without the match in its denominator there are rows_alone and no smoothing");
  const MatchingSizes sizes(x);
  STD_TORCH_CHECK(!sizes.batched || (include && !sum && !row_weights.has_value()),
                  "x with a batch dimension takes no row_weights, no sum, and every match in its denominator");
  const int64_t batch = sizes.batch, rows = sizes.rows, width = sizes.width;
  std::vector<MatchingCall> calls;
  calls.reserve(batch);
  for (int64_t entry = 0; entry < batch; ++entry)
    calls.push_back(matching_call(sizes, entry, x, y, scale, shift, labels, precision, rows_alone, smoothing, factor));
  const bool sigmoid = calls[0].sigmoid();
  const int64_t sides = calls[0].sides();
  const Reduction reduction{mean, mean && sum, row_weights.has_value() ? packed<float>("row_weights", *row_weights, {rows}) : nullptr};
  const bool weighted = row_weights.has_value() || reduction.sum || !include;
  Losses of_rows{reduction, include, sigmoid ? reduction.factors(rows, [](int64_t) { return true; }) : std::vector<float>()};
  const bool by_row = (sigmoid || rows_alone) && precision_of(precision) != kdfast::Precision::kBFloat16;  // whose scores cost less than a table
  const bool kept = (mean || by_row) && (keep_x || keep_y) && kdfast::few_pairs(rows, rows, width);
  std::vector<float> row_losses(mean ? batch * rows : 0, 0.0f);
  const Tensor loss = mean ? output(x, {}) : output(x, sizes.all({rows}));
  const Tensor statistics = kept && mean ? output(x, {2}) : output(x, sizes.all({kept ? kOfRow : sides * kStatistics + weighted, rows}));
  float* const losses = mean ? row_losses.data() : floats_of(loss);
  const auto kept_rows = [&](bool keep, int64_t line) { return kept && keep ? output(x, sizes.all({rows, line})) : output(x, {0}); };
  const Tensor dx = kept_rows(keep_x, width), dy = kept_rows(keep_y, mean ? width : rows);
  if (kept) {
    float *const to_x = data_of(keep_x, dx), *const to_y = data_of(keep_y && mean, dy), *const to_table = data_of(keep_y && !mean, dy);
    const auto at = [](float* to, int64_t words) { return to == nullptr ? nullptr : to + words; };
    const int64_t words = kept_words(calls[0].p, {to_x, to_y}, sigmoid, to_table != nullptr);
    const int64_t workers = workers_for(work_of(calls[0].p, 3 * batch), batch);
    const Workspace<float> workspace = product_workspace(words * workers);
    float *const work = workspace.data(), *const found = floats_of(statistics);
    std::vector<float> scalars(2 * batch, 0.0f);  // of a mean
    const bool want_scalars = scale.has_value() || shift.has_value();
    const auto one = [&](Losses& factors, int64_t worker, int64_t entry) {
      const MatchingCall& call = calls[entry];
      Kept to{at(to_x, entry * rows * width), at(to_y, entry * rows * width), at(to_table, entry * rows * rows), want_scalars, {}, {}, {}, {}};
      kept_matching(call, factors, losses + entry * rows, mean ? 1 / float(batch * rows) : 1, to, work + worker * words);
      if (mean) {
        scalars[entry] = of_scale(call, to.dscale.data()), scalars[batch + entry] = float(total(to.dshift.data(), rows));
      } else {
        float* row = found + entry * kOfRow * rows;
        for (const std::vector<float>* of_row : {&to.dscale, &to.dshift, &to.pull, &to.spread}) row = std::copy(of_row->begin(), of_row->end(), row);
      }
    };
    if (batch == 1) {
      one(of_rows, 0, 0);
    } else {
      for_each_task(workers, batch, [&](int64_t worker, int64_t entry) {
        Losses unweighted{reduction, include, {}};
        one(unweighted, worker, entry);
      });
    }
    if (mean) found[0] = float(total(scalars.data(), batch)), found[1] = float(total(scalars.data() + batch, batch));
  } else {
    for (int64_t entry = 0; entry < batch; ++entry) {
      const MatchingCall& call = calls[entry];
      if (sigmoid) {
        sigmoid_losses(call.p, losses + entry * rows);
        continue;
      }
      float *const row = floats_of(statistics) + entry * sides * kStatistics * rows, *const column = row + (sides - 1) * kStatistics * rows;
      if (call.m.views) {
        const std::vector<BatchStatistic> found = row_statistics(call.p, nullptr);
        for (int64_t i = 0; i < rows; ++i) log_sum(found[i], row + i, row + rows + i);
      } else {
        symmetric_log_sums(call.p, row, row + rows, sides == 2 ? column : nullptr, sides == 2 ? column + rows : nullptr);
      }
      of_rows.find(call, row, column, losses + entry * rows);
    }
  }
  const float* const factors = of_rows.data();
  for (int64_t i = 0; i < rows && factors != nullptr; ++i) losses[i] *= factors[i];
  for (int64_t i = 0; i < rows && weighted && !kept; ++i) floats_of(statistics)[sides * kStatistics * rows + i] = factors != nullptr ? factors[i] : 1;
  if (mean) *floats_of(loss) = mean_of(losses, batch * rows);
  return {loss, statistics, dx, dy};
}

// The gradients from what was kept of each row, x's in floats.
std::tuple<Tensor, Tensor, Tensor, Tensor> kept_rows_grad(const MatchingSizes& sizes, const std::vector<MatchingCall>& calls, const Tensor& like,
                                                          const float* g, const Tensor& of_rows, const Tensor& kept_x, const Tensor& table, bool want_x,
                                                          bool want_y, bool want_scale, bool want_shift) {
  const int64_t batch = sizes.batch, rows = sizes.rows, width = sizes.width;
  const float* const numbers = sizes.packed_lines<float>("statistics", of_rows, kOfRow, rows);
  const Tensor dx = want_x ? output(like, sizes.all({rows, width})) : output(like, {0});
  const Tensor dy = want_y ? output(like, sizes.all({rows, width}), like.scalar_type()) : output(like, {0});
  if (want_x) {
    const float* const unit = sizes.packed_lines<float>("kept_x", kept_x, rows, width);
    float* const out = floats_of(dx);
    for (int64_t i = 0; i < batch * rows; ++i)
      std::transform(unit + i * width, unit + (i + 1) * width, out + i * width, [&](float d) { return g[i] * d; });
  }
  if (want_y) {
    const float* const weights = sizes.packed_lines<float>("table", table, rows, rows);
    const int64_t words = kept_words(calls[0].p, {}, false, true), workers = workers_for(work_of(calls[0].p, batch), batch);
    const Workspace<float> workspace = product_workspace(words * workers);
    const Tensor sums = output(like, sizes.all({rows, width}));
    float *const work = workspace.data(), *const to = floats_of(sums);
    char* const out = static_cast<char*>(dy.mutable_data_ptr());
    for_each_task(workers, batch, [&](int64_t worker, int64_t entry) {
      const float *const upstream = g + entry * rows, *const dscale = numbers + entry * kOfRow * rows, *const pull = dscale + 2 * rows;
      float* const to_y = to + entry * rows * width;
      tabled_sums(calls[entry].p, weights + entry * rows * rows, upstream, to_y, work + worker * words);
      const Backward back(calls[entry], dscale);
      for (int64_t i = 0; i < rows; ++i) back.pull[i] = upstream[i] * pull[i], back.spread[i] = upstream[i] * pull[rows + i];
      char* const dy_entry = out + entry * rows * width * calls[entry].m.y.element_bytes();
      finish(calls[entry], back, {back.pull, nullptr, 0, nullptr, to_y, nullptr, dy_entry, nullptr, false});
    });
  }
  const auto product = [&](bool want, int64_t which) {
    if (!want) return output(like, {0});
    double sum = 0;
    for (int64_t entry = 0; entry < batch; ++entry)
      sum = std::inner_product(g + entry * rows, g + (entry + 1) * rows, numbers + (entry * kOfRow + which) * rows, sum);
    return filled(like, {}, sum);
  };
  return {dx, dy, product(want_scale, 0), product(want_shift, 1)};
}

// The gradients of x, y, scale and shift, [0] where not wanted, where the forward pass has not left them. kept_x and table: what it has left of
// rows, with these as statistics.
std::tuple<Tensor, Tensor, Tensor, Tensor> matching_loss_grad(const Tensor& g, const Tensor& statistics, const Tensor& x, const OptionalTensor& y,
                                                              const OptionalTensor& scale, const OptionalTensor& shift,
                                                              const OptionalTensor& labels, bool want_x, bool want_y, bool want_scale,
                                                              bool want_shift, int64_t precision, bool rows_alone, double smoothing, double factor,
                                                              const OptionalTensor& kept_x, const OptionalTensor& table) {
  STD_TORCH_CHECK(kept_x.has_value() == table.has_value(), "kept_x and table come together");
  const MatchingSizes sizes(x);
  STD_TORCH_CHECK(!sizes.batched || table.has_value(), "x with a batch dimension needs kept_x and table");
  std::vector<MatchingCall> calls;
  for (int64_t entry = 0; entry < sizes.batch; ++entry)
    calls.push_back(matching_call(sizes, entry, x, y, scale, shift, labels, precision, rows_alone, smoothing, factor));
  const bool mean = g.dim() == 0;
  const float* const upstream = mean && !table.has_value() ? packed<float>("g", g, {}) : sizes.packed_rows<float>("g", g);
  if (table.has_value()) return kept_rows_grad(sizes, calls, x, upstream, statistics, *kept_x, *table, want_x, want_y, want_scale, want_shift);
  const MatchingCall& call = calls[0];
  const Matching& m = call.m;
  const int64_t rows = m.rows;
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
