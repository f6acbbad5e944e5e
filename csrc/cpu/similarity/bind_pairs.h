// What the bindings of the passes over pairs share: checks, division among threads, and the passes: log-sum-exps of rows and columns, the
// sigmoid pair loss, and their gradients.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "similarity/bind_similarity.h"

namespace {

using kdfast::PairParams;
using kdfast::PairSums;
using kdfast::PairTask;
using kdfast::BatchStatistic;
using kdfast::SymmetricUpstream;

constexpr int64_t kMinSide = 64;             // rows, and columns, that a task should have: each is packed once for all of the other
constexpr int64_t kPairRowsOnVectors = 128;  // of either side: a gradient packs both twice

inline PairParams pair_parameters(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& x_labels,
                                  const OptionalTensor& y_labels, int64_t precision) {
  STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3, "x and y must have 3 dimensions, got ", x.dim(), " and ", y.dim());
  STD_TORCH_CHECK(x_labels.has_value() == y_labels.has_value(), "x_labels and y_labels come together");
  PairParams p{};
  p.batch = x.size(0), p.rows = x.size(1), p.width = x.size(2), p.columns = y.size(1);
  p.precision = precision_for_rows(precision_of(precision), std::min(p.rows, p.columns), kPairRowsOnVectors);
  p.x = row_matrix("x", x, {p.batch, p.rows, p.width});
  p.y = row_matrix("y", y, {p.batch, p.columns, p.width});
  p.scale = row_data<float>("scale", scale, {p.batch, p.rows});
  p.x_labels = row_data<int64_t>("x_labels", x_labels, {p.batch, p.rows});
  p.y_labels = row_data<int64_t>("y_labels", y_labels, {p.batch, p.columns});
  return p;
}

// Multiply-adds of so many matrix products.
inline double work_of(const PairParams& p, int64_t products) {
  return double(p.batch) * double(p.rows) * double(p.columns) * double(p.width) * double(products);
}

struct Range {
  int64_t begin, end;
};
inline Range part_of(int64_t size, int64_t part, int64_t parts) { return {part * size / parts, (part + 1) * size / parts}; }
inline int64_t longest(int64_t size, int64_t parts) { return (size + parts - 1) / parts; }

// A forward pass is cut into rows first, then into columns.
struct Grid {
  const PairParams& p;
  int64_t workers, row_parts, column_parts;

  explicit Grid(const PairParams& p) : p(p), workers(workers_for(work_of(p, 1))) {
    const int64_t parts = workers / std::gcd(workers, p.batch);
    row_parts = std::clamp<int64_t>(p.rows / kMinSide, 1, parts);
    column_parts = std::clamp<int64_t>(p.columns / kMinSide, 1, std::max<int64_t>(1, parts / row_parts));
  }
  int64_t tasks() const { return p.batch * row_parts * column_parts; }
  int64_t row_part(int64_t t) const { return t / column_parts % row_parts; }
  int64_t column_part(int64_t t) const { return t % column_parts; }
  PairTask task(int64_t t) const {
    const Range rows = part_of(p.rows, row_part(t), row_parts), columns = part_of(p.columns, column_part(t), column_parts);
    return {t / (column_parts * row_parts), rows.begin, rows.end, columns.begin, columns.end};
  }
};

// [parts][size] maxima, then as many low digits of these, then sums.
struct Partial {
  int64_t parts, size;
  std::unique_ptr<float[]> memory;

  Partial(int64_t parts, int64_t size) : parts(parts), size(size), memory(new float[size_t(3 * parts * size)]) {}
  float* maximum(int64_t part, int64_t at) const { return memory.get() + part * size + at; }
  float* rest(int64_t part, int64_t at) const { return maximum(parts + part, at); }
  float* sum(int64_t part, int64_t at) const { return maximum(2 * parts + part, at); }
  void merge(float* lse, float* low) const {
    kdfast::cpu_kernels().similarity_merge({parts, size, size, 0, maximum(0, 0), rest(0, 0), sum(0, 0), nullptr, lse, low, nullptr});
  }
};

// What scores are summed relative to: about what they have in common. A row's (lse - log n) / s is between its mean score and its largest; scales so
// small that it would round as the logarithm come with no logits that are large.
inline float level_of(const float* lse, const float* scale, int64_t rows, int64_t columns) {
  double sum = 0, count = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const double level = (double(lse[i]) - std::log(double(columns))) / double(scale[i]);
    if (std::abs(scale[i]) > 1e-3f && std::isfinite(level)) sum += level, count += 1;
  }
  return count == 0 ? 0 : float(sum / count);
}

inline float* data_of(bool want, const Tensor& x) { return want ? floats_of(x) : nullptr; }

// Sums of `shape`, zero; [0] where not wanted.
inline Tensor zeros(const Tensor& like, bool wanted, std::initializer_list<int64_t> shape) {
  const Tensor sums = wanted ? output(like, shape) : output(like, {0});
  std::fill_n(floats_of(sums), sums.numel(), 0.0f);
  return sums;
}

// Parts that rows of a batch entry, and as many that columns are cut into.
inline int64_t rectangle_parts(const PairParams& p, int64_t workers) {
  return std::clamp<int64_t>(std::min(p.rows, p.columns) / kMinSide, 1, workers / std::gcd(workers, p.batch));
}

// task(PairTask, workspace) over a grid of parts x parts rectangles of each batch entry, in `parts` rounds: in a round no two rectangles
// share rows or columns. So sums of rows and of columns grow in place, in an order that depends on the number of threads alone.
template <class Words, class Task>
void for_each_rectangle(const PairParams& p, int64_t products, const Words& words_for, const Task& task) {
  const int64_t workers = workers_for(work_of(p, products)), parts = rectangle_parts(p, workers);
  const int64_t words = words_for(longest(p.rows, parts), longest(p.columns, parts));
  const Workspace<float> workspace = product_workspace(words * workers);
  float* const work = workspace.data();
  for (int64_t round = 0; round < parts; ++round) {
    for_each_task(workers, p.batch * parts, [&](int64_t worker, int64_t t) {
      const Range columns = part_of(p.columns, t % parts, parts), rows = part_of(p.rows, (t + round) % parts, parts);
      task(PairTask{t / parts, rows.begin, rows.end, columns.begin, columns.end}, work + worker * words);
    });
  }
}

// Log-sum-exps of every row and every column, and the digits that they have no room for. The parts of rows, and those of columns, are merged in
// a fixed order. column_lse null: not wanted.
inline void symmetric_log_sums(const PairParams& p, float* row_lse, float* row_low, float* column_lse, float* column_low) {
  const Grid grid(p);
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const bool columns = column_lse != nullptr;
  const Partial of_rows(grid.column_parts, p.batch * p.rows), of_columns(grid.row_parts, columns ? p.batch * p.columns : 0);
  const int64_t words = kernels.symmetric_workspace(p, longest(p.rows, grid.row_parts), longest(p.columns, grid.column_parts));
  const Workspace<float> workspace = product_workspace(words * grid.workers);
  float* const work = workspace.data();
  for_each_task(grid.workers, grid.tasks(), [&](int64_t worker, int64_t t) {
    const PairTask task = grid.task(t);
    const int64_t row_part = grid.row_part(t), column_part = grid.column_part(t);
    const int64_t row = task.batch * p.rows + task.row_begin, column = task.batch * p.columns + task.column_begin;
    kdfast::SymmetricStatistics found{of_rows.maximum(column_part, row), of_rows.rest(column_part, row), of_rows.sum(column_part, row)};
    if (columns) {
      found.column_maximum = of_columns.maximum(row_part, column), found.column_low = of_columns.rest(row_part, column);
      found.column_sum = of_columns.sum(row_part, column);
    }
    kernels.symmetric(p, task, found, work + worker * words);
  });
  of_rows.merge(row_lse, row_low);
  if (columns) of_columns.merge(column_lse, column_low);
}

inline double level_of(const BatchStatistic& s) { return double(s.maximum) + double(s.low); }

// Those of two ranges of columns.
inline BatchStatistic merged(const BatchStatistic& a, const BatchStatistic& b) {
  const bool second = level_of(b) > level_of(a);
  const BatchStatistic &top = second ? b : a, &other = second ? a : b;
  const double sum = other.sum == 0 ? top.sum : top.sum + other.sum * std::exp(level_of(other) - level_of(top));
  return {sum, a.same_sum + b.same_sum, top.maximum, top.low, a.same_count + b.same_count};
}

// Statistics of every row of the one batch entry among all rows, the columns, in their classes where these are given.
inline std::vector<BatchStatistic> row_statistics(const PairParams& p, const int64_t* classes) {
  const Grid grid(p);
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t words = kernels.row_statistics_workspace(p, longest(p.rows, grid.row_parts), longest(p.columns, grid.column_parts));
  const Workspace<float> workspace = product_workspace(words * grid.workers);
  float* const work = workspace.data();
  std::vector<BatchStatistic> found(size_t(grid.column_parts * p.rows));
  for_each_task(grid.workers, grid.tasks(), [&](int64_t worker, int64_t t) {
    const PairTask task = grid.task(t);
    kernels.row_statistics(p, task, classes, found.data() + grid.column_part(t) * p.rows + task.row_begin, work + worker * words);
  });
  for (int64_t part = 1; part < grid.column_parts; ++part)
    for (int64_t i = 0; i < p.rows; ++i) found[i] = merged(found[i], found[part * p.rows + i]);
  found.resize(size_t(p.rows));
  return found;
}

// The log-sum-exp, of which *high and *low get the digits of two floats.
inline double log_sum(const BatchStatistic& s, float* high, float* low) {
  const double lse = level_of(s) + std::log(s.sum), rest = lse - double(float(lse));
  *high = float(lse), *low = std::isfinite(rest) ? float(rest) : 0;
  return lse;
}

// Adds the weighted sums of rows and of columns to `sums`.
inline void symmetric_sums(const PairParams& p, const SymmetricUpstream& upstream, const PairSums& sums) {
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t products = 1 + (sums.x_sums != nullptr) + (sums.y_sums != nullptr);
  if (p.batch * p.rows * p.columns == 0 || (products == 1 && sums.scores == nullptr)) return;
  for_each_rectangle(
      p, products, [&](int64_t rows, int64_t columns) { return kernels.symmetric_grad_workspace(p, sums, rows, columns); },
      [&](const PairTask& task, float* work) { kernels.symmetric_grad(p, task, upstream, sums, work); });
}

// Floats that both for few_pairs need.
inline int64_t kept_words(const PairParams& p, const PairSums& sums, bool sigmoid, bool table) {
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  return table ? kernels.tabled_workspace(p) : sigmoid ? kernels.kept_sigmoid_workspace(p, sums) : kernels.kept_symmetric_workspace(p, sums);
}

// Both for few_pairs, from the same scores: `between()` makes the upstream gradients of the log-sum-exps. column_lse null: not wanted. With a table
// it is given the weights, and there are no sums of columns. work: of kept_words.
template <class Between>
void kept_symmetric_sums(const PairParams& p, float* row_lse, float* row_low, float* column_lse, float* column_low, const Between& between,
                         const SymmetricUpstream& upstream, const PairSums& sums, float* work, float* table = nullptr) {
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const bool columns = column_lse != nullptr;
  const Partial of_rows(1, p.rows), of_columns(1, columns ? p.columns : 0);
  auto merge = [&] {
    leave_vectors();
    of_rows.merge(row_lse, row_low);
    if (columns) of_columns.merge(column_lse, column_low);
    between();
  };
  const kdfast::Step step{[](void* f) { (*static_cast<decltype(merge)*>(f))(); }, &merge};
  kdfast::SymmetricStatistics found{of_rows.maximum(0, 0), of_rows.rest(0, 0), of_rows.sum(0, 0)};
  if (columns) found.column_maximum = of_columns.maximum(0, 0), found.column_low = of_columns.rest(0, 0), found.column_sum = of_columns.sum(0, 0);
  if (table != nullptr) {
    kernels.tabled_symmetric(p, found, step, upstream, sums, table, work);
  } else {
    kernels.kept_symmetric(p, found, step, upstream, sums, work);
  }
  leave_vectors();
}

// The sigmoid pair loss of every row. Cut as the log-sum-exps; a row's parts are added up in order.
inline void sigmoid_losses(const PairParams& p, float* losses) {
  const Grid grid(p);
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t words = kernels.sigmoid_workspace(p, longest(p.rows, grid.row_parts), longest(p.columns, grid.column_parts));
  const int64_t size = p.batch * p.rows;
  const Workspace<float> workspace = product_workspace(words * grid.workers);
  const Tensor partial = scratch(grid.column_parts * size);
  float *const work = workspace.data(), *const parts = floats_of(partial);
  for_each_task(grid.workers, grid.tasks(), [&](int64_t worker, int64_t t) {
    const PairTask task = grid.task(t);
    kernels.sigmoid(p, task, parts + grid.column_part(t) * size + task.batch * p.rows + task.row_begin, work + worker * words);
  });
  for (int64_t i = 0; i < size; ++i) {
    losses[i] = 0;
    for (int64_t part = 0; part < grid.column_parts; ++part) losses[i] += parts[part * size + i];
  }
}

// Adds its weighted sums, upstream g [batch, rows], to `sums`.
inline void sigmoid_sums(const PairParams& p, const float* g, const PairSums& sums) {
  if (p.batch * p.rows * p.columns == 0) return;
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  for_each_rectangle(
      p, 1 + (sums.x_sums != nullptr) + (sums.y_sums != nullptr),
      [&](int64_t rows, int64_t columns) { return kernels.sigmoid_grad_workspace(p, sums, rows, columns); },
      [&](const PairTask& task, float* work) { kernels.sigmoid_grad(p, task, g, sums, work); });
}

// Both for few_pairs, from the same scores; work and a table as above.
inline void kept_sigmoid_sums(const PairParams& p, float* losses, const float* g, const PairSums& sums, float* work, float* table = nullptr) {
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  if (table != nullptr) {
    kernels.tabled_sigmoid(p, losses, g, sums, table, work);
  } else {
    kernels.kept_sigmoid(p, losses, g, sums, work);
  }
  leave_vectors();
}

// From a table of weights W_ij, sum_i g_i W_ij scale_i x_i for every column. work: as above.
inline void tabled_sums(const PairParams& p, const float* table, const float* g, float* y_sums, float* work) {
  kdfast::cpu_kernels().tabled_sums(p, table, g, y_sums, work);
  leave_vectors();
}

}  // namespace
