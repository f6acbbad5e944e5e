// kdfast::symmetric_lse, kdfast::sigmoid_pairs and their gradients on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>

#include "similarity/bind_similarity.h"

namespace {

using kdfast::PairParams;
using kdfast::PairSums;
using kdfast::PairTask;

constexpr int64_t kMinSide = 64;  // rows, and columns, that a task should have: each is packed once for all of the other

PairParams pair_parameters(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& x_labels,
                           const OptionalTensor& y_labels, int64_t precision) {
  STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3, "x and y must have 3 dimensions, got ", x.dim(), " and ", y.dim());
  STD_TORCH_CHECK(x_labels.has_value() == y_labels.has_value(), "x_labels and y_labels come together");
  PairParams p{};
  p.precision = precision_of(precision);
  p.batch = x.size(0), p.rows = x.size(1), p.width = x.size(2), p.columns = y.size(1);
  p.x = row_matrix("x", x, {p.batch, p.rows, p.width});
  p.y = row_matrix("y", y, {p.batch, p.columns, p.width});
  p.scale = row_data<float>("scale", scale, {p.batch, p.rows});
  p.x_labels = row_data<int64_t>("x_labels", x_labels, {p.batch, p.rows});
  p.y_labels = row_data<int64_t>("y_labels", y_labels, {p.batch, p.columns});
  return p;
}

// Multiply-adds of so many matrix products.
double work_of(const PairParams& p, int64_t products) {
  return double(p.batch) * double(p.rows) * double(p.columns) * double(p.width) * double(products);
}

struct Range {
  int64_t begin, end;
};
Range part_of(int64_t size, int64_t part, int64_t parts) { return {part * size / parts, (part + 1) * size / parts}; }
int64_t longest(int64_t size, int64_t parts) { return (size + parts - 1) / parts; }

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

// [parts][size] maxima, then as many sums.
struct Partial {
  int64_t parts, size;
  Tensor memory;

  Partial(int64_t parts, int64_t size) : parts(parts), size(size), memory(scratch(2 * parts * size)) {}
  float* maximum(int64_t part, int64_t at) const { return static_cast<float*>(memory.mutable_data_ptr()) + part * size + at; }
  float* sum(int64_t part, int64_t at) const { return maximum(parts + part, at); }
  void merge(const Tensor& lse, const Tensor& low) const {
    kdfast::cpu_kernels().similarity_merge({parts, size, size, 0, maximum(0, 0), sum(0, 0), nullptr, static_cast<float*>(lse.mutable_data_ptr()),
                                            static_cast<float*>(low.mutable_data_ptr()), nullptr});
  }
};

// The parts of rows, and those of columns, are merged in a fixed order.
std::tuple<Tensor, Tensor, Tensor, Tensor> symmetric_lse(const Tensor& x, const Tensor& y, const Tensor& scale,
                                                         const OptionalTensor& x_labels, const OptionalTensor& y_labels, int64_t precision) {
  const PairParams p = pair_parameters(x, y, scale, x_labels, y_labels, precision);
  Tensor row_lse = output(x, {p.batch, p.rows}), row_low = output(x, {p.batch, p.rows});
  Tensor column_lse = output(x, {p.batch, p.columns}), column_low = output(x, {p.batch, p.columns});
  const Grid grid(p);
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const Partial of_rows(grid.column_parts, p.batch * p.rows), of_columns(grid.row_parts, p.batch * p.columns);
  const int64_t words = kernels.symmetric_workspace(p, longest(p.rows, grid.row_parts), longest(p.columns, grid.column_parts));
  const Tensor workspace = scratch(words * grid.workers);
  float* const work = static_cast<float*>(workspace.mutable_data_ptr());
  for_each_task(grid.workers, grid.tasks(), [&](int64_t worker, int64_t t) {
    const PairTask task = grid.task(t);
    const int64_t row_part = grid.row_part(t), column_part = grid.column_part(t);
    const int64_t row = task.batch * p.rows + task.row_begin, column = task.batch * p.columns + task.column_begin;
    kernels.symmetric(p, task,
                      {of_rows.maximum(column_part, row), of_rows.sum(column_part, row), of_columns.maximum(row_part, column),
                       of_columns.sum(row_part, column)},
                      work + worker * words);
  });
  of_rows.merge(row_lse, row_low);
  of_columns.merge(column_lse, column_low);
  return {row_lse, column_lse, row_low, column_low};
}

// Sums of `shape`, zero; [0] where not wanted.
Tensor zeros(const Tensor& like, bool wanted, std::initializer_list<int64_t> shape) {
  Tensor sums = wanted ? output(like, shape) : output(like, {0});
  return torch::stable::zero_(sums);
}

// task(PairTask, workspace) over a grid of parts x parts rectangles of each batch entry, in `parts` rounds: in a round no two rectangles
// share rows or columns. So sums of rows and of columns grow in place, in an order that depends on the number of threads alone.
template <class Words, class Task>
void for_each_rectangle(const PairParams& p, int64_t products, const Words& words_for, const Task& task) {
  const int64_t workers = workers_for(work_of(p, products));
  const int64_t parts = std::clamp<int64_t>(std::min(p.rows, p.columns) / kMinSide, 1, workers / std::gcd(workers, p.batch));
  const int64_t words = words_for(longest(p.rows, parts), longest(p.columns, parts));
  const Tensor workspace = scratch(words * workers);
  float* const work = static_cast<float*>(workspace.mutable_data_ptr());
  for (int64_t round = 0; round < parts; ++round) {
    for_each_task(workers, p.batch * parts, [&](int64_t worker, int64_t t) {
      const Range columns = part_of(p.columns, t % parts, parts), rows = part_of(p.rows, (t + round) % parts, parts);
      task(PairTask{t / parts, rows.begin, rows.end, columns.begin, columns.end}, work + worker * words);
    });
  }
}

std::tuple<Tensor, Tensor> symmetric_gradients(const Tensor& row_g, const Tensor& column_g, const Tensor& row_lse, const Tensor& column_lse,
                                               const Tensor& row_low, const Tensor& column_low, const Tensor& x, const Tensor& y,
                                               const Tensor& scale, const OptionalTensor& x_labels, const OptionalTensor& y_labels,
                                               bool want_x, bool want_y, int64_t precision) {
  const PairParams p = pair_parameters(x, y, scale, x_labels, y_labels, precision);
  const auto per_row = [&](const char* name, const Tensor& t) { return row_data<float>(name, t, {p.batch, p.rows}); };
  const auto per_column = [&](const char* name, const Tensor& t) { return row_data<float>(name, t, {p.batch, p.columns}); };
  const kdfast::SymmetricUpstream upstream{per_row("row_g", row_g),          per_row("row_lse", row_lse),          per_row("row_low", row_low),
                                           per_column("column_g", column_g), per_column("column_lse", column_lse), per_column("column_low", column_low)};
  Tensor x_sums = zeros(x, want_x, {p.batch, p.rows, p.width}), y_sums = zeros(x, want_y, {p.batch, p.columns, p.width});
  if (p.batch * p.rows * p.columns == 0 || !(want_x || want_y)) return {x_sums, y_sums};
  const PairSums sums{want_x ? static_cast<float*>(x_sums.mutable_data_ptr()) : nullptr,
                      want_y ? static_cast<float*>(y_sums.mutable_data_ptr()) : nullptr, nullptr};
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  for_each_rectangle(
      p, 1 + want_x + want_y, [&](int64_t rows, int64_t columns) { return kernels.symmetric_grad_workspace(p, sums, rows, columns); },
      [&](const PairTask& task, float* work) { kernels.symmetric_grad(p, task, upstream, sums, work); });
  return {x_sums, y_sums};
}

PairParams sigmoid_parameters(const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& shift, const Tensor& positive, int64_t precision) {
  PairParams p = pair_parameters(x, y, scale, std::nullopt, std::nullopt, precision);
  p.shift = row_data<float>("shift", shift, {p.batch, p.rows});
  p.positive = row_data<int64_t>("positive", positive, {p.batch, p.rows});
  return p;
}

// Cut as for symmetric_lse; a row's parts are added up in order.
Tensor sigmoid_pairs(const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& shift, const Tensor& positive, int64_t precision) {
  const PairParams p = sigmoid_parameters(x, y, scale, shift, positive, precision);
  Tensor loss = output(x, {p.batch, p.rows});
  const Grid grid(p);
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t words = kernels.sigmoid_workspace(p, longest(p.rows, grid.row_parts), longest(p.columns, grid.column_parts));
  const int64_t size = p.batch * p.rows;
  const Tensor workspace = scratch(words * grid.workers), partial = scratch(grid.column_parts * size);
  float* const work = static_cast<float*>(workspace.mutable_data_ptr());
  float* const parts = static_cast<float*>(partial.mutable_data_ptr());
  for_each_task(grid.workers, grid.tasks(), [&](int64_t worker, int64_t t) {
    const PairTask task = grid.task(t);
    kernels.sigmoid(p, task, parts + grid.column_part(t) * size + task.batch * p.rows + task.row_begin, work + worker * words);
  });
  float* const out = static_cast<float*>(loss.mutable_data_ptr());
  for (int64_t i = 0; i < size; ++i) {
    out[i] = 0;
    for (int64_t part = 0; part < grid.column_parts; ++part) out[i] += parts[part * size + i];
  }
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> sigmoid_gradients(const Tensor& g, const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& shift,
                                                     const Tensor& positive, bool want_x, bool want_y, int64_t precision) {
  const PairParams p = sigmoid_parameters(x, y, scale, shift, positive, precision);
  const float* const upstream = row_data<float>("g", g, {p.batch, p.rows});
  Tensor x_sums = zeros(x, want_x, {p.batch, p.rows, p.width}), y_sums = zeros(x, want_y, {p.batch, p.columns, p.width});
  Tensor weights = zeros(x, true, {p.batch, p.rows});
  if (p.batch * p.rows * p.columns == 0) return {x_sums, y_sums, weights};
  const PairSums sums{want_x ? static_cast<float*>(x_sums.mutable_data_ptr()) : nullptr,
                      want_y ? static_cast<float*>(y_sums.mutable_data_ptr()) : nullptr, static_cast<float*>(weights.mutable_data_ptr())};
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  for_each_rectangle(
      p, 1 + want_x + want_y, [&](int64_t rows, int64_t columns) { return kernels.sigmoid_grad_workspace(p, sums, rows, columns); },
      [&](const PairTask& task, float* work) { kernels.sigmoid_grad(p, task, upstream, sums, work); });
  return {x_sums, y_sums, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("symmetric_lse", TORCH_BOX(&symmetric_lse));
  m.impl("symmetric_gradients", TORCH_BOX(&symmetric_gradients));
  m.impl("sigmoid_pairs", TORCH_BOX(&sigmoid_pairs));
  m.impl("sigmoid_gradients", TORCH_BOX(&sigmoid_gradients));
}
