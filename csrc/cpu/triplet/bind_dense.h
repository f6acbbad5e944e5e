// What the bindings of losses over all negatives share: the problem, checked; tables of the positives; division among threads; gradients.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "bind.h"
#include "dispatch.h"
#include "large_pages.h"
#include "triplet/bind_triplet.h"

namespace {

using kdfast::CpuKernels;
using kdfast::DenseParams;
using kdfast::PairSums;
using kdfast::PairTask;
using kdfast::tile_columns;

constexpr int64_t kFewWindows = 16;  // windows of a row that are compared with every level; more are sorted
constexpr int64_t kPullColumns = 256;  // of small classes, whose positives are summed together
constexpr int64_t kTaskSlots = int64_t(1) << 17;  // of one task, whose tables they are

template <class T>
T* memory(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
Tensor zeros(int64_t count, ScalarType type) {
  Tensor x = scratch(count, type);
  std::fill_n(memory<T>(x), count, T(0));
  return x;
}

inline int64_t parts_of(int64_t size, int64_t most) { return std::clamp<int64_t>(size / kRowsApart, 1, most); }

// Where part number `part` of `parts` begins, a multiple of kRowsApart.
inline int64_t bound(int64_t size, int64_t part, int64_t parts) {
  return part == parts ? size : size * part / parts / kRowsApart * kRowsApart;
}

// f(begin, end) for parts of `size` rows, one a worker.
template <class F>
void for_each_part(int64_t workers, int64_t size, const F& f) {
  const int64_t parts = parts_of(size, workers);
  for_each_task(parts, parts, [&](int64_t, int64_t part) { f(bound(size, part, parts), bound(size, part + 1, parts)); });
}

// One problem, its references counted and its positives measured.
struct Dense {
  DenseParams p{};
  const CpuKernels& kernels = kdfast::cpu_kernels();
  int64_t workers, slots, most = 0;  // most: positives of a row
  std::vector<int64_t> group;
  Tensor x_square, y_square, distance, farthest;

  Dense(const Tensor& x, const OptionalTensor& y, const Tensor& first, const Tensor& last, const Tensor& own, const Tensor& columns,
        int64_t metric, int64_t positives) {
    STD_TORCH_CHECK(x.dim() == 2 && (!y || y->dim() == 2), "x and y must have 2 dimensions");
    STD_TORCH_CHECK(metric >= 0 && metric <= 3, "metric must be in [0, 3], got ", metric);
    STD_TORCH_CHECK(positives >= 0, "positives must be >= 0, got ", positives);
    const Tensor& refs = y ? *y : x;
    const int64_t rows = x.size(0), width = x.size(1);
    p.pairs.batch = 1, p.pairs.rows = rows, p.pairs.columns = refs.size(0), p.pairs.width = width;
    p.pairs.x = {packed<float>("x", x, {rows, width}), kdfast::ElementType::kFloat32};
    p.pairs.y = {packed<float>("y", refs, {p.pairs.columns, width}), kdfast::ElementType::kFloat32};
    p.metric = kdfast::Metric(metric), p.in_batch = !y, p.positives = positives;
    p.first = packed<int64_t>("first", first, {rows});
    p.last = packed<int64_t>("last", last, {rows});
    p.own = packed<int64_t>("own", own, {rows});
    p.columns = *packed<int64_t>("columns", columns, {});
    check_runs();
    workers = workers_for(double(rows) * double(p.columns) * double(width));
    group_slots();
    measure();
  }

  void check_runs() const {
    STD_TORCH_CHECK(p.columns >= 0 && p.columns <= p.pairs.columns, "columns must be in [0, ", p.pairs.columns, "], got ", p.columns);
    for (int64_t i = 0; i < p.pairs.rows; ++i) {
      const bool good = 0 <= p.first[i] && p.first[i] <= p.last[i] && p.last[i] <= p.columns && -1 <= p.own[i] && p.own[i] < p.pairs.columns;
      STD_TORCH_CHECK(good, "row ", i, " has a class ", p.first[i], " .. ", p.last[i], " or own reference ", p.own[i], " out of range");
    }
  }

  void group_slots() {
    for (int64_t i = 0; i < p.pairs.rows; ++i) most = std::max(most, p.count(i));
    p.group_shift = most > kFewWindows ? 0 : DenseParams::kSlotShift;
    const int64_t together = int64_t(1) << p.group_shift;
    group.assign(1, 0);
    for (int64_t begin = 0; begin < p.pairs.rows; begin += together) {
      int64_t deepest = 0;
      for (int64_t i = begin; i < std::min(begin + together, p.pairs.rows); ++i) deepest = std::max(deepest, p.count(i));
      group.push_back(group.back() + deepest);
    }
    p.group = group.data();
    slots = p.slots(0, p.pairs.rows);
    p.symmetric = p.in_batch, p.mirrored = p.group_shift == 0;
    for (int64_t i = 0; i < p.pairs.rows; ++i) p.symmetric &= p.own[i] == i && p.own_inside(i), p.mirrored &= p.count(i) == p.all_positives(i);
    p.mirrored &= p.symmetric;
  }

  void measure() {
    const auto squares = [&](const kdfast::Matrix& m, int64_t count, Tensor& to) {
      to = zeros<float>(count + kPanelPad, ScalarType::Float);
      for_each_part(workers, count, [&](int64_t begin, int64_t end) {
        kernels.dense_squares(static_cast<const float*>(m.data), p.pairs.width, begin, end, memory<float>(to));
      });
    };
    squares(p.pairs.x, p.pairs.rows, x_square);
    if (!p.in_batch) squares(p.pairs.y, p.pairs.columns, y_square);
    // non-finite rows are for plain floats, and a square is finite where its row is, or the row is far too long for its distances to be
    const auto finite = [](const Tensor& square) {
      return std::all_of(data<float>(square), data<float>(square) + square.numel(), [](float one) { return one - one == 0; });
    };
    if (!finite(x_square) || !(p.in_batch || finite(y_square))) p.pairs.precision = kdfast::Precision::kFloat32Vectors;
    p.x_square = memory<float>(x_square), p.y_square = memory<float>(p.in_batch ? x_square : y_square);
    distance = on_large_pages(scratch(slots)), farthest = zeros<float>(p.pairs.rows + kPanelPad, ScalarType::Float);
    p.distance = memory<float>(distance), p.farthest = memory<float>(farthest);
    for_each_part(workers, p.pairs.rows, [&](int64_t begin, int64_t end) { kernels.dense_positives(p, begin, end); });
    if (p.mirrored) for_each_part(workers, p.pairs.rows, [&](int64_t begin, int64_t end) { kernels.dense_mirror(p, begin, end); });
  }

  int64_t rows() const { return p.pairs.rows; }

  // Parts that the rows are cut into, and the threads that share them.
  int64_t parts() const { return std::max(parts_of(rows(), workers), parts_of(rows(), (slots + kTaskSlots - 1) / kTaskSlots)); }
  int64_t threads() const { return std::min(workers, parts()); }

  // f(begin, end, worker, workspace) for all parts of the rows; words(rows, slots) of workspace.
  template <class Words, class F>
  void for_each_rows(const Words& words, const F& f) const {
    const int64_t number = parts();
    int64_t most_rows = 0, most_slots = 0;
    for (int64_t part = 0; part < number; ++part) {
      const int64_t begin = bound(rows(), part, number), end = bound(rows(), part + 1, number);
      most_rows = std::max(most_rows, end - begin), most_slots = std::max(most_slots, p.slots(begin, end));
    }
    const int64_t size = words(most_rows, most_slots);
    const Tensor workspace = scratch(size * threads());
    for_each_task(threads(), number, [&](int64_t worker, int64_t part) {
      f(bound(rows(), part, number), bound(rows(), part + 1, number), worker, memory<float>(workspace) + worker * size);
    });
  }

  // f(task, workspace) with all rectangles of parts of the rows and, where columns are summed too, parts of the columns, in rounds: in a round no two
  // share rows or columns, so that sums of both grow in place, in an order that depends on the number of threads alone.
  template <class Words, class F>
  void for_each_rectangle(const PairSums& sums, const Words& words, const F& f) const {
    const int64_t rows = p.pairs.rows, columns = sums.y_sums == nullptr ? 1 : parts_of(p.columns, workers);
    const int64_t parts = sums.y_sums == nullptr ? parts_of(rows, workers) : std::min(parts_of(rows, workers), columns);
    const int64_t rounds = std::min(parts, columns);
    const int64_t size = words(rows / parts + 2 * kRowsApart, p.columns / rounds + 2 * kRowsApart);
    const Tensor workspace = scratch(size * parts);
    for (int64_t round = 0; round < rounds; ++round) {
      for_each_task(parts, parts, [&](int64_t worker, int64_t part) {
        const int64_t column = (part + round) % rounds;
        f(PairTask{0, bound(rows, part, parts), bound(rows, part + 1, parts), bound(p.columns, column, rounds), bound(p.columns, column + 1, rounds)},
          memory<float>(workspace) + worker * size);
      });
    }
  }
};

inline int64_t tile_rows(const DenseParams& p) { return (p.pairs.rows + DenseParams::kSlotRows - 1) / DenseParams::kSlotRows; }

// One number a row, copied to where vectors of rows may be read beyond the last.
inline Tensor padded(const float* x, int64_t stride, int64_t rows) {
  Tensor to = zeros<float>(rows + kPanelPad, ScalarType::Float);
  for (int64_t i = 0; i < rows; ++i) memory<float>(to)[i] = x[i * stride];
  return to;
}

inline Tensor no_tiles(const Tensor& x, const DenseParams& p) {
  Tensor tiles = output(x, {tile_rows(p), tile_columns(p)}, ScalarType::Byte);
  return torch::stable::zero_(tiles);
}

inline const uint8_t* tiles_data(const Tensor& tiles, const DenseParams& p) {
  check("tiles", tiles, ScalarType::Byte, {tile_rows(p), tile_columns(p)});
  STD_TORCH_CHECK(tiles.is_contiguous(), "tiles must be contiguous");
  return data<uint8_t>(tiles);
}

// Gradients in x and y, or in the one of them that is wanted, from sums weighted in tiles and the pull of the positives.
struct DenseGradients {
  const Dense& dense;
  Tensor dx, dy;
  PairSums sums;
  Tensor pull, x_weight, y_weight;

  DenseGradients(const Dense& dense, const Tensor& like, bool want_x, bool want_y)
      : dense(dense), pull(on_large_pages(scratch(dense.slots))), x_weight(zeros<double>(dense.rows(), ScalarType::Double)),
        y_weight(zeros<double>(want_y ? dense.p.pairs.columns : 0, ScalarType::Double)) {
    const DenseParams& p = dense.p;
    STD_TORCH_CHECK(!(want_y && p.in_batch), "in batch the gradient of the references is part of that of x");
    dx = want_x ? output(like, {p.pairs.rows, p.pairs.width}) : output(like, {0});
    dy = want_y ? output(like, {p.pairs.columns, p.pairs.width}) : output(like, {0});
    torch::stable::zero_(dx), torch::stable::zero_(dy);
    sums = {want_x ? memory<float>(dx) : nullptr, want_y ? memory<float>(dy) : nullptr, nullptr};
  }

  // pull_of(begin, end, pull): the pull of the positives of rows begin .. end.
  template <class F>
  std::tuple<Tensor, Tensor> finish(const F& pull_of) {
    for_each_part(dense.workers, dense.rows(), [&](int64_t begin, int64_t end) { pull_of(begin, end, memory<float>(pull)); });
    return finish();
  }
  std::tuple<Tensor, Tensor> finish() {
    const DenseParams& p = dense.p;
    const float* pulls = memory<float>(pull);
    if (p.group_shift == 0) {
      pull_in_tiles(pulls);
      pulls = nullptr;
    }
    if (sums.x_sums != nullptr)
      for_each_part(dense.workers, p.pairs.rows, [&](int64_t begin, int64_t end) {
        dense.kernels.dense_finish_rows(p, pulls, memory<double>(x_weight), sums.x_sums, begin, end);
      });
    if (sums.y_sums != nullptr)
      for_each_part(dense.workers, p.columns, [&](int64_t begin, int64_t end) {
        dense.kernels.dense_finish_columns(p, pulls, memory<double>(y_weight), sums.y_sums, begin, end);
      });
    return {dx, dy};
  }

  // Tasks of whole classes, which share neither rows nor columns; in batch the columns are the rows.
  void pull_in_tiles(const float* pulls) const {
    const DenseParams& p = dense.p;
    const std::vector<PairTask> tasks = class_tasks(p);
    int64_t rows = 0, columns = 0;
    for (const PairTask& t : tasks) rows = std::max(rows, t.row_end - t.row_begin), columns = std::max(columns, t.column_end - t.column_begin);
    PairSums to = sums;
    kdfast::DensePull pull{pulls, memory<double>(x_weight), sums.y_sums != nullptr ? memory<double>(y_weight) : nullptr};
    if (p.in_batch) to.y_sums = to.x_sums, pull.y_weight = pull.x_weight;
    const int64_t size = dense.kernels.dense_pull_workspace(p, to, rows, columns), number = int64_t(tasks.size());
    const int64_t threads = std::min(dense.workers, number);
    const Tensor workspace = scratch(size * threads);
    for_each_task(threads, number, [&](int64_t worker, int64_t task) {
      dense.kernels.dense_pull(p, tasks[size_t(task)], pull, to, memory<float>(workspace) + worker * size);
    });
  }

  // Runs of rows of the same classes, each up to kPullColumns columns or one class.
  static std::vector<PairTask> class_tasks(const DenseParams& p) {
    std::vector<PairTask> tasks;
    for (int64_t row = 0; row < p.pairs.rows;) {
      int64_t end = row + 1, last = p.last[row];
      for (; end < p.pairs.rows; ++end) {
        if (p.first[end] != p.first[end - 1] && p.last[end] - p.first[row] > kPullColumns) break;
        last = std::max(last, p.last[end]);
      }
      if (last > p.first[row]) tasks.push_back({0, row, end, p.first[row], last});
      row = end;
    }
    return tasks;
  }
};

}  // namespace
