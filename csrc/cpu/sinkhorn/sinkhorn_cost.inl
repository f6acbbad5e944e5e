// Rows of a cost matrix: read where it is given, formed from points otherwise, a few rows at a time.
//
// Points y lie in panels of kVecs vectors, [panel][D][lanes], so that a tile of 4 rows by a panel is read from one place.
#pragma once

#include "sinkhorn/sinkhorn.h"
#include "engine/vector_math.h"

namespace {

using kdfast::ElementType;
using kdfast::SinkhornMetric;
using kdfast::SinkhornProblem;
using kdfast::SinkhornTeam;

template <class Real>
constexpr int64_t kPanelWidth = kVecs * kWidth<Real>;
constexpr int64_t kDirectWidth = 16;  // squared distances in so few dimensions are summed from differences: points may nearly meet
constexpr int64_t kPointRows = 4;

// What sums over d of products, or of squared differences, becomes.
template <class Real>
struct PointSums {
  bool difference;
  const Real *panels, *y_squares;  // [round_up(m, panel)]; squares only for products under kSquared

  static int64_t space(const SinkhornProblem<Real>& p) {
    return p.metric == SinkhornMetric::kGiven ? 0 : round_up(p.m, kPanelWidth<Real>) * (p.width + 1);
  }

  static bool from_differences(const SinkhornProblem<Real>& p) {
    return p.metric == SinkhornMetric::kEuclidean || (p.metric == SinkhornMetric::kSquared && p.width <= kDirectWidth);
  }

  PointSums(const SinkhornProblem<Real>& p, Real* work)
      : difference(from_differences(p)),
        panels(work),
        y_squares(work + round_up(p.m, kPanelWidth<Real>) * p.width) {
    if (p.metric == SinkhornMetric::kGiven) return;
    constexpr int64_t kP = kPanelWidth<Real>;
    for (int64_t j = 0; j < round_up(p.m, kP); ++j) {
      Real square = 0;
      Real* const to = work + j / kP * kP * p.width + j % kP;
      for (int64_t d = 0; d < p.width; ++d) {
        const Real y = j < p.m ? p.y[j * p.width + d] : Real(0);
        to[d * kP] = y;
        square += y * y;
      }
      const_cast<Real*>(y_squares)[j] = square;
    }
  }
};

template <class Real>
inline Real square_norm(const Real* x, int64_t width) {
  VecOf<Real> sum[4] = {};
  each_vector<Real>(width, [&](int64_t d, int lane, int64_t count) {
    const VecOf<Real> v = load_count<Real>(x + d, count);
    sum[lane] = multiply_add(v, v, sum[lane]);
  });
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Costs of kRows points x and one panel of y.
template <int kRows, bool kDifference, class Real>
inline void cost_panel(const SinkhornProblem<Real>& p, const PointSums<Real>& sums, int64_t i, int64_t j, Real* out, int64_t stride) {
  using V = VecOf<Real>;
  constexpr int64_t kW = kWidth<Real>;
  const Real* const panel = sums.panels + j * p.width;
  const Real* const x = p.x + i * p.width;
  V acc[kRows][kVecs] = {};
  for (int64_t d = 0; d < p.width; ++d) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V point = splat(x[r * p.width + d]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const V y = load(panel + d * kPanelWidth<Real> + v * kW);
        if constexpr (kDifference) {
          const V difference = point - y;
          acc[r][v] = multiply_add(difference, difference, acc[r][v]);
        } else {
          acc[r][v] = multiply_add(point, y, acc[r][v]);
        }
      }
    }
  }
  const bool expand = p.metric == SinkhornMetric::kSquared && !kDifference;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Real x_square = expand ? square_norm(x + r * p.width, p.width) : Real(0);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      V c = acc[r][v];
      if (expand) {
        c = splat(x_square) + load(sums.y_squares + j + v * kW) - 2 * c;
        c = larger(splat(Real(0)), c);
      } else if (p.metric == SinkhornMetric::kDot) {
        c = 1 - c;
      } else if (p.metric == SinkhornMetric::kEuclidean) {
        c = root(c);
      }
      store(out + r * stride + v * kW, c);
    }
  }
}

template <int kRows, class Real>
inline void cost_tile(const SinkhornProblem<Real>& p, const PointSums<Real>& sums, int64_t i, int64_t j, int64_t columns, Real* out, int64_t stride) {
  for (int64_t c = 0; c < columns; c += kPanelWidth<Real>) {
    if (sums.difference) {
      cost_panel<kRows, true>(p, sums, i, j + c, out + c, stride);
    } else {
      cost_panel<kRows, false>(p, sums, i, j + c, out + c, stride);
    }
  }
}

// Columns j ... j + columns of rows i ... i + rows, j at a panel: a pointer to the first, and the stride between rows. T is what costs
// are stored as; those of points go to `buffer`, [rows][round_up(columns, panel)].
template <class Real, class T>
inline const T* cost_rows(const SinkhornProblem<Real>& p, const PointSums<Real>& sums, int64_t i, int64_t rows, int64_t j, int64_t columns, Real* buffer,
                          int64_t* stride) {
  if constexpr (sizeof(T) == sizeof(Real)) {
    if (p.metric != SinkhornMetric::kGiven) {
      *stride = round_up(columns, kPanelWidth<Real>);
      int64_t r = 0;
      for (; r + kPointRows <= rows; r += kPointRows) cost_tile<kPointRows>(p, sums, i + r, j, columns, buffer + r * *stride, *stride);
      for (; r < rows; ++r) cost_tile<1>(p, sums, i + r, j, columns, buffer + r * *stride, *stride);
      return reinterpret_cast<const T*>(buffer);
    }
  }
  *stride = p.cost_stride;
  return static_cast<const T*>(p.cost) + i * p.cost_stride + j;
}

// The problem of points with a given cost, formed from them in arrays.kept [n, arrays.m]; PointSums are made in arrays.points.
template <class Real, class Arrays>
SinkhornProblem<Real> keep_cost(const SinkhornProblem<Real>& p, const SinkhornTeam& team, const Arrays& arrays) {
  struct Rows {
    const SinkhornProblem<Real>& p;
    const PointSums<Real> points;
    const Arrays& arrays;
    int64_t workers;
  } rows{p, PointSums<Real>(p, arrays.points), arrays, team.size};
  team.run(team.size, [](void* self, int64_t worker) {
    const Rows& r = *static_cast<Rows*>(self);
    const int64_t begin = worker * r.p.n / r.workers, end = (worker + 1) * r.p.n / r.workers;
    int64_t stride = 0;
    cost_rows<Real, Real>(r.p, r.points, begin, end - begin, 0, r.p.m, r.arrays.kept + begin * r.arrays.m, &stride);
  }, &rows);
  SinkhornProblem<Real> q = p;
  q.metric = SinkhornMetric::kGiven, q.type = ElementType::kFloat32, q.cost = arrays.kept, q.cost_stride = arrays.m;
  return q;
}

// f(T{}), T what the costs of `p` are stored as.
template <class Real, class F>
inline void with_cost_type(const SinkhornProblem<Real>& p, const F& f) {
  const bool given = p.metric == SinkhornMetric::kGiven && sizeof(Real) == 4;
  if (given && p.type == ElementType::kBFloat16) {
    if constexpr (sizeof(Real) == 4) f(BFloat16{});
  } else if (given && p.type == ElementType::kFloat16) {
    if constexpr (sizeof(Real) == 4) f(Half{});
  } else {
    f(Real{});
  }
}

}  // namespace
