// What the bindings of the gather kernels share: sampled rows, checked, and what their work is.
#pragma once

#include <atomic>

#include "bind.h"
#include "dispatch.h"

namespace {

using kdfast::GatherParams;

inline const int64_t* index_data(const GatherParams& p, const Tensor& index) {
  const int64_t* const at = packed<int64_t>("index", index, {p.rows, p.samples});
  STD_TORCH_CHECK(p.columns > 0 || index.numel() == 0, "bank must have at least 1 row");
  return at;
}

constexpr double kSampleWork = 300;  // what ordering a sample, or waiting for its bank row, costs in multiply-adds

inline void check_inside(const GatherParams& p, bool inside) { STD_TORCH_CHECK(inside, "index must be in [0, ", p.columns, ")"); }

}  // namespace
