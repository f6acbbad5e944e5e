// Norms and distances of single rows of any element type.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/simd.h"

namespace {

template <class T>
inline float row_square(const T* x, int64_t width) {
  Vec sum = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec v = load_row(x, d, width);
    sum = multiply_add(v, v, sum);
  }
  return total(sum);
}

template <class T>
inline void prefetch_row(const T* row, int64_t width) {
  for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d);
}

// Elements times a scale, rounded: contracted into a difference, one of two equal products would keep what the other lost.
inline Vec scaled(Vec x, Vec scale) { return opaque(x * scale); }

// ||a x - b y||^2, from differences: equal rows are at distance exactly 0.
template <class T, class U>
inline float row_distance(const T* x, float a, const U* y, float b, int64_t width) {
  Vec sum = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec v = scaled(load_row(x, d, width), splat(a)) - scaled(load_row(y, d, width), splat(b));
    sum = multiply_add(v, v, sum);
  }
  return total(sum);
}

// Of a row whose squared norm is `square`, as torch.nn.functional.normalize has it.
inline float inverse_norm(float square) {
  const float norm = __builtin_sqrtf(square);
  return 1 / (norm < 1e-12f ? 1e-12f : norm);
}

}  // namespace
