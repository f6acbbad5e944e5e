// What the bindings of the gather kernels share: sampled rows, checked, and the threads their work is worth.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "bind.h"
#include "dispatch.h"

namespace {

using kdfast::GatherParams;

inline const int64_t* index_data(const GatherParams& p, const Tensor& index) {
  check("index", index, ScalarType::Long, {p.rows, p.samples});
  STD_TORCH_CHECK(p.columns > 0 || index.numel() == 0, "bank must have at least 1 row");
  STD_TORCH_CHECK(index.is_contiguous(), "index must be contiguous");
  return data<int64_t>(index);
}

inline const float* float_rows(const char* name, const Tensor& x, int64_t rows, int64_t width) {
  check(name, x, ScalarType::Float, {rows, width});
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  return data<float>(x);
}

inline Tensor scratch(int64_t count, ScalarType type) {
  return torch::stable::empty({count}, type, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
}

constexpr double kSampleWork = 300;  // what ordering a sample, or waiting for its bank row, costs in multiply-adds

// `work` in multiply-adds.
inline int64_t workers_for(double work, int64_t most) {
  return std::clamp<int64_t>(int64_t(work / kMinWork), 1, std::min<int64_t>(torch::stable::get_num_threads(), most));
}

inline void check_inside(const GatherParams& p, bool inside) { STD_TORCH_CHECK(inside, "index must be in [0, ", p.columns, ")"); }

}  // namespace
