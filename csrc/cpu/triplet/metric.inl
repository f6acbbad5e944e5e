// Rows as distances see them, and distances from inner products.
//
// ||x - y||^2 = |x|^2 + |y|^2 - 2 x.y is formed from rows moved by about the mean of the references, which changes no difference and lets
// little cancel. Rows are read in any type, scaled and moved as they are needed: no copy of a matrix is made.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/packing.inl"
#include "engine/rows.inl"
#include "triplet/metric.h"

namespace {

using kdfast::Classes;
using kdfast::Metric;
using kdfast::MetricRows;

// lesser(a, b) is b when either is NaN.
#if KDFAST_LANES == 16
inline Vec lesser(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif KDFAST_LANES == 8
inline Vec lesser(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline Vec lesser(Vec a, Vec b) { return a < b ? a : b; }
#endif

// The sum of the lanes, by halves.
inline double wide_total(Vec x) {
  double sum[kLanes];
  for (int i = 0; i < kLanes; ++i) sum[i] = double(x[i]);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}

// The factor that brings row `row` to the length it counts with.
inline float row_scale(const MetricRows& m, int64_t row) {
  float scale = 1;
  if (m.normalize)
    with_elements(m.matrix, [&](const auto* elements) { scale = inverse_norm(row_square(elements + row * m.width, m.width)); });
  return scale;
}

// Row `row` as distances see it, times `factor`, to `to` [width]; returns the squared length without the factor.
inline float prepare_row(const MetricRows& m, int64_t row, float factor, float* to) {
  const Vec scale = splat(row_scale(m, row)), times = splat(factor);
  Vec square = {};
  with_elements(m.matrix, [&](const auto* elements) {
    for (int64_t d = 0; d < m.width; d += kLanes) {
      Vec x = load_row(elements + row * m.width, d, m.width) * scale;
      if (m.centre != nullptr) x -= load_row(m.centre, d, m.width);
      square = multiply_add(x, x, square);
      store_row(to, d, m.width, x * times);
    }
  });
  return total(square);
}

// |x|^2 + |y|^2 - 2 x.y; exactly 0 where it is no more than its own rounding error: coinciding rows stay at distance 0.
inline Vec squared_distance(Vec dot, Vec x_square, Vec y_square) {
  const Vec scale = x_square + y_square, square = scale - (dot + dot);
  return square < splat(0x1p-21f) * scale ? Vec{} : square;
}

}  // namespace
