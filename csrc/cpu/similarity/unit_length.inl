// Rows scaled to unit length, as torch.nn.functional.normalize does it, and the gradient.
//
// With n = max(|x|, 1e-12) and y = x / n: dx = (dy - y (y.dy)) / n, or dy / n where |x| is below that. Where dy is all 0 so is dx,
// whatever x holds: the row did not count, as a bank's past its valid ones.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/packing.inl"
#include "engine/rows.inl"
#include "similarity/unit_length.h"

namespace {

using kdfast::UnitLength;
using kdfast::UnitLengthGradient;

constexpr float kLeastNorm = 1e-12f;

template <class T>
void unit_length_of(const UnitLength& u, int64_t row, const T* x) {
  x += row * u.width;
  T* const y = static_cast<T*>(u.y) + row * u.width;
  const float norm = __builtin_sqrtf(row_square(x, u.width));
  const Vec n = splat(norm < kLeastNorm ? kLeastNorm : norm);
  for (int64_t d = 0; d < u.width; d += kLanes) store_row(y, d, u.width, load_row(x, d, u.width) / n);
  u.norm[row] = norm;
}

inline bool any_lane(IntVec mask) {
  int any = 0;
  for (int k = 0; k < kLanes; ++k) any |= mask[k];
  return any != 0;
}

template <class T>
void unit_length_grad_of(const UnitLengthGradient& u, int64_t row, const T* x) {
  x += row * u.width;
  const T* const dy = static_cast<const T*>(u.dy.data) + row * u.width;
  T* const dx = static_cast<T*>(u.dx) + row * u.width;
  const bool clamped = u.norm[row] < kLeastNorm;
  const Vec n = splat(clamped ? kLeastNorm : u.norm[row]);
  Vec along = {};
  IntVec counts = {};
  for (int64_t d = 0; d < u.width; d += kLanes) {
    const Vec upstream = load_row(dy, d, u.width);
    counts |= upstream != Vec{};
    along = multiply_add(load_row(x, d, u.width) / n, upstream, along);
  }
  if (!any_lane(counts)) {
    __builtin_memset(dx, 0, sizeof(T) * size_t(u.width));
    return;
  }
  const Vec share = splat(clamped ? 0 : total(along));
  for (int64_t d = 0; d < u.width; d += kLanes)
    store_row(dx, d, u.width, (load_row(dy, d, u.width) - scaled(load_row(x, d, u.width) / n, share)) / n);
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

void unit_length(const UnitLength& u, int64_t begin, int64_t end) {
  with_elements(u.x, [&](const auto* x) {
    for (int64_t i = begin; i < end; ++i) unit_length_of(u, i, x);
  });
}

void unit_length_grad(const UnitLengthGradient& u, int64_t begin, int64_t end) {
  with_elements(u.x, [&](const auto* x) {
    for (int64_t i = begin; i < end; ++i) unit_length_grad_of(u, i, x);
  });
}

}  // namespace
