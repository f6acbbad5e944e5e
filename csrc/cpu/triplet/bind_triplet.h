// What the bindings of the triplet kernels share: rows as a metric sees them, classes.
#pragma once

#include "bind.h"
#include "dispatch.h"

namespace {

constexpr int64_t kPanelPad = 64;  // vectors over rows or columns may be read up to a whole panel

inline kdfast::Metric metric_of(int64_t metric) {
  STD_TORCH_CHECK(metric >= 0 && metric <= 2, "metric must be 0 (euclidean), 1 (sqeuclidean) or 2 (cosine), got ", metric);
  return kdfast::Metric(metric);
}

inline kdfast::MetricRows metric_rows(const char* name, const Tensor& x, bool normalize, const OptionalTensor& centre = std::nullopt) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must have 2 dimensions, got ", x.dim());
  const int64_t width = x.size(1);
  return {row_matrix(name, x, {x.size(0), width}), width, normalize, row_data<float>("centre", centre, {width})};
}

template <class T>
T* written(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace
