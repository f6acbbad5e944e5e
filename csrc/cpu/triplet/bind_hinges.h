// What the bindings of hinges of triplets share: the rule, the filter of multi-similarity mining, sums of the columns, gradients made with the values.
#pragma once

#include <cmath>
#include <limits>

#include "triplet/bind_dense.h"

namespace {

inline kdfast::HingeRule rule_of(int64_t mining, double sign, double margin, double epsilon, bool soft) {
  STD_TORCH_CHECK(mining >= 0 && mining <= 2, "mining must be 0, 1 or 2, got ", mining);
  STD_TORCH_CHECK(sign == 1 || sign == -1, "sign must be 1 or -1, got ", sign);
  return {kdfast::Mining(mining), float(sign), float(epsilon), margin, soft, nullptr};
}

// Sums of the columns that each thread keeps for itself, added up in the order of threads.
struct ColumnSums {
  int64_t size, columns, threads;
  Tensor sums, weights;

  ColumnSums(const Dense& dense, bool wanted, int64_t threads)
      : size(wanted ? dense.p.pairs.columns * dense.p.pairs.width : 0), columns(wanted ? dense.p.pairs.columns : 0), threads(threads),
        sums(zeros<float>(size * threads, ScalarType::Float)), weights(zeros<double>(columns * threads, ScalarType::Double)) {}
  float* sums_of(int64_t worker) const { return size > 0 ? memory<float>(sums) + worker * size : nullptr; }
  double* weights_of(int64_t worker) const { return size > 0 ? memory<double>(weights) + worker * columns : nullptr; }
  void add_to(float* to_sums, double* to_weights) const {
    for (int64_t worker = 0; worker < threads; ++worker) {
      const float* const own_sums = sums_of(worker);
      const double* const own_weights = weights_of(worker);
      for (int64_t i = 0; i < size; ++i) to_sums[i] += own_sums[i];
      for (int64_t j = 0; j < columns; ++j) to_weights[j] += own_weights[j];
    }
  }
};

// Where a part of the filter's rows begins: those whose distances serve both their rows have the fewer columns the later they come.
inline int64_t filter_bound(const DenseParams& p, int64_t part, int64_t parts) {
  if (!p.symmetric) return bound(p.pairs.rows, part, parts);
  const double before = 1 - std::sqrt(1 - double(part) / double(parts));
  return part == parts ? p.pairs.rows : int64_t(before * double(p.pairs.rows)) / kRowsApart * kRowsApart;
}

// What values of one pass are made with: out.nearest, and out.mined as SortedHinges takes it.
inline void run_filter(const Dense& dense, const kdfast::HingeRule& rule, const kdfast::HingeResult& out) {
  const int64_t rows = dense.rows();
  std::fill_n(out.nearest, rows, std::numeric_limits<float>::infinity());
  if (rule.mining != kdfast::Mining::kMultiSimilarity) return;
  const int64_t parts = parts_of(rows, dense.workers), padded_rows = rows + kPanelPad;
  const Tensor nearest = scratch(parts * padded_rows), kept = zeros<int64_t>(parts * rows, ScalarType::Long);
  std::fill_n(memory<float>(nearest), parts * padded_rows, std::numeric_limits<float>::infinity());
  for_each_task(parts, parts, [&](int64_t, int64_t part) {
    const int64_t begin = filter_bound(dense.p, part, parts), end = filter_bound(dense.p, part + 1, parts);
    const Tensor workspace = scratch(dense.kernels.hinge_filter_workspace(dense.p, end - begin));
    dense.kernels.hinge_filter(dense.p, rule, {memory<float>(nearest) + part * padded_rows, memory<int64_t>(kept) + part * rows}, begin, end,
                               memory<float>(workspace));
  });
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < rows; ++i) {
      out.nearest[i] = std::min(out.nearest[i], memory<float>(nearest)[part * padded_rows + i]);
      out.mined[i] += memory<int64_t>(kept)[part * rows + i];
    }
  }
}

// counts [N, pairs of columns] from `pairs` vectors of N.
inline Tensor columns_of(const Tensor& like, const std::vector<const int64_t*>& columns, int64_t rows) {
  const int64_t number = int64_t(columns.size());
  Tensor to = output(like, {rows, number}, ScalarType::Long);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < number; ++c) memory<int64_t>(to)[i * number + c] = columns[size_t(c)][i];
  return to;
}

struct Wanted {
  bool x, y;
};

// factor x where it is wanted, else nothing.
inline Tensor scaled(const Tensor& x, float factor, bool wanted) {
  Tensor to = output(x, wanted ? std::vector<int64_t>{x.size(0), x.size(1)} : std::vector<int64_t>{0});
  std::transform(data<float>(x), data<float>(x) + to.numel(), memory<float>(to), [&](float one) { return factor * one; });
  return to;
}

// Whether a gradient made with the values, of the rows of `like`, is at hand: else it has no elements.
inline bool given(const char* name, const Tensor& gradient, const Tensor& like) {
  if (gradient.dim() == 1 && gradient.size(0) == 0) return false;
  packed<float>(name, gradient, {like.size(0), like.size(1)});
  return true;
}

}  // namespace
